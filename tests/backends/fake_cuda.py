"""A CUDA runtime that records calls and makes them again: what the logic of capturing needs, without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from optimizer.backends import cuda_graph


class FakeGraph:
    """Calls that were made while it was being captured, and the tensors that their results go to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], tuple[Tensor, ...]]] = []

    def replay(self) -> None:
        for function, outputs in self.calls:
            for output, value in zip(outputs, function(), strict=True):
                output.copy_(value)


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert other is not self


class FakeCuda:
    """The part of `torch.cuda` that capturing uses. A failed capture leaves its stream set, as a real one does."""

    def __init__(self) -> None:
        self.current = self.default = FakeStream()
        self.capturing: FakeGraph | None = None
        self.captures = self.pools_ended = 0
        self.ending = ""
        """What the end of a capture raises."""

    def stream(self, stream: FakeStream) -> Any:
        @contextmanager
        def entered() -> Iterator[None]:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        return entered()

    @contextmanager
    def graph(self, graph: FakeGraph, *, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert pool == (0, 7)
        assert capture_error_mode == "thread_local"
        before, self.current, self.capturing = self.current, stream, graph
        failed = False
        try:
            yield
        except RuntimeError:
            failed = True
            raise
        finally:
            self.capturing = None
            if failed or (self.ending and graph.calls):
                raise RuntimeError(self.ending or "operation failed due to a previous error during capture")
            self.current = before
            self.captures += bool(graph.calls)

    def end_allocation(self, _device: int, _pool: Any) -> None:
        self.pools_ended += 1

    def recorded(self, function: Callable[[], tuple[Tensor, ...]], like: tuple[Tensor, ...]) -> Callable[[], Any]:
        """`function`, which does not run while a graph is captured, but whenever that is replayed."""

        def call() -> tuple[Tensor, ...]:
            if self.capturing is None:
                return function()
            outputs = tuple(torch.full_like(t, 99) for t in like)
            self.capturing.calls.append((function, outputs))
            return outputs

        return call


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put one in the place of the real runtime."""
    runtime = FakeCuda()
    replaced: dict[str, Any] = {
        "CUDAGraph": FakeGraph, "Stream": lambda _device: FakeStream(), "stream": runtime.stream,
        "graph": runtime.graph, "graph_pool_handle": lambda: (0, 7), "current_device": lambda: 0,
        "current_stream": lambda _device: runtime.current, "device": lambda _device: nullcontext(),
        "set_stream": lambda stream: setattr(runtime, "current", stream),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", runtime.end_allocation, raising=False)
    monkeypatch.setattr(cuda_graph, "_POOLS", WeakValueDictionary())
    monkeypatch.setattr(cuda_graph, "_BROKEN", [])
    return runtime
