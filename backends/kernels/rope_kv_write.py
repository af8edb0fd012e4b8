"""What happens between the projections and attention, in one launch: per-head norm, rotary embedding, cache write.

    q, k, v            [B, H | H_kv, S, D]            one float type; any strides with a contiguous last dimension
    cos, sin           [B or 1, S, R]                 as for `rope`
    q_weight, k_weight [D]                            RMS norm of each head, `x / sqrt(mean x² + eps) · (w + offset)`,
                                                      as Qwen3 (offset 0) and Gemma 3 (offset 1) have
    k_cache, v_cache   [blocks, H_kv, block_size, D]  a float type, int8 or float8_e4m3fn
    k_scale, v_scale   [blocks, H_kv, block_size]     float32, with 8 bits only
    slots              [B, S] int64                   `block · block_size + offset`; not written where outside the cache

Returns q, normed where it has a weight and rotated, contiguous `[B, H, S, D]`; k (likewise) and v go to the caches. A
contiguous cache `[B, H_kv, C, D]` is the case `block_size = C`, `slot = b C + position`. No slot may come twice, but a
negative one. float32 inside, rounded once: to the type of q or the cache, or to 8 bits per head and token by the rule
of `optimizer.quant.kv`, to the bit. At least `B S D (2 H e + 2 H_kv (e + c))` bytes move, for elements of e and caches
of c bytes, and 8 B S H_kv of scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, jit, tl
from optimizer.backends.kernels.kv_write import (
    SCALE_STRIDES,
    as_written,
    check_cache,
    shipped_scales,
    write_heads,
    write_ref,
)
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rope import (
    WARPS,
    check_rope,
    head_constants,
    last_contiguous,
    load_heads,
    rotate,
    rotated_ref,
    store_heads,
    table_strides,
)
from optimizer.backends.kernels.rounding import FLOATS, rounded
from optimizer.errors import UsageError


def rope_kv_write_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> Tensor:
    """The specification, in float32."""
    _check(q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots)
    write_ref(rotated_ref(_normed(k, k_weight, eps, offset), cos, sin), k_cache, k_scale, slots)
    write_ref(v.float(), v_cache, v_scale, slots)
    return rotated_ref(_normed(q, q_weight, eps, offset), cos, sin).to(q.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    x = x.float()
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.float() + offset)


@jit
def _norm(  # type: ignore[no-untyped-def]
    first,
    second,
    rest,
    weight_ptr,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """The RMS norm of each head; what `load_heads` filled up is 0 and stays so."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares / (2 * HALF + REST) + eps))[:, None]
    i, j = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    w1 = tl.load(weight_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    w3 = tl.load(weight_ptr + 2 * HALF + j, mask=j < REST, other=0.0).to(tl.float32)
    return first * inverse * (w1 + offset), second * inverse * (w2 + offset), rest * inverse * (w3 + offset)


@jit
def _query_heads(  # type: ignore[no-untyped-def]
    out_ptr,
    out_stride,
    q_ptr,
    stride,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    eps,
    offset,
    h,
    heads,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Norm and rotate one token's query heads."""
    kind = out_ptr.dtype.element_ty
    first, second, rest = load_heads(q_ptr, stride, h, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if NORM:
        first, second, rest = _norm(first, second, rest, weight_ptr, eps, offset, HALF, REST, BLOCK_HALF, BLOCK_REST)
    first, second = rotate(first, second, cos_ptr, sin_ptr, HALF, BLOCK_HALF)
    first, second, rest = rounded(first, kind), rounded(second, kind), rounded(rest, kind)
    store_heads(out_ptr, out_stride, h, h < heads, first, second, rest, HALF, REST, BLOCK_HALF, BLOCK_REST)


@jit
def _cache_heads(  # type: ignore[no-untyped-def]
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
    x_ptr,
    stride,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    eps,
    offset,
    h,
    heads,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Norm, rotate and round one token's key or value heads, and write them to its slot if the cache has it."""
    first, second, rest = load_heads(x_ptr, stride, h, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if NORM:
        first, second, rest = _norm(first, second, rest, weight_ptr, eps, offset, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if ROTATE:
        first, second = rotate(first, second, cos_ptr, sin_ptr, HALF, BLOCK_HALF)
    write_heads(
        cache_ptr, stride_b, stride_h, stride_s, scale_ptr, scale_stride_b, scale_stride_h, slot, slot_count,
        block_size, first, second, rest, h, heads, QUANTIZE, HALF, REST, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


@jit
def _rope_kv_write_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    eps,
    offset,
    tokens,
    heads,
    kv_heads,
    slot_count,
    block_size,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
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
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, s = token // tokens, token % tokens
    cos_ptr += b * stride_cb + s * stride_cs
    sin_ptr += b * stride_sb + s * stride_ss
    part, q_parts, kv_parts = tl.program_id(1), tl.cdiv(heads, BLOCK_H), tl.cdiv(kv_heads, BLOCK_H)
    n = tl.arange(0, BLOCK_H).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if part < q_parts:
        out_ptr += (b * heads * tokens + s) * (2 * HALF + REST)
        _query_heads(
            out_ptr, tokens * (2 * HALF + REST), q_ptr + b * stride_qb + s * stride_qs, stride_qh, cos_ptr, sin_ptr,
            q_weight_ptr, eps, offset, part * BLOCK_H + n, heads, Q_NORM, HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif part < q_parts + kv_parts:
        _cache_heads(
            k_cache_ptr, stride_kcb, stride_kch, stride_kcs, k_scale_ptr, stride_ksb, stride_ksh,
            slot, slot_count, block_size, k_ptr + b * stride_kb + s * stride_ks, stride_kh, cos_ptr, sin_ptr,
            k_weight_ptr, eps, offset, (part - q_parts) * BLOCK_H + n, kv_heads, K_NORM, True, QUANTIZE,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _cache_heads(
            v_cache_ptr, stride_vcb, stride_vch, stride_vcs, v_scale_ptr, stride_vsb, stride_vsh,
            slot, slot_count, block_size, v_ptr + b * stride_vb + s * stride_vs, stride_vh, cos_ptr, sin_ptr,
            k_weight_ptr, eps, offset, (part - q_parts - kv_parts) * BLOCK_H + n, kv_heads, False, False, QUANTIZE,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _rope_kv_write_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> Tensor:
    """Launch the kernel."""
    _check(q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots)
    batch, heads, tokens, head = q.shape
    out = _fake(q)
    blocks, kv_heads, block_size, _ = k_cache.shape
    q, k, v, cos, sin = last_contiguous(q, k, v, cos, sin)
    sizes = head_constants(head, cos.shape[-1])
    parts = -(-heads // sizes["BLOCK_H"]) + 2 * -(-kv_heads // sizes["BLOCK_H"])
    if not batch * tokens * parts:
        return out
    scales = (k_scale, v_scale)
    quantize, k_cache, v_cache, scale_strides = as_written(k_cache, v_cache, *scales)
    weights = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    _rope_kv_write_kernel[(batch * tokens, parts)](
        out, q, k, v, cos, sin, *weights, k_cache, v_cache, *scales, slots.contiguous(), eps, offset,
        tokens, heads, kv_heads, blocks * block_size, max(block_size, 1),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table_strides(cos), *table_strides(sin),
        *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, QUANTIZE=quantize, **sizes, num_warps=WARPS,
    )  # fmt: skip
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor,
) -> None:
    """`UsageError` for shapes and types that do not go together."""
    check_rope(q, k, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != q.shape[3:] or weight.dtype not in FLOATS):
            raise UsageError(f"{name} must be a float [{q.shape[3]}]; got {weight.dtype} {list(weight.shape)}.")
    check_cache(k, v, k_cache, v_cache, k_scale, v_scale, slots)


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


rope_kv_write = define(
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float eps, float offset, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor slots) -> Tensor",
    rope_kv_write_ref,
    _fake,
    cuda=_rope_kv_write_cuda,
)


def _shipped(head: int, cache: str, norm: bool) -> Shipped:
    """One build."""
    strides = [f"{name}{i}" for name in ("q", "k", "v", "kc", "vc") for i in "bhs"] + ["cb", "cs", "sb", "ss"]
    counts = ("tokens", "heads", "kv_heads", "slot_count", "block_size")
    signature = dict.fromkeys(("out_ptr", "q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr"), "*bf16")
    signature |= {"k_cache_ptr": cache, "v_cache_ptr": cache, "slots_ptr": "*i64", "eps": "fp32", "offset": "fp32"}
    signature |= dict.fromkeys((*counts, *(f"stride_{name}" for name in strides)), "i32")
    more, constants, quantize = shipped_scales(cache)
    constants |= {"Q_NORM": norm, "K_NORM": norm, **head_constants(head, head)}
    if norm:
        signature |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), "*bf16")
    else:
        constants |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr"))
    label = f"{'bf16' if quantize == 'none' else quantize.split('-')[0]} cache, D = {head}{', norms' if norm else ''}"
    return Shipped(
        _rope_kv_write_kernel, label, signature | more, constants, WARPS, unaligned=(*counts, *SCALE_STRIDES),
        expects=("load128", "store128", "no-atomics"), registers=128,
    )  # fmt: skip


SHIPPED = (
    _shipped(64, "*bf16", False),
    _shipped(128, "*bf16", False),
    _shipped(128, "*bf16", True),
    _shipped(128, "*i8", True),
    _shipped(128, "*u8", True),
)
