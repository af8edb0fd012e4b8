"""When the gate says no: attribute the loss, take the culprit back, gate again, keep the best that passes.

A job that missed a floor on quality or speed is searched for what carries the loss (`attribution`, `probe`). A revert
that is measured to mend it, on documents of the search, becomes a candidate recipe, smallest weights first, and is run
and gated like any other: all floors, all documents. Every gate is another chance to pass by luck, so candidate k of a
run is judged at a stricter confidence: with α = 1 − confidence of the recipe, at 1 − α / 2^k. The chances of all
repaired candidates together then stay below the one that the recipe grants, and the recipe of the artifact says at
which confidence it was judged.

All of it ends after `repair_minutes`; what is begun is finished, and what was not tried is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from optimizer.attribution import Attribution, Finding, Loss, attribute, attribute_layers
from optimizer.backends.runner import BaseRunner
from optimizer.errors import OptimizerError
from optimizer.evals.bisect import Budget, OutOfBudget
from optimizer.evals.gate import Floor, judge
from optimizer.passes.calibration import Calibration
from optimizer.passes.reverts import LAYERED, Revert, gentler, reverted, suspects, time_suspects
from optimizer.pipeline import Baseline, Outcome, run
from optimizer.probe import QualityProbe, Reverts, quality_floors
from optimizer.probe_speed import TIMES, SpeedProbe
from optimizer.progress import Progress
from optimizer.quality_looks import floors_of
from optimizer.recipe import Recipe
from optimizer.refusal import Attempt, Refusal
from optimizer.source import Source

ATTEMPTS = 3
"""Candidates of one run that are gated again at most."""
SLACK = 1.1
"""After one has passed, only candidates of at most so many times its weights are tried: others are no faster."""

FAILURES = (OptimizerError, RuntimeError, MemoryError)
"""What running a candidate may raise: its own refusals, and the device's (torch raises RuntimeError)."""


def run_and_repair(
    source: Source,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
    baseline: Baseline | Callable[[BaseRunner], Baseline] | None = None,
) -> Outcome:
    """`pipeline.run`; if the gate refuses the job, say what carries the loss and release what holds without it.

    Without `recipe.repair` the loss is attributed and nothing else is tried; with `repair_minutes: 0` neither.
    """
    progress = progress or Progress()
    outcome = run(source, recipe, calibration=calibration, progress=progress, baseline=baseline)
    if not outcome.verdict.passed and recipe.repair_minutes > 0:
        outcome = _Repair(outcome, calibration, progress).run()
        outcome = replace(outcome, costs=dict(progress.seconds))
    if inplace:
        vars(source.model).update(vars(outcome.runner.model))
    return outcome


@dataclass(frozen=True)
class _Candidate:
    reverts: Reverts
    weight_bytes: float


