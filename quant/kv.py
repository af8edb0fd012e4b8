"""Keys and values of an attention cache in 8 bits, one scale for each head and token.

    x      [B, H, S, D]  keys (after rotary embedding) or values, D the size of a head
    q      [B, H, S, D]  int8 in -127..127, or float8_e4m3fn
    scale  [B, H, S, 1]  float32: max |x| over D, divided by 127 (int8) or 448 (fp8)

`q scale` stands for x. A token and head take D + 4 bytes where bfloat16 takes 2 D: `kv_bits` is 8.5 for D = 64 and
8.25 for D = 128. Each entry is rounded by itself, so it does not matter whether a cache is rounded as it is written
or all of it every time it is read. int8 stops at 127 instead of -128, so that the largest magnitude is exact; that
makes rounding in bfloat16 and float16 idempotent (in float32 a second rounding may move a value by its last bits).
A vector of zeros stays one; one that holds NaN or infinity becomes NaN.

KIVI (arXiv:2402.02750) and KVQuant (arXiv:2401.18079) find that keys have outlier channels and need scales along them
at 2 to 4 bits. At 8 bits a scale for each head and token is enough, and the only kind that needs no second pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from optimizer.errors import UsageError

KvKind = Literal["int8", "fp8"]

_LARGEST: dict[KvKind, float] = {"int8": 127.0, "fp8": 448.0}
_SCALE_BITS = 32


def quantize_kv(x: Tensor, kind: KvKind) -> tuple[Tensor, Tensor]:
    """Keys or values `[B, H, S, D]` as elements of the same shape and scales `[B, H, S, 1]`.

    Raises `UsageError` for another kind or shape.
    """
    check_kv_kind(kind)
    if x.ndim != 4 or not x.shape[-1]:
        raise UsageError(f"keys and values are [B, H, S, D] with D ≥ 1; got {list(x.shape)}.")
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = largest / _LARGEST[kind]  # infinite or NaN where a value is: its elements are 0, and 0 · inf is NaN
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = (wide / scale).nan_to_num().clamp(-_LARGEST[kind], _LARGEST[kind])
    return scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn), scale


def dequantize_kv(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What elements and scales stand for, computed in float32 and rounded once to `dtype`."""
    return (q.float() * scale).to(dtype)


def round_kv(x: Tensor, kind: KvKind) -> Tensor:
    """`x [B, H, S, D]` as it comes back from a cache of this kind, in its own type."""
    return dequantize_kv(*quantize_kv(x, kind), x.dtype)


def check_kv_kind(kind: str) -> None:
    """`UsageError` for a kind of cache that there is not."""
    if kind not in _LARGEST:
        raise UsageError(f"Invalid KV cache kind {kind!r}. Use one of {', '.join(_LARGEST)}.")


def kv_bits(head_size: int) -> float:
    """Stored bits of one value of a head of `head_size`, with its share of the scale."""
    return 8 + _SCALE_BITS / head_size
