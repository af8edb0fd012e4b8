"""A cache in blocks for transformers' own `generate`, and for any loop that calls `model(..., past_key_values=cache)`.

    cache = block_cache(model, batch=8, max_tokens=2048, kv="int8")
    with block_attention(model):  # or model.set_attn_implementation("optimizer-blocks"), for good
        model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

The attention finds the cache noted on the keys that `update` hands on. It writes them and reads the others in place,
through a `View` as in `paged_cache`. Padding it learns of from the 2D mask:

    column  c in 0..T-1     a token in the mask `[B, T]`, padding included, as transformers counts
    place   c - starts[b]   where row b keeps it; a row starts at its first token that is not padding

So padding on the left is never written and costs nothing. Zeros elsewhere hide tokens that are in the cache; then, and
for more than `FEW_TOKENS` new ones, SDPA attends under a mask to earlier tokens, gathered, and the new ones.

Block i of row b is block `i B + b` of the storage, so a row grows at the storage's end. Layers with a window go round
in a ring of `(window + ROLLBACK) / block_size` blocks behind those of the sinks. No gradient passes through.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kv_layout import FEW_TOKENS, KeyValueLayout, check_interface
from optimizer.backends.paged_cache import LayerStorage, Storage, View, attend
from optimizer.backends.paged_cache import attention_forward as attend_in_place
from optimizer.backends.paged_runner import PagedOptions, layout_of
from optimizer.errors import ModelError, UsageError
from optimizer.quant.kv import round_kv

NAME = "optimizer-blocks"  # under which transformers knows this attention
ROLLBACK = 64
"""Tokens that a layer with a window keeps beyond it, for `crop`, and so that `FEW_TOKENS` can be written at once."""


class BlockCache:
    """Keys and values of up to `batch` rows of `max_tokens` tokens; `block_cache` makes one, a transformers `Cache`.
    Memory grows with the longest row and stays for the next use. What does not fit raises before anything is written.
    """

    is_compileable = False

    def __init__(self, config: Any, layout: KeyValueLayout, batch: int, max_tokens: int) -> None:
        super().__init__(layers=[])  # type: ignore[call-arg]
        if batch < 1 or max_tokens < 1:
            raise UsageError(f"Invalid BlockCache of {batch} rows of {max_tokens} tokens. Use at least 1 of each.")
        self.layout, self.batch, self.max_tokens = layout, batch, max_tokens
        self.storage = Storage(layout, (0,) * len(layout.windows), torch.device("cpu"))
        self._config = weakref.ref(config)
        size, whole = layout.block_size, -(-max_tokens // layout.block_size)
        self._sinks = [-(-layout.sinks // size) if window else 0 for window in layout.windows]  # in blocks
        self._rings = [-(-(window + ROLLBACK) // size) if window else whole for window in layout.windows]
        self._most = [min(whole, sinks + ring) for sinks, ring in zip(self._sinks, self._rings, strict=True)]
        self.reset()

    def reset(self) -> None:
        """Forget all rows. The memory stays for the next ones."""
        self.columns, self.starts = 0, [0]
        self._reach = 0  # the most columns that were written, cropped ones included
        self._view: View | None = None
        self._seen: list[Tensor | None] = []

    def update(self, key: Tensor, value: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """`key` and `value` `[B, H_kv, S, D]` as they are: attention writes them, once it knows what is padding."""
        config = self._config()
        if config is not None and config._attn_implementation != NAME:
            raise UsageError(
                f"The model attends through {config._attn_implementation!r}, which cannot read a BlockCache. "
                f"Use `with block_attention(model):`, or model.set_attn_implementation({NAME!r})."
            )
        key.block_cache = self  # type: ignore[attr-defined]
        return key, value

    def get_seq_length(self, *_args: Any, **_options: Any) -> int:
        """Columns so far, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, *_args: Any, **_options: Any) -> tuple[int, int]:
        """Columns that a mask covers, and the first."""
        return self.columns + query_length, 0

    def get_max_length(self, *_args: Any, **_options: Any) -> int:
        """Tokens of the longest row that fits; padding on the left does not count."""
        return self.max_tokens

    def __len__(self) -> int:
        return len(self.layout.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row; as in transformers, their number is given as a negative one.
        Raises `UsageError` where tokens that are needed again have left a window; see `ROLLBACK`."""
        if tokens_to_remove > 0:
            raise UsageError(f"Invalid crop({tokens_to_remove}). Give the tokens to remove as a negative number.")
        columns = max(0, self.columns + tokens_to_remove)
        self._check_kept(columns)
        self.columns, self.starts = columns, [min(start, columns) for start in self.starts]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let row b go on from what row `indices[b]` holds; raises `UsageError` if that makes more than `batch`."""
        if not self.columns:
            return
        rows = len(self.starts)
        chosen = torch.arange(rows, device=indices.device)[indices]
        starts = [self.starts[row] for row in chosen.tolist()]
        if len(starts) > self.batch:
            raise UsageError(f"{len(starts)} rows exceed batch={self.batch}. Make a larger cache.")
        for i, layer in enumerate(self.storage.layers):
            held = self._blocks(i, self.columns - min(self.starts))
            # As bytes: not every operation knows float8.
            parts = [t.view(torch.uint8)[: held * rows].unflatten(0, (held, rows)) for t in layer.tensors]
            taken = [part.index_select(1, chosen.to(part.device)).flatten(0, 1) for part in parts]
            self._grow(i, held * len(starts), layer.keys.device)
            for tensor, new in zip(self.storage.layers[i].tensors, taken, strict=True):
                tensor.view(torch.uint8)[: len(new)].copy_(new)
        self.starts = starts

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, side by side."""
        self.batch_select_indices(torch.arange(len(self.starts)).repeat_interleave(repeats))

    @property
    def bytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return self.storage.bytes

    def _plan(self, key: Tensor, mask: Tensor | None) -> tuple[View, list[Tensor | None]]:
        """Where new tokens `[B, H_kv, S, D]` go, and what they see: for each group `[B, 1, S, P + S]`, over P earlier
        places and themselves, None where it is just causal. No list for attention in place."""
        rows, tokens, columns, device = key.shape[0], key.shape[2], self.columns + key.shape[2], key.device
        if self.columns and rows != len(self.starts):
            raise UsageError(f"The BlockCache holds {len(self.starts)} rows and was given {rows}. Call its reset().")
        if rows > self.batch:
            raise UsageError(f"{rows} rows exceed batch={self.batch}. Make a larger cache; each beam takes a row.")
        starts, hidden = self._padding(rows, tokens, mask)
        longest, past = max(1, columns - min(starts)), max(0, self.columns - min(starts))
        if longest > self.max_tokens:
            raise UsageError(f"A row of {longest} tokens exceeds max_tokens={self.max_tokens}. Make a larger cache.")
        self._check_kept(self.columns)  # a forward that failed may have written over it
        self.starts, self._reach = starts, max(self._reach if self.columns else 0, columns)

        start = torch.tensor(starts, device=device)[:, None]
        places = (torch.arange(self.columns, columns, device=device) - start).clamp(min=-1)  # [B, S]
        tables = [self._table(group, longest, rows, device) for group in range(len(self._most))]
        view = View.of(self.storage, places, tables)
        for slots, sinks, ring in zip(view.slots, self._sinks, self._rings, strict=True):
            size = self.layout.block_size  # no slot may come twice: what others will overwrite is not written
            slots.masked_fill_((places >= sinks * size) & (places < places[:, -1:] + 1 - ring * size), -1)
        if tokens <= FEW_TOKENS and hidden is None:
            return view, []
        at = torch.arange(past, device=device)
        keys = torch.cat([torch.where(at < self.columns - start, at, -1), places], 1)
        shown = None if hidden is None else ~hidden.gather(1, (keys + start).clamp(min=0))
        causal = not past and hidden is None and not any(starts)
        seen = [
            None if causal and tokens <= (window or tokens) else _seen(places, keys, shown, window, self.layout.sinks)
            for window in self.layout.windows
        ]
        view.visible = [mask[..., :past] for mask in seen if mask is not None and past] or None
        return view, seen

    def _padding(self, rows: int, tokens: int, mask: Tensor | None) -> tuple[list[int], Tensor | None]:
        """The column that each row starts at, and which later ones are hidden `[B, T]`, if any. A row without a token
        yet (all padding so far) starts at the next one that is not padding."""
        starts, columns = [*self.starts] if self.columns else [0] * rows, self.columns + tokens
        if mask is None:
            return starts, None
        if mask.shape != (rows, columns):
            raise UsageError(f"Invalid attention mask {list(mask.shape)}. Use [{rows}, {columns}], former tokens too.")
        for row, first in enumerate((~mask).long().cumprod(1).sum(1).tolist()):
            if first < min(starts[row], self.columns):
                raise UsageError(f"Column {first} of row {row} was padding and not kept. Mask it again, or reset().")
            if starts[row] >= self.columns:
                starts[row] = first
        started = torch.arange(columns, device=mask.device) >= torch.tensor(starts, device=mask.device)[:, None]
        hidden = started & ~mask
        return starts, hidden if bool(hidden.any()) else None

    def _check_kept(self, columns: int) -> None:
        """That what the token after `columns` sees was not overwritten, by tokens that are no longer there."""
        for window, ring in zip(self.layout.windows, self._rings, strict=True):
            oldest = min(max(start, columns - window + 1) for start in self.starts)
            if columns and window and oldest < self._reach - ring * self.layout.block_size:
                raise UsageError(
                    f"{self._reach - columns} tokens cannot be taken back: others left the window of {window}. "
                    f"Crop at most {ROLLBACK}, or call reset() and give the BlockCache the whole text."
                )

    def _blocks(self, layer_idx: int, tokens: int) -> int:
        """Blocks of a row of `tokens`."""
        return min(self._most[self.layout.group_of[layer_idx]], -(-tokens // self.layout.block_size))

    def _grow(self, layer_idx: int, blocks: int, device: torch.device) -> None:
        """Make room, for at least half as many again: so growing copies each entry about twice in all."""
        old = self.storage.layers[layer_idx]
        held = len(old.keys)
        if held >= blocks and old.keys.device == device:
            return
        blocks = min(self._most[self.layout.group_of[layer_idx]] * self.batch, max(blocks, held + held // 2))
        with torch.inference_mode(False):  # or nothing outside inference mode could ever write to it
            new = LayerStorage(self.layout.layers[layer_idx], self.layout, blocks, device)
        for source, target in zip(old.tensors, new.tensors, strict=True):
            target[:held].copy_(source)
        self.storage.layers[layer_idx] = new

    def _table(self, group: int, tokens: int, rows: int, device: torch.device) -> Tensor:
        """`[B, M]` int32: the block of every `block_size` places of each row."""
        at, sinks = torch.arange(-(-tokens // self.layout.block_size), device=device), self._sinks[group]
        ring = torch.where(at < sinks, at, sinks + (at - sinks) % self._rings[group])
        return (ring * rows + torch.arange(rows, device=device)[:, None]).to(torch.int32)


def _seen(places: Tensor, keys: Tensor, shown: Tensor | None, window: int, sinks: int) -> Tensor:
    """`[B, 1, S, L]`: which tokens at places `keys [B, L]` those at `places [B, S]`, the last of them, see."""
    at, key = places[:, :, None], keys[:, None]
    seen = (key >= 0) & (key <= at)
    if window:
        seen &= (key > at - window) | (key < sinks)
    if shown is not None:
        seen &= shown[:, None]
    # A token that sees nothing (padding) sees itself: a row of nothing is NaN in some kernels.
    itself = torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
    seen[:, :, -places.shape[1] :] |= itself & ~seen.any(2, keepdim=True)
    return seen[:, None]


def _attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: write new keys and values to the cache noted on them, attend to all seen."""
    cache: BlockCache | None = getattr(key, "block_cache", None)
    if cache is None:
        raise UsageError(f"{NAME} was given no BlockCache. Pass past_key_values=block_cache(model, ...) to the model.")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UsageError(f"{NAME} cannot use an attention mask {list(attention_mask.shape)}. Give a 2D one, of tokens.")
    query, key, value, layer_idx = query.detach(), key.detach(), value.detach(), module.layer_idx
    if layer_idx == 0:
        cache._view, cache._seen = cache._plan(key, attention_mask)
    view, seen, columns = cache._view, cache._seen, cache.columns + key.shape[2]
    assert view is not None
    cache._grow(layer_idx, cache._blocks(layer_idx, columns - min(cache.starts)) * key.shape[0], key.device)
    # Read first: in a ring, a long prompt's end takes the place of what its beginning sees.
    earlier = view.gathered(layer_idx) if view.visible else None
    view.update(key, value, layer_idx)
    if layer_idx == len(cache) - 1:  # not before: a forward that failed halfway can be run again
        cache.columns = columns
    if not seen:
        return attend_in_place(module, query, key, value, None, kv_cache=view, **options)
    if (kind := cache.layout.kind) is not None:
        key, value = round_kv(key, kind), round_kv(value, kind)
    if earlier is not None:
        key, value = (torch.cat([old.to(new), new], 2) for old, new in zip(earlier, (key, value), strict=True))
    mask = seen[cache.layout.group_of[layer_idx]]
    return attend(module, query, key, value, mask, **options)


def _mask(kv_length: int, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """transformers' mask interface: the 2D mask as it is, bool."""
    if not options.get("allow_is_causal_skip", True):
        raise ModelError(f"The model has an attention mask of its own; {NAME} sees all earlier tokens or a window.")
    return None if attention_mask is None else attention_mask[:, :kv_length]


@contextmanager
def block_attention(model: Any) -> Iterator[None]:
    """Let a model of transformers attend over a `BlockCache` inside the `with` block, and as before afterwards."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def block_cache(model: Any, batch: int = 1, max_tokens: int = 2048, **options: Any) -> BlockCache:
    """A `BlockCache` for a model, which stays as it is. Options are `kv`, `block_size`, `window`, `sinks` of
    `PagedOptions`. Raises `ModelError`, with the reason, for a model whose attention cannot read blocks."""
    from transformers import Cache

    if options.get("recent"):
        raise UsageError(
            "A BlockCache keeps no recent tokens in the model's type. Leave `recent` out, or use a PagedRunner."
        )
    check_interface(model)  # `layout_of` would change it for good
    with block_attention(model):
        layout = layout_of(model, PagedOptions(**options))
    made = type("BlockCache", (BlockCache, Cache), {})
    return made(model.config.get_text_config(decoder=True), layout, batch, max_tokens)  # type: ignore[no-any-return]
