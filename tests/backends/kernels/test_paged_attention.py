"""Attention over a cache in blocks: reference and kernels against float64 over what the cache stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.paged_attention import _paged_attention_cuda, paged_attention, paged_attention_ref
from optimizer.errors import UsageError
from optimizer.quant.kv import quantize_kv
from tests.backends.kernels.attention_cases import assert_within, exact_attention

pytest.importorskip("triton")


def compiled(*args: Any) -> Tensor:
    """The op on a CPU, in C++."""
    if not cpu_kernels().loaded:
        pytest.skip(f"no compiled kernels: {cpu_kernels().reason}")
    return paged_attention(*args)  # type: ignore[no-any-return]


ALL = pytest.mark.parametrize(
    "op", [paged_attention_ref, _paged_attention_cuda, compiled], ids=["reference", "kernel", "compiled"]
)
PIECE = 256  # positions that the compiled kernel takes at a time
# The interpreter computes with NumPy, which reports what a NaN or an infinity does.
NOT_FINITE = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass
class Case:
    """The operands of the op, by name."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_table: Tensor
    lengths: Tensor
    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: int = 0
    recent_k: Tensor | None = None
    recent_v: Tensor | None = None
    rings: Tensor | None = None
    starts: Tensor | None = None
    roots: Tensor | None = None
    trees: Tensor | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def seen(self) -> Tensor:
        position = torch.arange(self.block_table.shape[1] * self.k_cache.shape[2], device=self.q.device)
        length = self.lengths[:, None]
        recent = position >= length - self.window if self.window else torch.ones_like(length, dtype=torch.bool)
        seen = (position < length) & (recent | (position < self.sinks))
        if self.roots is not None and self.trees is not None:
            for row, root, nodes in zip(seen, self.roots.tolist(), self.trees.tolist(), strict=True):
                row[root:] = False
                row[[root + i for i in range(32) if nodes >> i & 1]] = True
        return seen

    def gathered(self, cache: Tensor, scale: Tensor | None, recent: Tensor | None = None) -> Tensor:
        """`[B, H_kv, S, D]` in float64, position by position."""
        wide = cache.double() if scale is None else cache.double() * scale.double().unsqueeze(-1)
        size = cache.shape[2]

        def at(b: int, row: Tensor, p: int) -> Tensor:
            if recent is not None and self.rings is not None and self.starts is not None and p >= self.starts[b]:
                return recent[self.rings[b].clamp(min=0), :, p % recent.shape[2]].double()
            return wide[row[p // size], :, p % size]

        return torch.stack(
            [
                torch.stack([at(b, row, p) for p in range(len(row) * size)], 1)
                for b, row in enumerate(self.block_table.long())
            ]
        )

    def check(self, got: Tensor, rounded_weights: float = 0.0) -> None:
        k = self.gathered(self.k_cache, self.k_scale, self.recent_k)
        v = self.gathered(self.v_cache, self.v_scale, self.recent_v)
        assert got.dtype == self.q.dtype
        assert got.is_contiguous()
        assert_within(got, *exact_attention(self.q, k, v, self.seen(), self.scale, rounded_weights, self.softcap))


def case(
    *,
    heads: tuple[int, int] = (6, 2),
    head: int = 24,
    block_size: int = 20,
    lengths: tuple[int, ...] = (150, 0, 33),
    table: int = 8,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
    window: int = 0,
    sinks: int = 0,
    recent: tuple[int, ...] = (),
    trees: tuple[tuple[int, int], ...] = (),
    device: str = "cpu",
) -> Case:
    """Random operands: each sequence's blocks lie scattered in the cache. The `recent` last of each are in a ring.

    `trees` has the root of each row, and the nodes that it sees, as bits.
    """
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    blocks = batch * table + 1
    q = torch.randn(batch, heads[0], head, generator=generator).to(dtype)
    caches = [torch.randn(blocks, heads[1], block_size, head, generator=generator).to(dtype) for _ in range(2)]
    scales: list[Tensor | None] = [None, None]
    if kind:
        rounded = [quantize_kv(c, kind) for c in caches]  # type: ignore[arg-type]
        caches, scales = [r[0] for r in rounded], [r[1][..., 0].contiguous() for r in rounded]
    order = torch.randperm(blocks, generator=generator)[: batch * table].view(batch, table).int()
    filled = torch.tensor(lengths, dtype=torch.int32)
    rings: list[Tensor | None] = [None] * 4
    if recent:
        size = (batch + 1, heads[1], RING, head)
        rings[:2] = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
        rings[2] = torch.randperm(batch + 1, generator=generator)[:batch].int()
        rings[3] = (filled - torch.tensor(recent)).int()
    tree = [torch.tensor(part, dtype=torch.int32) for part in zip(*trees, strict=True)] if trees else [None, None]
    tensors = [None if t is None else t.to(device) for t in (q, *caches, *scales, order, filled, *rings, *tree)]
    return Case(*tensors[:7], head**-0.5, softcap, window, sinks, *tensors[7:])  # type: ignore[arg-type]


RING = 70


CASES: dict[str, dict[str, Any]] = {
    "small blocks": {},
    "a tile is one block": {"head": 128, "block_size": 64, "table": 3, "lengths": (130, 64)},
    "one block": {"table": 1, "block_size": 300, "lengths": (299, 300, 1), "head": 64},
    "int8": {"kind": "int8"},
    "fp8": {"kind": "fp8"},
    "int8, one block": {"kind": "int8", "table": 1, "block_size": 200, "lengths": (200, 3)},
    "window": {"window": 40, "table": 10, "lengths": (190, 40, 41)},
    "window and sinks": {"window": 10, "sinks": 4, "block_size": 70, "head": 128, "table": 4, "lengths": (280, 12, 5)},
    "sinks past the window": {"window": 30, "sinks": 130, "lengths": (160, 135, 20)},
    "window longer than all": {"window": 1000, "sinks": 1000, "kind": "fp8"},
    "one query head": {"heads": (2, 2), "head": 16},
    "many query heads": {"heads": (17, 1), "head": 16},
    "float16": {"dtype": torch.float16, "kind": "int8"},
    "bfloat16": {"dtype": torch.bfloat16},
    # More recent than there are makes starts negative, 0 recent reads no ring, and a row without tokens sees nothing.
    "recent, int8": {"kind": "int8", "recent": (60, 5, 0)},
    "recent, fp8": {"kind": "fp8", "recent": (1, 0, 70), "lengths": (158, 0, 33)},
    "recent, plain": {"recent": (70, 5, 33)},
    "recent, bfloat16": {"kind": "int8", "recent": (60, 5, 20), "dtype": torch.bfloat16},
    "recent, one block": {"kind": "int8", "table": 1, "block_size": 200, "lengths": (200, 3), "recent": (40, 3)},
    "recent within a window": {"kind": "int8", "recent": (20, 5, 33), "window": 40, "sinks": 4},
    "recent beyond a window": {"kind": "fp8", "recent": (60, 5, 33), "window": 16, "sinks": 5},
    "capped": {"softcap": 0.7},
    "capped, int8": {"kind": "int8", "softcap": 2.0, "window": 60, "dtype": torch.bfloat16},
    "capped, recent": {"kind": "fp8", "softcap": 1.5, "recent": (60, 5, 0)},
    # Rows stand at their length - 1 of a branch; other nodes lie between and behind what they see of it.
    "tree": {"lengths": (152, 3, 40), "trees": ((148, 0b100011001), (0, 0b111), (25, 0))},
    "tree, every bit": {"lengths": (120, 1, 129), "trees": ((96, -1), (0, 1), (128, -1 << 31))},
    "tree, int8": {
        "kind": "int8",
        "lengths": (152, 1, 40),
        "trees": ((148, 0b1001), (0, 1), (36, 0b10011)),
        "dtype": torch.bfloat16,
    },
    "tree in a window": {
        "window": 9,
        "sinks": 3,
        "lengths": (152, 12, 5),
        "trees": ((148, 0b11001), (5, 0b1010000001), (2, 0b1001)),
    },
    "tree behind a window": {"window": 2, "lengths": (149, 30, 5), "trees": ((139, 0b1100000001), (20, 1), (4, 0b101))},
    "tree in rings": {
        "kind": "int8",
        "lengths": (152, 12, 40),
        "trees": ((148, 0b1001), (0, 0b110001), (36, 0b10011)),
        "recent": (50, 12, 16),
    },
    "tree in rings and a window": {
        "kind": "fp8",
        "lengths": (152, 12, 40),
        "window": 20,
        "sinks": 5,
        "trees": ((148, 0b1001), (3, 0b110001), (36, 0b10011)),
        "recent": (50, 9, 16),
    },
    "recent, many heads": {"kind": "int8", "recent": (64, 5, 0), "heads": (17, 1), "head": 16, "window": 65},
}


@pytest.mark.parametrize("name", CASES)
@ALL
def test_equals_float64_attention(op: Any, name: str) -> None:
    one = case(**CASES[name])
    one.check(op(*one.args))


@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [1, 7, 33, 64, 80, 96, 256])
def test_compiled_heads_of_any_size(head: int, dtype: torch.dtype, kind: str) -> None:
    for heads in ((1, 1), (6, 2), (28, 4)):  # seven heads are taken as four, two and one
        one = case(heads=heads, head=head, dtype=dtype, kind=kind)
        one.check(compiled(*one.args))


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 1, 780)},
        {"lengths": (790, 300), "window": 2 * PIECE, "sinks": 7, "kind": "int8"},
        {"lengths": (799, 600), "window": 3, "sinks": PIECE + 20, "kind": "fp8"},
        {"lengths": (799, 600), "kind": "fp8", "recent": (70, 33)},
    ],
    ids=["pieces", "sinks within a piece", "sinks past a piece", "recent"],
)
def test_compiled_pieces_and_threads(shape: dict[str, Any]) -> None:
    """Pieces end anywhere in a block; however many threads share them, they are merged in the same order."""
    one = case(table=40, head=40, **shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 9):  # with nine, pieces are shared out
            torch.set_num_threads(threads)
            results.append(compiled(*one.args))
    finally:
        torch.set_num_threads(before)
    one.check(results[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", ["int8", "window and sinks", "recent, int8"])
def test_any_number_of_splits_gives_the_same(name: str, splits: int) -> None:
    one = case(**CASES[name])
    got = _paged_attention_cuda(*one.args, splits=splits)
    one.check(got)
    assert torch.equal(got, _paged_attention_cuda(*one.args, splits=splits))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("recent")])
