"""A static key-value cache: every buffer keeps its address and shape, so one compiled step serves every token.

Storage is transformers' `StaticCache`, which the models' own forward writes to. A prompt is run against a dynamic
cache first, at its own length, and copied in: attention over the whole static buffer would cost the full capacity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StaticKeyValueCache:
    """Keys and values of `batch` rows and up to `capacity` tokens, with the mask and positions that go with them.

    `mask [B, capacity]` is 0 for padding and 1 elsewhere, future slots included: causality hides those.
    `position [B, 1]` is the position of the next token. Both change in place.
    """

    def __init__(self, config: Any, batch: int, capacity: int, device: torch.device) -> None:
        from transformers import StaticCache

        self.batch, self.capacity = batch, capacity
        self.cache = StaticCache(config=config, max_cache_len=capacity)
        self.mask = torch.ones(batch, capacity, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        for static in (self.mask, self.position):
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
        self._expect(mask)

    def start(self, mask: Tensor) -> Any:
        """Empty the cache for a prompt that will be written to it directly; returns transformers' cache."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.reset()
        self._expect(mask)
        return self.cache

    def take_over(self, smaller: StaticKeyValueCache) -> None:
        """Continue where a full cache of smaller capacity stands."""
        self._fill([(layer.keys, layer.values) for layer in smaller.cache.layers])
        self.mask.fill_(1)
        self.mask[:, : smaller.capacity] = smaller.mask
        self.position.copy_(smaller.position)

    def _expect(self, mask: Tensor) -> None:
        self.mask.fill_(1)
        self.mask[:, : mask.shape[1]] = mask
        self.position[:, 0] = mask.sum(-1)

    def _fill(self, keys_values: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in zip(self.cache.layers, keys_values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.reset()
            layer.update(keys, values)

    @property
    def bytes(self) -> int:
        """Bytes that keys and values occupy."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def _repeat_last(tensor: Tensor, times: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(times, *tensor.shape[1:])])
