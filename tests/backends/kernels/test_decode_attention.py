"""Single-token attention: the compiled kernel against float64, transformers' own attention, and hostile caches."""

import math

import pytest
import torch

from optimizer.backends.kernels import decode_attention as module
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.decode_attention import (
    _decode_attention_cuda,
    attention_forward,
    decode_attention,
    decode_attention_ref,
    split_count,
)
from optimizer.errors import UsageError
from tests.backends.kernels.attention_cases import assert_within, exact_attention

SHAPES = [(1, 6, 2, 100, 64), (3, 4, 4, 7, 32), (2, 8, 1, 33, 128), (4, 2, 2, 1, 16)]
# Accumulation is in float32 (S + D terms, a few 1e-7 relative); the result is rounded once to its own type.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

ALL = pytest.mark.parametrize(
    "op", [decode_attention, decode_attention_ref, _decode_attention_cuda], ids=["op", "reference", "triton"]
)


def inputs(shape, dtype=torch.float32, seed=0):
    batch, heads, kv_heads, positions, size = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, 1, size, generator=generator).to(dtype)
    k, v = (torch.randn(batch, kv_heads, positions, size, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(batch, 1, 1, positions, generator=generator) < 0.6
    mask[..., -1] = True
    return q, k, v, mask, size**-0.5


def exact(q, k, v, mask, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
def test_equals_float64_attention(op, shape, dtype):
    arguments = inputs(shape, dtype)
    wanted = exact(*arguments)
    assert torch.allclose(op(*arguments).double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_the_kernel_is_compiled_here():
    assert cpu_kernels().loaded, cpu_kernels().reason


@ALL
def test_a_row_that_sees_nothing_is_zero(op):
    q, k, v, mask, scale = inputs(SHAPES[1])
    mask[1] = False
    out = op(q, k, v, mask, scale)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[[0, 2]], op(q[[0, 2]], k[[0, 2]], v[[0, 2]], mask[[0, 2]], scale))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@ALL
def test_hidden_positions_are_not_read(op, poison):
    q, k, v, mask, scale = inputs(SHAPES[0])
    wanted = op(q, k, v, mask, scale)
    hidden = ~mask[:, 0, 0, :, None].unsqueeze(1)
    out = op(q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison), mask, scale)
    assert torch.equal(out, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernel, reports NaN
@ALL
def test_a_visible_nan_reaches_only_the_heads_that_see_it(op):
    q, k, v, mask, scale = inputs(SHAPES[0])
    k[0, 1, -1] = math.nan
    out = op(q, k, v, mask, scale)
    assert out[0, :3].isfinite().all()
    assert out[0, 3:].isnan().all()


@ALL
def test_large_scores_do_not_overflow(op):
    q, k, v, mask, scale = inputs(SHAPES[0])
    arguments = (q * 1e4, k * 1e4, v, mask, scale)
    assert torch.allclose(op(*arguments).double(), exact(*arguments), atol=1e-5)


@ALL
def test_strided_inputs(op):
    q, k, v, mask, scale = inputs(SHAPES[0])
    wanted = op(q, k, v, mask, scale)
    for a, b in [(1, 2), (2, 3)]:
        strided = [t.transpose(a, b).contiguous().transpose(a, b) for t in (q, k, v)]
        assert torch.equal(op(*strided, mask, scale), wanted)


@ALL
def test_one_mask_for_all_rows(op):
    q, k, v, mask, scale = inputs(SHAPES[1])
    shared = mask[:1].expand(3, -1, -1, -1)
    assert torch.equal(op(q, k, v, shared, scale), op(q, k, v, shared.contiguous(), scale))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q[..., :8], k, v, m),
        lambda q, k, v, m: (q, k[:, :1], v, m),
        lambda q, k, v, m: (q[:, :5], k, v, m),
        lambda q, k, v, m: (q, k, v, m[..., :-1]),
        lambda q, k, v, m: (q, k, v, m.float()),
        lambda q, k, v, m: (q, k.bfloat16(), v, m),
        lambda q, k, v, m: (q.expand(-1, -1, 2, -1), k, v, m),
    ],
    ids=["head size", "kv heads", "groups", "mask length", "mask type", "types", "two tokens"],
)
def test_wrong_inputs_raise(change):
    q, k, v, mask, scale = inputs(SHAPES[0])
    with pytest.raises(RuntimeError):
        decode_attention(*change(q, k, v, mask), scale)
    with pytest.raises(UsageError, match="decode_attention"):
        _decode_attention_cuda(*change(q, k, v, mask), scale)


