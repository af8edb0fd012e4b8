"""Attention and its cache in an exported graph: one operator over a buffer that stays, or standard operators.

    GroupQuery   `com.microsoft::GroupQueryAttention` of ONNX Runtime. Past and present are one buffer `[B, H_kv, C, d]`
                 with room for C tokens: a step writes its keys and values at their place, and nothing is copied. Rows
                 are padded on the right, and the sum of a row's mask is its length, as onnxruntime-genai has it.
                 Rotary embedding is part of the operator where the model rotates halves by a table of positions, and
                 stands before it otherwise.
    Standard     products, softmax, and Concat, which makes present one longer than past: what every runtime knows.

Which of them a model gets is decided by tracing it: one that does something else than the operator says why
(`Unfit`), and the next is tried.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError

NAME = "optimizer_onnx_attention"
"""Under which transformers finds the attention that is being exported."""
ROTATE = "apply_rotary_pos_emb"
"""What every model of transformers calls the function that applies rotary embedding."""


class Unfit(Exception):  # noqa: N818 (no error: the next kind of attention is tried)
    """Why an operator cannot say what the model does."""


class Layers:
    """What a graph has to know of a model's layers: how many, their heads, and which see a window."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        self.count = int(text.num_hidden_layers)
        self.kv_heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        self.head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self.window: int | None = getattr(text, "sliding_window", None)
        kinds = list(getattr(text, "layer_types", None) or [])
        self.kinds = kinds or ["sliding_attention" if self.window else "full_attention"] * self.count

    def windowed(self, layer: int) -> bool:
        """Whether the layer sees no further back than the window."""
        return self.window is not None and self.kinds[layer] == "sliding_attention"

    def by_kind(self, full: Any, sliding: Any) -> Any:
        """The mask that a model's forward takes: one, or one for each kind that it has."""
        used = {"sliding_attention" if self.windowed(layer) else self.kinds[layer] for layer in range(self.count)}
        if len(used) == 1:
            return sliding if "sliding_attention" in used else full
        return {kind: sliding if kind == "sliding_attention" else full for kind in self.kinds}


class Attention(ABC, nn.Module):
    """One kind of attention while a model is traced: the model calls `attend` for each of its layers."""

    operator: str
    shared_buffer: bool

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers

    @abstractmethod
    def begin(self, mask: Tensor, past: list[Tensor], new: int, /) -> tuple[Any, Any]:
        """The cache and the mask that the model's forward gets, for `new` tokens after `past`."""

    @abstractmethod
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, /,
        scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attention of `query [B, H, S, d]` as `[B, S, H, d]`, over what the cache's `update` returned."""

    @abstractmethod
    def present(self, cache: Any, /) -> list[Tensor]:
        """The cache after the forward, keys and values layer by layer."""

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """`model`, which must be the caller's own, attends through this object meanwhile."""
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, self.attend)
        model.config._attn_implementation = NAME
        yield


def _refuse(module: nn.Module, options: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} wants {name} in its attention, which is not exported yet.")


