"""Keys and values written to a cache in blocks: in their own type exactly, to 8 bits as `quantize_kv`, to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.kv_write import _kv_write_cuda, kv_write, kv_write_ref
from optimizer.backends.kernels.paged_attention import paged_attention
from optimizer.errors import UsageError
from optimizer.quant.kv import quantize_kv

pytest.importorskip("triton")


def compiled(*args: Any) -> None:
    """The op on a CPU, in C++."""
    if not cpu_kernels().loaded:
        pytest.skip(f"no compiled kernels: {cpu_kernels().reason}")
    kv_write(*args)


ALL = pytest.mark.parametrize("op", [kv_write_ref, _kv_write_cuda, compiled], ids=["reference", "kernel", "compiled"])
KINDS = pytest.mark.parametrize("kind", ["", "int8", "fp8"])
# The interpreter computes with NumPy, which reports what a NaN or an infinity does.
NOT_FINITE = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class Case:
    """The operands of the op, by name."""

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    slots: Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    @property
    def sides(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        return [(self.k, self.k_cache, self.k_scale), (self.v, self.v_cache, self.v_scale)]

    def check(self, kind: str) -> None:
        """Every slot holds its token, and every other slot still holds sevens."""
        for x, cache, scale in self.sides:
            blocks, _, size, _ = cache.shape
            q, wanted_scale = quantize_kv(x, kind) if kind else (x, None)  # type: ignore[arg-type]
            wanted = torch.full(cache.shape, 7.0).to(cache)
            scales = torch.full(cache.shape[:3], 7.0).to(cache.device)
            for b, row in enumerate(self.slots.tolist()):
                for s, slot in enumerate(row):
                    if 0 <= slot < blocks * size:
                        as_bytes(wanted)[slot // size, :, slot % size] = as_bytes(q)[b, :, s]
                        if wanted_scale is not None:
                            scales[slot // size, :, slot % size] = wanted_scale[b, :, s, 0]
            assert torch.equal(as_bytes(cache), as_bytes(wanted))
            assert scale is None or torch.equal(scale.nan_to_num(nan=-1.0), scales.nan_to_num(nan=-1.0))


def as_bytes(x: Tensor) -> Tensor:
    """What is stored: NaN is equal to NaN, and 0 is not -0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def case(
    *,
    heads: int = 3,
    head: int = 24,
    tokens: int = 3,
    batch: int = 2,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Random operands, views of one fused projection, and caches filled with 7 in blocks of 4 slots."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, tokens, 2 * heads, head, generator=generator).to(device, dtype)
    k, v = fused.transpose(1, 2).chunk(2, 1)
    blocks = batch * tokens // 4 + 3
    cache = torch.full((blocks, heads, 4, head), 7.0).to(TYPES.get(kind, dtype)).to(device)
    scale = torch.full((blocks, heads, 4), 7.0, device=device) if kind else None
    scales = [None if scale is None else scale.clone() for _ in range(2)]
    slots = torch.randperm(blocks * 4, generator=generator)[: batch * tokens].view(batch, tokens).to(device)
    return Case(k, v, cache, cache.clone(), *scales, slots)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [{}, {"head": 64, "heads": 8, "tokens": 1}, {"head": 33, "heads": 19, "batch": 1}, {"head": 1}, {"head": 128}],
    ids=str,
)
@ALL
def test_equals_quantize_kv(op: Any, shape: dict[str, int], dtype: torch.dtype, kind: str) -> None:
    one = case(**shape, dtype=dtype, kind=kind)
    op(*one.args)
    one.check(kind)


