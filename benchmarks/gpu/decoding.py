"""Decode steps over a paged cache whose keys and values are random: what a request costs after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from optimizer.backends.linear import weight_bytes
from optimizer.backends.paged_cache import Storage
from optimizer.backends.paged_runner import PagedRunner
from optimizer.passes.base import Context, view
from optimizer.passes.decode import Decode
from optimizer.passes.fuse import Fuse
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.quantize import Quantize


def paged_runner(model: Any, options: dict[str, Any] | None, context: int, **decode: Any) -> tuple[PagedRunner, int]:
    """The runner of a scheme on a view of the model, with `context` tokens of room; bytes of weights a step reads."""
    copy, found = view(model), Context()
    if options is not None:
        Quantize(**options).run(copy, found)
    MergeLinears().run(copy, found)
    Decode(cache="paged", **({"max_context": context, "cache_tokens": context} | decode)).run(copy, found)
    Fuse(strict=False, required=False).run(copy, found)  # as every recipe ends
    runner = found.make_runner(copy, None)
    assert isinstance(runner, PagedRunner)
    embedding = copy.get_input_embeddings().weight
    return runner, weight_bytes(copy) - embedding.numel() * embedding.element_size()


def fill(storage: Storage) -> None:
    """Random keys and values (never zeros, on which a chip runs faster), of about the size that norms leave."""
    for layer in storage.layers:
        for tensor in layer.tensors:
            if tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            elif tensor is layer.keys or tensor is layer.values:
                tensor.copy_(torch.randn(tensor.shape, device=tensor.device))
            else:  # the scales of 8-bit entries
                tensor.uniform_(0.5 / 64, 1.5 / 64)


class Decoding:
    """One row of `context` tokens, and the step that takes it on, as `generate` does: nothing is waited for.

    The tokens are placeholders, and nothing computed their keys and values: those are what lies in the cache. With
    `captured` False the step runs as it was compiled, one launch after the other.
    """

    def __init__(self, runner: PagedRunner, context: int, *, captured: bool = True) -> None:
        self.runner, self.captured = runner, captured
        self.row = runner.cache.open((), share=False)
        runner.cache.reserve(self.row, context)
        runner.cache.commit(self.row, [0] * context)
        self.step = runner.step(1)

    def take_over(self) -> None:
        """Have the step go on with this row: rows may share one."""
        self.step.bind([self.row], [[1]])

    def go_on(self, count: int) -> None:
        """Take the row on by so many tokens."""
        for _ in range(count):
            self.step.reserve([1])
            if self.captured:
                self.step()
            else:
                with torch.inference_mode(False), torch.no_grad():
                    self.step.uncaptured()
            self.runner.cache.commit(self.row, [0])

    def turn(self, count: int) -> None:
        """Take the row on by so many tokens and back again, so that no later turn is at more tokens."""
        length = self.row.length
        self.take_over()
        self.go_on(count)
        self.runner.cache.truncate(self.row, length)

    @property
    def uncaptured(self) -> str:
        """Why the step was not replayed as a graph; empty where it was, or there is nothing to capture."""
        return self.runner.ledger.notes.get("graph", "")

    def idle_share(self, count: int) -> float:
        """The part of the time in which nothing runs on the device, over so many steps under the profiler."""
        length = self.row.length
        self.take_over()
        self.go_on(2)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self.go_on(count)
            torch.cuda.synchronize()
        self.runner.cache.truncate(self.row, length)
        events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
        return idle_share([(event.time_range.start, event.time_range.end) for event in events])


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The part of the time from the first start to the last end that no span covers."""
    first = reached = min(start for start, _ in spans)
    busy = 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - first)
