"""What measurement needs of a model that runs: the `Runner` protocol.

Eager, compiled and exported models all satisfy it, so each is timed by the same clock and its quality is measured
on exactly what will be deployed. Token tensors are int64, left-padded; a mask is 1 where a token is real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, device


@runtime_checkable
class Runner(Protocol):
    """A language model with a key-value cache that can be prefilled and stepped.

    `reset` empties the cache for a batch of `batch` rows; `prefill` then takes `tokens [B, S]` (and `mask [B, S]`)
    and returns the logits after the last token `[B, V]`, or after every token `[B, S, V]` with `all_logits`;
    `decode` appends `tokens [B]` and returns `[B, V]`. Logits are float32.
    """

    device: device
    vocab_size: int
    max_context: int

    def reset(self, batch: int) -> None:
        """Empty the cache and make room for `batch` rows."""

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, all_logits: bool = False) -> Tensor:
        """Run the prompt `[B, S]`; logits `[B, V]`, or `[B, S, V]` with `all_logits`."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token a row `[B]`; logits `[B, V]`."""

    def generate(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue the prompts `[B, S]`; returns `[B, S + new]`. `on_token` receives each new `[B]` as it is made."""

    def bytes_per_step(self, batch: int, context: int) -> int:
        """The fewest bytes one decode step must move at this batch and context length."""
