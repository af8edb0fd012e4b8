"""Norm, rotation and cache write in one: against float64, and to the bit against `quantize_kv`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.paged_attention import paged_attention
from optimizer.backends.kernels.rope_kv_write import _rope_kv_write_cuda, rope_kv_write, rope_kv_write_ref
from optimizer.errors import UsageError
from optimizer.quant.kv import quantize_kv

pytest.importorskip("triton")


def compiled(*args: Any) -> Tensor:
    """The op on a CPU, in C++."""
    if not cpu_kernels().loaded:
        pytest.skip(f"no compiled kernels: {cpu_kernels().reason}")
    return rope_kv_write(*args)  # type: ignore[no-any-return]


ALL = pytest.mark.parametrize(
    "op", [rope_kv_write_ref, _rope_kv_write_cuda, compiled], ids=["reference", "kernel", "compiled"]
)
KINDS = pytest.mark.parametrize("kind", ["", "int8", "fp8"])
EPS = 1e-6
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class Case:
    """The operands of the op, by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    offset: float
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    slots: Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def written(self, cache: Tensor, scale: Tensor | None) -> Tensor:
        """What was written for each token, `[B, H_kv, S, D]`, in float64."""
        wide = cache.double() if scale is None else cache.double() * scale.double().unsqueeze(-1)
        size = cache.shape[2]
        return torch.stack([torch.stack([wide[s // size, :, s % size] for s in row], 1) for row in self.slots.tolist()])


def case(
    *,
    heads: tuple[int, int] = (5, 2),
    head: int = 24,
    rotary: int = 8,
    tokens: int = 3,
    batch: int = 2,
    norm: bool = False,
    offset: float = 0.0,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Random operands, views of one fused projection, and caches filled with 7 in blocks of 4 slots."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, tokens, heads[0] + 2 * heads[1], head, generator=generator).to(dtype)
    q, k, v = fused.to(device).transpose(1, 2).split([heads[0], heads[1], heads[1]], 1)
    angle = torch.rand(batch, tokens, rotary // 2, generator=generator) * 100
    angle = torch.cat([angle, angle], -1).to(device)
    weights = [(torch.rand(head, generator=generator) + 0.5).to(device, dtype) if norm else None for _ in range(2)]
    blocks = batch * tokens // 4 + 3
    cache = torch.full((blocks, heads[1], 4, head), 7.0).to(TYPES.get(kind, dtype)).to(device)
    scale = torch.full((blocks, heads[1], 4), 7.0, device=device) if kind else None
    scales = [None if scale is None else scale.clone() for _ in range(2)]
    slots = torch.randperm(blocks * 4, generator=generator)[: batch * tokens].view(batch, tokens).to(device)
    return Case(
        q, k, v, angle.cos().to(dtype), angle.sin().to(dtype), *weights, EPS, offset, cache,
        cache.clone(), *scales, slots,
    )  # fmt: skip


def exact(x: Tensor, weight: Tensor | None, offset: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and rotation in float64, and their error in float32.

    The norm sums D squares and has seven more operations: (D + 7) u relatively. The rotation adds 3 u.
    """
    size, relative = cos.shape[-1], 3.0
    x, cos, sin = x.double(), cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    if weight is not None:
        relative += x.shape[-1] + 7
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)
    half = size // 2
    turned = torch.complex(x[..., :half], x[..., half:size]) * torch.complex(cos[..., :half], sin[..., :half])
    result = torch.cat([turned.real, turned.imag, x[..., size:]], -1)
    sizes = x[..., :half].abs() + x[..., half:size].abs()
    return result, relative * 2.0**-24 * torch.cat([sizes, sizes, x[..., size:].abs()], -1)


def rounding(wanted: Tensor, error: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The error of a value that was off by `error` and is then rounded once, to `dtype` or as the 8-bit cache does."""
    float32 = torch.finfo(torch.float32)
    largest = (wanted.abs() + error).amax(-1, keepdim=True)
    if kind == "int8":  # half a step, of which the largest has 127, and the divisions' own rounding
        return error + largest / 127 * 0.5 + 4 * float32.eps * largest
    if kind == "fp8":  # 3 bits of mantissa: half of 2⁻³ relatively, or half of the smallest step 2⁻⁹
        return error + torch.maximum((wanted.abs() + error) / 16, largest / 448 * 2.0**-10) + 4 * float32.eps * largest
    info = torch.finfo(dtype)
    return error + info.eps / 2 * (wanted.abs() + error) + info.smallest_normal * info.eps


def check(one: Case, got: Tensor, kind: str) -> None:
    dtype = one.q.dtype
    wanted, error = exact(one.q, one.q_weight, one.offset, one.cos, one.sin)
    assert (got.shape, got.dtype, got.is_contiguous()) == (one.q.shape, dtype, True)
    assert bool(((got.double() - wanted).abs() <= rounding(wanted, error, "", dtype)).all())
    wanted, error = exact(one.k, one.k_weight, one.offset, one.cos, one.sin)
    keys = one.written(one.k_cache, one.k_scale)
    assert bool(((keys - wanted).abs() <= rounding(wanted, error, kind, dtype)).all())
    values = one.written(one.v_cache, one.v_scale)
    if kind:
        q, scale = quantize_kv(one.v, kind)  # type: ignore[arg-type]
        assert torch.equal(values, q.double() * scale.double())
    else:
        assert torch.equal(values, one.v.double())


@KINDS
@pytest.mark.parametrize(
    "shape",
    [
        {"dtype": torch.bfloat16},
        {"norm": True, "offset": 1.0},
        {"norm": True, "head": 64, "rotary": 64, "heads": (4, 1), "tokens": 1, "dtype": torch.float16},
        {"norm": True, "head": 10, "rotary": 10, "heads": (19, 18), "batch": 1, "dtype": torch.bfloat16},
    ],
    ids=["partial", "partial, norms", "one token", "ragged"],
)
@ALL
def test_equals_float64(op: Any, shape: dict[str, Any], kind: str) -> None:
    one = case(**shape, kind=kind)
    check(one, op(*one.args), kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@ALL
def test_eight_bits_are_those_of_quantize_kv(op: Any, dtype: torch.dtype, kind: str) -> None:
    """Of what the op computes, which a float32 cache shows: no other rounding comes between."""
    one, wide = case(kind=kind, dtype=dtype, norm=True), case(dtype=dtype, norm=True)
    for each in (one, wide):
        each.v[0, 0, 0] *= 1e-43 if dtype == torch.float32 else 1e-7  # scales that are subnormal, or vanish
        each.v[0, 1, 0] = 0
        each.v[0, 0, 1] *= 1e37 if dtype == torch.float32 else 1e3
    wide.k_cache, wide.v_cache = wide.k_cache.float(), wide.v_cache.float()
    assert torch.equal(op(*one.args), op(*wide.args))
    for x, cache, scale in (
        (wide.k_cache, one.k_cache, one.k_scale),
        (wide.v_cache, one.v_cache, one.v_scale),
    ):
        q, wanted_scale = quantize_kv(x, kind)  # type: ignore[arg-type]
        assert scale is not None
        for slot in one.slots.flatten().tolist():
            at = slot // 4, slice(None), slot % 4
            assert torch.equal(cache.view(torch.uint8)[at], q.view(torch.uint8)[at])
            assert torch.equal(scale[at], wanted_scale[*at, 0])


@KINDS
@ALL
def test_only_the_slots_given_are_written(op: Any, kind: str) -> None:
    one = case(kind=kind)
    slots = one.slots.clone()
    one.slots[0, 1], one.slots[1, 0] = -1, 20  # the cache has 4 blocks of 4
    one.slots[1, 2] = -(2**62)
    written = torch.zeros(16, dtype=torch.bool)
    written[[int(slots[0, 0]), int(slots[0, 2]), int(slots[1, 1])]] = True
    got = op(*one.args)
    for cache in (one.k_cache, one.v_cache):
        assert bool((cache.float().transpose(1, 2).flatten(0, 1)[~written] == 7).all())
        assert bool((cache.float().transpose(1, 2).flatten(0, 1)[written] != 7).flatten(1).any(1).all())
    for scale in (one.k_scale, one.v_scale):
        if scale is not None:
            assert bool((scale.transpose(1, 2).flatten(0, 1)[~written] == 7).all())
    one.slots = slots
    assert torch.equal(got, op(*one.args))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernel, reports inf / inf
@pytest.mark.parametrize("value", [math.nan, math.inf])
@KINDS
@ALL
def test_what_is_not_finite_spoils_its_own_head(op: Any, kind: str, value: float) -> None:
    clean, one = case(kind=kind, norm=True), case(kind=kind, norm=True)
    for x in (one.q, one.k, one.v):
        x[1, 1, 2, 9] = value  # not rotated
    wanted, got = op(*clean.args), op(*one.args)
    hit = torch.zeros(2, 5, 3, dtype=torch.bool)
    hit[1, 1, 2] = True
    assert torch.equal(got[~hit], wanted[~hit])
    assert not got[hit].isfinite().all()
    for cache, scale, old, old_scale in (
        (one.k_cache, one.k_scale, clean.k_cache, clean.k_scale),
        (one.v_cache, one.v_scale, clean.v_cache, clean.v_scale),
    ):
        new, before = one.written(cache, scale), clean.written(old, old_scale)
        assert torch.equal(new[~hit[:, :2]], before[~hit[:, :2]])
        assert new[hit[:, :2]].isnan().all() if kind else not new[hit[:, :2]].isfinite().all()


@ALL
def test_strides_and_one_table_for_all(op: Any) -> None:
    one, other = case(kind="int8"), case(kind="int8")
    one.cos, one.sin = one.cos[:1], one.sin[:1]
    other.cos, other.sin = (t[:1].expand(2, -1, -1).mT.contiguous().mT for t in (one.cos, one.sin))
    other.q, other.k = other.q.mT.contiguous().mT, other.k.contiguous()
    other.k_cache = other.k_cache.transpose(0, 2).contiguous().transpose(0, 2)
    assert other.k_scale is not None
    other.k_scale = other.k_scale.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(op(*one.args), op(*other.args))
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@ALL
def test_a_contiguous_cache_read_by_attention(op: Any) -> None:
    one = case(heads=(6, 2), tokens=1, norm=True)
    one.k_cache, one.v_cache = torch.randn(2, 2, 9, 24), torch.randn(2, 2, 9, 24)
    position = torch.tensor([4, 8])
    one.slots = (torch.arange(2) * 9 + position)[:, None]
    q = op(*one.args)
    check(one, q, "")
    table, lengths = torch.arange(2, dtype=torch.int32)[:, None], (position + 1).int()
    # With a window of one, attention returns the value of the new token.
    got = paged_attention(q[:, :, 0], one.k_cache, one.v_cache, None, None, table, lengths, 0.2, 0.0, 1, 0, *[None] * 6)
    assert torch.equal(got, one.v[:, :, 0].repeat_interleave(3, 1))


def test_the_number_of_threads_changes_nothing() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            one = case(heads=(4, 2), head=64, rotary=64, tokens=300, norm=True, kind="fp8", dtype=torch.bfloat16)
            torch.set_num_threads(threads)
            found.append((compiled(*one.args), one))
    finally:
        torch.set_num_threads(before)
    (alone, one), (shared, other) = found
    assert torch.equal(alone, shared)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(getattr(one, name).view(torch.uint8), getattr(other, name).view(torch.uint8))
    check(one, alone, "fp8")


@pytest.mark.parametrize("op", [_rope_kv_write_cuda, compiled], ids=["kernel", "compiled"])
def test_offsets_beyond_32_bits(op: Any) -> None:
    far = 2**31
    one = case(heads=(1, 1), batch=1, tokens=2, kind="int8")
    memory = torch.empty(far + 256, dtype=torch.int8)  # pages that nothing touches take no memory
    one.k_cache = memory.as_strided((2, 1, 4, 24), (far, 96, 24, 1))
    one.v_cache, one.k_scale, one.v_scale = torch.zeros(2, 1, 4, 24, dtype=torch.int8), *torch.zeros(2, 2, 1, 4)
    one.slots = torch.tensor([[7, 0]])
    check(one, op(*one.args), "int8")


@pytest.mark.parametrize("shape", [{"batch": 0}, {"tokens": 0}], ids=str)
@ALL
def test_nothing_to_write(op: Any, shape: dict[str, int]) -> None:
    one = case(**shape, kind="int8")
    assert op(*one.args).shape == one.q.shape
    assert bool((one.k_cache == 7).all())


@ALL
def test_a_cache_without_slots(op: Any) -> None:
    one = case()
    wanted = op(*one.args)
    one.k_cache = one.v_cache = one.k_cache[:0]
    assert torch.equal(op(*one.args), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 2, 3, 8)}, "v must be as k"),
        ({"q_weight": torch.zeros(8)}, "q_weight must be a float \\[24\\]"),
        ({"v_cache": torch.zeros(4, 2, 5, 24)}, "v_cache must be (\\[blocks, 2, block_size, 24\\]|as k_cache)"),
        ({"v_cache": torch.zeros(4, 2, 4, 24).half()}, "of one type|as k_cache"),
        ({"k": torch.zeros(2, 2, 3, 24).half()}, "q and k of one float type"),
        ({"cos": torch.zeros(2, 3, 7), "sin": torch.zeros(2, 3, 7)}, "even R"),
        ({"cos": torch.zeros(3, 3, 8), "sin": torch.zeros(3, 3, 8)}, "\\[B or 1, S, R\\]"),
        ({"k_cache": torch.zeros(4, 2, 4, 48)[..., ::2]}, "contiguous"),
        ({"k_scale": torch.zeros(4, 2, 4)}, "k_scale goes with an 8-bit cache"),
        ({"slots": torch.zeros(2, 3, dtype=torch.int32)}, "slots must be int64"),
        ({"slots": torch.zeros(3, 2, dtype=torch.int64)}, "slots must be int64 \\[2, 3\\]"),
    ],
)
@ALL
def test_wrong_operands_raise(op: Any, change: dict[str, Any], message: str) -> None:
    one = case()
    for name, value in change.items():
        setattr(one, name, value)
    with pytest.raises(RuntimeError if op is compiled else UsageError, match=message):
        op(*one.args)


@ALL
def test_wrong_scales_raise(op: Any) -> None:
    one = case(kind="int8")
    error = RuntimeError if op is compiled else UsageError
    one.v_scale = torch.zeros(4, 2, 3)
    with pytest.raises(error, match="v_scale must be float32 \\[4, 2, 4\\]"):
        op(*one.args)
    one.v_scale = None
    with pytest.raises(error, match="v_scale goes with an 8-bit cache"):
        op(*one.args)


@pytest.mark.parametrize("kind", ["", "int8"])
def test_opcheck(kind: str) -> None:
    cpu_kernels()  # whichever implementation there is
    torch.library.opcheck(rope_kv_write, case(kind=kind, norm=True).args)


@KINDS
def test_compiles_whole_and_writes(kind: str) -> None:
    cpu_kernels()
    one, other = case(kind=kind), case(kind=kind)
    whole = torch.compile(lambda *args: rope_kv_write(*args) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(*one.args), rope_kv_write(*other.args) + 1)
    check(one, rope_kv_write(*other.args), kind)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [{"norm": True}, {"head": 128, "rotary": 128, "heads": (32, 8), "tokens": 100}], ids=str
)
def test_on_a_device(shape: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    one = case(**shape, dtype=dtype, kind=kind, device="cuda")
    check(one, rope_kv_write(*one.args), kind)
