"""Diagnoses of the two models of a finished job, for its report: what bound the one, and what binds the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from optimizer.backends.runner import BaseRunner
from optimizer.diagnose_command import TERM_WORDS, Passes, carried_out
from optimizer.errors import UsageError
from optimizer.evals.ceilings import Ceilings
from optimizer.evals.diagnose import Diagnosis, diagnose
from optimizer.evals.timing import GenerationTiming
from optimizer.export_forms import ExportedRunner
from optimizer.pipeline import Outcome, original_runner
from optimizer.progress import Progress
from optimizer.report import Cost, Report
from optimizer.report_diagnosis import BoundEntry

RECORDING_SECONDS = 1.0
"""What recording a phase may take: times are known from the gate, and sweeps are not made."""


def with_diagnosis(report: Report, outcome: Outcome, progress: Progress, *, replaced: bool) -> Report:
    """The report with what binds prefill and decode of both models on the workload of the recipe.

    Times are those that the gate judged. What cannot be diagnosed is a warning: an original whose place the optimized
    model took (`replaced`), a model that was exported, a workload of too few tokens.
    """
    found, warnings = list[BoundEntry](), list[str]()
    with progress.phase("diagnose"):
        if replaced:
            warnings.append("The original was not diagnosed: the optimized model took its place.")
        if isinstance(outcome.runner, ExportedRunner):
            warnings.append("The optimized model was not diagnosed: it was exported, and is no PyTorch model.")
        try:
            if not replaced:
                found += _bounds(
                    "original",
                    _diagnosed(original_runner(outcome.source), outcome.speed.baseline, outcome.ceilings),
                    (),
                )
            if not isinstance(outcome.runner, ExportedRunner):
                found += _bounds(
                    "optimized",
                    _diagnosed(outcome.runner, outcome.speed.optimized, outcome.ceilings),
                    outcome.recipe.passes,
                )
        except UsageError as error:
            warnings.append(f"Not diagnosed: {error}")
    costs = [*report.costs, Cost(phase="diagnose", seconds=progress.seconds["diagnose"])]
    return report.model_copy(update={"diagnosis": found, "costs": costs, "warnings": [*report.warnings, *warnings]})


def _diagnosed(runner: BaseRunner, timing: GenerationTiming, ceilings: Ceilings) -> Diagnosis:
    return diagnose(
        runner, ceilings, timing.workload, timing=timing, sweep=False, box_seconds=RECORDING_SECONDS
    )  # fmt: skip


def _bounds(variant: Literal["original", "optimized"], found: Diagnosis, passes: Passes) -> Iterator[BoundEntry]:
    """Each phase, with the first intervention that is not among the passes already."""
    for phase in found.phases:
        term, seconds = max(phase.terms.items(), key=lambda item: item[1])
        ahead = [i for i in found.interventions if i.phase == phase.phase and not carried_out(i, passes)]
        yield BoundEntry(
            variant=variant, phase=phase.phase, seconds=phase.seconds, attained=phase.attained, verdict=phase.verdict,
            why=phase.why, term=TERM_WORDS[term], share=seconds / phase.seconds,
            next=ahead[0].name if ahead else None, next_gain=ahead[0].predicted_gain if ahead else None,
        )  # fmt: skip
