"""What `paged_attention` takes: shapes and types that go together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimizer.backends.kernels.rounding import FLOATS
from optimizer.errors import UsageError

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    softcap: float,
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
    if not 0 <= softcap < math.inf:
        raise UsageError(f"softcap must be finite and 0 or more; got {softcap}.")


def check_recent(
    q: Tensor,
    k_cache: Tensor,
    recent_k: Tensor | None,
    recent_v: Tensor | None,
    rings: Tensor | None,
    starts: Tensor | None,
) -> None:
    """`UsageError` for rings that do not go with the rest; all four are given, or none."""
    given = [t for t in (recent_k, recent_v, rings, starts) if t is not None]
    if not given:
        return
    if recent_k is None or recent_v is None or rings is None or starts is None:
        raise UsageError(f"recent_k, recent_v, rings and starts go together; got {len(given)} of them.")
    wanted = (k_cache.shape[1], k_cache.shape[3])
    wrong = recent_k.ndim != 4 or (recent_k.shape[1], recent_k.shape[3]) != wanted or not recent_k.shape[2]
    if wrong or recent_v.shape != recent_k.shape or {recent_k.dtype, recent_v.dtype} != {q.dtype}:
        raise UsageError(
            f"recent_k and recent_v must be {q.dtype} [rings, {wanted[0]}, C, {wanted[1]}]; got {recent_k.dtype} "
            f"{list(recent_k.shape)} and {recent_v.dtype} {list(recent_v.shape)}."
        )
    for name, rows in (("rings", rings), ("starts", starts)):
        if rows.shape != q.shape[:1] or rows.dtype != torch.int32:
            raise UsageError(f"{name} must be int32 [{q.shape[0]}]; got {rows.dtype} {list(rows.shape)}.")


def check_tree(q: Tensor, roots: Tensor | None, trees: Tensor | None) -> None:
    """`UsageError` unless both or neither of a tree's operands are given, in the shapes of `q`."""
    if (roots is None) != (trees is None):
        raise UsageError("roots and trees go together; got one of them.")
    for name, rows in (("roots", roots), ("trees", trees)):
        if rows is not None and (rows.shape != q.shape[:1] or rows.dtype != torch.int32):
            raise UsageError(f"{name} must be int32 [{q.shape[0]}]; got {rows.dtype} {list(rows.shape)}.")
