"""Runners with a planted bottleneck: their steps do one thing, and what it must cost is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.evals.memory_probe import Operation, Probe
from optimizer.evals.roofline import Attention, ModelShape, Precision, Weights

MIB = 1 << 20
COLUMNS = 1024


class Planted:
    """The `Runner` protocol around a prompt and a step that are any functions, with `pause` seconds between steps."""

    def __init__(self, step: Callable[[], object], prompt: Callable[[], object] | None = None, pause: float = 0.0):
        self.step, self.prompt, self.pause = step, prompt or step, pause
        self.device, self.vocab_size, self.max_context = torch.device("cpu"), 64, 1 << 24

    def reset(self, batch: int) -> None: ...

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, all_logits: bool = False) -> Tensor:
        self.prompt()
        return torch.zeros(len(tokens), self.vocab_size)

    def decode(self, tokens: Tensor) -> Tensor:
        self.step()
        return torch.zeros(len(tokens), self.vocab_size)

    def generate(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        on_token: Callable[[Tensor], None] | None = None,
        **_: Any,
    ) -> Tensor:
        chosen = tokens[:, -1]
        for index in range(max_new_tokens):
            self.decode(chosen) if index else self.prefill(tokens)
            if self.pause:
                time.sleep(self.pause)
            if on_token:
                on_token(chosen)
        return tokens.new_zeros(len(tokens), tokens.shape[1] + max_new_tokens)

    def bytes_per_step(self, batch: int, context: int) -> int:
        return 1


def shape_of(weight_bytes: float, flops: int = 2, *attentions: Attention) -> ModelShape:
    """A model of one matrix that is read once a step, and attentions."""
    matrix = Weights("matrix", "linear", 1, 1, weight_bytes, flops, 0)
    return ModelShape("planted", (matrix, *attentions), 4.0)


def launch_bound() -> tuple[Planted, ModelShape]:
    """Two hundred operations on one element each."""
    scalar = torch.zeros(1)

    def step() -> None:
        for _ in range(200):
            scalar.add_(1)

    return Planted(step), shape_of(4)


def host_bound() -> tuple[Planted, ModelShape]:
    """A good matrix product, and four times as long of something else between two steps."""
    a = torch.randn(512, 512)
    return Planted(lambda: a @ a, pause=0.02), shape_of(4 * 512 * 512, 2 * 512**3)


def compute_bound() -> tuple[Planted, ModelShape]:
    """A product of large matrices: a prompt of many tokens."""
    a = torch.randn(768, 768)
    return Planted(lambda: a @ a), shape_of(4 * 768 * 768, 2 * 768 * 768)  # FLOP a token, 768 tokens


def kv_bound(context: int) -> tuple[Planted, ModelShape, Probe]:
    """One head that attends over a huge context, and no weights to speak of."""
    attention = Attention("layers.0.attention", 1, 1, 64, kv=Precision(32))

    def operation_at(size: int) -> Operation:
        tokens = max(8, size // (2 * 64 * 4))
        query = torch.randn(1, 1, 1, 64)
        keys, values = torch.randn(1, 1, tokens, 64), torch.randn(1, 1, tokens, 64)
        moved = keys.nbytes + values.nbytes
        return Operation(lambda: F.scaled_dot_product_attention(query, keys, values), moved, moved)

    full = context * 2 * 64 * 4
    return Planted(operation_at(full).run, lambda: None), shape_of(64, 2, attention), Probe(operation_at, full)


def saturated() -> tuple[Planted, ModelShape, Probe]:
    """A matrix far larger than any cache, times a vector."""
    return _matvec(passes=1)


def locality_lost() -> tuple[Planted, ModelShape, Probe]:
    """Four products with one matrix that no cache holds, where one pass would do."""
    return _matvec(passes=4)


def _matvec(passes: int, full: int = 64 * MIB) -> tuple[Planted, ModelShape, Probe]:
    def operation_at(size: int) -> Operation:
        matrix, vector = torch.randn(max(1, size // (4 * COLUMNS)), COLUMNS), torch.randn(COLUMNS)

        def run() -> None:
            for _ in range(passes):
                matrix.mv(vector)

        return Operation(run, passes * matrix.nbytes, matrix.nbytes)

    return Planted(operation_at(full).run), shape_of(full), Probe(operation_at, full)


def irregular(full: int = 64 * MIB) -> tuple[Planted, ModelShape, Probe]:
    """Single elements from anywhere in a table far larger than any cache."""

    def operation_at(size: int) -> Operation:
        table = torch.randn(size // 4)
        index = torch.randint(0, len(table), (min(len(table), 1 << 18),))
        return Operation(lambda: table.take(index), index.numel() * 4, table.nbytes)

    return Planted(operation_at(full).run), shape_of(4 * (1 << 18)), Probe(operation_at, full)
