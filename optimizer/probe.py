"""Measures the candidates that the search for a culprit asks for, cheaply and on documents of its own.

A candidate is the recipe with some reverts. Its quality is the metric that was missed itself, paired with the original
on documents that the gate did not judge where a task has them (on the gate's own where it has none): what is chosen
here is judged there without having been chosen for it. Its runner is the one that serves, uncompiled.

The search needs to know what the gate would say. Losses are compared in nats (the log of a ratio, towards worse). The
documents of the search may be easier or harder than the gate's, so losses on them are scaled by what a candidate that
the gate refused lost there and here, within a factor of three, and the interval is narrowed to the gate's number of
documents. A loss that the search's documents show less than a third of is looked for on the gate's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimizer.attribution import Loss
from optimizer.backends.linear import QuantizedLinear, weight_bytes
from optimizer.backends.runner import BaseRunner, EagerRunner
from optimizer.errors import OptimizerError
from optimizer.evals.bisect import Budget
from optimizer.evals.gate import Floor, Measurement
from optimizer.evals.quality import QualityResult, compare, evaluate, evidence, task_facts
from optimizer.passes.base import PassReport, view
from optimizer.passes.calibration import Calibration
from optimizer.passes.decode import Decode
from optimizer.passes.fuse import Fuse
from optimizer.passes.linearize import linearize
from optimizer.passes.merge_linears import sibling_units
from optimizer.passes.reverts import Revert, reverted, without_layers
from optimizer.passes.speculate import Speculate
from optimizer.pipeline import WINDOW, Outcome, _reference, apply_passes, make_context, reference_runner
from optimizer.progress import Progress

Reverts = frozenset[Revert]

FACTOR = 3.0
"""How much more or less than the gate's the documents of a search may show of a loss."""
PROBES = 30
"""Candidates that a search should have time for: it takes fewer documents where it would not, down to half."""
ERROR_DOCUMENTS = 4
"""Documents of each task on which the output errors of layers are measured, to put them in order."""


def nats(floor: Floor, value: float) -> float:
    """What was measured, towards what the floor forbids: 0 is as good as the original. NaN is infinitely bad.

    A ratio (`recovery`, `ratio`) is taken in its log, so that losses add up; any other measure of a loss as it is.
    """
    if math.isnan(value):
        return math.inf
    if floor.metric.rpartition(".")[2] in ("recovery", "ratio"):
        value = math.log(value) if 0 < value < math.inf else math.copysign(math.inf, value - 1)
    return -value if floor.at_least is not None else value


def quality_floors(outcome: Outcome, *, missed: bool) -> list[Floor]:
    """The floors on metrics of tasks that were measured, and missed or held."""
    measured = evidence(outcome.comparisons)
    return [item.floor for item in outcome.verdict.floors if item.floor.metric in measured and item.passed != missed]