@ALL
def test_what_lies_on_the_other_side_is_not_read(op: Any, name: str, poison: float) -> None:
    one = case(**CASES[name])
    wanted = op(*one.args)
    assert one.recent_k is not None
    assert one.recent_v is not None
    assert one.rings is not None
    assert one.starts is not None
    seen, place = one.seen(), torch.arange(one.seen().shape[1])
    ring = torch.zeros(one.recent_k.shape[0], RING, dtype=torch.bool)
    for row, at, start in zip(seen, one.rings.tolist(), one.starts.tolist(), strict=True):
        ring[at, (place[row & (place >= start)]) % RING] = True
    for cache in (one.recent_k, one.recent_v):
        cache.masked_fill_(~ring[:, None, :, None], poison)
    blocks = torch.zeros(one.k_cache.shape[0], one.k_cache.shape[2], dtype=torch.bool)
    for table, row, start in zip(one.block_table.long(), seen, one.starts, strict=True):
        blocks[table] |= (row & (place < start)).view(-1, one.k_cache.shape[2])
    if one.k_scale is not None and one.v_scale is not None:
        for scale in (one.k_scale, one.v_scale):
            scale.masked_fill_(~blocks[:, None], poison)
    assert torch.equal(op(*one.args), wanted)


@NOT_FINITE
@ALL
def test_a_ring_that_is_not_there_or_too_small_makes_its_row_nan(op: Any) -> None:
    one = case(kind="int8", recent=(60, 0, 20))
    wanted = op(*one.args)
    assert one.rings is not None
    assert one.starts is not None
    one.rings[1] = -1  # a row that is empty has none
    assert torch.equal(op(*one.args), wanted)
    for ring in (-1, 4):
        one.rings[2] = ring
        got = op(*one.args)
        assert got[2].isnan().all()
        assert torch.equal(got[:2], wanted[:2])
    one.starts[0] -= 11  # 71 of 70
    assert op(*one.args)[0].isnan().all()


