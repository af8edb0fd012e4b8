"""What binds a phase, by the order in which causes are ruled out: host, launch gaps, communication, then the roofline.

A step that the host or its gaps hold up says nothing about the device, so they come first. Then the work itself: near
its floor there is nothing to find; on the compute side of the ridge, or made of calls too short to reach any rate, it
is said so; on the memory side a sweep over working sets tells three cases apart (`memory_probe`). Far below both
ceilings it is neither position on the roofline but the implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from optimizer.evals.crossovers import binding
from optimizer.evals.memory_probe import SATURATED, MemoryKind
from optimizer.evals.placement import floor_of
from optimizer.evals.roofline import Roofline, StepCost
from optimizer.evals.trace import Overheads, Split, Term

Phase = Literal["prefill", "decode"]
Verdict = Literal[
    "host-bound", "launch-bound", "communication-bound", "latency-bound", "compute-bound", "implementation",
    "memory: bandwidth saturated", "memory: irregular access", "memory: locality lost", "near limit",
]  # fmt: skip

MUCH = 0.10  # of a step: a share of gaps or communication from which it comes first
HOST = 0.25  # of a step: below it the host is not what holds a step up
NEAR = 0.80  # of attainable: beyond it stop
FAR = 0.20  # of attainable: below it, on neither ceiling
SHORT_CALLS = 10.0  # a call is short up to this many fixed costs of a call


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a phase: its measured split, what it must do, and the roofline it does it under."""

    phase: Phase
    split: Split
    cost: StepCost
    roofline: Roofline
    overheads: Overheads
    compiled: bool

    @property
    def seconds(self) -> float:
        """The step, unprofiled."""
        return self.split.seconds

    @property
    def floor_seconds(self) -> float:
        """The least time of the step: all computing overlapping the reading of weights and cache."""
        return self.roofline.seconds(self.cost.flops, self.cost.required_bytes)

    def share(self, *terms: Term) -> float:
        """The fraction of the step that some terms take."""
        return sum(self.split.terms.get(term, 0.0) for term in terms) / self.seconds

    def reached(self, term: Term) -> float | None:
        """A term's floor over its time, where it has one; attention counts with the upkeep of its cache."""
        terms: tuple[Term, ...] = ("attention", "kv") if term == "attention" else (term,)
        floor, seconds = floor_of(self.cost, term, self.roofline), self.share(*terms) * self.seconds
        return None if floor is None or seconds <= 0 else floor / seconds

    @property
    def largest(self) -> Term:
        """The term of work that takes the most; attention and the upkeep of its cache are one."""
        candidates: tuple[Term, ...] = ("matmul", "attention", "elementwise", "communication", "unclassified")
        shares = {term: self.share(term) for term in candidates}
        shares["attention"] += self.share("kv")
        return max(shares, key=lambda term: shares[term])


def judge_phase(facts: Facts, probe: Callable[[], MemoryKind] | None = None) -> tuple[Verdict, str, MemoryKind | None]:
    """The verdict on a phase, why, and the sweep where one was made; `probe` runs it, only if it is needed."""
    host, launch, communication = (facts.share(term) for term in ("host", "launch", "communication"))
    largest = facts.largest
    rest = f"the largest work is {_of(facts, largest)}"
    if host > HOST:
        return "host-bound", f"{host:.0%} of the step passes outside the model and between its steps; {rest}", None
    graphs_help = not facts.compiled or launch > facts.share(largest)  # in a compiled step they are there already
    if launch > MUCH and graphs_help:
        where = "calls and gaps in the compiled step" if facts.compiled else "dispatching operations one by one"
        return "launch-bound", f"{launch:.0%} of the step goes into {where}, more than {MUCH:.0%}; {rest}", None
    if communication > MUCH:
        return "communication-bound", f"{communication:.0%} of the step passes between devices; {rest}", None
    attained = facts.floor_seconds / facts.seconds
    if attained >= NEAR:
        return "near limit", f"{attained:.0%} of what this machine can reach: stop here", None
    if (short := short_share(facts)) > 0.5:
        return "latency-bound", f"{short:.0%} of the work is in calls too short to reach any rate; {rest}", None
    intensity = facts.cost.flops / facts.cost.required_bytes
    side = f"{intensity:.3g} FLOP/byte against a ridge of {facts.roofline.ridge:.3g}"
    binds = binding(facts.cost, facts.roofline)
    reached = facts.reached(largest)
    if binds == "compute":
        if (reached if reached is not None else attained) < FAR:
            return "implementation", f"{side}, yet far below both ceilings: {rest}", None
        return "compute-bound", f"{side}; {rest}", None
    return _memory(facts, f"{binds} bind: {side}; {rest}", reached, probe)


def _memory(
    facts: Facts, why: str, reached: float | None, probe: Callable[[], MemoryKind] | None
) -> tuple[Verdict, str, MemoryKind | None]:
    """One of three kinds: saturated if the step itself says so, else by a sweep where there is one."""
    if reached is not None and reached >= SATURATED:
        return "memory: bandwidth saturated", why, None
    found = probe() if probe is not None else None
    if found is not None:
        # Neighbours may have slowed the machine since its ceilings were measured, and the sweep with it.
        stream = found.points[-1].stream_bytes_per_second if found.points else facts.roofline.bandwidth
        fast = reached is None or reached >= FAR or reached * facts.roofline.bandwidth >= SATURATED * stream
        near = fast or found.kind != "bandwidth saturated"
        why = f"{why}; {found.why}"
        if near:
            verdict: Verdict = f"memory: {found.kind}"  # type: ignore[assignment]
            return verdict, why, found
    elif facts.largest == "elementwise":
        return "memory: locality lost", f"{why}, which writes intermediates and reads them again", None
    return "implementation", f"{why}: far below both ceilings, so it is how the work is done", found


def short_share(facts: Facts) -> float:
    """The share of work done in calls no longer than `SHORT_CALLS` fixed costs."""
    total = sum(seconds for _, _, seconds, _ in facts.split.work)
    limit = SHORT_CALLS * facts.overheads.per_call
    return sum(seconds for _, _, seconds, _ in facts.split.work if seconds < limit) / total if total else 0.0


def _of(facts: Facts, term: Term) -> str:
    """A term, its share, and how near it is to its own floor."""
    share = facts.share("attention", "kv") if term == "attention" else facts.share(term)
    reached = facts.reached(term)
    label = "attention with its cache" if term == "attention" else term
    return f"{label}, {share:.0%} of the step" + ("" if reached is None else f" at {reached:.0%} of its own roofline")
