"""Attention of one new token over a static key-value cache.

`out[b, h] = softmax(q[b, h] · K[b, h / G]ᵀ · scale + mask[b]) V[b, h / G]`, `G = H / H_kv` query heads a KV head.

    q     [B, H, 1, D]     float32, bfloat16 or float16
    k, v  [B, H_kv, S, D]  the type of q: the whole static buffer
    mask  [B, 1, 1, S]     bool, True where a position may be seen

Returns `[B, H, 1, D]`. A row that sees nothing is 0. Accumulates in float32. Positions that are masked out are not
read, so at least `2 B H_kv L D` elements move for `L` visible positions, whatever the capacity `S`. The query heads
of a group share each key and value that is read; expanding the cache to H heads, as `repeat_kv` does under
`torch.compile`, writes and reads it G times.

On a GPU (Triton), one program takes a KV head, all its query heads, and every `splits`-th tile of positions (Flash-
Decoding, https://pytorch.org/blog/flash-decoding/): a visible prefix of any length is spread evenly. The products run
on the matrix units in the type of q, probabilities rounded to it. A second kernel adds the splits in their order, so
results repeat. `load_group`, `weigh`, `finish` and `combine` also serve `paged_attention`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl, triton
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import FLOATS, rounded
from optimizer.errors import UsageError

LOG2_E = 1.4426950408889634
MAX_SPLITS = 128
WARPS, STAGES = 4, 3
_CHUNK = 16  # splits that the combining kernel reads at once
_TILE_ELEMENTS = {2: 8192, 4: 2048}  # of keys, by the bytes of a query's: two stages fit 99 KB and the registers
_PROGRAMS_PER_PROCESSOR = 2


def decode_attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """The specification, in float32. Unless it is 0, scores `s` become `softcap · tanh(s / softcap)` (Gemma 2)."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ keys.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    # A position that nobody sees must not count even where it holds NaN, which 0 · NaN would let through.
    return (weights @ torch.where(mask.any(-2).unsqueeze(-1), values, 0.0)).to(q.dtype)