@ALL
def test_wrong_rings_raise(op: Any) -> None:
    error = RuntimeError if op is compiled else UsageError
    for change, message in (
        ({"rings": None}, "go together"),
        ({"recent_k": torch.zeros(4, 2, RING, 24, dtype=torch.int8)}, "recent_k and recent_v must be"),
        ({"recent_v": torch.zeros(4, 2, RING, 8)}, "recent_k and recent_v must be"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, "starts must be int32"),
        ({"rings": torch.zeros(2, dtype=torch.int32)}, "rings must be int32"),
    ):
        one = case(kind="int8", recent=(60, 0, 20))
        for name, value in change.items():
            setattr(one, name, value)
        with pytest.raises(error, match=message):
            op(*one.args)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@ALL
def test_hidden_positions_are_not_read(op: Any, poison: float) -> None:
    one = case(**CASES["window and sinks"])
    wanted = op(*one.args)
    size = one.k_cache.shape[2]
    used = torch.zeros(one.k_cache.shape[0], size, dtype=torch.bool)
    for row, seen in zip(one.block_table.long(), one.seen(), strict=True):
        used[row] |= seen.view(-1, size)
    for cache in (one.k_cache, one.v_cache):
        cache.masked_fill_(~used[:, None, :, None], poison)
    assert torch.equal(op(*one.args), wanted)