class QualityProbe:
    """Candidates of one refused job, judged by the floors on quality that it missed."""

    def __init__(
        self, outcome: Outcome, calibration: Calibration | None, confidence: float, budget: Budget, progress: Progress
    ) -> None:
        self.outcome, self.calibration, self.confidence = outcome, calibration, confidence
        self.budget, self.progress = budget, progress
        self.source, self.recipe = outcome.source, outcome.recipe
        missed = quality_floors(outcome, missed=True)
        tasks = {c.task for c in outcome.comparisons}
        self.tasks = sorted({_task(floor, tasks) for floor in missed})
        held = [f for f in quality_floors(outcome, missed=False) if _task(f, tasks) in self.tasks]
        self.floors = missed + held
        self.found: dict[Reverts, dict[str, Measurement] | str] = {}
        self.refused: set[Reverts] = {frozenset()}
        self.scales: dict[str, float] = {}
        self.orders: dict[tuple[int, Reverts], dict[str, list[str]]] = {}
        facts = task_facts(self.tasks, seed=self.recipe.evaluation.seed)
        fused = any(isinstance(step, Fuse) and report.matched for step, report in outcome.passes)
        self.compile = fused and any(facts[task].generates for task in self.tasks)
        self.judged = {
            task: min(self.recipe.evaluation.tasks.get(task) or facts[task].documents, facts[task].documents)
            for task in self.tasks
        }
        share = budget.seconds / (PROBES * max(outcome.costs.get("optimized quality", 0.0), 1e-9))
        share = min(1.0, max(0.5, share))
        self.documents: dict[str, range] = {}
        for task, count in self.judged.items():
            wanted, spare = max(1, round(share * count)), facts[task].documents - count
            self.documents[task] = range(count, count + min(wanted, spare)) if 2 * spare >= wanted else range(count)
        self._open()

    def _open(self) -> None:
        """Evaluate the original and the refused job on the documents; on the gate's where these hide the loss."""
        self.before = self._evaluate(reference_runner(self.source), "the original")
        self.calibrate(frozenset(), self.outcome.evidence)
        if self.fresh and any(self._hidden(floor) for floor in quality_floors(self.outcome, missed=True)):
            self.documents = {task: range(count) for task, count in self.judged.items()}
            self.found.clear()
            self._open()

    @property
    def fresh(self) -> bool:
        """Whether no document of the search is one that the gate judged."""
        return all(self.documents[task].start >= count for task, count in self.judged.items())

    @property
    def described(self) -> str:
        """The documents in words."""
        counts = ", ".join(f"{len(chosen)} documents of {task}" for task, chosen in self.documents.items())
        return f"{counts}, {'none of which the gate judges' if self.fresh else 'which the gate judges too'}"

    def _hidden(self, floor: Floor) -> bool:
        here, there = self._nats(floor, self._measured(frozenset())), self._nats(floor, self.outcome.evidence)
        return not here >= there / FACTOR

    @staticmethod
    def _nats(floor: Floor, found: Mapping[str, Measurement]) -> float:
        return nats(floor, found[floor.metric].value)

    def calibrate(self, reverts: Reverts, gate: Mapping[str, Measurement]) -> None:
        """The gate refused this candidate: it misses from now on, and others are judged in its light."""
        self.refused.add(reverts)
        found = self._measured(reverts)
        for floor in self.floors:
            if floor.metric not in found or floor.metric not in gate:
                continue
            here, there = self._nats(floor, found), self._nats(floor, gate)
            known = 0 < here < math.inf and 0 < there < math.inf
            self.scales[floor.metric] = min(FACTOR, max(1 / FACTOR, there / here)) if known else 1.0

    def measure(self, reverts: Reverts) -> Loss:
        """The loss of the job with these reverts. Raises `OutOfBudget`."""
        try:
            found = self._measured(reverts)
        except OptimizerError as error:
            return Loss(math.nan, math.nan, math.nan, math.nan, str(error))
        miss = max(self._miss(floor, found[floor.metric]) for floor in self.floors)
        main = found[self.floors[0].metric]
        low, high = (main.value if end is None else end for end in (main.low, main.high))
        return Loss(main.value, low, high, max(miss, 1e-9) if reverts in self.refused else miss)

    def _miss(self, floor: Floor, found: Measurement) -> float:
        """How far beyond the floor the gate is expected to find this, in nats."""
        center, end = nats(floor, found.value), found.low if floor.at_least is not None else found.high
        if math.isinf(center):
            return center
        spread = 0.0 if floor.bound == "value" or end is None else max(0.0, nats(floor, end) - center)
        judged = self.outcome.evidence[floor.metric].samples
        narrower = math.sqrt(found.samples / judged) if found.samples and judged else 1.0
        return self.scales.get(floor.metric, 1.0) * center + spread * narrower - nats(floor, floor.limit)

    def sizes(self, reverts: Reverts) -> dict[str, Measurement]:
        """What floors may judge of a measured candidate's size: weights and cache."""
        found = self._measured(reverts)
        return {name: found[name] for name in ("weights.bytes", "weights.ratio", "kv.ratio")}

    def _measured(self, reverts: Reverts) -> dict[str, Measurement]:
        """What was found of a candidate, measured when it is asked for first."""
        if reverts not in self.found:
            with self.budget.candidate():
                try:
                    self.found[reverts] = self._measure(reverts)
                except OptimizerError as error:
                    self.found[reverts] = str(error)
        found = self.found[reverts]
        if isinstance(found, str):
            raise OptimizerError(found)
        return found

    def _measure(self, reverts: Reverts) -> dict[str, Measurement]:
        runner, _ = self._build(reverted(self.recipe.passes, reverts))
        after = self._evaluate(runner, f"candidate {self.budget.candidates}")
        found = evidence(compare(self.before, after, confidence=self.confidence, seed=self.recipe.seed))
        size, whole = weight_bytes(runner.model), self.outcome.baseline_weight_bytes
        found["weights.bytes"] = Measurement(float(size), unit="B")
        found["weights.ratio"] = Measurement(size / whole)
        found["kv.ratio"] = Measurement(runner.kv_bytes_per_token / runner.original_kv_bytes_per_token)
        return found

    def _build(self, specs: Sequence[Mapping[str, Any]]) -> tuple[BaseRunner, list[PassReport]]:
        """The model with these passes, and the runner that they make, uncompiled where that computes the same."""
        from optimizer.passes.registry import build_pass

        steps = []
        for spec in specs:
            step = build_pass(spec["name"], {key: value for key, value in spec.items() if key != "name"})
            if isinstance(step, Decode):
                step = replace(step, compile=step.compile and self.compile)
            if isinstance(step, Speculate) or (isinstance(step, Fuse) and not self.compile):
                continue  # the one gives the same tokens, the other rewrites compiled steps alone
            steps.append(step)
        model, silent = view(self.source.model), Progress()
        context = make_context(self.source, self.recipe, self.calibration, silent)
        reports = apply_passes(model, steps, context, silent)
        return context.make_runner(model, self.source.tokenizer), reports

    def _evaluate(self, runner: BaseRunner, what: str, documents: Mapping[str, range] | None = None) -> QualityResult:
        spec = self.recipe.evaluation
        return evaluate(
            runner, runner.tokenizer, self.tasks, documents=documents or self.documents, batch_size=spec.batch_size,
            generate_batch=self.recipe.workload.batch, max_length=WINDOW, seed=spec.seed,
            progress=lambda _kind, done, total: self.progress.update(what, done, total),
        )  # fmt: skip

    def layers(self, place: int, others: Reverts) -> dict[str, list[str]]:
        """The layers of the pass at `place`, those that are served merged as one, the most suspicious first.

        Their order is that of the errors of their outputs: as the pass found them on its calibration data, or on a few
        documents of the search; the errors of their weights where earlier passes have changed the inputs.
        """
        if (place, others) in self.orders:
            return self.orders[place, others]
        before = reverted(self.recipe.passes[: place + 1], (r for r in others if r.place <= place))
        runner, reports = self._build(before)
        changes = {change.name: change for change in reports[-1].layers}
        errors = {name: c.weight_error if c.output_error is None else c.output_error for name, c in changes.items()}
        if len(before) == 1 and any(change.output_error is None for change in changes.values()):
            errors |= self._output_errors(runner.model, changes)
        units = sibling_units(list(changes))
        ranked = sorted(units.items(), key=lambda unit: -max(errors[name] or 0.0 for name in unit[1]))
        self.orders[place, others] = dict(ranked)
        return self.orders[place, others]

    def _output_errors(self, quantized: nn.Module, names: Mapping[str, Any]) -> dict[str, float]:
        """`‖X ΔWᵀ‖ / ‖X Wᵀ‖` of each layer, on the inputs that it has in the original."""
        original = view(self.source.model)
        linearize(original)
        runner = _reference(EagerRunner(original, self.source.tokenizer))
        energies = {name: [0.0, 0.0] for name in names}

        def watch(name: str, layer: Any) -> Any:
            weight = layer.stored_weight().dequantize()

            def hook(module: Any, inputs: Any, _output: Any) -> None:
                x, plain = inputs[0].reshape(-1, weight.shape[1]).float(), module.weight.float()
                for index, w in enumerate((weight.to(plain.device) - plain, plain)):
                    energies[name][index] += float((x @ w.T).square().sum(dtype=torch.float64))

            return runner.model.get_submodule(name).register_forward_hook(hook)

        layers = {name: quantized.get_submodule(name) for name in names}
        handles = [watch(name, layer) for name, layer in layers.items() if isinstance(layer, QuantizedLinear)]
        few = {task: range(r.start, min(r.stop, r.start + ERROR_DOCUMENTS)) for task, r in self.documents.items()}
        try:
            self._evaluate(runner, "output errors", few)
        finally:
            for handle in handles:
                handle.remove()
        return {name: math.sqrt(lost / whole) if whole else 0.0 for name, (lost, whole) in energies.items()}

    def keeping(self, place: int, units: Mapping[str, Sequence[str]], reverted_units: frozenset[str]) -> Revert:
        """The revert that leaves the layers of these units as they are, or drops the pass if that is all."""
        from optimizer.passes.reverts import titles

        if reverted_units >= set(units):
            title = titles(self.recipe.passes)[place]
            return Revert(place, title, f"without {title}", drop=True)
        return without_layers(
            self.recipe.passes, place, [n for unit, names in units.items() if unit in reverted_units for n in names]
        )


def _task(floor: Floor, tasks: set[str]) -> str:
    """The task that a floor on quality judges."""
    return max((t for t in tasks if floor.metric.startswith(f"quality.{t}.")), key=len)
