"""Rotary embedding of queries and keys (RoFormer, arXiv:2104.09864), in the half-split order of GPT-NeoX and Llama.

With `r` half of R, for `i < r`:  `out[i] = x[i] cos[i] - x[i + r] sin[i]`,  `out[i + r] = x[i + r] cos[i + r] + x[i]
sin[i + r]`;  elements from R on pass unchanged.

    q         [B, H, S, D]     float32, bfloat16 or float16; any strides with a contiguous last dimension, such as
    k         [B, H_kv, S, D]  views of [B, S, H D]
    cos, sin  [B or 1, S, R]   any of these types, R even and at most D: both halves, as transformers has them

Returns the rotated q and k, contiguous. float32 inside, rounded once. Reads and writes each element once: at least
`2 B (H + H_kv) S D` elements and the tables move. One launch: a program takes a token and a few heads.
`head_constants`, `load_heads`, `rotate` and `store_heads` also serve `rope_kv_write`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import FLOATS, rounded
from optimizer.errors import UsageError

WARPS = 2
_ELEMENTS = 512  # of a half that a program takes: 16 bytes for each of its threads


def rotated_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [B, H, S, D]` rotated by `cos` and `sin [B or 1, S, R]`, in float32."""
    size = cos.shape[-1]
    part, rest = x[..., :size].float(), x[..., size:].float()
    first, second = part.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([part * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1), rest], -1)


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The specification."""
    check_rope(q, k, cos, sin)
    return rotated_ref(q, cos, sin).to(q.dtype), rotated_ref(k, cos, sin).to(k.dtype)


@jit
def load_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    stride,
    h,
    heads,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads `h` of one token in float32: two halves `[BLOCK_H, BLOCK_HALF]` to rotate, and what is not rotated."""
    i, j = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    inside = (h < heads)[:, None]
    row = x_ptr + h[:, None] * stride
    first = tl.load(row + i, mask=inside & (i < HALF), other=0.0)
    second = tl.load(row + HALF + i, mask=inside & (i < HALF), other=0.0)
    rest = tl.load(row + 2 * HALF + j, mask=inside & (j < REST), other=0.0)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@jit
def store_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    stride,
    h,
    inside,
    first,
    second,
    rest,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Write what `load_heads` returned, for the heads that are `inside`."""
    i, j = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    row = x_ptr + h[:, None] * stride
    tl.store(row + i, first, mask=inside[:, None] & (i < HALF))
    tl.store(row + HALF + i, second, mask=inside[:, None] & (i < HALF))
    tl.store(row + 2 * HALF + j, rest, mask=inside[:, None] & (j < REST))


@jit
def rotate(first, second, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves turned by the angles of one token."""
    i = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos2 + first * sin2


@jit
def _rope_heads(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    b,
    s,
    tokens,
    stride_b,
    stride_h,
    stride_s,
    h,
    heads,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    kind = out_ptr.dtype.element_ty
    head: tl.constexpr = 2 * HALF + REST
    x_ptr += b * stride_b + s * stride_s
    first, second, rest = load_heads(x_ptr, stride_h, h, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
    first, second = rotate(first, second, cos_ptr, sin_ptr, HALF, BLOCK_HALF)
    first, second, rest = rounded(first, kind), rounded(second, kind), rounded(rest, kind)
    out_ptr += (b * heads * tokens + s) * head
    stride = tokens * head
    store_heads(out_ptr, stride, h, h < heads, first, second, rest, HALF, REST, BLOCK_HALF, BLOCK_REST)


@jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    kv_heads,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    b = (tl.program_id(0) // tokens).to(tl.int64)
    s = (tl.program_id(0) % tokens).to(tl.int64)
    cos_ptr += b * stride_cb + s * stride_cs
    sin_ptr += b * stride_sb + s * stride_ss
    part, q_parts = tl.program_id(1), tl.cdiv(heads, BLOCK_H)
    n = tl.arange(0, BLOCK_H).to(tl.int64)
    if part < q_parts:
        _rope_heads(
            q_out_ptr, q_ptr, cos_ptr, sin_ptr, b, s, tokens, stride_qb, stride_qh, stride_qs,
            part * BLOCK_H + n, heads, HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rope_heads(
            k_out_ptr, k_ptr, cos_ptr, sin_ptr, b, s, tokens, stride_kb, stride_kh, stride_ks,
            (part - q_parts) * BLOCK_H + n, kv_heads, HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def head_constants(head: int, rotary: int) -> dict[str, int]:
    """The sizes that a build is made for: heads of `head` elements, the first `rotary` of them rotated."""
    half, rest = rotary // 2, head - rotary
    block = 1 << (half - 1).bit_length()
    return {
        "HALF": half,
        "REST": rest,
        "BLOCK_H": max(1, min(16, _ELEMENTS // block)),
        "BLOCK_HALF": block,
        "BLOCK_REST": 1 << max(rest - 1, 0).bit_length(),
    }


def _rope_cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel."""
    check_rope(q, k, cos, sin)
    batch, heads, tokens, head = q.shape
    q_out, k_out = _fake(q, k, cos, sin)
    q, k, cos, sin = last_contiguous(q, k, cos, sin)
    sizes = head_constants(head, cos.shape[-1])
    parts = -(-heads // sizes["BLOCK_H"]) - (-k.shape[1] // sizes["BLOCK_H"])
    if batch * tokens * parts:
        _rope_kernel[(batch * tokens, parts)](
            q_out, k_out, q, k, cos, sin, tokens, heads, k.shape[1], *q.stride()[:3], *k.stride()[:3],
            *table_strides(cos), *table_strides(sin), **sizes, num_warps=WARPS,
        )  # fmt: skip
    return q_out, k_out


def last_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those copied whose last dimension is not contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def table_strides(table: Tensor) -> tuple[int, int]:
    """Of `cos` or `sin [B or 1, S, R]`: by sequence, 0 where all share one, and by token."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`UsageError` for shapes and types that do not go together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise UsageError(f"rope takes q [B, H, S, D] and k [B, H_kv, S, D]; got {shapes}.")
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[2]:
        raise UsageError(f"rope takes cos and sin [B or 1, S, R]; got {shapes}.")
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= q.shape[3]:
        raise UsageError(f"rope needs an even R of 2..D; got {shapes}.")
    if k.dtype != q.dtype or any(t.dtype not in FLOATS for t in (q, cos, sin)):
        raise UsageError(f"rope needs q and k of one float type; got {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}.")


def _fake(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(q, memory_format=contiguous), torch.empty_like(k, memory_format=contiguous)


rope = define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", rope_ref, _fake, cuda=_rope_cuda)

_STRIDES = tuple(f"stride_{name}" for name in ("qb", "qh", "qs", "kb", "kh", "ks", "cb", "cs", "sb", "ss"))
_SIGNATURE = {
    **dict.fromkeys(("q_out_ptr", "k_out_ptr", "q_ptr", "k_ptr", "cos_ptr", "sin_ptr"), "*bf16"),
    **dict.fromkeys(("tokens", "heads", "kv_heads", *_STRIDES), "i32"),
}

SHIPPED = tuple(
    Shipped(
        _rope_kernel, f"bf16, D = {head}, R = {rotary}", _SIGNATURE, head_constants(head, rotary), WARPS,
        unaligned=("tokens", "heads", "kv_heads"), expects=("load128", "store128", "no-atomics"), registers=96,
    )
    for head, rotary in ((64, 64), (128, 128), (128, 64), (256, 256))
)  # fmt: skip