@NOT_FINITE
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k_cache", "v_cache", "k_scale", "v_scale"])
@ALL
def test_what_is_not_finite_spoils_the_heads_that_see_it(op: Any, which: str, value: float) -> None:
    one = case(kind="int8" if which.endswith("scale") else "")
    clean = op(*one.args)
    block = int(one.block_table[0, 3])
    getattr(one, which)[block, 1, 5] = value
    if which.endswith("scale"):  # as `quantize_kv` writes it
        getattr(one, which.replace("scale", "cache"))[block, 1, 5] = 0
    got = op(*one.args)
    assert torch.equal(got[1:], clean[1:])
    assert torch.equal(got[0, :3], clean[0, :3])
    assert not got[0, 3:].isfinite().any(-1).all()
    if which != "v_cache" or math.isnan(value):
        assert got[0, 3:].isnan().all()


@pytest.mark.parametrize("op", [paged_attention_ref, compiled], ids=["reference", "compiled"])
def test_every_e4m3_is_decoded(op: Any) -> None:
    """As a value of weight 1 it comes back exactly; NaN, 0x7f and 0xff, is one as a value and as a key."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 1, 256)
    none, scale = torch.zeros(1, 1, 1, 256).to(every.dtype), torch.ones(1, 1, 1)
    place = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 1.0, 0.0, 0, 0, *[None] * 6)
    got = op(torch.zeros(1, 1, 256), none, every, scale, scale, *place)
    assert torch.allclose(got.flatten(), every.float().flatten(), rtol=0, atol=0, equal_nan=True)
    for nan in (0x7F, 0xFF):
        key = none.clone()
        key.view(torch.uint8)[..., 3] = nan
        assert op(torch.ones(1, 1, 256), key, none, scale, scale, *place).isnan().all()


@pytest.mark.parametrize("lost", [range(PIECE), range(PIECE, 2 * PIECE), range(2 * PIECE)], ids=str)
def test_compiled_pieces_whose_scores_are_all_minus_infinity(lost: range) -> None:
    """Their weights are 0, and NaN where there are no others."""
    one = case(lengths=(2 * PIECE,), table=26)
    one.q.fill_(1.0)
    for position in lost:
        one.k_cache[int(one.block_table[0, position // 20]), :, position % 20] = -math.inf
    got = compiled(*one.args)
    if len(lost) == 2 * PIECE:
        assert got.isnan().all()
        assert paged_attention_ref(*one.args).isnan().all()
        return
    seen = one.seen()
    seen[:, lost] = False
    k, v = one.gathered(one.k_cache, None).nan_to_num(neginf=0.0), one.gathered(one.v_cache, None)
    assert_within(got, *exact_attention(one.q, k, v, seen, one.scale))


@NOT_FINITE
@pytest.mark.parametrize("splits", [1, 4, 0])
def test_scores_of_minus_infinity(splits: int) -> None:
    one = case(lengths=(100, 1))
    one.q.fill_(1.0)
    first = int(one.block_table[0, 0])
    one.k_cache[first, :, 7] = -math.inf  # one of many: its weight is 0
    one.k_cache[int(one.block_table[1, 0]), :, 0] = -math.inf  # the only one
    got = _paged_attention_cuda(*one.args, splits=splits) if splits else compiled(*one.args)
    wanted = paged_attention_ref(*one.args)
    assert torch.allclose(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert wanted[0].isfinite().all()
    assert got[1].isnan().all()
    assert wanted[1].isnan().all()


@pytest.mark.parametrize("block", [-1, 10**6])
@ALL
def test_a_block_outside_the_cache_is_not_read_and_makes_its_row_nan(op: Any, block: int) -> None:
    one = case()
    wanted = op(*one.args)
    one.block_table[2, 2:] = block  # of its 33 positions none: blocks 0 and 1 hold 40
    assert torch.equal(op(*one.args), wanted)
    one.block_table[2, 1] = block
    got = op(*one.args)
    assert got[2].isnan().all()
    assert torch.equal(got[:2], wanted[:2])


@NOT_FINITE
@ALL
def test_lengths_out_of_range(op: Any) -> None:
    one = case(lengths=(-3, 161, 160))
    got = op(*one.args)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert got[1].isnan().all()
    assert got[2].isfinite().all()


@ALL
def test_large_scores_do_not_overflow(op: Any) -> None:
    one = case()
    one.q *= 1e3
    one.k_cache *= 1e3
    got = op(*one.args)
    k, v = one.gathered(one.k_cache, None), one.gathered(one.v_cache, None)
    # The gap between the first two scores is far more than what rounding moves either: one weight is 1, the rest 0.
    assert_within(got, *exact_attention(one.q, k, v, one.seen(), one.scale))


@ALL
def test_strided_operands(op: Any) -> None:
    one = case(kind="int8")
    wanted = op(*one.args)
    one.q = one.q.transpose(0, 1).contiguous().transpose(0, 1)
    one.k_cache, one.v_cache = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (one.k_cache, one.v_cache))
    assert one.k_scale is not None
    one.k_scale = one.k_scale.transpose(0, 2).contiguous().transpose(0, 2)
    one.block_table = one.block_table.t().contiguous().t()
    assert torch.equal(op(*one.args), wanted)


@pytest.mark.parametrize("op", [_paged_attention_cuda, compiled], ids=["kernel", "compiled"])
def test_offsets_beyond_32_bits(op: Any) -> None:
    far = 2**31
    one = case(heads=(1, 1), head=16, block_size=16, table=2, lengths=(32,), kind="int8")
    memory = torch.empty(far + 256, dtype=torch.int8)  # pages that nothing touches take no memory
    for name in ("k_cache", "v_cache"):
        cache = memory.as_strided((2, 1, 16, 16), (far, 256, 16, 1))
        cache.copy_(one.k_cache[:2])
        setattr(one, name, cache)
    assert one.k_scale is not None
    one.k_scale = one.v_scale = one.k_scale[:2].contiguous()
    one.block_table = torch.tensor([[1, 0]], dtype=torch.int32)
    one.check(op(*one.args))


@ALL
def test_nothing_to_do(op: Any) -> None:
    one = case()
    none = Case(one.q[:0], one.k_cache, one.v_cache, None, None, one.block_table[:0], one.lengths[:0], 1.0)
    assert op(*none.args).shape == (0, 6, 24)
    one.block_table, one.lengths = one.block_table[:, :0], torch.tensor([0, 1, 0], dtype=torch.int32)
    assert op(*one.args).isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 6, 8)}, "q \\[B, H, D\\]"),
        ({"q": torch.zeros(3, 5, 24)}, "multiple of H_kv"),
        ({"q": torch.zeros(3, 6, 24, dtype=torch.float16)}, "type of q"),
        ({"v_cache": torch.zeros(25, 2, 20, 24, dtype=torch.int8)}, "type of q"),
        ({"k_scale": torch.zeros(25, 2, 20)}, "k_scale goes with an 8-bit cache"),
        ({"block_table": torch.zeros(3, 8, dtype=torch.int64)}, "block_table must be int32"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths must be int32 \\[3\\]"),
        ({"window": -1}, "window and sinks"),
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
    one = case(kind="int8")
    one.v_scale = None
    with pytest.raises(error, match="v_scale goes with"):
        op(*one.args)
    one = case(kind="int8")
    assert one.k_scale is not None
    one.k_scale = one.k_scale.half()
    with pytest.raises(error, match="k_scale must be float32"):
        op(*one.args)


@ALL
def test_an_inner_dimension_that_is_not_contiguous(op: Any) -> None:
    one = case(dtype=torch.bfloat16)
    wanted = op(*one.args)
    one.q, one.k_cache, one.v_cache = (x.mT.contiguous().mT for x in (one.q, one.k_cache, one.v_cache))
    assert torch.equal(op(*one.args), wanted)


@NOT_FINITE
@ALL
def test_scores_of_any_size_are_capped(op: Any) -> None:
    one = case(softcap=30.0)
    one.q *= 1e4  # capped scores are 30 or -30, but for the few near 0
    one.check(op(*one.args))
    one.q.fill_(1.0)
    one.k_cache[int(one.block_table[0, 0]), :, 7] = math.inf
    one.k_cache[int(one.block_table[0, 0]), :, 8] = -math.inf
    got = op(*one.args)
    assert got.isfinite().all()
    assert torch.allclose(got, paged_attention_ref(*one.args), rtol=1e-5, atol=1e-6)
    one.k_cache[int(one.block_table[0, 0]), 0, 9] = math.nan
    got = op(*one.args)
    assert got[0, :3].isnan().all()
    assert got[0, 3:].isfinite().all()


@ALL
def test_nodes_that_others_see_are_not_read(op: Any) -> None:
    for name in ("tree", "tree in rings"):
        one = case(**CASES[name])
        assert one.roots is not None
        wanted, hidden, roots = op(*one.args), ~one.seen(), one.roots.tolist()
        place = torch.arange(hidden.shape[1])
        for row, table, unseen in zip(range(3), one.block_table.long(), hidden, strict=True):
            for p in place[unseen].tolist():
                cache = one.v_cache if one.v_scale is None else one.v_scale
                cache[table[p // 20], :, p % 20] = math.nan
                if one.recent_v is not None and one.rings is not None and 0 <= p - roots[row] < 16:
                    one.recent_v[one.rings[row].long(), :, p % RING] = math.nan
        assert torch.equal(op(*one.args), wanted)


@NOT_FINITE
@ALL
def test_a_node_outside_the_table_or_the_cache_makes_its_row_nan(op: Any) -> None:
    one = case(**CASES["tree"])
    wanted = op(*one.args)
    assert one.trees is not None
    one.trees[0] |= 1 << 12  # position 160 of 160
    got = op(*one.args)
    assert got[0].isnan().all()
    assert torch.equal(got[1:], wanted[1:])
    one = case(**CASES["tree, every bit"])
    wanted = op(*one.args)
    one.block_table[2, 7] = -1  # of its last node alone, at 159
    got = op(*one.args)
    assert got[2].isnan().all()
    assert torch.equal(got[:2], wanted[:2])


@ALL
def test_a_chain_is_a_tree(op: Any) -> None:
    """To the bit: a token's attention is the same, whichever way it is said what it sees."""
    for name in ("small blocks", "recent, int8", "window"):
        one = case(**CASES[name])
        plain = op(*one.args)
        one.roots, nodes = (one.lengths - torch.tensor([7, 0, 1])).int(), torch.tensor([0b1111111, 0, 1])
        one.trees = nodes.int()
        assert torch.equal(op(*one.args), plain)


