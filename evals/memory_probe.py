"""Which kind of memory problem an operation has: bandwidth used up, irregular access, or locality lost.

Without hardware counters the answer comes from a sweep: the operation runs at smaller and smaller working sets, and
its bytes per second are set against what a plain stream over a working set of that size reaches, measured in the same
rounds on the same machine:

- **bandwidth saturated**: at full size it moves bytes about as fast as the stream does. Fewer bytes is all that helps.
- **locality lost**: it uses its data again, and is faster by the step that the caches make once it fits one of them.
  Smaller blocks, or fusing what writes the data with what reads it, helps.
- **irregular access**: it stays far below the stream, wherever the data lies. Another layout helps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from optimizer.errors import UsageError
from optimizer.evals.timing import stopwatch, synchronise

Kind = Literal["bandwidth saturated", "irregular access", "locality lost"]
OperationAt = Callable[[int], "Operation"]

SATURATED = 0.5  # of a plain stream's rate: sequential access reaches it somewhere, scattered access nowhere
RECOVERS = 1.5  # faster by this much in a cache than out of it: caches are 2 to 8 times the memory
STREAM_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the operation at some working set: `touched` bytes, of which `distinct` are different ones."""

    run: Callable[[], object]
    touched: int
    distinct: int

    @property
    def passes(self) -> float:
        """How often each byte is used."""
        return self.touched / self.distinct


@dataclass(frozen=True, slots=True)
class Probe:
    """An operation at any working set, and the working set in bytes at which a step runs it."""

    operation_at: OperationAt
    working_set: int


@dataclass(frozen=True, slots=True)
class Point:
    """A working set in bytes, and the bytes per second of the operation and of a stream over it."""

    working_set: int
    bytes_per_second: float
    stream_bytes_per_second: float

    @property
    def share(self) -> float:
        """The operation's rate as a share of the stream's."""
        return self.bytes_per_second / self.stream_bytes_per_second


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """The verdict, why, and the sweep behind it, smallest working set first."""

    kind: Kind
    why: str
    points: tuple[Point, ...]


def probe_memory(
    operation_at: OperationAt, sizes: Sequence[int], *, repeats: int = 7, device: torch.device | str = "cpu",
    box_seconds: float = math.inf,
) -> MemoryKind:  # fmt: skip
    """Sweep an operation over working sets of `sizes` bytes, the last being its own, and say what is wrong with it.

    `operation_at(bytes)` builds it at about that working set. All sizes and their streams are timed interleaved, each
    after a call that is not timed, so that what fits a cache lies in it as it does from step to step. The fastest of
    `repeats` counts: neighbours only slow a machine down. After `box_seconds` no further round is begun.

    Raises:
        UsageError: fewer than two sizes, or an operation that touches nothing.
    """
    if len(sizes) < 2 or sorted(sizes) != list(sizes):
        raise UsageError(f"probe_memory: sizes={list(sizes)} must be at least two, growing; give smaller sets as well")
    operations = [operation_at(size) for size in sizes]
    if min(min(op.touched, op.distinct) for op in operations) < 1:
        raise UsageError("probe_memory: an operation touches 0 bytes; operation_at must say what each call reads")
    streams = [_stream(op.distinct, device) for op in operations]
    times = _fastest(
        [run for pair in zip((op.run for op in operations), streams, strict=True) for run in pair],
        repeats,
        device,
        box_seconds,
    )
    points = tuple(
        Point(op.distinct, op.touched / times[2 * i], op.distinct / times[2 * i + 1]) for i, op in enumerate(operations)
    )
    return judge_sweep(points, operations[-1].passes)


def judge_sweep(points: Sequence[Point], passes: float) -> MemoryKind:
    """The kind by a sweep, smallest first; `passes` is how often the operation uses each byte at full size."""
    points = tuple(points)
    full, best = points[-1], max(points[:-1], key=lambda point: point.bytes_per_second)
    inside = max(points[:-1], key=lambda point: point.share)
    at = f"at {_size(full.working_set)} it moves {full.bytes_per_second / 1e9:.3g} GB/s"
    recovery = best.bytes_per_second / full.bytes_per_second
    regular = max(inside.share, full.share) >= SATURATED
    if passes > RECOVERS and recovery >= RECOVERS and regular:
        return MemoryKind(
            "locality lost",
            f"{at} and uses each byte {passes:.3g} times; at {_size(best.working_set)} it moves "
            f"{best.bytes_per_second / 1e9:.3g} GB/s, so the data no longer fits the cache that it fits there",
            points,
        )
    if full.share >= SATURATED:
        return MemoryKind("bandwidth saturated", f"{at}, {full.share:.0%} of a plain stream over as many bytes", points)
    return MemoryKind(
        "irregular access",
        f"{at}, {full.share:.0%} of a plain stream, and {inside.share:.0%} at best over smaller sets: what it reads "
        "does not lie together",
        points,
    )


def working_sets(full: int, smallest: int = 1 << 18, step: int = 4) -> list[int]:
    """Working sets from `smallest` to `full` bytes, each `step` times the one before; at least two."""
    sizes = [full]
    while sizes[0] // step >= smallest or len(sizes) < 2:
        sizes.insert(0, max(1, sizes[0] // step))
    return sizes


def _fastest(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device | str, box_seconds: float
) -> list[float]:
    """The least seconds of each call, in rounds, each call following one of itself."""
    best = [float("inf")] * len(calls)
    began = time.perf_counter()
    for index in range(max(1, repeats)):
        if index and time.perf_counter() - began > box_seconds:
            break
        for place, call in enumerate(calls):
            call()
            synchronise(device)
            watch = stopwatch(device)
            watch.mark()
            call()
            watch.mark()
            best[place] = min(best[place], max(watch.gaps()[0], 1e-9))
    return best


def _stream(size: int, device: torch.device | str) -> Callable[[], object]:
    """The plainest read of `size` bytes."""
    rows = max(1, size // (4 * STREAM_CHUNK))
    matrix = torch.rand(rows, STREAM_CHUNK, device=device)
    vector = torch.rand(STREAM_CHUNK, device=device)
    return lambda: matrix.mv(vector)


def _size(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"
