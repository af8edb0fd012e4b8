"""The key-value cache of an exported graph, bound to ONNX Runtime without a copy through Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from optimizer.backends.onnx_export import past_names

FIRST_ROOM = 256
"""Tokens for which a shared buffer has room at least, so that a short prompt's first steps do not make it grow."""


class Cache(ABC):
    """Keys and values `[B, H_kv, C, d]` of every layer, on `place` ("cpu" or "cuda"); empty at first."""

    right_padded: bool

    def __init__(
        self, runtime: Any, place: str, layers: int, heads: int, width: int, batch: int, dtype: torch.dtype, room: int
    ) -> None:
        self._runtime, self._place = runtime, place
        self._past, self._present = past_names(layers), past_names(layers, "present")
        self._empty = torch.zeros(batch, heads, 0, width, dtype=dtype)
        self._room = room

    def _value(self, content: torch.Tensor) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(content.numpy(), self._place, 0)

    @abstractmethod
    def bind(self, binding: Any, length: int, /) -> None:
        """Bind past and present for a step after which the longest row has `length` tokens."""

    @abstractmethod
    def after(self, binding: Any, /) -> None:
        """Take what the step made."""


class SharedBuffer(Cache):
    """One buffer is past and present; it is bound once, and anew when it had to grow."""

    right_padded = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._values: list[Any] = []

    def bind(self, binding: Any, length: int, /) -> None:
        """Nothing, unless there is no room for the step."""
        if self._values and length <= self._room:
            return
        old = self._values
        while self._room < length:
            self._room *= 2
        shape = (*self._empty.shape[:2], self._room, self._empty.shape[3])
        self._values = []
        for index, (past, present) in enumerate(zip(self._past, self._present, strict=True)):
            content = torch.zeros(shape, dtype=self._empty.dtype)
            if old:
                kept = torch.from_numpy(old[index].numpy())
                content[:, :, : kept.shape[2]] = kept
                old[index] = None  # one layer at a time is held twice
            value = self._value(content)
            self._values.append(value)
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

    def after(self, _binding: Any, /) -> None:
        """The step wrote in place."""


class GrowingCache(Cache):
    """What a step returned as present is the past of the next: a new tensor each step."""

    right_padded = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._values = [self._value(self._empty)] * len(self._past)

    def bind(self, binding: Any, _length: int, /) -> None:
        """The last step's tensors, and new ones of the runtime's own."""
        for past, present, value in zip(self._past, self._present, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._place)

    def after(self, binding: Any, /) -> None:
        """The tensors that the runtime made, in the order in which they were bound."""
        self._values = list(binding.get_outputs()[1:])
