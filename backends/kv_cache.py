"""A static key-value cache: every buffer keeps its address and shape, so one compiled step serves every token.

Storage is transformers' `StaticCache`, which the models' own forward writes to. A prompt is run against a dynamic
cache first, at its own length, and copied in: attention over the whole static buffer would cost the full capacity.
Sliding-window layers keep every token here and leave the window to the attention mask: transformers' own rolling
layer counts in Python integers, which a compiled step would freeze at their first value. How a layer writes is in
`static_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StaticKeyValueCache:
    """Keys and values of `batch` rows and up to `capacity` tokens, with the mask and positions that go with them.

    `mask [B, capacity]` is 0 for padding and 1 elsewhere, future slots included: causality hides those.
    `position [B, 1]` is the position of the next token, padding not counted, and `length` the tokens that are held,
    padding counted. All change in place.
    """

    def __init__(self, config: Any, batch: int, capacity: int, device: torch.device) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer as TransformersLayer

        from optimizer.backends.static_layer import StaticLayer

        self.batch, self.capacity = batch, capacity
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.cache = StaticCache(config=config, max_cache_len=capacity)
        self.cache.layers = [
            StaticLayer(capacity, self.length) if isinstance(layer, TransformersLayer) else layer
            for layer in self.cache.layers
        ]
        self.mask = torch.ones(batch, capacity, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        for static in (self.mask, self.position, self.length):
            torch._dynamo.mark_static_address(static)

    def load(self, prompt: Any, mask: Tensor) -> None:
        """Take over a prompt's dynamic cache; `mask [B, S]` says which of its tokens are real.

        A prompt that was run without spare rows (logits of all tokens were wanted) has its last row repeated.
        """
        spare = self.batch - mask.shape[0]
        keys_values = [(layer.keys, layer.values) for layer in prompt.layers]
        if spare:
            mask = _repeat_last(mask, spare)
            keys_values = [(_repeat_last(k, spare), _repeat_last(v, spare)) for k, v in keys_values]
        self._fill(keys_values)
        self.mask.fill_(1)
        self.mask[:, : mask.shape[1]] = mask
        self.position[:, 0] = mask.sum(-1)

    def take_over(self, smaller: StaticKeyValueCache) -> None:
        """Continue where a full cache of smaller capacity stands."""
        self._fill([(layer.keys, layer.values) for layer in smaller.cache.layers])
        self.mask.fill_(1)
        self.mask[:, : smaller.capacity] = smaller.mask
        self.position.copy_(smaller.position)

    def _fill(self, keys_values: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in zip(self.cache.layers, keys_values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.reset()
            layer.update(keys, values)
        self.length.fill_(keys_values[0][0].shape[2])

    def advance(self) -> None:
        """One token more in every row."""
        self.position.add_(1)
        self.length.add_(1)

    @property
    def bytes(self) -> int:
        """Bytes that keys and values occupy."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def prompt_cache(config: Any) -> Any:
    """transformers' dynamic cache as `load` takes it: every token kept, in sliding-window layers too."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]
    return cache


def _repeat_last(tensor: Tensor, times: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(times, *tensor.shape[1:])])
