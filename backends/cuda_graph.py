"""A step captured once as a CUDA graph and replayed: one launch for all its kernels.

The step reads and writes buffers that never move; the host copies new values into them between replays. The graphs of a
device share one memory pool, so buckets do not add up: they are replayed one after the other on one stream, and what a
replay leaves in the pool is copied out before the next. Capture runs the step a few times first (compilation, Triton's
tuning and lazy initialization must not happen while capturing), which would advance the step's own buffers: they are
put back. A first replay must give what the step itself gave, to the bit; else, and where a step cannot be captured, it
runs uncaptured and the reason is kept.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from optimizer.errors import DeviceError

T = TypeVar("T")
Outputs = tuple[Tensor, Tensor]
WARM_UP = 3
_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. PyTorch's allocators may go on asking them, through a pointer, what they capture."""


class _Pool:
    """The memory and the stream that the graphs of a device share: memory is only reused on the stream it was made on.

    PyTorch gives a pool up once no graph is left in it, and capturing into it afterwards is an internal error. A graph
    of one fill, the anchor, is in the pool for as long as this object is.
    """

    def __init__(self, device: torch.device, index: int) -> None:
        self.device, self.index = device, index
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._anchor = self._anchored()

    def _anchored(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._record(graph, lambda: torch.zeros(1, device=self.device))
        return graph

    def capture(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Record `run`, and return the graph and what `run` returned. Raises `DeviceError` with the reason."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            return graph, self._record(graph, run)
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            self._recover(graph)
            # The end of a capture that had failed raises too, and says less.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise DeviceError(f"this step cannot be captured as a CUDA graph: {reason}") from error

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], T]) -> T:
        # cuBLAS keeps a workspace for each stream. One from outside the pool could be freed by whoever clears them
        # (torch.compile's own graphs do), while the graph goes on writing to it; one from the pool must stay in it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may allocate or wait for their own work meanwhile.
            with torch.cuda.graph(graph, pool=self.handle, stream=self.stream, capture_error_mode="thread_local"):
                return run()
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a capture that failed leaves behind, which PyTorch's `capture_end` skips when it raises.

        The allocator would go on believing that memory is taken for the graph, and the random generator that it is
        being captured: every later `torch.randn` would raise "Offset increment outside graph capture". A capture that
        ends well tells the generator that none is under way.
        """
        _BROKEN.append(graph)
        with suppress(RuntimeError):  # where capture_end came far enough, there is nothing to end or release
            torch._C._cuda_endAllocateToPool(self.index, self.handle)
            torch._C._cuda_releasePool(self.index, self.handle)
        self._anchor = self._anchored()


_POOLS: WeakValueDictionary[int, _Pool] = WeakValueDictionary()
"""The pool of each device, kept by the steps that were captured into it: with the last of them its memory goes."""


def _pool(device: torch.device) -> _Pool:
    index = torch.cuda.current_device() if device.index is None else device.index
    pool = _POOLS.get(index)
    if pool is None:
        pool = _POOLS[index] = _Pool(device, index)
    return pool


class GraphedStep:
    """`run` over `buffers`, captured at the first call (or by `capture`) and replayed by every later one.

    `run` must allocate nothing that outlives it, read nothing from the host, and return tensors. Its writes to other
    memory than `buffers` must be the same whenever it runs with the same buffers: a step that writes keys and values to
    the slots that its positions name is such a one. Steps of one device must not run on two streams at once.
    """

    def __init__(self, run: Callable[[], Outputs], buffers: Sequence[Tensor]) -> None:
        self.run, self.buffers = run, buffers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs
        self.reason = ""
        self._pool: _Pool | None = None

    def capture(self) -> None:
        """Warm up and capture. Raises `DeviceError`, with the reason, for a step that cannot be captured."""
        device = self.buffers[0].device
        with torch.cuda.device(device):
            pool = _pool(device)
            before = [buffer.clone() for buffer in self.buffers]

            def restore() -> None:
                for buffer, value in zip(self.buffers, before, strict=True):
                    buffer.copy_(value)

            pool.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(pool.stream):
                for _ in range(WARM_UP):
                    expected = self.run()
                    restore()
            torch.cuda.current_stream(device).wait_stream(pool.stream)
            graph, outputs = pool.capture(self.run)
            graph.replay()
            restore()
            if not all(_same_bits(a, b) for a, b in zip(outputs, expected, strict=True)):
                raise DeviceError("the captured step gives other numbers than the step itself")
        self.graph, self.outputs, self._pool = graph, outputs, pool

    def __call__(self) -> Outputs:
        """What the step gives, in memory of its own; uncaptured where `reason` says why."""
        if self.graph is None and not self.reason:
            try:
                self.capture()
            except DeviceError as error:
                self.reason = str(error)
        if self.graph is None:
            return self.run()
        self.graph.replay()
        logits, chosen = self.outputs
        return logits.clone(), chosen.clone()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