@KINDS
@ALL
def test_scales_of_any_size(op: Any, kind: str) -> None:
    one = case(kind=kind, tokens=5)
    one.v[0, 0, 0] *= 1e-43  # scales that are subnormal, or vanish
    one.v[0, 1, 0], one.k[1, 1, 0] = 0.0, -0.0
    one.v[0, 0, 1] *= 1e37
    one.k[0, 0, 2] *= 1e-37
    op(*one.args)
    one.check(kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@ALL
def test_ties_are_rounded_to_even(op: Any, kind: str) -> None:
    """Halves of every step there is: with the largest value of the type in each head, the scale is 1."""
    every = torch.arange(256, dtype=torch.uint8).view(TYPES[kind]).float().nan_to_num(nan=0.0)
    every = every.clamp(min=-127) if kind == "int8" else every
    values = every.sort().values.unique()
    ties = (values[1:] + values[:-1]) / 2
    one = case(kind=kind, heads=1, head=ties.numel() + 1, tokens=1, batch=1)
    one.k = one.v = torch.cat([ties, values[-1:]]).view(1, 1, 1, -1)
    op(*one.args)
    assert one.k_scale is not None
    assert one.k_scale.flatten()[one.slots.item()] == 1
    one.check(kind)


@KINDS
@ALL
def test_only_the_slots_given_are_written(op: Any, kind: str) -> None:
    one = case(kind=kind)
    one.slots[0, 1], one.slots[1, 0] = -1, 16  # the cache has 4 blocks of 4
    one.slots[1, 2] = -(2**62)
    op(*one.args)
    one.check(kind)


@NOT_FINITE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@KINDS
@ALL
def test_what_is_not_finite_spoils_its_own_head(op: Any, kind: str, value: float) -> None:
    one = case(kind=kind)
    for x in (one.k, one.v):
        x[1, 1, 2, 23] = value
    op(*one.args)
    one.check(kind)
    slot = int(one.slots[1, 2])
    for _, cache, scale in one.sides:
        wide = cache.float() if scale is None else cache.float() * scale.unsqueeze(-1)
        hit = wide[slot // 4, 1, slot % 4]
        assert hit.isnan().all() if kind else not hit.isfinite().all()


@ALL
def test_strided_operands(op: Any) -> None:
    one, other = case(kind="int8", dtype=torch.bfloat16), case(kind="int8", dtype=torch.bfloat16)
    other.k, other.v = other.k.mT.contiguous().mT, other.v.contiguous()
    other.k_cache = other.k_cache.transpose(0, 2).contiguous().transpose(0, 2)
    other.v_cache = torch.full((4, 3, 4, 40), 7, dtype=torch.int8)[..., 8:32]
    assert other.k_scale is not None
    other.k_scale = other.k_scale.transpose(0, 1).contiguous().transpose(0, 1)
    other.slots = other.slots.t().contiguous().t()
    op(*one.args)
    op(*other.args)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_threads_share_a_long_prompt() -> None:
    one = case(tokens=400, batch=2, heads=2, head=64, kind="fp8")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        compiled(*one.args)
    finally:
        torch.set_num_threads(before)
    one.check("fp8")


@ALL
def test_a_contiguous_cache_read_by_attention(op: Any) -> None:
    one = case(tokens=1)
    one.k_cache, one.v_cache = torch.randn(2, 3, 9, 24), torch.randn(2, 3, 9, 24)
    position = torch.tensor([4, 8])
    one.slots = (torch.arange(2) * 9 + position)[:, None]
    op(*one.args)
    table, lengths = torch.arange(2, dtype=torch.int32)[:, None], (position + 1).int()
    # With a window of one, attention returns the value of the new token.
    got = paged_attention(
        one.k[:, :, 0], one.k_cache, one.v_cache, None, None, table, lengths, 0.2, 0.0, 1, 0, *[None] * 6
    )
    assert torch.equal(got, one.v[:, :, 0])


@pytest.mark.parametrize("op", [_kv_write_cuda, compiled], ids=["kernel", "compiled"])
def test_offsets_beyond_32_bits(op: Any) -> None:
    far = 2**31
    one = case(heads=1, batch=1, tokens=2, kind="int8")
    memory = torch.empty(far + 256, dtype=torch.int8)  # pages that nothing touches take no memory
    one.k_cache = memory.as_strided((2, 1, 4, 24), (far, 96, 24, 1))
    one.k_cache.fill_(7)
    one.v_cache = torch.full((2, 1, 4, 24), 7, dtype=torch.int8)
    one.k_scale, one.v_scale = torch.full((2, 2, 1, 4), 7.0)
    one.slots = torch.tensor([[7, 0]])
    op(*one.args)
    one.check("int8")


@pytest.mark.parametrize("shape", [{"batch": 0}, {"tokens": 0}], ids=str)
@KINDS
@ALL
def test_nothing_to_write(op: Any, shape: dict[str, int], kind: str) -> None:
    one = case(**shape, kind=kind)
    op(*one.args)
    one.check(kind)


@ALL
def test_a_cache_without_slots(op: Any) -> None:
    for cache in (torch.zeros(0, 3, 4, 24), torch.zeros(4, 3, 0, 24)):
        one = case()
        one.k_cache = one.v_cache = cache
        op(*one.args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 3, 24), "v": torch.zeros(2, 3, 24)},
            "k (must be )?\\[B, H_kv, S, D\\]",
        ),
        ({"k": torch.zeros(2, 3, 3, 24).double(), "v": torch.zeros(2, 3, 3, 24).double()}, "Double|float64"),
        ({"v": torch.zeros(2, 3, 3, 8)}, "v must be as k"),
        ({"v": torch.zeros(2, 3, 3, 24).half()}, "v must be as k"),
        ({"k_cache": torch.zeros(4, 2, 4, 24)}, "k_cache must be \\[blocks, 3, block_size, 24\\]"),
        ({"v_cache": torch.zeros(5, 3, 4, 24)}, "v_cache must be"),
        ({"v_cache": torch.zeros(4, 3, 4, 24).half()}, "v_cache must be"),
        ({"k_cache": torch.zeros(4, 3, 4, 24).half(), "v_cache": torch.zeros(4, 3, 4, 24).half()}, "cache"),
        ({"k_cache": torch.zeros(4, 3, 4, 48)[..., ::2]}, "contiguous"),
        ({"k_scale": torch.zeros(4, 3, 4)}, "k_scale goes with an 8-bit cache"),
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
    error = RuntimeError if op is compiled else UsageError
    for wrong in (torch.zeros(4, 3, 3), torch.zeros(4, 3, 4).double(), torch.zeros(4, 3, 8)[..., ::2]):
        one = case(kind="int8")
        one.v_scale = wrong
        with pytest.raises(error, match="v_scale must be float32 \\[4, 3, 4\\]"):
            op(*one.args)
    one.v_scale = None
    with pytest.raises(error, match="v_scale goes with an 8-bit cache"):
        op(*one.args)


@pytest.mark.parametrize("kind", ["", "int8"])
def test_opcheck(kind: str) -> None:
    cpu_kernels()  # whichever implementation there is
    torch.library.opcheck(kv_write, case(kind=kind).args)


@KINDS
def test_compiles_whole_and_writes(kind: str) -> None:
    cpu_kernels()
    one = case(kind=kind)

    def step(k: Tensor, *rest: Any) -> Tensor:
        kv_write(k, *rest)
        return k + 1

    whole = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(*one.args), one.k + 1)
    one.check(kind)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"head": 128, "heads": 8, "tokens": 100}], ids=str)
def test_on_a_device(shape: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    one = case(**shape, dtype=dtype, kind=kind, device="cuda")
    kv_write(*one.args)
    one.check(kind)