class Standard(Attention):
    """Standard operators; the keys and values of grouped heads are not repeated."""

    operator, shared_buffer = "standard operators", False

    def begin(self, mask: Tensor, past: list[Tensor], new: int, /) -> tuple[Any, Any]:
        """A cache that Concat makes longer, and what is added to the scores, `[B, 1, S, P + S]`."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for index in range(self.layers.count):
            layer = DynamicLayer()
            layer.keys, layer.values = past[2 * index], past[2 * index + 1]
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        return cache, self._masks(mask, past[0].shape[2], new, past[0].dtype)

    def _masks(self, mask: Tensor, past: int, new: int, dtype: torch.dtype) -> Any:
        """0 where a token is seen, the least number elsewhere."""
        query = torch.arange(past, past + new)[:, None]
        key = torch.arange(past + new)[None, :]
        full = (key <= query)[None, None] & (mask[:, None, None, :] > 0)

        def added(seen: Tensor) -> Tensor:
            return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)

        window = self.layers.window
        return self.layers.by_kind(added(full), None if window is None else added(full & (key > query - window)))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, /,
        scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """A group's heads share a product over `key`, `value [B, H_kv, T, d]`."""
        _refuse(module, options, ("s_aux", "position_bias"))
        batch, heads, new, width = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        scale = width**-0.5 if scaling is None else scaling
        rows = (query * scale).reshape(batch, kv_heads, group * new, width)
        scores = rows @ key.transpose(2, 3)  # [B, H_kv, group · S, T]
        if cap := options.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        scores = scores.reshape(batch, kv_heads, group, new, -1) + mask[:, :, None]
        weights = torch.softmax(scores, -1).reshape(batch, kv_heads, group * new, -1)
        out = (weights @ value).reshape(batch, heads, new, -1)
        return out.transpose(1, 2), None

    def present(self, cache: Any, /) -> list[Tensor]:
        """Past and new tokens, one behind the other."""
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class GroupQuery(Attention):
    """ONNX Runtime's operator over a buffer that is past and present at once.

    `tables` are the cosines and sines `[positions, r / 2]` with which the operator rotates the first r of each head's
    features; without them the model's own rotary embedding stands before it.
    """

    shared_buffer = True
    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, layers: Layers, tables: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(layers)
        cos, sin = tables or (None, None)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.operator = "GroupQueryAttention" + ("" if cos is None else " with rotary embedding")
        if layers.head_dim % 8:
            raise Unfit(f"heads of {layers.head_dim} features are no multiple of 8")

    def begin(self, mask: Tensor, past: list[Tensor], _new: int, /) -> tuple[Any, Any]:
        """A cache that hands new keys and values on as they are; the operator makes its own mask."""
        from transformers import DynamicCache

        class New(DynamicCache):  # type: ignore[misc]
            def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
                return key, value

        self._past = past
        self._lengths = (mask.sum(1) - 1).to(torch.int32)  # of each row, without the token that is last
        self._longest = torch.full((), mask.shape[1], dtype=torch.int32)
        self._present: dict[int, tuple[Tensor, Tensor]] = {}
        self._rotated: tuple[Tensor, Tensor] | None = None
        unused = torch.zeros(1, 1, 1, 1)
        return New(), self.layers.by_kind(unused, unused)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor, /,
        scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The operator on `query`, `key` and `value` of the new tokens alone."""
        _refuse(module, options, ("s_aux", "position_bias"))
        layer = getattr(module, "layer_idx", None)
        if layer is None or key.shape[-1] != value.shape[-1]:
            raise Unfit(f"{type(module).__name__} has no number, or keys and values of different widths")
        rotary = self._rotated is not None
        if rotary and (query is not self._rotated[0] or key is not self._rotated[1]):  # type: ignore[index]
            raise Unfit(f"{type(module).__name__} does something between its rotary embedding and its attention")
        self._rotated = None
        batch, heads, new, width = query.shape
        past = self._past[2 * layer], self._past[2 * layer + 1]
        attributes: dict[str, Any] = {
            "num_heads": heads, "kv_num_heads": key.shape[1], "do_rotary": int(rotary),
            "scale": float(width**-0.5 if scaling is None else scaling),
            "local_window_size": self.layers.window if self.layers.windowed(layer) else -1,
            "softcap": float(options.get("softcap") or 0),
        }  # fmt: skip
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*(x.transpose(1, 2).flatten(2) for x in (query, key, value)), *past, self._lengths, self._longest,
             *((self.cos, self.sin) if rotary else ())],
            attributes, version=1, dtypes=[query.dtype] * 3,
            shapes=[(batch, new, heads * width), past[0].shape, past[1].shape],
        )  # fmt: skip
        self._present[layer] = present[0], present[1]
        return out.unflatten(2, (heads, width)), None

    def present(self, _cache: Any, /) -> list[Tensor]:
        """The buffers, in which the new tokens are."""
        missing = set(range(self.layers.count)) - self._present.keys()
        if missing:
            raise Unfit(f"layers {sorted(missing)} do no attention of their own")
        return [tensor for layer in range(self.layers.count) for tensor in self._present[layer]]

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Where the operator rotates, the model's own function for it does nothing meanwhile."""

        def leave(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self._rotated = query, key
            return query, key

        homes = {} if self.cos is None else {home: getattr(home, ROTATE) for home in _rotating(model)}
        with super().installed(model):
            try:
                for home in homes:
                    setattr(home, ROTATE, leave)
                yield
            finally:
                for home, own in homes.items():
                    setattr(home, ROTATE, own)


def candidates(model: Any, dtype: torch.dtype, dialect: str) -> Iterator[Callable[[], Attention]]:
    """The kinds of attention that the dialect has, best first; making one may raise `Unfit`."""
    layers = Layers(model.config)
    if dialect == "onnxruntime":
        tables = rotary_tables(model, dtype)
        if tables is not None:
            yield lambda: GroupQuery(layers, tables)
        yield lambda: GroupQuery(layers, None)
    yield lambda: Standard(layers)


def rotary_tables(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines `[positions, r / 2]` by which the model rotates; None if that is not all that it does.

    Frequencies that depend on the length of the text (dynamic, longrope) or on the layer have no such table, and
    neither have models that rotate neighbouring features. The model's own function is tried on numbers.
    """
    homes = _rotating(model)
    embeddings = [module for module in model.modules() if hasattr(module, "rope_type")]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if len(embeddings) != 1 or not homes or not positions:
        return None
    kind = embeddings[0].rope_type
    if not isinstance(kind, str) or kind == "longrope" or "dynamic" in kind:
        return None
    with torch.no_grad():
        cos, sin = embeddings[0](torch.zeros(1, dtype=dtype), torch.arange(positions)[None])  # [1, positions, r]
        half = cos.shape[-1] // 2
        x = torch.linspace(-1, 1, 2 * 3 * 2 * half, dtype=dtype).reshape(1, 2, 3, 2 * half)
        low, high = x.chunk(2, -1)
        c, s = cos[:, None, -3:, :half], sin[:, None, -3:, :half]
        expected = torch.cat([low * c - high * s, high * c + low * s], -1)
        error = 4 * torch.finfo(dtype).eps
        for home in homes:
            for found in getattr(home, ROTATE)(x, x, cos[:, -3:], sin[:, -3:]):
                if found.shape != x.shape or not torch.allclose(found, expected, rtol=0, atol=error):
                    return None
    return (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()) if half % 8 == 0 else None


def _rotating(model: Any) -> list[Any]:
    """The Python modules of the model's layers that have a function for rotary embedding."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    return [home for home in homes if hasattr(home, ROTATE)]
