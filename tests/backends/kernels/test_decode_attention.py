"""Single-token attention: the compiled kernel against float64, transformers' own attention, and hostile caches."""

import math

import pytest
import torch

from optimizer.backends.kernels import decode_attention as module
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.decode_attention import attention_forward, decode_attention, decode_attention_ref

SHAPES = [(1, 6, 2, 100, 64), (3, 4, 4, 7, 32), (2, 8, 1, 33, 128), (4, 2, 2, 1, 16)]
# Accumulation is in float32 (S + D terms, a few 1e-7 relative); the result is rounded once to its own type.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


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
@pytest.mark.parametrize("op", [decode_attention, decode_attention_ref], ids=["op", "reference"])
def test_equals_float64_attention(op, shape, dtype):
    arguments = inputs(shape, dtype)
    wanted = exact(*arguments)
    assert torch.allclose(op(*arguments).double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_the_kernel_is_compiled_here():
    assert cpu_kernels().loaded, cpu_kernels().reason


def test_a_row_that_sees_nothing_is_zero():
    q, k, v, mask, scale = inputs(SHAPES[1])
    mask[1] = False
    out = decode_attention(q, k, v, mask, scale)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[[0, 2]], decode_attention(q[[0, 2]], k[[0, 2]], v[[0, 2]], mask[[0, 2]], scale))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", [decode_attention, decode_attention_ref], ids=["op", "reference"])
def test_hidden_positions_are_not_read(op, poison):
    q, k, v, mask, scale = inputs(SHAPES[0])
    wanted = op(q, k, v, mask, scale)
    hidden = ~mask[:, 0, 0, :, None].unsqueeze(1)
    out = op(q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison), mask, scale)
    assert torch.equal(out, wanted)


def test_a_visible_nan_reaches_only_the_heads_that_see_it():
    q, k, v, mask, scale = inputs(SHAPES[0])
    k[0, 1, -1] = math.nan
    out = decode_attention(q, k, v, mask, scale)
    assert out[0, :3].isfinite().all()
    assert out[0, 3:].isnan().all()


def test_large_scores_do_not_overflow():
    q, k, v, mask, scale = inputs(SHAPES[0])
    arguments = (q * 1e4, k * 1e4, v, mask, scale)
    assert torch.allclose(decode_attention(*arguments).double(), exact(*arguments), atol=1e-5)


def test_strided_inputs():
    q, k, v, mask, scale = inputs(SHAPES[0])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(decode_attention(*strided, mask, scale), decode_attention(q, k, v, mask, scale))


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