@pytest.mark.parametrize("splits", [1, 2, 9])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_triton_kernel_in_any_number_of_splits(dtype, splits):
    q, k, v, mask, scale = inputs((2, 6, 2, 200, 96), dtype)  # four tiles of 64
    mask[1, ..., 64:] = False
    out = _decode_attention_cuda(q, k, v, mask, scale, splits=splits)
    assert_within(out[:, :, 0], *exact_attention(q[:, :, 0], k, v, mask[:, 0, 0], scale))
    assert torch.equal(out, _decode_attention_cuda(q, k, v, mask, scale, splits=splits))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernel, reports the infinities
@pytest.mark.parametrize("splits", [1, 3])
def test_the_triton_kernel_where_every_visible_score_is_minus_infinity(splits):
    q, k, v, mask, scale = inputs((2, 2, 1, 150, 64))
    q.fill_(1.0)
    mask[1, ..., :-1] = False
    k[0, :, 3], k[1, :, -1] = -math.inf, -math.inf
    out = _decode_attention_cuda(q, k, v, mask, scale, splits=splits)
    assert torch.allclose(out[0], decode_attention_ref(q, k, v, mask, scale)[0], atol=1e-5)
    assert out[1].isnan().all()


def test_the_triton_kernel_with_nothing_to_see():
    q, k, v, mask, scale = inputs(SHAPES[1])
    assert torch.equal(_decode_attention_cuda(q, k[:, :, :0], v[:, :, :0], mask[..., :0], scale), torch.zeros_like(q))
    assert _decode_attention_cuda(q[:0], k[:0], v[:0], mask[:0], scale).shape == (0, 4, 1, 32)


def test_splits_fill_the_device_and_never_exceed_the_tiles():
    cpu = torch.device("cpu")  # counted as four processors, two programs each
    assert [split_count(programs, 100, cpu) for programs in (1, 2, 3, 8, 9, 1000)] == [8, 4, 2, 1, 1, 1]
    assert [split_count(1, tiles, cpu) for tiles in (1, 3, 100)] == [1, 3, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 8, 5000, 128)], ids=str)
def test_the_op_on_a_device(shape, dtype):
    q, k, v, mask, scale = inputs(shape, dtype)
    weights = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    wanted = exact_attention(q[:, :, 0], k, v, mask[:, 0, 0], scale, weights)
    out = decode_attention(*(t.cuda() for t in (q, k, v, mask)), scale)
    assert_within(out[:, :, 0].cpu(), *wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(decode_attention, inputs(SHAPES[0], dtype))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_the_attention_interface_equals_sdpa(kind):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v, mask, scale = inputs(SHAPES[0])
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    ours, _ = attention_forward(layer, q, k, v, mask, scaling=scale)
    theirs, _ = sdpa_attention_forward(layer, q, k, v, mask, scaling=scale)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_what_the_kernel_cannot_do_goes_to_sdpa(monkeypatch):
    def never(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(module, "decode_attention", never)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    q, k, v, mask, scale = inputs(SHAPES[0])
    prompt = torch.randn(1, 6, 5, 64)
    attention_forward(layer, prompt, k[:, :, :5], v[:, :, :5], None, scaling=scale)  # several tokens
    attention_forward(layer, q, k, v, None, scaling=scale)  # no mask
    attention_forward(layer, q[..., :24], k[..., :24], v[..., :24], mask, scaling=scale)  # an odd head size
