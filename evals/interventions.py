"""What to do next, as a table, and what it would gain: Amdahl's law over the measured terms of a step.

Each row says when it applies, which passes of a recipe do it, and the fraction of each term it takes away. A fraction
follows from bytes, FLOP and the rates measured here wherever it can. What cannot be derived is an assumption and named
in `why`: what compiling a step removes, as it was measured on the reference model (`benchmarks/diagnose.py`), and that
this package's kernels for weights reach half of their roofline at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimizer.evals.arithmetic import amdahl_seconds
from optimizer.evals.placement import MATMUL_KINDS, floor_of
from optimizer.evals.roofline import ModelShape, Precision, Weights
from optimizer.evals.trace import Term
from optimizer.evals.verdicts import Facts, Phase

COMPILE_REMOVES: Mapping[str, float] = {"launch": 0.9, "elementwise": 0.8, "attention": 0.7}
GOOD_KERNEL = 0.8  # of its roofline: what a good kernel reaches
OWN_KERNEL = 0.5  # of its roofline: what the kernels for quantized weights reach at least
UNQUANTIZED = 1.9  # bytes a weight
SMALLER = 0.9  # of the bytes now: weights that would shrink less are as small already, but for their scales
WORTH = 1.02  # smaller gains are not named

Recipe = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Intervention:
    """One change to a phase: passes that a recipe can hold (none: nothing here does it), and the step afterwards."""

    name: str
    phase: Phase
    why: str
    recipe_passes: Recipe
    predicted_seconds: float
    predicted_gain: float


@dataclass(frozen=True, slots=True)
class Situation:
    """A phase, the model in it, the multiply rates of the machine by type, and seconds by layer where known."""

    facts: Facts
    shape: ModelShape
    matmul_flops: Mapping[str, float]
    layer_seconds: Mapping[str, float]

    def removable(self, term: Term, seconds: float) -> dict[str, float]:
        """`seconds` of a term as a fraction of it, at most all of it."""
        have = self.facts.split.terms.get(term, 0.0)
        return {term: min(1.0, max(0.0, seconds / have))} if have > 0 else {}


Effect = Callable[[Situation], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the table: `removes` gives the fraction of each term that goes away, nothing where it cannot help."""

    name: str
    phases: tuple[Phase, ...]
    why: str
    passes: Recipe
    removes: Effect
    lowers_floor: bool = False  # it changes what must be moved or how fast multiplying can be


def _compiled_step(s: Situation) -> Mapping[str, float]:
    """The pass `decode` also writes the cache in place, and multiplies by this package's kernels for single rows."""
    if s.facts.compiled:
        return {}
    floor, have = floor_of(s.facts.cost, "matmul", s.facts.roofline), s.facts.split.terms.get("matmul", 0.0)
    kernels = s.removable("matmul", have - floor / OWN_KERNEL) if floor is not None else {}
    return {**COMPILE_REMOVES, **kernels, **_cache_in_place(s)}


def _better_matmul(s: Situation) -> Mapping[str, float]:
    floor, have = floor_of(s.facts.cost, "matmul", s.facts.roofline), s.facts.split.terms.get("matmul", 0.0)
    return s.removable("matmul", have - floor / GOOD_KERNEL) if floor is not None else {}


def _better_attention(s: Situation) -> Mapping[str, float]:
    floor, have = floor_of(s.facts.cost, "attention", s.facts.roofline), s.facts.split.terms.get("attention", 0.0)
    return s.removable("attention", have - floor / GOOD_KERNEL) if floor is not None else {}


def _cache_in_place(s: Situation) -> Mapping[str, float]:
    tokens = s.facts.cost.load.context + s.facts.cost.load.tokens
    return {} if s.facts.compiled else {"kv": 1 - s.facts.cost.load.tokens / tokens}


def _fewer_weight_bytes(precision: Precision) -> Effect:
    """Linears that would be stored smaller, on kernels as near to their roofline as these.

    Kernels for quantized weights are this package's own; where those are not in use yet, at least `OWN_KERNEL` is.
    """

    def effect(s: Situation) -> Mapping[str, float]:
        roofline = s.facts.roofline
        then = {op.name: op for op in s.shape.stored_as(precision).step(s.facts.cost.load).ops}
        changed = [op for op in s.facts.cost.ops if then[op.name].weight_bytes < SMALLER * op.weight_bytes]
        flops, before = sum(op.flops for op in changed), sum(op.weight_bytes for op in changed)
        after = sum(then[op.name].weight_bytes for op in changed)
        if not before or flops / before >= roofline.ridge:  # computing binds: fewer bytes change nothing
            return {}
        if all(op.name in s.layer_seconds for op in changed):
            seconds = sum(s.layer_seconds[op.name] for op in changed)
        else:
            everything = sum(op.weight_bytes for op in s.facts.cost.ops if op.kind in MATMUL_KINDS)
            seconds = s.facts.split.terms.get("matmul", 0.0) * before / everything
        names = {op.name for op in changed}
        stored = [op for op in s.shape.ops if isinstance(op, Weights) and op.name in names]
        plain = all(op.weight_bytes >= UNQUANTIZED * op.rows * op.columns for op in stored)
        least = OWN_KERNEL if plain else 0.0  # what is quantized already runs on such a kernel, and shows what it does
        reached = min(1.0, max(least, roofline.seconds(flops, before) / seconds if seconds else 1.0))
        return s.removable("matmul", seconds - roofline.seconds(flops, after) / reached)

    return effect