class _Repair:
    """One refused job, its search and its attempts."""

    def __init__(self, outcome: Outcome, calibration: Calibration | None, progress: Progress) -> None:
        self.refused, self.calibration, self.progress = outcome, calibration, progress
        self.recipe, self.passes = outcome.recipe, outcome.recipe.passes
        self.seconds = 60 * outcome.recipe.repair_minutes
        skipped = ("load", "calibration data", "baseline quality", "measure ceilings")
        self.gate_seconds = sum(s for name, s in outcome.costs.items() if name not in skipped)
        enough = self.seconds - 1.2 * self.gate_seconds if self.recipe.repair else self.seconds
        self.budget = Budget(max(enough, self.seconds / 3))
        self.quality = quality_floors(outcome, missed=True)
        self.slow = [
            item.floor for item in outcome.verdict.floors
            if not item.passed and item.measurement is not None and item.floor.metric in TIMES
        ]  # fmt: skip
        self.probe: QualityProbe | None = None
        self.mends: list[Reverts] = []
        self.layer_finding: Finding | None = None
        self.expected: list[str] = []  # notes on the candidates as they were last judged

    def run(self) -> Outcome:
        """The best candidate that passed, or the refused job, with the refusal."""
        if not (self.quality or self.slow):
            return self.refused  # a size cannot be mended by taking a pass back
        self.refusal = Refusal((self.quality or self.slow)[0], self.refused.verdict)
        best = self.refused
        try:
            with self.progress.phase("attribution"):
                faster = self._attribute_time() if self.slow else []
                if self.quality:
                    self._attribute_quality()
                self._note_candidates(faster)
            best = self._attempt_all(faster)
        except OutOfBudget:
            self.refusal.complete = False
        except FAILURES as error:  # the verdict stands, whatever the search met
            self._note(f"the search ended early: {type(error).__name__}: {error}")
        self.refusal.candidates, self.refusal.seconds = self.budget.candidates, self.budget.spent
        self.refusal.findings += [self.layer_finding] if self.layer_finding else []
        self.refusal.notes += self.expected
        if not self.refusal.complete:
            blamed = any(finding.guilty for finding in self.refusal.findings)
            start = "another suspect may be to blame as well" if blamed else "nothing could be blamed"
            self._note(
                f"{start}: not everything was tried within repair_minutes {self.recipe.repair_minutes:g}; give more"
            )
        return replace(best, refusal=self.refusal)

    def _confidence(self, attempt: int) -> float:
        return 1 - (1 - self.recipe.evaluation.confidence) * 0.5**attempt

    def _attribute_quality(self) -> None:
        """Which passes, pairs and settings carry the loss of quality, and which reverts are expected to mend it."""
        self.probe = QualityProbe(self.refused, self.calibration, self._confidence(1), self.budget, self.progress)
        probe = self.probe
        idle = {i for i, (step, report) in enumerate(self.refused.passes) if not report.matched}
        idle |= {i for i, spec in enumerate(self.passes) if spec["name"] == "fuse" and not probe.compile}
        self.by_name = {r.name: r for r in suspects(self.passes) if r.place not in idle}
        self.refusal.documents = probe.described
        self.refusal.whole = probe.measure(frozenset())
        found = attribute(list(self.by_name), lambda names: probe.measure(self._reverts(names)))
        self._take(found)
        self.mends = [self._reverts(names) for names in found.repairs]

    def _take(self, found: Attribution) -> None:
        self.refusal.findings += found.findings
        self.refusal.notes += found.notes
        self.refusal.complete &= found.complete

    def _reverts(self, names: frozenset[str]) -> Reverts:
        return frozenset(self.by_name[name] for name in names)

    def _candidates(self) -> list[_Candidate]:
        """What is expected to hold every floor on quality and size: smallest weights first.

        A pass that works on layers is taken back as little as is enough: for some layers, or to a gentler setting.
        """
        probe = self.probe
        if probe is None:
            return []
        found: dict[Reverts, None] = {}
        self.expected, self.layer_finding = [], None
        for mend in self.mends:
            try:
                for reverts in self._softer(mend):
                    found.setdefault(reverts)
            except OutOfBudget:
                self.refusal.complete = False
            if probe.measure(mend).holds:
                found.setdefault(mend)
        sizes = {reverts: probe.sizes(reverts) for reverts in found}
        floors = [f for f in floors_of(self.recipe) if f.metric in ("weights.ratio", "weights.bytes", "kv.ratio")]
        small = []
        for reverts, size in sizes.items():
            missed = [v for v in judge(floors, size).floors if not v.passed] if floors else []
            if missed:
                self.expected.append(f"{_words(reverts)}: quality is expected to hold, but {missed[0].reason}")
            else:
                small.append(_Candidate(reverts, size["weights.bytes"].value))
        return sorted(small, key=lambda c: (c.weight_bytes, len(c.reverts)))

    def _softer(self, mend: Reverts) -> Iterator[Reverts]:
        """Instead of dropping a pass that works on layers: a gentler setting, and the fewest layers left out."""
        probe = self.probe
        assert probe is not None
        for dropped in [r for r in mend if r.drop and self.passes[r.place]["name"] in LAYERED]:
            others = mend - {dropped}
            for step in gentler(self.passes, dropped.place):  # few, so first
                if probe.measure(others | {step}).holds:
                    yield others | {step}
                    break
            units = probe.layers(dropped.place, others)
            removal, finding = attribute_layers(list(units), partial(self._leaving, dropped.place, units, others))
            self.refusal.complete &= removal.complete
            if removal.holds and len(removal.removed) < len(units):
                layers = tuple(name for unit in finding.names for name in units[unit])
                self.layer_finding = replace(finding, names=layers, guilty=removal.minimal)
                if not removal.minimal and removal.complete:
                    self.expected.append(
                        f"the loss is spread over layers: with the {len(removal.removed)} of {len(units)} whose outputs"
                        " have the largest errors left as they are, quality is expected to hold (those that are served "
                        "merged count as one)"
                    )
                yield others | {probe.keeping(dropped.place, units, frozenset(removal.removed))}

    def _leaving(self, place: int, units: Mapping[str, Sequence[str]], others: Reverts, left: frozenset[str]) -> Loss:
        """The loss with these units of layers left as they are by the pass at `place`."""
        assert self.probe is not None
        return self.probe.measure(others | {self.probe.keeping(place, units, left)} if left else others)

    def _attribute_time(self) -> list[Revert]:
        """Passes whose taking back makes the job faster beyond noise, the most first."""
        probe = SpeedProbe(self.refused, self.calibration, self._confidence(1), self.budget, self.progress)
        kind = TIMES[self.slow[0].metric]
        found: dict[Revert, float] = {}
        try:
            for revert in time_suspects(self.passes, serving=self.recipe.serving is not None):
                try:
                    speedup = probe.speedups(revert)[kind]
                except OptimizerError as error:
                    self._note(f"{revert.what}: could not be timed: {error}")
                    continue
                loss = Loss(speedup.median, speedup.low, speedup.high, math.log(speedup.low))
                self.refusal.findings.append(Finding("time", (revert.name,), loss, None, loss.miss > 0))
                if loss.miss > 0:
                    found[revert] = speedup.median
        except OutOfBudget:
            self.refusal.complete = False
        if not found and self.refusal.complete:
            self._note(f"no pass costs time: without each, {self.slow[0].metric} is no better beyond noise")
        return sorted(found, key=lambda revert: -found[revert])

    def _note_candidates(self, faster: Sequence[Revert]) -> None:
        options = self._options(faster)
        self.refusal.proposed = tuple(sorted(options[0].reverts, key=_order)) if options else ()

    def _options(self, faster: Sequence[Revert]) -> list[_Candidate]:
        """The candidates in the order in which they are worth gating; those of quality are made faster as well."""
        if self.quality:
            return [replace(c, reverts=c.reverts | set(faster)) for c in self._candidates()]
        sets = [frozenset({revert}) for revert in faster]
        sets += [frozenset(faster)] if len(faster) > 1 else []
        return [_Candidate(reverts, 0.0) for reverts in sets]

    def _attempt_all(self, faster: Sequence[Revert]) -> Outcome:
        """Gate candidates again until one has passed, or attempts, time or candidates run out."""
        passed: list[tuple[Outcome, _Candidate]] = []
        tried: set[Reverts] = set()
        options = self._options(faster) if self.recipe.repair else []
        while options and len(tried) < ATTEMPTS:
            if self.budget.spent + self.gate_seconds > self.seconds:
                if not passed:
                    self._note(
                        f"{_words(options[0].reverts)} is expected to hold, but gating it again takes about "
                        f"{self.gate_seconds:.0f} s, more than is left of repair_minutes "
                        f"{self.recipe.repair_minutes:g}: give more"
                    )
                break
            candidate = options[0]
            tried.add(candidate.reverts)
            outcome = self._attempt(candidate, len(tried))
            if outcome is not None and outcome.verdict.passed:
                passed.append((outcome, candidate))
            if not passed:  # the refusal has changed what is expected of the others
                options = self._options(faster)
            limit = SLACK * min((c.weight_bytes for _, c in passed), default=math.inf)
            options = [c for c in options if c.reverts not in tried and c.weight_bytes <= limit]
        if not passed:
            return self.refused
        best, candidate = max(passed, key=lambda pair: _merit(pair[0]))
        self.refusal.chosen, self.refusal.proposed = tuple(sorted(candidate.reverts, key=_order)), ()
        return best

    def _attempt(self, candidate: _Candidate, number: int) -> Outcome | None:
        """Run and gate one candidate with every floor; a refusal teaches the probe what the gate sees."""
        confidence = self._confidence(number)
        reverts = tuple(sorted(candidate.reverts, key=_order))
        evaluation = self.recipe.evaluation.model_dump() | {"confidence": confidence}
        if "alpha" in evaluation:  # the level of floors that have one of their own
            evaluation["alpha"] *= 0.5**number
        changed = {
            "name": f"{self.recipe.name}-repaired",
            "passes": reverted(self.passes, reverts),
            "evaluation": evaluation,
        }
        try:
            outcome = run(
                self.refused.source, self.recipe.updated(changed), calibration=self.calibration, progress=self.progress,
                baseline=self.refused.baseline,
            )  # fmt: skip
        except FAILURES as error:
            self.refusal.attempts.append(Attempt(reverts, confidence, None, None, str(error)))
            return None
        speedup = outcome.speed.decode.median
        self.refusal.attempts.append(Attempt(reverts, confidence, outcome.verdict, speedup))
        if self.probe is not None and candidate.reverts in self.probe.found and quality_floors(outcome, missed=True):
            self.probe.calibrate(candidate.reverts, outcome.evidence)
        return outcome

    def _note(self, text: str) -> None:
        if text not in self.refusal.notes:
            self.refusal.notes.append(text)


def _order(revert: Revert) -> tuple[int, str]:
    return revert.place, revert.name


def _words(reverts: Reverts) -> str:
    return "; ".join(revert.what for revert in sorted(reverts, key=_order))


def _merit(outcome: Outcome) -> float:
    """How fast a candidate is: by the recipe's first floor on speed, or by decoding."""
    floor = next((f for f in floors_of(outcome.recipe) if f.metric in TIMES), Floor("decode.speedup", at_least=0.0))
    value = outcome.evidence[floor.metric].value
    return value if floor.at_least is not None else -value