@ALL
def test_wrong_caps_and_trees_raise(op: Any) -> None:
    error, rows = RuntimeError if op is compiled else UsageError, torch.zeros(3, dtype=torch.int32)
    for change, message in (
        ({"softcap": -1.0}, "softcap must be"),
        ({"softcap": math.nan}, "softcap must be"),
        ({"roots": rows}, "roots and trees go together"),
        ({"roots": rows.long(), "trees": rows}, "roots must be int32"),
        ({"roots": rows, "trees": rows[:2]}, "trees must be int32"),
    ):
        one = case()
        for name, value in change.items():
            setattr(one, name, value)
        with pytest.raises(error, match=message):
            op(*one.args)


@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
def test_opcheck(kind: str) -> None:
    cpu_kernels()  # whichever implementation there is
    # PyTorch's check of the schema compares operands before and after, which it cannot for float8 on a CPU.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(paged_attention, case(kind=kind).args, test_utils=checks[kind == "fp8" :])
    rest: dict[str, Any] = {"recent": (9, 0, 3), "trees": ((144, 0b101001), (0, 0), (32, 1)), "softcap": 30.0}
    torch.library.opcheck(paged_attention, case(kind=kind, **rest).args, test_utils=checks[kind == "fp8" :])


def test_compiles_whole() -> None:
    cpu_kernels()
    one = case(kind="int8")
    whole = torch.compile(lambda *args: paged_attention(*args) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(*one.args), paged_attention(*one.args) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 4096])
def test_on_a_device(block_size: int, dtype: torch.dtype, kind: str) -> None:
    shape = {"table": 4096 // block_size, "block_size": block_size, "lengths": (4096, 1500, 1)}
    one = case(heads=(32, 8), head=128, window=900, sinks=4, kind=kind, dtype=dtype, device="cuda", **shape)  # type: ignore[arg-type]
    weights = 0.0 if dtype == torch.float32 else torch.finfo(torch.bfloat16 if kind else dtype).eps
    one.check(paged_attention(*one.args), weights)
