"""Attention of one new token over a key-value cache in blocks, in 16 or 32 bits or rounded to 8.

`out[b, h] = softmax(q[b, h] · K[b, h / G]ᵀ · scale) V[b, h / G]` over the positions that `b` sees, `G = H / H_kv`.

    q                 [B, H, D]                      float32, bfloat16 or float16
    k_cache, v_cache  [blocks, H_kv, block_size, D]  the type of q, int8 or float8_e4m3fn; last dimension contiguous
    k_scale, v_scale  [blocks, H_kv, block_size]     float32, with 8 bits only (`optimizer.quant.kv`)
    block_table       [B, max_blocks] int32          position p lies in block `block_table[b, p // block_size]`
    lengths           [B] int32                      positions of b that are filled, the new token included

Position `p < length` is seen where `window` is 0, else where `p ≥ length - window` or `p < sinks` (StreamingLLM,
arXiv:2309.17453). A contiguous cache `[B, H_kv, C, D]` is the case `block_table = arange(B)[:, None]`, block_size = C.
A row of length 0 is 0. One that is longer than its table, or sees a position whose block is not in the cache, is NaN.

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
    STAGES,
    WARPS,
    combine,
    decode_attention_ref,
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
from optimizer.backends.kernels.rounding import FLOATS
from optimizer.errors import DeviceError, UsageError

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
_EVERYTHING = 2**31 - 1  # as a window


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    sinks: int,
) -> Tensor:
    """The specification, in float32: gather the blocks in use, decode them, attend."""
    _check(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, window, sinks)
    blocks, _, size, _ = k_cache.shape
    if not q.numel() or not blocks * size or not block_table.shape[1]:
        return torch.where(lengths[:, None, None] > 0, torch.nan, torch.zeros_like(q))
    used = max(1, min(block_table.shape[1], -(-int(lengths.max()) // size)))
    table = block_table[:, :used].long()
    inside = (table >= 0) & (table < blocks)
    table = table.where(inside, 0)
    position = torch.arange(used * size, device=q.device)
    length = lengths[:, None]
    seen = position < length
    if window:
        seen &= (position >= length - window) | (position < sinks)
    # [B, used, H_kv, size, D] to [B, H_kv, used size, D]
    keys = _decoded(k_cache, k_scale, table).transpose(1, 2).flatten(2, 3)
    values = _decoded(v_cache, v_scale, table).transpose(1, 2).flatten(2, 3)
    out = decode_attention_ref(q.unsqueeze(2).float(), keys, values, seen[:, None, None], scale).squeeze(2)
    lost = (seen & ~inside.repeat_interleave(size, 1)).any(1) | (lengths > block_table.shape[1] * size)
    return out.masked_fill(lost[:, None, None], torch.nan).to(q.dtype)


def _decoded(cache: Tensor, scale: Tensor | None, table: Tensor) -> Tensor:
    blocks = cache.view(torch.uint8)[table].view(cache.dtype).float() if cache.itemsize == 1 else cache[table].float()
    return blocks if scale is None else blocks * scale[table].unsqueeze(-1)


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
    scale,
    window,
    sinks,
    blocks,
    block_size,
    capacity,
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
):
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = load_group(q_ptr + b * stride_qb + head * GROUP * stride_qh, stride_qh, GROUP, HEAD, BLOCK_G, BLOCK_D, PRODUCT)
    filled = tl.load(length_ptr + b)
    length = tl.minimum(tl.maximum(filled, 0), capacity)
    low = length - window
    # Tiles are those of the sinks, then from the window's start on: the former only as far as they do not overlap.
    first = tl.maximum(low, 0) // BLOCK_N
    sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK_N), first)
    tiles = sink_tiles + tl.maximum(tl.cdiv(length, BLOCK_N) - first, 0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for tile in range(bound(split), bound(tiles), bound(splits)):
        start = tl.where(tile < sink_tiles, tile, tile - sink_tiles + first) * BLOCK_N
        position = start + n
        seen = (position < length) & ((position < sinks) | (position >= low))
        if WHOLE:  # a tile lies in one block
            block = tl.load(table_ptr + b * stride_tb + start // block_size)
            within = (start % block_size + n).to(tl.int64)
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
        scores = tl.where((inside & (filled <= capacity) & (n >= 0))[None, :], scores, float("nan"))
        weights, keep, top, total = weigh(scores, seen, top, total)
        if QUANTIZED:
            v_scale = tl.load(v_scale_ptr + block * stride_vsb + head * stride_vsh + within, mask=read, other=0.0)
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(WEIGHT), v.to(WEIGHT), acc * keep[:, None], input_precision="ieee")
    row = b * KV_HEADS * GROUP + head * GROUP
    finish(
        out_ptr, part_ptr, stats_ptr, acc, top, total, row, split, splits, entries, GROUP, HEAD, BLOCK_G, BLOCK_D, SPLIT
    )


def _paged_attention_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    sinks: int,
    splits: int | None = None,
) -> Tensor:
    """Launch the kernels; `splits` overrides how many parts the positions are divided into."""
    _check(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, window, sinks)
    batch, heads, head = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    capacity = block_table.shape[1] * block_size
    if not q.numel() or not blocks * capacity:
        return torch.where(lengths[:, None, None] > 0, torch.nan, torch.zeros_like(q))
    quantized = k_scale is not None
    _check_device(k_cache)
    sizes = tile_constants(kv_heads, heads // kv_heads, head, q.element_size())
    tile = sizes["BLOCK_N"]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k_cache, v_cache = inner_contiguous(q), inner_contiguous(k_cache), inner_contiguous(v_cache)
    block_table = inner_contiguous(block_table)
    whole = block_size % tile == 0 or block_table.shape[1] == 1
    most = capacity if not window else min(capacity, window + tile + sinks + tile)
    splits = splits or split_count(batch * kv_heads, -(-most // tile), q.device)
    part, stats = split_buffers(q, splits)
    scale_strides: tuple[int, ...] = (0, 0, 0, 0)
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = inner_contiguous(k_scale), inner_contiguous(v_scale)
        scale_strides = (*k_scale.stride()[:2], *v_scale.stride()[:2])
    _paged_kernel[(batch * kv_heads, splits)](
        out, part, stats, q, k_cache, v_cache, k_scale, v_scale, block_table, lengths.contiguous(),
        scale * LOG2_E, window or _EVERYTHING, sinks, blocks, block_size, capacity, splits, batch * heads * splits,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides, block_table.stride(0),
        **sizes, **_products(product_type(q), quantized), WHOLE=whole, SPLIT=splits > 1,
        num_warps=WARPS, num_stages=_stages(whole, tile),
    )  # fmt: skip
    combine(out, part, stats)
    return out


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


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    window: int,
    sinks: int,
) -> None:
    """`UsageError` for shapes and types that do not go together."""
    shape = k_cache.shape
    if q.ndim != 3 or len(shape) != 4 or v_cache.shape != shape or q.shape[2] != shape[3]:
        raise UsageError(
            "paged_attention takes q [B, H, D], k_cache and v_cache [blocks, H_kv, block_size, D]; got "
            f"{list(q.shape)}, {list(shape)}, {list(v_cache.shape)}."
        )
    if not shape[1] or q.shape[1] % shape[1]:
        raise UsageError(f"paged_attention needs H to be a multiple of H_kv; got {q.shape[1]} and {shape[1]}.")
    if q.dtype not in FLOATS or k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, *EIGHT_BITS):
        raise UsageError(
            f"paged_attention takes a cache of the type of q, int8 or float8_e4m3fn; got {q.dtype}, {k_cache.dtype} "
            f"and {v_cache.dtype}."
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (k_cache.dtype in EIGHT_BITS):
            raise UsageError(f"{name} goes with an 8-bit cache and no other; the cache is {k_cache.dtype}.")
        if scale is not None and (scale.shape != shape[:3] or scale.dtype != torch.float32):
            raise UsageError(f"{name} must be float32 {list(shape[:3])}; got {scale.dtype} {list(scale.shape)}.")
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0] or block_table.dtype != torch.int32:
        raise UsageError(
            f"block_table must be int32 [{q.shape[0]}, max_blocks]; got {block_table.dtype} {list(block_table.shape)}."
        )
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise UsageError(f"lengths must be int32 [{q.shape[0]}]; got {lengths.dtype} {list(lengths.shape)}.")
    if window < 0 or sinks < 0:
        raise UsageError(f"window and sinks must be 0 or more; got {window} and {sinks}.")


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


paged_attention = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
    "Tensor lengths, float scale, int window, int sinks) -> Tensor",
    paged_attention_ref,
    _fake,
    cuda=_paged_attention_cuda,
)


def _shipped(head: int, cache: str, whole: bool) -> Shipped:
    """One build, with the heads of an 8 B Llama: 8 KV heads with 4 query heads each."""
    pointers = {"out_ptr": "*bf16", "part_ptr": "*fp32", "stats_ptr": "*fp32", "q_ptr": "*bf16"}
    integers = ("window", "sinks", "blocks", "block_size", "capacity", "splits", "entries")
    caches = {"k_ptr": cache, "v_ptr": cache}
    tables = {"table_ptr": "*i32", "length_ptr": "*i32", "scale": "fp32"}
    strides = ["qb", "qh", "kb", "kh", "ks", "vb", "vh", "vs", "tb"]
    quantized = cache != "*bf16"
    scales: dict[str, Any] = dict.fromkeys(("k_scale_ptr", "v_scale_ptr"))
    if quantized:
        tables |= dict.fromkeys(scales, "*fp32")
        scales = {}
        strides += ["ksb", "ksh", "vsb", "vsh"]
    else:
        scales |= dict.fromkeys(("stride_ksb", "stride_ksh", "stride_vsb", "stride_vsh"), 0)
    signature = pointers | caches | tables | dict.fromkeys((*integers, *(f"stride_{x}" for x in strides)), "i32")
    constants = tile_constants(8, 4, head, 2) | _products(tl.bfloat16, quantized) | scales
    return Shipped(
        _paged_kernel, f"{cache[1:]}, D = {head}, {'one block a tile' if whole else 'small blocks'}", signature,
        constants | {"WHOLE": whole, "SPLIT": True}, WARPS, _stages(whole, constants["BLOCK_N"]),
        unaligned=(*integers, "stride_tb"), expects=("load128", "mma", "no-atomics"),
        targets=(90, 100) if cache == "*fp8e4nv" else (80, 90, 100),
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
)  # fmt: skip
