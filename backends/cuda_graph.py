"""A step captured once as a CUDA graph and replayed: one launch for all its kernels.

The step reads and writes buffers that never move; the host copies new values into them between replays. All graphs of a
process share one memory pool, so buckets do not add up. Capture runs the step a few times first (compilation, Triton's
tuning and lazy initialization must not happen while capturing), which would advance the step's own buffers: they are
put back. A first replay must give what the step itself gave, to the bit; else, and where a step cannot be captured, it
runs uncaptured and the reason is kept. The result of a replay lives in memory that the next one overwrites, so it is
copied out.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import DeviceError

Outputs = tuple[Tensor, Tensor]
WARM_UP = 3
_POOLS: dict[int, Any] = {}


class GraphedStep:
    """`run` over `buffers`, captured at the first call (or by `capture`) and replayed by every later one.

    `run` must allocate nothing that outlives it, read nothing from the host, and return tensors. Its writes to other
    memory than `buffers` must be the same whenever it runs with the same buffers: a step that writes keys and values to
    the slots that its positions name is such a one.
    """

    def __init__(self, run: Callable[[], Outputs], buffers: Sequence[Tensor]) -> None:
        self.run, self.buffers = run, buffers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs
        self.reason = ""

    def capture(self) -> None:
        """Warm up and capture. Raises `DeviceError`, with the reason, for a step that cannot be captured."""
        device = self.buffers[0].device
        before = [buffer.clone() for buffer in self.buffers]

        def restore() -> None:
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                expected = self.run()
                restore()
        torch.cuda.current_stream(device).wait_stream(stream)
        index = torch.cuda.current_device() if device.index is None else device.index
        pool = _POOLS.setdefault(index, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.outputs = self.run()
        except RuntimeError as error:
            raise DeviceError(f"this step cannot be captured as a CUDA graph: {error}") from error
        graph.replay()
        restore()
        if not all(_same_bits(a, b) for a, b in zip(self.outputs, expected, strict=True)):
            raise DeviceError("the captured step gives other numbers than the step itself")
        self.graph = graph

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
