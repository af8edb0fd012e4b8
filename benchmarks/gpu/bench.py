"""Timing on a GPU: graphs of one kernel over rotating operands, and the rows that were found."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from optimizer.evals.timing import time_interleaved

Call = Callable[[], object]


@dataclass
class Bench:
    """A device, how much smaller than life the shapes are, and the rows found so far."""

    device: torch.device
    shrink: int = 1
    repeats: int = 10
    rows: dict[str, float] = field(default_factory=dict)
    bandwidth: float = math.nan

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """A layer's shape, or a small one with the same proportions."""
        return max(128, n // self.shrink // 128 * 128), max(256, k // self.shrink // 256 * 256)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Standard normal values: never zeros, on which a chip runs faster."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def record(self, name: str, value: float) -> None:
        """Keep a figure and show it."""
        self.rows[name] = value
        print(f"{name:<64} {value:10.4f}", flush=True)

    def copies(self, nbytes: int) -> int:
        """How many operands of so many bytes pass the cache five times over."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type != "cpu" else 1
        return min(64, math.floor(5 * cache / nbytes) + 1) if self.shrink == 1 else 2

    def seconds(self, candidates: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        """Median seconds of one call of each candidate, whose calls differ in their operands alone."""
        replays = {name: self._replay(calls) for name, calls in candidates.items()}
        times = time_interleaved(replays, repeats=self.repeats, warmup=2, device=self.device)
        return {name: median(times[name]) / len(calls) for name, calls in candidates.items()}

    def _replay(self, calls: Sequence[Call]) -> Call:
        """All calls as one graph; one after the other where there are no graphs."""
        if self.device.type != "cuda":
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in (*calls, *calls):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        del kept
        return graph.replay

    def free(self) -> None:
        """Let go of what the last part has left: compiled graphs and their memory."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
