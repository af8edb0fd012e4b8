"""Keys and values in blocks (PagedAttention, Kwon et al., arXiv:2309.06180), filled and read by transformers' models.

A model runs unchanged: `update` of the cache that it is given writes its new keys and values to their slots, and the
attention that transformers looks up by name reads them where they lie, through the ops `kv_write` and
`paged_attention`. A contiguous cache is the case of one block a row.

    tokens     [B, S] int64   what one forward appends, padded anywhere
    positions  [B, S] int64   place of each in its row; -1 for padding, which is neither written nor seen
    tables     [B, M] int32   for each group of layers (`KeyValueLayout`): the block of every `block_size` positions

A few tokens a row (decoding, verifying drafts) are attended as so many rows of one token, by the kernel that reads
blocks in place: a token's attention is computed alike whatever the number of tokens beside it. More tokens (a prompt's
chunk) gather the row's keys and values and go to transformers' SDPA. An 8-bit cache is
read as it was rounded in either case, so the size of a chunk changes nothing. With `recent` tokens in the model's type
beside it (`recent_kv`), SDPA attends to what was gathered from blocks, to the ring and to the new tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.kernels.decode_attention import decode_attention_ref
from optimizer.backends.kernels.kv_write import kv_write
from optimizer.backends.kernels.paged_attention import paged_attention
from optimizer.backends.kv_layout import KeyValueLayout, LayerShape, PositionsGiven, ProbeCache
from optimizer.backends.recent_kv import Recent
from optimizer.errors import UsageError

NAME = "optimizer-paged"
"""The name under which transformers knows this attention."""
VARIANTS = ("position_bias", "s_aux")
"""What some models add to attention and the kernel lacks; `probe` refuses these models."""


class LayerStorage:
    """One layer's blocks: `keys`, `values` `[blocks, H_kv, block_size, D]`, scales `[blocks, H_kv, block_size]`.

    With recent tokens also `recent_keys`, `recent_values` `[rings, H_kv, C, D]`.
    """

    def __init__(
        self, shape: LayerShape, layout: KeyValueLayout, blocks: int, device: torch.device, rings: int = 0
    ) -> None:
        size = (blocks, shape.kv_heads, layout.block_size, shape.head_dim)
        self.keys = torch.zeros(size, dtype=layout.elements, device=device)
        self.values = torch.zeros_like(self.keys)
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        if layout.kind is not None:
            self.key_scales = torch.zeros(size[:3], dtype=torch.float32, device=device)
            self.value_scales = torch.zeros_like(self.key_scales)
        self.recent: tuple[Tensor, ...] = ()
        if layout.recent:
            ring = (rings, shape.kv_heads, layout.ring, shape.head_dim)
            self.recent = tuple(torch.zeros(ring, dtype=layout.dtype, device=device) for _ in range(2))
        for tensor in (*self.tensors, *self.recent):
            torch._dynamo.mark_static_address(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored in blocks."""
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return [tensor for tensor in every if tensor is not None]


