"""One layer of the static cache: transformers' layer, with the write and the counting of tokens done our way.

On a GPU one `kv_write` puts keys and values in, which fuses with the rotation before it: a contiguous cache is the case
of one block a row. On a CPU `index_copy_` scatters them, of which Inductor makes one loop with what computed them. All
layers count by one tensor, that of the cache they belong to: a step then computes where its tokens go once, not once a
layer.

Importing this imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer as TransformersLayer

from optimizer.backends.kernels.kv_write import kv_write


class StaticLayer(TransformersLayer):  # type: ignore[misc, unused-ignore]
    """Keys and values `[B, H_kv, C, D]`. The next token goes where `length` says, an int64 that all layers share."""

    def __init__(self, capacity: int, length: Tensor) -> None:
        super().__init__(capacity)
        self.cumulative_length = length
        self.by_op = length.is_cuda
        """Whether keys and values are written by `kv_write`."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[B, H_kv, S, D]`, and return all; whoever calls counts the tokens afterwards."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        places = self.cumulative_length + torch.arange(tokens, device=self.device)  # [S]
        if self.by_op and key_states.shape == value_states.shape:
            rows = torch.arange(batch, device=self.device) * self.max_cache_len
            kv_write(key_states, value_states, self.keys, self.values, None, None, rows[:, None] + places)
        else:
            self.keys.index_copy_(2, places, key_states)
            self.values.index_copy_(2, places, value_states)
        return self.keys, self.values
