"""Keys and values of new tokens into the slots of a cache in blocks, in their own type or rounded to 8 bits.

    k, v               [B, H_kv, S, D]                float32, bfloat16 or float16; last dimension contiguous
    k_cache, v_cache   [blocks, H_kv, block_size, D]  the type of k, int8 or float8_e4m3fn; last dimension contiguous
    k_scale, v_scale   [blocks, H_kv, block_size]     float32, with 8 bits only; last dimension contiguous
    slots              [B, S] int64                   `block · block_size + offset`; not written where outside the cache

Returns nothing. What `rope_kv_write` does after its rotation, for keys that are rotated elsewhere. A contiguous cache
`[B, H_kv, C, D]` is the case `block_size = C`, `slot = b C + position`. No slot may come twice, but a negative one.
In 8 bits a head's values are rounded by the rule of `optimizer.quant.kv`, to the bit, computed in float32. At least
`2 B S H_kv (D (e + c) + s)` bytes move, for elements of e and caches of c bytes, s = 4 for a scale, 0 without.

One launch: a program takes a token and a few heads. `write_ref`, `check_cache` and `write_heads` also serve
`rope_kv_write`, which holds a head as two halves and a rest; so does the kernel here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rope import WARPS, head_constants, last_contiguous, load_heads, store_heads
from optimizer.backends.kernels.rounding import FLOATS, elements, magnitude, rounded
from optimizer.errors import UsageError
from optimizer.quant.kv import KvKind, quantize_kv

KINDS: dict[torch.dtype, KvKind] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def kv_write_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> None:
    """The specification."""
    _check(k, v, k_cache, v_cache, k_scale, v_scale, slots)
    write_ref(k, k_cache, k_scale, slots)
    write_ref(v, v_cache, v_scale, slots)


def write_ref(x: Tensor, cache: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Put `x [B, H_kv, S, D]` in its slots."""
    size = cache.shape[2]
    inside = (slots >= 0) & (slots < cache.shape[0] * size)
    rows, slot = x.transpose(1, 2)[inside], slots[inside]  # [n, H_kv, D], [n]
    block, offset = slot // max(size, 1), slot % max(size, 1)
    if scale is None:
        cache[block, :, offset] = rows.to(cache.dtype)
        return
    q, row_scale = quantize_kv(rows.unsqueeze(0), KINDS[cache.dtype])
    cache.view(torch.uint8)[block, :, offset] = q[0].view(torch.uint8)
    scale[block, :, offset] = row_scale[0, ..., 0]


@jit
def write_heads(  # type: ignore[no-untyped-def]
    cache_ptr,
    stride_b,
    stride_h,
    stride_s,
    scale_ptr,
    scale_stride_b,
    scale_stride_h,
    slot,
    slot_count,
    block_size,
    first,
    second,
    rest,
    h,
    heads,
    QUANTIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Round one token's key or value heads, as `load_heads` returns them, and write them if the cache has the slot."""
    inside = (h < heads) & (slot >= 0) & (slot < slot_count)
    block, offset = slot // block_size, slot % block_size
    if QUANTIZE == "none":
        kind = cache_ptr.dtype.element_ty
        first, second, rest = rounded(first, kind), rounded(second, kind), rounded(rest, kind)
    else:
        limit: tl.constexpr = 127.0 if QUANTIZE == "int8" else 448.0
        largest = tl.maximum(tl.max(magnitude(first), 1), tl.max(magnitude(second), 1))
        largest = tl.maximum(largest, tl.max(magnitude(rest), 1)).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, limit)
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scale_ptr + block * scale_stride_b + offset + h * scale_stride_h, scale, mask=inside)
        first = elements(first, scale[:, None], QUANTIZE)
        second = elements(second, scale[:, None], QUANTIZE)
        rest = elements(rest, scale[:, None], QUANTIZE)
        if QUANTIZE == "int8":  # a subnormal scale may give -128
            first, second, rest = tl.maximum(first, -127), tl.maximum(second, -127), tl.maximum(rest, -127)
    cache_ptr += block * stride_b + offset * stride_s
    store_heads(cache_ptr, stride_h, h, inside, first, second, rest, HALF, REST, BLOCK_HALF, BLOCK_REST)