class Storage:
    """The blocks of all layers, `blocks` of them in each group, and in each layer `rings` of recent tokens."""

    def __init__(
        self, layout: KeyValueLayout, blocks: tuple[int, ...], device: torch.device, *, rings: int = 0
    ) -> None:
        self.layout, self.blocks = layout, blocks
        groups = layout.group_of
        self.layers = [
            LayerStorage(shape, layout, blocks[groups[i]], device, rings) for i, shape in enumerate(layout.layers)
        ]

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy a block in every layer of a group, before a shared one is written to."""
        for layer, at in zip(self.layers, self.layout.group_of, strict=True):
            if at == group:
                for tensor in layer.tensors:
                    tensor[target].copy_(tensor[source])

    def move(self, group: int, table: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy positions of one row to others, in every layer of a group; all are read before any is written."""
        size, blocks = self.layout.block_size, torch.tensor(table)
        (read_block, read), (write_block, write) = (
            (blocks[at // size], at % size) for at in map(torch.tensor, (sources, targets))
        )
        for layer, in_group in zip(self.layers, self.layout.group_of, strict=True):
            if in_group == group:
                for tensor in layer.tensors:
                    raw = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
                    raw[write_block, :, write] = raw[read_block, :, read]

    def move_recent(self, ring: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy positions in one row's ring to others, in every layer; all are read before any is written."""
        read, write = (torch.tensor(at) % self.layout.ring for at in (sources, targets))
        for layer in self.layers:
            for tensor in layer.recent:
                tensor[ring, :, write] = tensor[ring, :, read]

    @property
    def bytes(self) -> int:
        """Bytes that all blocks and rings occupy, used or not."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (*layer.tensors, *layer.recent))


@dataclass
class View(PositionsGiven):
    """What one forward writes and sees: this is the cache that the model is given.

    `visible` is given where attention must gather: `[B, 1, S, L]` bool, the first L positions of each row that each new
    token sees (one for each group), and behind them its ring and the new tokens if some are `recent`. `fresh` says that
    the rows held nothing before and none is padded. `roots`, `trees` (of each group) are those of `paged_attention`.
    """

    storage: Storage
    positions: Tensor
    tables: list[Tensor]
    slots: list[Tensor]
    lengths: Tensor
    row_tables: list[Tensor]
    roots: Tensor | None = None
    trees: list[Tensor] | None = None
    visible: list[Tensor] | None = None
    fresh: bool = False
    recent: Recent | None = None

    @classmethod
    def of(
        cls, storage: Storage, positions: Tensor, tables: list[Tensor], *, context: int | None = None,
        tree: tuple[Tensor, Tensor] | None = None, fresh: bool = False, rings: tuple[Tensor, Tensor] | None = None,
    ) -> View:  # fmt: skip
        """A view for tokens at `positions [B, S]`.

        `context` (the tokens in the longest row afterwards) makes attention gather that many positions; it must be
        given for more than `FEW_TOKENS`. For drafts in a tree, attended in place, `tree` holds which of the new tokens
        each may see, as bits `[B, S]` int32, and the position in the sequence that each would have `[B, S]`, -1 for
        padding; `positions` is where each is written. `rings`, each row's ring and where it begins `[B]` int32, goes
        with recent tokens.
        """
        size = storage.layout.block_size
        real = positions >= 0
        at = positions.clamp(min=0)
        slots = [torch.where(real, table.gather(1, at // size).long() * size + at % size, -1) for table in tables]
        layout, stand, recent = storage.layout, positions if tree is None else tree[1], None
        lengths = (stand + 1).to(torch.int32).reshape(-1)
        tokens = positions.shape[1]
        rows = tables if tokens == 1 else [table.repeat_interleave(tokens, 0) for table in tables]
        roots, trees = None, None
        if tree is not None:
            roots = at[:, :1].to(torch.int32).repeat_interleave(tokens, 0).reshape(-1)
            trees = [_nodes(*tree, window, layout.sinks) for window in layout.windows]
        if rings is not None:
            recent = Recent.of(layout.recent, layout.ring, positions, stand, *rings)
        visible = None
        if context is not None:
            visible = [_visible(positions, context, window, layout.sinks) for window in layout.windows]
            if recent is not None:
                visible = [
                    recent.visible(seen, positions, window, layout.sinks)
                    for seen, window in zip(visible, layout.windows, strict=True)
                ]
        return cls(storage, positions, tables, slots, lengths, rows, roots, trees, visible, fresh, recent)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values `[B, H_kv, S, D]`; attention finds them in the storage.

        Returns them as they are, where attention gathers behind those of the ring `[B, H_kv, C + S, D]`.
        """
        layer = self.storage.layers[layer_idx]
        kv_write(
            key, value, layer.keys, layer.values, layer.key_scales, layer.value_scales,
            self.slots[self.storage.layout.group_of[layer_idx]],
        )  # fmt: skip
        if self.recent is None:
            return key, value
        ring_keys, ring_values = layer.recent
        held = None if self.visible is None else self.recent.rings.clamp(min=0).long()
        earlier = None if held is None else (ring_keys[held], ring_values[held])  # before they are overwritten
        kv_write(key, value, ring_keys, ring_values, None, None, self.recent.slots)
        if earlier is None:
            return key, value
        return torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2)

    def gathered(self, layer_idx: int, near: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first L positions `[B, H_kv, L, D]`, in the model's type, and behind them `near`."""
        assert self.visible is not None
        group = self.storage.layout.group_of[layer_idx]
        layer, context = self.storage.layers[layer_idx], self.visible[group].shape[-1]
        if near is not None:
            context -= near[0].shape[2]
        size = self.storage.layout.block_size
        blocks = self.tables[group][:, : -(-context // size)].clamp(min=0).long()
        # What nobody sees may be another sequence's, or left from one, NaN included, and 0 · NaN would let it through.
        unseen = ~self.visible[group].any(2).unsqueeze(-1)  # [B, 1, L, 1]
        keys = _gather(layer.keys, layer.key_scales, blocks, context).to(self.storage.layout.dtype)
        values = _gather(layer.values, layer.value_scales, blocks, context).to(self.storage.layout.dtype)
        if near is not None:
            keys, values = torch.cat([keys, near[0]], 2), torch.cat([values, near[1]], 2)
        return keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)


def _nodes(bits: Tensor, at: Tensor, window: int, sinks: int) -> Tensor:
    """`[B S]` int32: the nodes `bits [B, S]` that each of those at `at [B, S]` sees within a window."""
    tokens = at.shape[1]
    if 0 < window < tokens:
        node = torch.arange(tokens, dtype=torch.int32, device=at.device)
        near = (at[:, None] > at[:, :, None] - window) | (at[:, None] < sinks)  # [B, S, S]
        bits = bits & (near.to(torch.int32) << node).sum(2, dtype=torch.int32)
    return bits.reshape(-1)


def _visible(positions: Tensor, context: int, window: int, sinks: int) -> Tensor:
    """`[B, 1, S, L]`: what each new token sees. Padding sees the first position, so that no row is empty."""
    at = positions[:, :, None]
    key = torch.arange(context, device=positions.device)
    seen = key <= at
    if window:
        seen = seen & ((key > at - window) | (key < sinks))
    return (seen | ((at < 0) & (key == 0))).unsqueeze(1)


def _gather(cache: Tensor, scale: Tensor | None, blocks: Tensor, context: int) -> Tensor:
    """`[blocks, H, size, D]` at `blocks [B, m]` as `[B, H, L, D]`; float32 where it was rounded to 8 bits."""
    if scale is None:
        found = cache[blocks]
    else:
        found = cache.view(torch.uint8)[blocks].view(cache.dtype).float() * scale[blocks].unsqueeze(-1)
    return found.transpose(1, 2).flatten(2, 3)[:, :, :context]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    kv_cache: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface, over the `View` that was passed to the model as `kv_cache` as well."""
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    if kv_cache is None:
        raise UsageError(f"{NAME}: layer {layer_idx} was given no kv_cache. Run the model through a PagedRunner.")
    if isinstance(kv_cache, ProbeCache):
        kv_cache.attended.add(layer_idx)
        kv_cache.variants |= {name for name in VARIANTS if options.pop(name, None) is not None}
        return attend(module, query, key, value, None, **options)
    if kv_cache.visible is None:
        return _in_place(query, kv_cache, layer_idx, options.get("scaling"), options.get("softcap")), None
    group = kv_cache.storage.layout.group_of[layer_idx]
    whole = kv_cache.fresh and not kv_cache.storage.layout.windows[group] and kv_cache.storage.layout.kind is None
    if whole:  # nothing but the tokens themselves is seen, and nothing is rounded
        return attend(module, query, key, value, None, **options)
    keys, values = kv_cache.gathered(layer_idx, None if kv_cache.recent is None else (key, value))
    return attend(module, query, keys, values, kv_cache.visible[group], **options)


def attend(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
    softcap: float | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' SDPA `[B, S, H, D]`, and our own attention where it caps scores, which SDPA does not. `mask` is
    bool; None sees all earlier tokens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        return sdpa_attention_forward(module, query, keys, values, mask, **options)  # type: ignore[no-any-return]
    tokens, context = query.shape[2], keys.shape[2]
    if mask is None:
        mask = torch.ones(tokens, context, dtype=torch.bool, device=query.device).tril(context - tokens)
    out = decode_attention_ref(query, keys, values, mask, _scale(query, options.get("scaling")), softcap)
    return out.transpose(1, 2).contiguous(), None


def _scale(query: Tensor, scaling: float | None) -> float:
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _in_place(query: Tensor, view: View, layer_idx: int, scaling: float | None, softcap: float | None) -> Tensor:
    """Attention of `query [B, H, S, D]`, each token a row of its own; `[B, S, H, D]`."""
    batch, heads, tokens, head_dim = query.shape
    layout, layer = view.storage.layout, view.storage.layers[layer_idx]
    group = layout.group_of[layer_idx]
    rings: tuple[Tensor | None, ...] = (None, None, None, None)
    if view.recent is not None:
        rings = (*layer.recent, view.recent.rings.repeat_interleave(tokens), view.recent.starts.reshape(-1))
    out = paged_attention(
        query.transpose(1, 2).reshape(batch * tokens, heads, head_dim), layer.keys, layer.values, layer.key_scales,
        layer.value_scales, view.row_tables[group], view.lengths, _scale(query, scaling), softcap or 0.0,
        layout.windows[group], layout.sinks, *rings, view.roots, None if view.trees is None else view.trees[group],
    )  # fmt: skip
    return out.view(batch, tokens, heads, head_dim)  # type: ignore[no-any-return]


def register() -> str:
    """Make the attention known to transformers, once; returns its name. It makes its own masks: none is registered."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    return NAME
