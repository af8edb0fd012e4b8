"""What a key-value cache must hold for a model: heads and windows of every layer, element type, bytes per token.

The shapes are read off one forward pass over one token, so they are right for every model of transformers that passes
its keys and values to a cache, whatever its configuration calls them. The same pass proves that each layer attends
through the function that transformers looks up: a layer that does not would never see a paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.kv import KvKind, check_kv_kind

_ELEMENTS: dict[KvKind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SCALE_BYTES = 4
FEW_TOKENS = 16
"""Up to so many tokens a row are attended one by one, in place."""
ATTENTION_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer: `kv_heads` of `head_dim` a token. A `window` of 0 sees everything."""

    kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class KeyValueLayout:
    """How keys and values are stored: blocks of `block_size` tokens, elements of `dtype` or of an 8-bit `kind`.

    Layers with the same window form a group: a token takes the same block in each of them, and one group's blocks can
    be given back (they left the window) while another keeps its own. With `sinks`, the first tokens stay visible
    beside the window (StreamingLLM, arXiv:2309.17453). With `recent`, the last so many tokens of each sequence are kept
    in `dtype` as well (`recent_kv`).
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    kind: KvKind | None = None
    block_size: int = 32
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_kv_kind(self.kind)
        if not self.layers or self.block_size < 1 or self.sinks < 0:
            raise UsageError(
                f"Invalid KeyValueLayout: {len(self.layers)} layers, block_size {self.block_size}, sinks {self.sinks}. "
                "Use at least one layer, a block of at least one token, and 0 or more sinks."
            )
        if self.recent and (self.kind is None or self.recent < FEW_TOKENS):
            raise UsageError(
                f"Invalid recent {self.recent} with kv {self.kind}. Keep {FEW_TOKENS} or more tokens, beside an 8-bit "
                "cache: any other has all of them in the model's type."
            )

    @property
    def elements(self) -> torch.dtype:
        """The type that is stored."""
        return self.dtype if self.kind is None else _ELEMENTS[self.kind]

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each group, the one that sees everything first."""
        return tuple(sorted({layer.window for layer in self.layers}))

    @property
    def group_of(self) -> tuple[int, ...]:
        """The group of each layer."""
        return tuple(self.windows.index(layer.window) for layer in self.layers)

    def bytes_per_token(self, group: int | None = None) -> int:
        """Bytes of keys, values and scales that a token takes, over all layers or those of a group."""
        scale = 0 if self.kind is None else _SCALE_BYTES
        return sum(
            2 * layer.kv_heads * (layer.head_dim * self.elements.itemsize + scale)
            for layer, at in zip(self.layers, self.group_of, strict=True)
            if group in (None, at)
        )

    @property
    def ring(self) -> int:
        """Slots of a sequence's ring of recent tokens; 0 without."""
        return -(-(self.recent + FEW_TOKENS) // 16) * 16 if self.recent else 0

    @property
    def ring_bytes(self) -> int:
        """Bytes of a sequence's rings, over all layers."""
        return self.ring * self._own_bytes

    @property
    def _own_bytes(self) -> int:
        """Bytes of a token in `dtype`, over all layers."""
        return sum(2 * layer.kv_heads * layer.head_dim * self.dtype.itemsize for layer in self.layers)

    def bytes_read(self, context: int) -> int:
        """The fewest bytes that the step of one row reads, `context` tokens in its cache; windows not counted."""
        recent = min(self.recent, context)
        return (context - recent) * self.bytes_per_token() + recent * self._own_bytes

    def blocks_for(self, tokens: int, group: int) -> int:
        """The most blocks that a sequence of `tokens` holds at once: all, or those of the sinks and the window.

        A window that starts inside a block keeps that block, and the next block is there before the last one leaves.
        """
        whole, window = -(-tokens // self.block_size), self.windows[group]
        if not window:
            return whole
        return min(whole, -(-self.sinks // self.block_size) + -(-window // self.block_size) + 1)


def windowed(layout: KeyValueLayout, window: int, sinks: int) -> KeyValueLayout:
    """The layout in which layers that see everything see `window` tokens and the first `sinks` (StreamingLLM)."""
    if window < 1:
        raise UsageError(f"Invalid window {window}. Attend to at least the token itself.")
    layers = tuple(
        LayerShape(layer.kv_heads, layer.head_dim, min(layer.window or window, window)) for layer in layout.layers
    )
    return replace(layout, layers=layers, sinks=sinks)


class PositionsGiven:
    """What transformers' models ask a cache besides `update`, for one that is always given with positions.

    Nothing is counted, and no mask is made from what is said here: the paged attention makes its own.
    """

    is_compileable = False

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Not counted."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, _layer_idx: int = 0) -> tuple[int, int]:
        """As for an empty cache."""
        return query_length, 0


class ProbeCache(PositionsGiven):
    """A cache that keeps nothing: it notes the shapes it is given, and which layers attended through our function."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.value_heads: dict[int, tuple[int, int]] = {}
        self.attended: set[int] = set()
        self.variants: set[str] = set()
        self.dtype = torch.float32

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as they are."""
        self.shapes[layer_idx] = (key.shape[1], key.shape[3])
        self.value_heads[layer_idx] = (value.shape[1], value.shape[3])
        self.dtype = key.dtype
        return key, value


def check_interface(model: Any) -> None:
    """`ModelError` for a model that does not look its attention up by name, as transformers lets it."""
    if not model.is_backend_compatible():
        name = type(model).__name__
        raise ModelError(f"{name} computes attention itself, not through transformers' attention interface")


def probe(model: Any, *, kind: KvKind | None = None, block_size: int = 32, recent: int = 0) -> KeyValueLayout:
    """The layout of a model whose attention is the paged one (`paged_cache.register`), from one forward pass.

    Raises `ModelError`, with the reason, for a model whose layers keep something else than keys and values of
    one shape, or attend in a way of their own.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    name = type(model).__name__
    kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if isinstance(options, dict):  # transformers 5.17 gives one for all layers with a window
        options = [options if kind == "sliding_attention" else {} for kind in kinds]
    if other := sorted(set(kinds) - set(ATTENTION_TYPES)):
        raise ModelError(f"{name} has layers of type {', '.join(other)}, which keep no paged keys and values")
    cache = ProbeCache()
    with torch.inference_mode(False), torch.no_grad():
        device = next(model.parameters()).device
        zeros = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(input_ids=zeros, position_ids=zeros, past_key_values=cache, use_cache=True, kv_cache=cache)
    layers = range(len(kinds))
    if missed := [i for i in layers if i not in cache.attended]:
        raise ModelError(f"{name} computes attention itself in {len(missed)} of {len(kinds)} layers")
    if cache.variants:
        raise ModelError(
            f"{name} attends with {', '.join(sorted(cache.variants))}, which no kernel over blocks computes"
        )
    if cache.shapes != cache.value_heads or sorted(cache.shapes) != list(layers):
        raise ModelError(f"{name} keeps keys and values of different shapes")
    windows = [int(option.get("sliding_window") or 0) for option in options]
    return KeyValueLayout(
        tuple(LayerShape(*cache.shapes[i], windows[i]) for i in layers), cache.dtype, kind, block_size, recent=recent
    )