@jit
def _kv_write_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    tokens,
    heads,
    slot_count,
    block_size,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_kcb,
    stride_kch,
    stride_kcs,
    stride_vcb,
    stride_vch,
    stride_vcs,
    stride_ksb,
    stride_ksh,
    stride_vsb,
    stride_vsh,
    QUANTIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, s = token // tokens, token % tokens
    part, parts = tl.program_id(1), tl.cdiv(heads, BLOCK_H)
    h = (part % parts) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if part < parts:
        k_ptr += b * stride_kb + s * stride_ks
        first, second, rest = load_heads(k_ptr, stride_kh, h, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
        write_heads(
            k_cache_ptr, stride_kcb, stride_kch, stride_kcs, k_scale_ptr, stride_ksb, stride_ksh, slot, slot_count,
            block_size, first, second, rest, h, heads, QUANTIZE, HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        v_ptr += b * stride_vb + s * stride_vs
        first, second, rest = load_heads(v_ptr, stride_vh, h, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
        write_heads(
            v_cache_ptr, stride_vcb, stride_vch, stride_vcs, v_scale_ptr, stride_vsb, stride_vsh, slot, slot_count,
            block_size, first, second, rest, h, heads, QUANTIZE, HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _kv_write_cuda(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> None:
    """Launch the kernel."""
    _check(k, v, k_cache, v_cache, k_scale, v_scale, slots)
    batch, heads, tokens, head = k.shape
    blocks, _, block_size, _ = k_cache.shape
    k, v = last_contiguous(k, v)
    sizes = head_constants(head, head - head % 2)
    parts = 2 * -(-heads // sizes["BLOCK_H"])
    if not batch * tokens * parts:
        return
    scales = (k_scale, v_scale)
    quantize, k_cache, v_cache, scale_strides = as_written(k_cache, v_cache, *scales)
    _kv_write_kernel[(batch * tokens, parts)](
        k, v, k_cache, v_cache, *scales, slots.contiguous(), tokens, heads, blocks * block_size, max(block_size, 1),
        *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
        QUANTIZE=quantize, **sizes, num_warps=WARPS,
    )  # fmt: skip


def as_written(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[str, Tensor, Tensor, tuple[int, ...]]:
    """For `write_heads`: QUANTIZE, the caches as it stores to them, and the scales' strides by block and head."""
    quantize = {None: "none", "int8": "int8", "fp8": "fp8-bits"}[KINDS.get(k_cache.dtype)]
    if quantize == "fp8-bits":
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    strides = (stride for scale in (k_scale, v_scale) for stride in ((0, 0) if scale is None else scale.stride()[:2]))
    return quantize, k_cache, v_cache, tuple(strides)


def _check(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> None:
    if k.ndim != 4 or not k.shape[3] or k.dtype not in FLOATS:
        raise UsageError(f"kv_write takes float k [B, H_kv, S, D] with D of 1 or more; got {k.dtype} {list(k.shape)}.")
    check_cache(k, v, k_cache, v_cache, k_scale, v_scale, slots)
    if k_cache.dtype not in (k.dtype, *KINDS):
        raise UsageError(f"kv_write takes a cache of {k.dtype}, int8 or float8_e4m3fn; got {k_cache.dtype}.")


def check_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> None:
    """`UsageError` unless `k [B, H_kv, S, D]` and the rest go together; a cache may be of any float type."""
    if v.shape != k.shape or v.dtype != k.dtype:
        raise UsageError(f"v must be as k, {k.dtype} {list(k.shape)}; got {v.dtype} {list(v.shape)}.")
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        heads, head = k.shape[1], k.shape[3]
        if cache.ndim != 4 or cache.shape[1::2] != (heads, head) or cache.shape != k_cache.shape:
            raise UsageError(f"{name}_cache must be [blocks, {heads}, block_size, {head}]; got {list(cache.shape)}.")
        if cache.dtype != k_cache.dtype or cache.dtype not in (*FLOATS, *KINDS) or cache.stride(3) != 1:
            raise UsageError(
                f"{name}_cache must be a float, int8 or float8_e4m3fn, of one type with the other, its last dimension "
                f"contiguous; got {cache.dtype} with strides {cache.stride()}."
            )
        if (scale is None) == (cache.dtype in KINDS):
            raise UsageError(f"{name}_scale goes with an 8-bit cache and no other; the cache is {cache.dtype}.")
        wrong = scale is not None and (scale.shape != cache.shape[:3] or scale.dtype != torch.float32)
        if scale is not None and (wrong or scale.stride(2) != 1):
            raise UsageError(
                f"{name}_scale must be float32 {list(cache.shape[:3])}, its last dimension contiguous; got "
                f"{scale.dtype} {list(scale.shape)}."
            )
    if slots.shape != k.shape[::2] or slots.dtype != torch.int64:
        raise UsageError(f"slots must be int64 [{k.shape[0]}, {k.shape[2]}]; got {slots.dtype} {list(slots.shape)}.")


def _fake(*_: Any) -> None:
    return None


kv_write = define(
    "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor slots) -> ()",
    kv_write_ref,
    _fake,
    cuda=_kv_write_cuda,
)

SCALE_STRIDES = tuple(f"stride_{name}" for name in ("ksb", "ksh", "vsb", "vsh"))


def _shipped(head: int, cache: str) -> Shipped:
    """One build."""
    signature = dict.fromkeys(("k_ptr", "v_ptr"), "*bf16") | dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), cache)
    counts = ("tokens", "heads", "slot_count", "block_size")
    strides = tuple(f"stride_{name}{i}" for name in ("k", "v", "kc", "vc") for i in "bhs")
    signature |= {"slots_ptr": "*i64"} | dict.fromkeys((*counts, *strides), "i32")
    more, constants, quantize = shipped_scales(cache)
    label = f"{'bf16' if quantize == 'none' else quantize.split('-')[0]} cache, D = {head}"
    stores = ("store128",) if quantize == "none" else ()  # a thread has 8 elements: 8 bytes where they have 8 bits
    return Shipped(
        _kv_write_kernel, label, signature | more, constants | head_constants(head, head), WARPS,
        unaligned=(*counts, *SCALE_STRIDES), expects=("load128", *stores, "no-atomics"), registers=96,
    )  # fmt: skip


def shipped_scales(cache: str) -> tuple[dict[str, str], dict[str, Any], str]:
    """What a build for this type of cache takes of scales: signature, constants with QUANTIZE, and QUANTIZE."""
    quantize = {"*bf16": "none", "*i8": "int8", "*u8": "fp8-bits"}[cache]
    pointers = ("k_scale_ptr", "v_scale_ptr")
    if quantize == "none":
        return {}, dict.fromkeys(pointers) | dict.fromkeys(SCALE_STRIDES, 0) | {"QUANTIZE": quantize}, quantize
    signature = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(SCALE_STRIDES, "i32")
    return signature, {"QUANTIZE": quantize}, quantize


SHIPPED = (_shipped(64, "*bf16"), _shipped(128, "*bf16"), _shipped(128, "*i8"), _shipped(128, "*u8"))
