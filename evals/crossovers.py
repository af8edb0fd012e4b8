"""Where the bottleneck of a model moves: the batch, context or prompt at which another term becomes the larger one.

Computed from the model's shape and a machine's roofline, before anything is run there. Each rests on a quantity that
only grows with the size in question, so bisection finds the first size that crosses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optimizer.evals.roofline import ModelShape, Roofline, StepCost

MOST = 1 << 24
"""Sizes beyond this are called never."""


@dataclass(frozen=True, slots=True)
class Crossover:
    """From `value` on (`axis` is batch, context or prompt) `after` binds instead of `before`; None: never."""

    phase: str
    axis: str
    value: int | None
    before: str
    after: str
    text: str


def binding(cost: StepCost, roofline: Roofline) -> str:
    """What sets the floor: `compute`, or the larger part of the bytes, `weights` or `KV reads`."""
    if cost.flops / roofline.peak_flops >= cost.required_bytes / roofline.bandwidth:
        return "compute"
    return "weights" if cost.weight_bytes >= cost.kv_bytes else "KV reads"


def crossovers(shape: ModelShape, roofline: Roofline, *, batch: int, context: int) -> list[Crossover]:
    """Where decode and prefill change their bottleneck around a workload."""

    def computes(cost: StepCost) -> bool:
        return cost.flops / roofline.peak_flops >= cost.required_bytes / roofline.bandwidth

    def reads_cache(cost: StepCost) -> bool:
        return cost.kv_bytes > cost.weight_bytes

    def decode(rows: int, cached: int) -> StepCost:
        return shape.decode(rows, cached)

    return [
        _crossover(
            "decode", "batch", f"at context {context:,}", "bytes", "compute", lambda n: computes(decode(n, context))
        ),
        _crossover(
            "decode", "batch", f"at context {context:,}", "weights", "KV reads",
            lambda n: reads_cache(decode(n, context)),
        ),
        _crossover(
            "decode", "context", f"at batch {batch}", "weights", "KV reads", lambda n: reads_cache(decode(batch, n))
        ),
        _crossover(
            "prefill", "prompt", f"at batch {batch}", "bytes", "compute", lambda n: computes(shape.prefill(batch, n))
        ),
    ]  # fmt: skip


def _crossover(phase: str, axis: str, where: str, before: str, after: str, crossed: Callable[[int], bool]) -> Crossover:
    value = first(crossed)
    verb = "sets the floor" if after == "compute" else "are most of the bytes"
    earlier = "set the floor" if after == "compute" else "are most of the bytes"
    if value is None:
        text = f"{phase} {where}: {before} {earlier} at every {axis}"
    elif value <= 1:
        text = f"{phase} {where}: {after} {verb} at every {axis}"
    else:
        text = f"{phase} {where}: {before} {earlier} until {axis} {value - 1:,}, {after} from {value:,} on"
    return Crossover(phase, axis, value, before, after, text)


def first(crossed: Callable[[int], bool], most: int = MOST) -> int | None:
    """The smallest size of at least 1 for which `crossed` holds, where it holds for all larger ones; None: none."""
    high = 1
    while not crossed(high):
        if high >= most:
            return None
        high *= 2
    low = high // 2  # not crossed, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if crossed(middle) else (middle, high)
    return high
