"""Which pass, pair of passes or layers carry a loss, from the losses of candidates with some of them taken back.

Nothing here measures: `measure(reverted)` gives the `Loss` of the job with these suspects taken back. Each suspect is
judged twice: the job *without* it, and it *alone*, with all others taken back. A suspect that misses the floor alone is
guilty. Where none does, pairs are tried alone: two that are each harmless and miss the floor together are guilty as a
pair. Where no pair does either the losses add up, and the fewest suspects are sought whose reverting holds the floor.

For n suspects that is 2n + 1 candidates, n (n − 1) / 2 pairs where they are needed, and O(k log n) for k that add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from optimizer.evals.bisect import OutOfBudget, Removal, minimal_removal

MOST_LAYERS = 4
"""Layers that are singled out: a loss on more is spread, and the worst by their error are taken back together."""

Names = frozenset[str]
Kind = Literal["pass", "pair", "layers", "time"]


@dataclass(frozen=True)
class Loss:
    """A metric of one candidate, with its interval, and how far the gate is expected to find it beyond its floor.

    `miss` is in nats of the metric: above 0 the floor is missed. `error` says why a candidate could not be measured;
    such a candidate holds nothing and accuses nobody.
    """

    value: float
    low: float
    high: float
    miss: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the gate is expected to find the floor held."""
        return not self.error and self.miss <= 0

    @property
    def misses(self) -> bool:
        """Whether the gate is expected to find the floor missed."""
        return not self.error and not self.miss <= 0  # a NaN misses


Measure = Callable[[Names], Loss]


@dataclass(frozen=True)
class Finding:
    """A suspect, a pair or a set of layers: the loss of the job without it, and of it alone. None: not measured."""

    kind: Kind
    names: tuple[str, ...]
    without: Loss | None
    alone: Loss | None
    guilty: bool


@dataclass
class Attribution:
    """What was found. `repairs` are sets of suspects whose reverting was measured to hold, the most plausible first.

    `complete` is False where the budget ended before everything was tried.
    """

    findings: list[Finding] = field(default_factory=list)
    repairs: list[Names] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def guilty(self) -> list[Finding]:
        """Those that were found to carry the loss."""
        return [finding for finding in self.findings if finding.guilty]


def attribute(suspects: Sequence[str], measure: Measure) -> Attribution:
    """Find what carries the loss of a job that missed its floor with nothing taken back.

    `measure` may raise `OutOfBudget`: what was found until then is returned. Other exceptions are the caller's.
    """
    found = Attribution()
    every = frozenset(suspects)
    without: dict[str, Loss] = {}
    alone: dict[str, Loss] = {}
    together: dict[Names, Loss] = {}
    try:
        if not every:
            found.notes.append("no pass of the recipe can be taken back")
            return found
        plain = measure(every)
        if not plain.holds:
            found.notes.append(
                f"the job with all of {', '.join(suspects)} taken back could not be measured: {plain.error}"
                if plain.error
                else "the floor is missed even with every pass taken back: no pass carries this loss"
            )
            return found
        for name in suspects:
            without[name] = measure(frozenset({name}))
        for name in suspects:
            alone[name] = measure(every - {name})
        if not any(loss.misses for loss in alone.values()):
            ranked = sorted(suspects, key=lambda name: _rank(without[name]))
            for pair in combinations(ranked, 2):
                together[frozenset(pair)] = measure(every - frozenset(pair))
    except OutOfBudget:
        found.complete = False
    found.findings = _findings(suspects, without, alone, together)
    _conclude(found, without, measure)
    return found


def _rank(loss: Loss | None) -> float:
    return float("inf") if loss is None or loss.error or loss.miss != loss.miss else loss.miss


def _findings(
    suspects: Sequence[str], without: dict[str, Loss], alone: dict[str, Loss], together: dict[Names, Loss]
) -> list[Finding]:
    single = [
        Finding("pass", (n,), without.get(n), alone.get(n), n in alone and alone[n].misses)
        for n in suspects
        if n in without or n in alone
    ]
    pairs = [
        Finding("pair", tuple(n for n in suspects if n in pair), None, loss, guilty=True)
        for pair, loss in together.items()
        if loss.misses
    ]
    return single + pairs


def _conclude(found: Attribution, without: dict[str, Loss], measure: Measure) -> None:
    """Which reverts hold the floor: single ones, the guilty first, or else the fewest together."""
    blamed = {name for finding in found.guilty for name in finding.names}
    ranked = sorted(without, key=lambda name: (name not in blamed, _rank(without[name])))
    found.repairs = [frozenset({name}) for name in ranked if without[name].holds]
    if not found.guilty and found.complete:
        found.notes.append("no pass and no pair of passes misses the floor alone: their losses add up")
    if not found.repairs and found.complete and without:
        removal = minimal_removal(ranked, lambda names: measure(names).holds)
        found.complete = removal.complete
        if removal.holds:
            found.repairs = [frozenset(removal.removed)]


def attribute_layers(layers: Sequence[str], measure: Measure) -> tuple[Removal[str], Finding]:
    """The fewest layers, of those given in order of suspicion, whose reverting holds the floor."""
    removal = minimal_removal(layers, lambda names: measure(names).holds, most=MOST_LAYERS)
    without = measure(frozenset(removal.removed)) if removal.holds else None  # measured before
    culprits = removal.removed if removal.holds else ()
    return removal, Finding("layers", tuple(n for n in layers if n in culprits), without, None, removal.holds)
