"""Kernels and layers on the roofline: what each had to compute and move, how long it took, and what it could reach.

What a layer must do is counted by the model's shape. A kernel's work is that of the layers it ran for, found by the
module whose range it ran in, or, in a compiled step where modules do not run, by the shape of its weight and by order.
Where it belongs to no layer, its bytes are those of the tensors it was given plus one output as large as the largest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optimizer.evals.roofline import Attention, Kind, ModelShape, OpCost, Roofline, StepCost, Weights
from optimizer.evals.trace import Event, Split, Term

MATMUL_KINDS: frozenset[Kind] = frozenset({"linear", "expert", "router", "lm_head"})
ITEM_BYTES = {
    "float": 4, "double": 8, "int": 4, "long int": 8, "short int": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
    "c10::BFloat16": 2, "c10::Half": 2, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
}  # fmt: skip
READS_ROWS = frozenset({"aten::embedding", "aten::index_select", "aten::index", "aten::gather", "aten::take"})


@dataclass(frozen=True, slots=True)
class Placed:
    """A kernel (all its calls in a step) or a layer on the roofline.

    `flops` and `bytes` are None where they are not known. `attainable` is the least time on this roofline over the
    time taken: 1 is perfect. `bound` says which ceiling that least time is set by.
    """

    name: str
    term: str
    calls: float
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    attainable: float | None = None
    bound: Literal["memory", "compute"] | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """The rate at which it moved its bytes."""
        return self.bytes / self.seconds if self.bytes is not None and self.seconds else None


def place(
    found: Split, shape: ModelShape, cost: StepCost, roofline: Roofline, bandwidth: Callable[[float], float]
) -> tuple[list[Placed], list[Placed]]:
    """Every kernel, by name, and every layer that could be told apart, each sorted by its time.

    `bandwidth` gives bytes/s by working set: what belongs to no layer moves activations, which may lie in a cache.
    """
    costs = {op.name: op for op in cost.ops}
    owners = dict(_owners(found, shape))
    worked = set(owners.values())
    layer_seconds: dict[str, float] = {name: part for name, part in found.layers.items() if name not in worked}
    calls: dict[str, float] = defaultdict(float)
    work: dict[str, list[tuple[float, float] | None]] = defaultdict(list)
    for index, (event, term, seconds, inside) in enumerate(found.work):
        owner = owners.get(index)
        if owner is not None:
            layer_seconds[owner] = layer_seconds.get(owner, 0.0) + seconds
        calls[event.name] += 1
        known = _layer_work(costs[owner]) if owner is not None else None
        if known is None and not (inside is not None and term == "matmul"):
            known = _tensor_work(event)
        work[event.name].append(known)
    owned = {found.work[index][0].name for index in owners}
    kernels = []
    for use in found.kernels.values():
        total, line = _total(work[use.name]), roofline
        if total is not None and total[1] and use.name not in owned:
            line = Roofline(roofline.peak_flops, bandwidth(total[1] / len(work[use.name])))
        kernels.append(_placed(use.name, use.term, use.calls, use.seconds, total, line))
    layers = [
        _placed(name, costs[name].kind, 1, seconds, _layer_work(costs[name]), roofline)
        for name, seconds in layer_seconds.items()
        if name in costs
    ]
    return longest_first(kernels), longest_first(layers)


def longest_first(items: Sequence[Placed]) -> list[Placed]:
    """The longest first."""
    return sorted(items, key=lambda item: -item.seconds)


def floor_of(cost: StepCost, term: Term, roofline: Roofline) -> float | None:
    """The least seconds of all matrix multiplies, or of attention with its cache; None for terms that need not be."""
    kinds = {"matmul": MATMUL_KINDS, "attention": frozenset({"attention"})}.get(term)
    if kinds is None:
        return None
    ops = [op for op in cost.ops if op.kind in kinds]
    return roofline.seconds(sum(op.flops for op in ops), sum(op.weight_bytes + op.kv_bytes for op in ops))


def _owners(found: Split, shape: ModelShape) -> Iterator[tuple[int, str]]:
    """Which layer each event that worked belongs to, where that can be told."""
    waiting: dict[tuple[int, int], list[str]] = defaultdict(list)
    for op in shape.ops:
        if isinstance(op, Weights) and op.kind in MATMUL_KINDS:
            waiting[op.rows, op.columns].append(op.name)
    matmuls = {name for names in waiting.values() for name in names}
    attentions = [op.name for op in shape.ops if isinstance(op, Attention)]
    attended = [index for index, (_, term, _, _) in enumerate(found.work) if term == "attention"]
    if attentions and attended and len(attended) % len(attentions) == 0:
        each = len(attended) // len(attentions)
        yield from ((index, attentions[place // each]) for place, index in enumerate(attended) if place % each == 0)
    unknown = []
    for index, (event, term, _, layer) in enumerate(found.work):
        if term != "matmul":
            continue
        if layer is not None and layer in matmuls:
            yield index, layer
        elif key := next((key for key in _matrices(event) if waiting.get(key)), None):
            yield index, waiting[key].pop(0)
        else:
            unknown.append(index)
    left = [op.name for op in shape.ops if any(op.name in names for names in waiting.values())]
    if len(left) == len(unknown):  # what is left by size goes by order
        yield from zip(unknown, left, strict=True)


def _matrices(event: Event) -> Iterator[tuple[int, int]]:
    """Sizes [N, K] that a weight among the inputs may have: as stored, transposed, or with two values a byte."""
    plain = [shape for shape in event.shapes if len(shape) == 2 and all(isinstance(size, int) for size in shape)]
    for first, second in reversed(plain):
        yield from ((first, second), (second, first), (first, 2 * second))


def _layer_work(op: OpCost) -> tuple[float, float]:
    """What cannot be avoided: FLOP, and the bytes of weights and cache; of a norm or a look-up its activations too."""
    must = op.weight_bytes + op.kv_bytes
    return op.flops, must if op.kind in MATMUL_KINDS or op.kind == "attention" else must + op.activation_bytes


def _tensor_work(event: Event) -> tuple[float, float] | None:
    """FLOP (one an element) and bytes of an operation by its inputs; None where they were not recorded."""
    if event.on_device or not event.name.startswith("aten::"):
        return None
    sizes = [
        (math.prod(shape), ITEM_BYTES[dtype])
        for shape, dtype in zip(event.shapes, event.dtypes, strict=False)
        if dtype in ITEM_BYTES and _is_shape(shape)
    ]
    if not sizes or event.name in READS_ROWS:
        return None
    largest, item = max(sizes)
    moved = sum(count * each for count, each in sizes)
    return float(largest), float(moved if event.name == "aten::copy_" else moved + largest * item)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)


def _total(parts: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The sum, if every call is known."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return sum(flops for flops, _ in known), sum(moved for _, moved in known)


def _placed(
    name: str, term: str, calls: float, seconds: float, work: tuple[float, float] | None, roofline: Roofline
) -> Placed:
    if work is None or not seconds or not work[1]:
        return Placed(name, term, calls, seconds)
    flops, moved = work
    least = roofline.seconds(flops, moved)
    return Placed(name, term, calls, seconds, flops, moved, least / seconds, roofline.bound(flops / moved))
