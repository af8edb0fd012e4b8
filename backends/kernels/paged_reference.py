"""The specification of `paged_attention`, in plain PyTorch; that file says what the operands are."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.decode_attention import decode_attention_ref
from optimizer.backends.kernels.paged_operands import check, check_recent, check_tree


def paged_attention_ref(
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
) -> Tensor:
    """The specification, in float32: gather the blocks in use, decode them, attend."""
    check(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, softcap, window, sinks)
    check_recent(q, k_cache, recent_k, recent_v, rings, starts)
    check_tree(q, roots, trees)
    blocks, _, size, _ = k_cache.shape
    if not q.numel() or not blocks * size or not block_table.shape[1]:
        return torch.where(lengths[:, None, None] > 0, torch.nan, torch.zeros_like(q))
    ends = lengths if roots is None or trees is None else _ends(lengths, roots, trees)
    used = max(1, min(block_table.shape[1], -(-int(ends.max()) // size)))
    table = block_table[:, :used].long()
    inside = (table >= 0) & (table < blocks)
    table = table.where(inside, 0)
    position = torch.arange(used * size, device=q.device)
    length = lengths[:, None]
    seen = position < length
    if window:
        seen &= (position >= length - window) | (position < sinks)
    if roots is not None and trees is not None:
        behind = position - roots[:, None].clamp(min=0)
        node = (trees.long()[:, None] >> behind.clamp(0, 31)) & 1 == 1
        seen = torch.where(behind >= 0, node & (behind < 32), seen)
    # [B, used, H_kv, size, D] to [B, H_kv, used size, D]
    keys = _decoded(k_cache, k_scale, table).transpose(1, 2).flatten(2, 3)
    values = _decoded(v_cache, v_scale, table).transpose(1, 2).flatten(2, 3)
    readable = inside.repeat_interleave(size, 1)
    if recent_k is not None and recent_v is not None and rings is not None and starts is not None:
        count, capacity = recent_k.shape[0], recent_k.shape[2]
        recent = position >= starts[:, None]
        there = ((rings >= 0) & (rings < count) & (ends - starts.clamp(min=0) <= capacity))[:, None]
        readable = torch.where(recent, there, readable)
        ring, slot = rings.long().where(there[:, 0], 0), position % capacity
        chosen = recent[:, None, :, None]
        keys = torch.where(chosen, recent_k[ring][:, :, slot].float(), keys)
        values = torch.where(chosen, recent_v[ring][:, :, slot].float(), values)
    out = decode_attention_ref(q.unsqueeze(2).float(), keys, values, seen[:, None, None], scale, softcap).squeeze(2)
    lost = (seen & ~readable).any(1) | (ends > block_table.shape[1] * size)
    return out.masked_fill(lost[:, None, None], torch.nan).to(q.dtype)


def _ends(lengths: Tensor, roots: Tensor, trees: Tensor) -> Tensor:
    """`[B]`: behind the last position that each row sees of a tree, or where it sees none before its root."""
    roots = roots.clamp(min=0)
    width = ((trees[:, None] >> torch.arange(32, device=trees.device)) != 0).sum(1, dtype=torch.int32)
    return torch.where(width > 0, roots + width, lengths.minimum(roots))


def _decoded(cache: Tensor, scale: Tensor | None, table: Tensor) -> Tensor:
    blocks = cache.view(torch.uint8)[table].view(cache.dtype).float() if cache.itemsize == 1 else cache[table].float()
    return blocks if scale is None else blocks * scale[table].unsqueeze(-1)
