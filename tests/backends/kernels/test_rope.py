"""Rotary embedding: reference and kernel against complex multiplication in float64, and transformers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.rope import _rope_cuda, rope, rope_ref
from optimizer.errors import UsageError

pytest.importorskip("triton")
BOTH = pytest.mark.parametrize("op", [rope_ref, _rope_cuda], ids=["reference", "kernel"])
# batch, heads, KV heads, tokens, head size, rotated size
SHAPES = [(1, 4, 2, 3, 64, 64), (2, 9, 1, 2, 24, 8), (3, 1, 1, 1, 10, 6), (1, 33, 5, 1, 16, 16), (2, 3, 3, 2, 128, 2)]


def operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, tables: int | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as views of the projections' output, and the tables of `tables` sequences (all unless told)."""
    batch, heads, kv_heads, tokens, head, rotary = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(batch, tokens, n * head, generator=generator).to(dtype).view(batch, tokens, n, head).transpose(1, 2)
        for n in (heads, kv_heads)
    )
    angle = torch.rand(tables or batch, tokens, rotary // 2, generator=generator) * 100
    angle = torch.cat([angle, angle], -1)
    return tuple(t.to(device) for t in (q, k, angle.cos().to(dtype), angle.sin().to(dtype)))  # type: ignore[return-value]


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation in float64, and its error: two products and a sum in float32, rounded once to the type of x."""
    rotary = cos.shape[-1]
    half = rotary // 2
    x = x.double()
    turn = torch.complex(cos[..., :half].double(), sin[..., :half].double()).unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * turn
    result = torch.cat([turned.real, turned.imag, x[..., rotary:]], -1)
    size = x[..., :half].abs() + x[..., half:rotary].abs()
    return result, 3 * 2.0**-24 * torch.cat([size, size, torch.zeros_like(x[..., rotary:])], -1)


def check(got: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    wanted, error = exact(x, cos, sin)
    kind = torch.finfo(x.dtype)
    error = error + kind.eps / 2 * (wanted.abs() + error) + kind.smallest_normal * kind.eps
    assert (got.shape, got.dtype, got.is_contiguous()) == (x.shape, x.dtype, True)
    assert bool(((got.double() - wanted).abs() <= error).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BOTH
def test_equals_complex_multiplication(op: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, cos, sin = operands(shape, dtype)
    for got, x in zip(op(q, k, cos, sin), (q, k), strict=True):
        check(got, x, cos, sin)


@BOTH
def test_equals_transformers(op: Any) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = operands(SHAPES[0])
    for got, wanted in zip(op(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(got, wanted)


def test_the_kernel_equals_the_reference_where_the_halves_of_the_tables_differ() -> None:
    q, k, cos, sin = operands(SHAPES[1])
    cos, sin = cos * torch.arange(8), sin + torch.arange(8)
    for got, wanted in zip(_rope_cuda(q, k, cos, sin), rope_ref(q, k, cos, sin), strict=True):
        assert torch.equal(got, wanted)


@BOTH
def test_one_table_and_other_strides_serve_every_sequence(op: Any) -> None:
    q, k, cos, sin = operands((2, 9, 1, 2, 24, 8), tables=1)
    cos = cos.transpose(1, 2).contiguous().transpose(1, 2)
    same = (q.contiguous(), k.contiguous(), *(t.expand(2, -1, -1).contiguous() for t in (cos, sin)))
    for got, wanted in zip(op(q.mT.contiguous().mT, k, cos, sin), op(*same), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernel, reports inf · 0
@pytest.mark.parametrize("value", [math.nan, math.inf])
@BOTH
def test_what_is_not_finite_stays_in_its_pair(op: Any, value: float) -> None:
    q, k, cos, sin = operands(SHAPES[1])
    clean, _ = op(q, k, cos, sin)
    q[1, 3, 1, 2] = value  # paired with element 6
    q[1, 3, 1, 20] = value  # not rotated
    got, _ = op(q, k, cos, sin)
    hit = torch.zeros(got.shape, dtype=torch.bool)
    hit[1, 3, 1, [2, 6, 20]] = True
    assert torch.equal(got[~hit], clean[~hit])
    assert not got[hit].isfinite().any()


def test_offsets_beyond_32_bits() -> None:
    far = 2**30
    memory = torch.empty(4 * far, dtype=torch.float16)  # pages that nothing touches take no memory
    q = memory.as_strided((2, 1, 2, 16), (3 * far, 16, far - 16, 1))
    _, k, cos, sin = operands((2, 1, 1, 2, 16, 16))
    q.copy_(k)
    check(_rope_cuda(q, k.half(), cos, sin)[0], q, cos, sin)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 64, 64), (2, 4, 2, 0, 64, 64)], ids=["no sequence", "no token"])
@BOTH
def test_nothing_to_rotate(op: Any, shape: tuple[int, ...]) -> None:
    q, k, cos, sin = operands(shape)
    got = op(q, k, cos[:1], sin[:1]) if shape[0] else op(q, k, torch.zeros(1, 3, 64), torch.zeros(1, 3, 64))
    assert [t.shape for t in got] == [q.shape, k.shape]


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, c, s: (q[:, :, :1], k, c, s),
        lambda q, k, c, s: (q, k, c[:, :1], s[:, :1]),
        lambda q, k, c, s: (q, k, c, s[..., :4]),
        lambda q, k, c, s: (q, k, c[..., :3], s[..., :3]),
        lambda q, k, c, s: (q, k, c.repeat(1, 1, 4), s.repeat(1, 1, 4)),
        lambda q, k, c, s: (q, k.half(), c, s),
        lambda q, k, c, s: (q, k, c.double(), s),
        lambda q, k, c, s: (q, k, c.repeat(2, 1, 1), s.repeat(2, 1, 1)),
    ],
    ids=["tokens of q", "tokens of cos", "sin", "odd", "too many", "types", "float64", "sequences"],
)
@BOTH
def test_wrong_operands_raise(op: Any, change: Any) -> None:
    with pytest.raises(UsageError, match="rope"):
        op(*change(*operands(SHAPES[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(rope, operands(SHAPES[1], dtype))


def test_compiles_whole() -> None:
    arguments = operands(SHAPES[1])
    compiled = torch.compile(lambda *args: rope(*args)[0] + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), rope(*arguments)[0] + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 8, 300, 128, 128)], ids=str)
def test_on_a_device(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, cos, sin = operands(shape, dtype, device="cuda")
    for got, x in zip(rope(q, k, cos, sin), (q, k), strict=True):
        check(got, x, cos, sin)