def _fewer_cache_bytes(precision: Precision) -> Effect:
    def effect(s: Situation) -> Mapping[str, float]:
        then = s.shape.cached_as(precision).step(s.facts.cost.load)
        reached = s.facts.reached("attention") or 0.0
        rate = s.facts.roofline.bandwidth * (min(1.0, reached) if reached >= 0.5 else 1.0)
        return s.removable("attention", (s.facts.cost.kv_bytes - then.kv_bytes) / rate)

    return effect


def _faster_multiply(dtype: str) -> Effect:
    def effect(s: Situation) -> Mapping[str, float]:
        faster, ops = s.matmul_flops.get(dtype, 0.0), [op for op in s.facts.cost.ops if op.kind in MATMUL_KINDS]
        flops, moved = sum(op.flops for op in ops), sum(op.weight_bytes for op in ops)
        if faster <= s.facts.roofline.peak_flops or not moved or flops / moved < s.facts.roofline.ridge:
            return {}
        reached = min(1.0, s.facts.reached("matmul") or 1.0)
        return s.removable("matmul", (flops / s.facts.roofline.peak_flops - flops / faster) / reached)

    return effect


CANDIDATES: tuple[Candidate, ...] = (
    Candidate(
        "take host work out of the loop", ("prefill", "decode"),
        "time outside the forward pass: sampling, checks, callbacks and whatever runs between two steps",
        (), lambda _: {"host": 1.0},
    ),
    Candidate(
        "compile the step", ("decode",),
        "one compiled step (on a GPU a captured graph) instead of single calls, over a cache written in place, on this "
        "package's kernels; assumes that it removes 90 % of launch, 80 % of element-wise and 70 % of attention time, "
        "and kernels for weights that are half-way to their roofline",
        ({"name": "merge_linears"}, {"name": "decode"}), _compiled_step,
    ),
    Candidate(
        "fewer calls in the compiled step", ("decode",),
        "launch time that is left in a compiled step: merged linears, fused operations; assumes half of it goes",
        ({"name": "merge_linears"}, {"name": "fuse"}), lambda s: {"launch": 0.5} if s.facts.compiled else {},
    ),
    Candidate(
        "a better matrix-multiply kernel", ("prefill", "decode"),
        "the kernels are below 80 % of their own roofline; assumes that others reach it. No pass exchanges them alone",
        (), _better_matmul,
    ),
    Candidate(
        "a better attention kernel", ("prefill", "decode"),
        "attention is below 80 % of its own roofline; assumes that another kernel reaches it. Compiling the step "
        "brings one; no pass exchanges it alone",
        (), _better_attention,
    ),
    Candidate(
        "write the cache in place", ("decode",),
        "each step copies the whole cache to append one token; a static or paged cache writes that token alone. "
        "Compiling the step brings one; no pass does it alone",
        (), _cache_in_place,
    ),
    Candidate(
        "fuse element-wise operations", ("prefill",),
        "assumes that fusing removes 80 %; no pass does it for prompts, which run the model's own forward",
        (), lambda _: {"elementwise": COMPILE_REMOVES["elementwise"]},
    ),
    Candidate(
        "int8 weights", ("prefill", "decode"),
        "half the weight bytes, on kernels as near to their roofline as now; half-way at least where these are 16-bit",
        ({"name": "quantize", "bits": 8, "group_size": -1},), _fewer_weight_bytes(Precision(8, None, 16)), True,
    ),
    Candidate(
        "int4 weights", ("prefill", "decode"),
        "4.1 bits a weight, on kernels as near to their roofline as now; half-way at least where these are 16-bit",
        ({"name": "quantize", "bits": 4, "group_size": 128},), _fewer_weight_bytes(Precision(4, 128, 16)), True,
    ),
    Candidate(
        "int8 keys and values", ("decode",), "half the bytes of the cache, at the rate at which it is read now",
        ({"name": "decode", "cache": "paged", "kv": "int8"},), _fewer_cache_bytes(Precision(8, 64, 16)), True,
    ),
    Candidate(
        "int8 matrix multiplies", ("prefill",),
        "int8 multiplies faster here than what runs now, at the same efficiency",
        ({"name": "quantize", "activations": "int8"},), _faster_multiply("int8"), True,
    ),
    Candidate(
        "fp8 matrix multiplies", ("prefill",),
        "fp8 multiplies faster here than what runs now, at the same efficiency",
        ({"name": "quantize", "weights": "fp8", "activations": "fp8"},), _faster_multiply("float8_e4m3fn"), True,
    ),
    Candidate(
        "overlap communication", ("prefill", "decode"), "communication hidden behind work; at best all of it",
        (), lambda _: {"communication": 1.0},
    ),
)  # fmt: skip


def interventions(situations: Sequence[Situation], output: int) -> tuple[Intervention, ...]:
    """Every candidate worth naming, the one that saves a request of `output` tokens the most first."""
    found = []
    for situation in situations:
        facts = situation.facts
        shares: dict[str, float] = {term: part / facts.seconds for term, part in facts.split.terms.items() if part}
        for row in CANDIDATES:
            if facts.phase not in row.phases:
                continue
            removed = {term: part for term, part in row.removes(situation).items() if shares.get(term) and part > 0}
            least = 0.01 * facts.seconds if row.lowers_floor else facts.floor_seconds
            predicted = max(amdahl_seconds(facts.seconds, shares, removed), least)
            if facts.seconds / predicted >= WORTH:
                gain = facts.seconds / predicted
                found.append(Intervention(row.name, facts.phase, row.why, row.passes, predicted, gain))
    seconds = {situation.facts.phase: situation.facts.seconds for situation in situations}
    steps = {"prefill": 1, "decode": max(1, output - 1)}
    return tuple(sorted(found, key=lambda i: -steps[i.phase] * (seconds[i.phase] - i.predicted_seconds)))
