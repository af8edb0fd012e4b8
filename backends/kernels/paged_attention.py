"""Attention of one new token over a key-value cache in blocks, in 16 or 32 bits or rounded to 8.

`out[b, h] = softmax(q[b, h] · K[b, h / G]ᵀ · scale) V[b, h / G]` over the positions that `b` sees, `G = H / H_kv`.
With a `softcap` other than 0 a score `s` counts as `softcap · tanh(s / softcap)` (Gemma 2).

    q                 [B, H, D]                      float32, bfloat16 or float16
    k_cache, v_cache  [blocks, H_kv, block_size, D]  the type of q, int8 or float8_e4m3fn; last dimension contiguous
    k_scale, v_scale  [blocks, H_kv, block_size]     float32, with 8 bits only (`optimizer.quant.kv`)
    block_table       [B, max_blocks] int32          position p lies in block `block_table[b, p // block_size]`
    lengths           [B] int32                      positions of b that are filled, the new token included

Position `p < length` is seen where `window` is 0, else where `p ≥ length - window` or `p < sinks` (StreamingLLM,
arXiv:2309.17453). A contiguous cache `[B, H_kv, C, D]` is the case `block_table = arange(B)[:, None]`, block_size = C.
A row of length 0 is 0. One that is longer than its table, or sees a position whose block is not in the cache, is NaN.

A row's last positions may lie elsewhere, in the type of q beside 8-bit blocks say: those from `starts[b]` on are read
from a ring of C slots, position p from slot `p % C`.

    recent_k, recent_v  [rings, H_kv, C, D]  the type of q; last dimension contiguous
    rings, starts       [B] int32            each row's ring (no matter where none of it is seen), and what is there

More positions than C, or a ring that is not there, make the row NaN.

Drafts may form a tree, and lie behind one another in the cache nevertheless. `roots`, `trees` `[B]` int32 say what a
row sees of it: position `roots[b] + i` where bit i of `trees[b]` is set, whatever its length and the window, and of
those before `roots[b]` what was said above. There `lengths[b]` is where the row stands in its branch, for the window.

At least `2 B H_kv L (D e + s)` bytes move for L visible positions: e bytes an element, s = 4 for a scale, 0 without.
Split as `decode_attention` is: one program takes a KV head, all its query heads, and every `splits`-th tile of the
positions that are seen; no other tile is read. int8 and e4m3 are exact in bfloat16 and float16, so elements meet q
on the matrix units as they are: the keys' scale multiplies the score, the values' scale the probability, in float32.
Probabilities are rounded to the type of q, to bfloat16 with 8-bit values: times a scale they leave float16's range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.decode_attention import (
    LOG2_E,
    MAX_SPLITS,
    STAGES,
    WARPS,
    combine,
    finish,
    inner_contiguous,
    load_group,
    product_type,
    split_buffers,
    split_count,
    tile_constants,
    weigh,
)
from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.paged_operands import check, check_recent, check_tree
from optimizer.backends.kernels.paged_reference import paged_attention_ref
from optimizer.errors import DeviceError

_EVERYTHING = 2**31 - 1  # as a window


@jit
def _paged_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    stats_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    length_ptr,
    start_ptr,
    root_ptr,
    tree_ptr,
    scale,
    cap,
    window,
    sinks,
    blocks,
    block_size,
    capacity,
    first_split,
    splits,
    entries,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ksb,
    stride_ksh,
    stride_vsb,
    stride_vsh,
    stride_tb,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    SIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    TREE: tl.constexpr,
):
    # SIDE: "all" positions, those "before" `starts`, or those "from" there on, where a table is the number of a ring.
    # CAPPED: scores times `scale` are 2 s / softcap, and `cap` is softcap, both in base 2.
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    part = tl.program_id(1)
    if SIDE == "all":
        split, programs = part, splits
    else:
        split, programs = first_split + part, tl.num_programs(1)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = load_group(q_ptr + b * stride_qb + head * GROUP * stride_qh, stride_qh, GROUP, HEAD, BLOCK_G, BLOCK_D, PRODUCT)
    filled = tl.load(length_ptr + b)
    low = tl.minimum(tl.maximum(filled, 0), capacity) - window
    if TREE:
        root = tl.maximum(tl.load(root_ptr + b), 0)
        nodes = tl.load(tree_ptr + b)
        width = tl.sum(((nodes >> tl.arange(0, 32)) != 0).to(tl.int32), 0)
        filled = tl.where(width > 0, root + width, tl.minimum(filled, root))
    length = tl.minimum(tl.maximum(filled, 0), capacity)
    fits = filled <= capacity
    if SIDE != "all":
        start = tl.load(start_ptr + b)
        if SIDE == "before":
            length = tl.minimum(length, tl.maximum(start, 0))
        else:
            low = tl.where(start < sinks, low, tl.maximum(low, start))
            fits = fits & (filled - tl.maximum(start, 0) <= block_size)
    # Tiles are those of the sinks, then from the window's start on: the former only as far as they do not overlap.
    first = tl.maximum(low, 0) // BLOCK_N
    if TREE:  # of which all is seen that the window's start may lie behind
        first = tl.minimum(first, root // BLOCK_N)
    sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK_N), first)
    tiles = sink_tiles + tl.maximum(tl.cdiv(length, BLOCK_N) - first, 0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for tile in range(bound(part), bound(tiles), bound(programs)):
        tile_start = tl.where(tile < sink_tiles, tile, tile - sink_tiles + first) * BLOCK_N
        position = tile_start + n
        seen = (position < sinks) | (position >= low)
        if TREE:
            behind = position - root
            seen = tl.where(behind < 0, seen, ((nodes >> tl.minimum(tl.maximum(behind, 0), 31)) & 1) != 0)
        seen = seen & (position < length)
        if SIDE == "from":
            seen = seen & (position >= start)
            block = tl.load(table_ptr + b)
            within = (position % block_size).to(tl.int64)
        elif WHOLE:  # a tile lies in one block
            block = tl.load(table_ptr + b * stride_tb + tile_start // block_size)
            within = (tile_start % block_size + n).to(tl.int64)
        else:
            block = tl.load(table_ptr + b * stride_tb + position // block_size, mask=seen, other=0)
            within = (position % block_size).to(tl.int64)
        inside = (block >= 0) & (block < blocks)
        block = block.to(tl.int64)
        read = seen & inside
        keys = k_ptr + head * stride_kh + (block * stride_kb + within * stride_ks)[:, None] + d[None, :]
        values = v_ptr + head * stride_vh + (block * stride_vb + within * stride_vs)[:, None] + d[None, :]
        k = tl.load(keys, mask=read[:, None] & (d < HEAD)[None, :], other=0.0, eviction_policy="evict_first")
        v = tl.load(values, mask=read[:, None] & (d < HEAD)[None, :], other=0.0, eviction_policy="evict_first")
        scores = tl.dot(q, tl.trans(k.to(PRODUCT)), input_precision="ieee") * scale
        if QUANTIZED:
            k_scale = tl.load(k_scale_ptr + block * stride_ksb + head * stride_ksh + within, mask=read, other=0.0)
            scores *= k_scale[None, :]
        if CAPPED:
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        scores = tl.where((inside & fits & (n >= 0))[None, :], scores, float("nan"))
        weights, keep, top, total = weigh(scores, seen, top, total)
        if QUANTIZED:
            v_scale = tl.load(v_scale_ptr + block * stride_vsb + head * stride_vsh + within, mask=read, other=0.0)
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(WEIGHT), v.to(WEIGHT), acc * keep[:, None], input_precision="ieee")
    row = b * KV_HEADS * GROUP + head * GROUP
    finish(
        out_ptr, part_ptr, stats_ptr, acc, top, total, row, split, splits, entries, GROUP, HEAD, BLOCK_G,
        BLOCK_D, SPLIT,
    )  # fmt: skip


def _paged_attention_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
    recent_k: Tensor | None = None,
    recent_v: Tensor | None = None,
    rings: Tensor | None = None,
    starts: Tensor | None = None,
    roots: Tensor | None = None,
    trees: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launch the kernels; `splits` overrides how many parts the positions are divided into.

    What lies in rings is attended by one more launch, whose parts are combined with the others.
    """
    check(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, softcap, window, sinks)
    check_recent(q, k_cache, recent_k, recent_v, rings, starts)
    check_tree(q, roots, trees)
    batch, heads, head = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    capacity = block_table.shape[1] * block_size
    if not q.numel() or not blocks * capacity:
        return torch.where(lengths[:, None, None] > 0, torch.nan, torch.zeros_like(q))
    _check_device(k_cache)
    tile = tile_constants(kv_heads, heads // kv_heads, head, q.element_size())["BLOCK_N"]
    block_table = inner_contiguous(block_table)
    whole = block_size % tile == 0 or block_table.shape[1] == 1
    most = capacity if not window else min(capacity, window + tile + sinks + tile)
    splits = splits or split_count(batch * kv_heads, -(-most // tile), q.device)
    in_rings = 0
    if recent_k is not None:
        in_rings = min(split_count(batch * kv_heads, -(-recent_k.shape[2] // tile), q.device), MAX_SPLITS // 2)
        splits = min(splits, MAX_SPLITS - in_rings)
    part, stats = split_buffers(q, splits + in_rings)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    into, counts = (out, part, stats, inner_contiguous(q)), (capacity, splits + in_rings)
    factors = (2 * LOG2_E * scale / softcap if softcap else scale * LOG2_E, softcap * LOG2_E)
    lengths, bounds = lengths.contiguous(), (*factors, window or _EVERYTHING, sinks)
    tree = None if roots is None or trees is None else (roots.contiguous(), trees.contiguous())
    blocked = (k_cache, v_cache, k_scale, v_scale, block_table)
    if recent_k is None or recent_v is None or rings is None or starts is None:
        _launch(into, blocked, lengths, None, tree, bounds, *counts, 0, splits, "all", whole)
    else:
        starts, ring = starts.contiguous(), (recent_k, recent_v, None, None, rings.contiguous()[:, None])
        _launch(into, blocked, lengths, starts, tree, bounds, *counts, 0, splits, "before", whole)
        _launch(into, ring, lengths, starts, tree, bounds, *counts, splits, in_rings, "from", False)
    combine(out, part, stats)
    return out


def _launch(
    into: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor],
    lengths: Tensor,
    starts: Tensor | None,
    tree: tuple[Tensor, Tensor] | None,
    bounds: tuple[float, float, int, int],
    capacity: int,
    splits: int,
    first: int,
    programs: int,
    side: str,
    whole: bool,
) -> None:
    """Parts `first` to `first + programs - 1` of `splits`, of the positions on one side of `starts`."""
    out, part, stats, q = into
    k_cache, v_cache, k_scale, v_scale, table = cache
    batch, heads, head = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    k_cache, v_cache = inner_contiguous(k_cache), inner_contiguous(v_cache)
    scale_strides: tuple[int, ...] = (0, 0, 0, 0)
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = inner_contiguous(k_scale), inner_contiguous(v_scale)
        scale_strides = (*k_scale.stride()[:2], *v_scale.stride()[:2])
    sizes = tile_constants(kv_heads, heads // kv_heads, head, q.element_size())
    _paged_kernel[(batch * kv_heads, programs)](
        out, part, stats, q, k_cache, v_cache, k_scale, v_scale, table, lengths, starts, *(tree or (None, None)),
        *bounds, blocks, block_size, capacity, first, splits, batch * heads * splits, *q.stride()[:2],
        *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides, table.stride(0), **sizes,
        **_products(product_type(q), k_scale is not None), WHOLE=whole, SPLIT=splits > 1, SIDE=side,
        CAPPED=bounds[1] != 0, TREE=tree is not None, num_warps=WARPS,
        num_stages=_stages(whole or side == "from", sizes["BLOCK_N"]),
    )  # fmt: skip


def _products(product: Any, quantized: bool) -> dict[str, Any]:
    """The types that scores and sums are multiplied in; see the top of the file for values in 8 bits."""
    weight = tl.bfloat16 if quantized and product == tl.float16 else product
    return {"PRODUCT": product, "WEIGHT": weight, "QUANTIZED": quantized}


def _stages(whole: bool, tile: int) -> int:
    """Two tiles in flight. It takes twice the stages where Triton also pipelines the loads of a tile's addresses: it
    does if threads have less than one position each."""
    return STAGES if whole or tile >= 32 * WARPS else 2 * STAGES - 1


def _check_device(cache: Tensor) -> None:
    if cache.is_cuda and cache.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(cache.device) < (8, 9):
        raise DeviceError(
            f"{torch.cuda.get_device_name(cache.device)} cannot convert float8_e4m3fn, which takes compute capability "
            "8.9. Use an int8 cache."
        )


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


paged_attention = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
    "Tensor lengths, float scale, float softcap, int window, int sinks, Tensor? recent_k, Tensor? recent_v, "
    "Tensor? rings, Tensor? starts, Tensor? roots, Tensor? trees) -> Tensor",
    paged_attention_ref,
    _fake,
    cuda=_paged_attention_cuda,
)


def _shipped(
    head: int, cache: str, whole: bool, side: str = "all", *, capped: bool = False, tree: bool = False
) -> Shipped:
    """One build, with the heads of an 8 B Llama: 8 KV heads with 4 query heads each."""
    pointers = {"out_ptr": "*bf16", "part_ptr": "*fp32", "stats_ptr": "*fp32", "q_ptr": "*bf16"}
    integers = ("window", "sinks", "blocks", "block_size", "capacity", "first_split", "splits", "entries")
    caches = {"k_ptr": cache, "v_ptr": cache}
    tables = {"table_ptr": "*i32", "length_ptr": "*i32", "scale": "fp32", "cap": "fp32"}
    strides = ["qb", "qh", "kb", "kh", "ks", "vb", "vh", "vs", "tb"]
    quantized = cache != "*bf16"
    absent: dict[str, Any] = {}
    if quantized:
        tables |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
        strides += ["ksb", "ksh", "vsb", "vsh"]
    else:
        absent = dict.fromkeys(("k_scale_ptr", "v_scale_ptr"))
        absent |= dict.fromkeys(("stride_ksb", "stride_ksh", "stride_vsb", "stride_vsh"), 0)
    if side == "all":
        absent["start_ptr"] = None
    else:
        tables["start_ptr"] = "*i32"
    if tree:
        tables |= {"root_ptr": "*i32", "tree_ptr": "*i32"}
    else:
        absent |= {"root_ptr": None, "tree_ptr": None}
    signature = pointers | caches | tables | dict.fromkeys((*integers, *(f"stride_{x}" for x in strides)), "i32")
    constants = tile_constants(8, 4, head, 2) | _products(tl.bfloat16, quantized) | absent
    where = {"all": "", "before": ", before a ring", "from": " ring"}[side]
    label = f"{cache[1:]}{where if side == 'from' else ''}, D = {head}"
    if side != "from":
        label += f", {'one block a tile' if whole else 'small blocks'}{where}"
    label += ", capped" * capped + ", tree" * tree
    constants |= {"WHOLE": whole, "SPLIT": True, "SIDE": side, "CAPPED": capped, "TREE": tree}
    stages = _stages(whole or side == "from", constants["BLOCK_N"])
    return Shipped(
        _paged_kernel, label, signature, constants, WARPS, stages, unaligned=(*integers, "stride_tb"),
        expects=("load128", "mma", "no-atomics"), targets=(90, 100) if cache == "*fp8e4nv" else (80, 90, 100),
    )  # fmt: skip


SHIPPED = () if tl is None else (
    _shipped(64, "*bf16", True),
    _shipped(64, "*bf16", False),
    _shipped(128, "*bf16", True),
    _shipped(128, "*bf16", False),
    _shipped(256, "*bf16", True),
    _shipped(64, "*i8", True),
    _shipped(128, "*i8", True),
    _shipped(128, "*i8", False),
    _shipped(64, "*fp8e4nv", True),
    _shipped(128, "*fp8e4nv", True),
    _shipped(128, "*i8", False, "before"),
    _shipped(128, "*fp8e4nv", False, "before"),
    _shipped(64, "*bf16", False, "from"),
    _shipped(128, "*bf16", False, "from"),
    _shipped(256, "*bf16", False, capped=True),
    _shipped(256, "*i8", False, capped=True),
    _shipped(128, "*bf16", False, tree=True),
    _shipped(128, "*i8", False, tree=True),
    _shipped(128, "*i8", False, "before", tree=True),
    _shipped(128, "*bf16", False, "from", tree=True),
)  # fmt: skip