@jit
def load_group(  # type: ignore[no-untyped-def]
    q_ptr,
    stride_h,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The query heads of one KV head, `[BLOCK_G, BLOCK_D]`, zero where there is none."""
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < HEAD)[None, :]
    offsets = g[:, None] * stride_h + d[None, :]
    return tl.load(q_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_last").to(PRODUCT)


@jit
def weigh(scores, seen, top, total):  # type: ignore[no-untyped-def]
    """Take a tile of base-2 `scores [G, N]` into the running softmax; returns its weights and what to keep of the rest.

    `top` stays -inf only while nothing was seen: a score of -inf that is seen counts as the lowest number, so that a
    row which sees nothing else ends as 0 / 0.
    """
    bounded = tl.where(seen[None, :], tl.maximum(scores, -3.4028234e38), float("-inf"))
    higher = tl.maximum(top, tl.max(bounded, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - (-inf) is NaN
    weights = tl.where(seen[None, :], tl.exp2(scores - shift[:, None]), 0.0)
    keep = tl.exp2(top - shift)
    return weights, keep, higher, total * keep + tl.sum(weights, 1)


@jit
def finish(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    stats_ptr,
    acc,
    top,
    total,
    row,
    split,
    splits,
    entries,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the rows `row..row + GROUP` of the result, or of this split: its sums, their scale and their total."""
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < HEAD)[None, :]
    if SPLIT:
        entry = (row + g) * splits + split
        tl.store(stats_ptr + entry, top, mask=g < GROUP)
        tl.store(stats_ptr + entries + entry, total, mask=g < GROUP)
        used = top != float("-inf")
        tl.store(part_ptr + entry[:, None] * HEAD + d[None, :], acc, mask=inside & used[:, None])
    else:
        result = acc / tl.where(top == float("-inf"), 1.0, total)[:, None]
        tl.store(
            out_ptr + (row + g)[:, None] * HEAD + d[None, :], rounded(result, out_ptr.dtype.element_ty), mask=inside
        )


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    stats_ptr,
    splits,
    entries,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    every = tl.arange(0, MOST)
    top = tl.max(tl.load(stats_ptr + row * splits + every, mask=every < splits, other=float("-inf")), 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc, total = tl.zeros([BLOCK_D], tl.float32), 0.0
    for start in range(0, bound(splits), CHUNK):
        entry = row * splits + start + s
        tops = tl.load(stats_ptr + entry, mask=start + s < splits, other=float("-inf"))
        totals = tl.load(stats_ptr + entries + entry, mask=start + s < splits, other=0.0)
        used = tops != float("-inf")  # the sums of an empty split were not written
        parts = part_ptr + entry[:, None] * HEAD + d[None, :]
        sums = tl.load(parts, mask=used[:, None] & (d < HEAD)[None, :], other=0.0)
        weights = tl.exp2(tops - shift)
        total += tl.sum(weights * totals, 0)
        acc += tl.sum(weights[:, None] * sums, 0)
    result = acc / tl.where(top == float("-inf"), 1.0, total)
    tl.store(out_ptr + row * HEAD + d, rounded(result, out_ptr.dtype.element_ty), mask=d < HEAD)


@jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    stats_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    scale,
    positions,
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
    stride_mb,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = load_group(q_ptr + b * stride_qb + head * GROUP * stride_qh, stride_qh, GROUP, HEAD, BLOCK_G, BLOCK_D, PRODUCT)
    keys = k_ptr + b * stride_kb + head.to(tl.int64) * stride_kh
    values = v_ptr + b * stride_vb + head.to(tl.int64) * stride_vh
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for tile in range(bound(split), bound(tl.cdiv(positions, BLOCK_N)), bound(splits)):
        at = tile * BLOCK_N + n
        seen = tl.load(mask_ptr + b * stride_mb + at, mask=at < positions, other=0) != 0
        read = seen[:, None] & (d < HEAD)[None, :]
        at = at.to(tl.int64)[:, None]
        k = tl.load(keys + at * stride_ks + d[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        v = tl.load(values + at * stride_vs + d[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        scores = tl.dot(q, tl.trans(k.to(PRODUCT)), input_precision="ieee") * scale
        weights, keep, top, total = weigh(scores, seen, top, total)
        acc = tl.dot(weights.to(PRODUCT), v.to(PRODUCT), acc * keep[:, None], input_precision="ieee")
    row = b * KV_HEADS * GROUP + head * GROUP
    finish(
        out_ptr, part_ptr, stats_ptr, acc, top, total, row, split, splits, entries, GROUP, HEAD, BLOCK_G, BLOCK_D, SPLIT
    )


def tile_constants(kv_heads: int, group: int, head: int, query_bytes: int) -> dict[str, Any]:
    """The sizes that a build is made for: query heads padded to the matrix units' 16, and a tile of keys."""
    block_d = max(16, 1 << (head - 1).bit_length())
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD": head,
        "BLOCK_G": max(16, 1 << (group - 1).bit_length()),
        "BLOCK_D": block_d,
        "BLOCK_N": max(16, min(128, _TILE_ELEMENTS[query_bytes] // block_d)),
    }


def product_type(q: Tensor) -> Any:
    """The type in which keys and values are multiplied: that of `q`, or float32 interpreted, where bfloat16 lacks."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[q.dtype] if q.is_cuda else tl.float32


def split_count(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts the positions are split: enough to fill the device, no more than there are tiles.

    It depends on shapes and the device only, never on lengths, so that a captured graph stays valid.
    """
    return max(1, min(tiles, MAX_SPLITS, _PROGRAMS_PER_PROCESSOR * _processors(device) // max(programs, 1)))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_buffers(q: Tensor, splits: int) -> tuple[Tensor | None, Tensor | None]:
    """Where the splits of `q [B, H, ..., D]` leave sums `[B H, splits, D]` and maxima, totals `[2, B H, splits]`."""
    if splits == 1:
        return None, None
    rows = q.shape[0] * q.shape[1]
    part = torch.empty(rows, splits, q.shape[-1], dtype=torch.float32, device=q.device)
    return part, torch.empty(2, rows, splits, dtype=torch.float32, device=q.device)


def combine(out: Tensor, part: Tensor | None, stats: Tensor | None) -> None:
    """Add up what the splits left, if there is more than one."""
    if part is None:
        return
    rows, splits, head = part.shape
    block_d = tile_constants(1, 1, head, 4)["BLOCK_D"]
    _combine_kernel[(rows,)](out, part, stats, splits, rows * splits, head, block_d, _CHUNK, MAX_SPLITS, num_warps=4)


def inner_contiguous(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _decode_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, splits: int | None = None
) -> Tensor:
    """Launch the kernels; `splits` overrides how many parts the positions are divided into."""
    _check(q, k, v, mask)
    batch, heads, _, head = q.shape
    kv_heads, positions = k.shape[1], k.shape[2]
    if not positions or not q.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes = tile_constants(kv_heads, heads // kv_heads, head, q.element_size())
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    seen = inner_contiguous(mask.expand(batch, 1, 1, positions)).view(torch.uint8)
    splits = splits or split_count(batch * kv_heads, -(-positions // sizes["BLOCK_N"]), q.device)
    part, stats = split_buffers(q, splits)
    _decode_kernel[(batch * kv_heads, splits)](
        out, part, stats, q, k, v, seen, scale * LOG2_E, positions, splits, batch * heads * splits,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], seen.stride(0),
        **sizes, PRODUCT=product_type(q), SPLIT=splits > 1, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    combine(out, part, stats)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == 4 and q.shape[2] == 1 and k.shape == v.shape and q.shape[0] == k.shape[0]):
        raise UsageError(f"decode_attention takes q [B, H, 1, D], k and v [B, H_kv, S, D]; got {shapes}.")
    if q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise UsageError(f"decode_attention needs one head size, and H a multiple of H_kv; got {shapes}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        raise UsageError(f"decode_attention needs q, k and v of one float type; got {q.dtype}, {k.dtype}, {v.dtype}.")
    rows = mask.shape[0] if mask.ndim else 0
    if mask.dtype != torch.bool or mask.shape != (rows, 1, 1, k.shape[2]) or rows not in (1, q.shape[0]):
        raise UsageError(
            f"decode_attention needs a bool mask [B, 1, 1, {k.shape[2]}]; got {mask.dtype} {list(mask.shape)}."
        )


def _fake(q: Tensor, *_: Tensor | float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


decode_attention = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor",
    decode_attention_ref,
    _fake,
    cuda=_decode_attention_cuda,
)

NAME = "optimizer"
"""The name under which transformers knows this attention."""


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: our op for one new token where it has a kernel, else its own SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    served = query.device.type == "cpu" or (query.is_cuda and triton is not None)
    single = query.shape[2] == 1 and served and attention_mask is not None
    plain = not any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if not (single and plain and query.shape[-1] == value.shape[-1] and query.shape[-1] % 16 == 0):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    assert attention_mask is not None
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    mask = mask.expand(query.shape[0], 1, 1, key.shape[2])
    return decode_attention(query, key, value, mask, scale).transpose(1, 2), None


def register() -> str:
    """Make the attention known to transformers, once; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


_SIGNATURE = {
    "out_ptr": "*bf16",
    "part_ptr": "*fp32",
    "stats_ptr": "*fp32",
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16"),
    "mask_ptr": "*u8",
    "scale": "fp32",
    **dict.fromkeys(("positions", "splits", "entries", "stride_mb"), "i32"),
    **dict.fromkeys((f"stride_{x}" for x in ("qb", "qh", "kb", "kh", "ks", "vb", "vh", "vs")), "i32"),
}


def _shipped(head: int) -> tuple[Shipped, Shipped]:
    """The builds for a head size, with the heads of an 8 B Llama: 8 KV heads with 4 query heads each."""
    sizes = tile_constants(8, 4, head, 2)
    combined = {"HEAD": head, "BLOCK_D": sizes["BLOCK_D"], "CHUNK": _CHUNK, "MOST": MAX_SPLITS}
    pointers = {name: _SIGNATURE[name] for name in ("out_ptr", "part_ptr", "stats_ptr", "splits", "entries")}
    return (
        Shipped(
            _decode_kernel, f"bf16, D = {head}", _SIGNATURE, sizes | {"PRODUCT": tl.bfloat16, "SPLIT": True},
            WARPS, STAGES, unaligned=("positions", "splits", "entries", "stride_mb"),
            expects=("load128", "mma", "no-atomics"),
        ),
        Shipped(
            _combine_kernel, f"combine, D = {head}", pointers, combined, WARPS, STAGES,
            unaligned=("splits", "entries"), expects=("no-atomics",), registers=128,
        ),
    )  # fmt: skip


SHIPPED = () if tl is None else tuple(build for head in (64, 128) for build in _shipped(head))
