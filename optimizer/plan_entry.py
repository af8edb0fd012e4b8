"""The plan as data of a report: each candidate with its predicted and measured times, its verdict and its fate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from optimizer.evals.predict import median_error, relative_error

if TYPE_CHECKING:
    from optimizer.plan import Plan, PlanStep


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class PlanStepEntry(_Entry):
    """A candidate. Times in seconds, None where it was not predicted or not tried; errors are predicted / measured − 1.

    `kept` names the layers that stay as they are because they are slower quantized, with their milliseconds.
    """

    candidate: str
    predicted_ttft_seconds: float | None = None
    predicted_tpot_seconds: float | None = None
    measured_ttft_seconds: float | None = None
    measured_tpot_seconds: float | None = None
    ttft_error: float | None = None
    tpot_error: float | None = None
    quality: Literal["passed", "missed", "not measured"]
    kept: list[str] = []
    chosen: bool = False
    reason: str = ""


class PlanEntry(_Entry):
    """An automatic plan: what it made faster, what bound before and what binds now, every step, and why it stopped.

    `median_error` is over predicted TTFT and TPOT of every candidate that was tried, the unquantized one left out.
    """

    objective: str
    eager_ttft_seconds: float
    eager_tpot_seconds: float
    before: list[str]
    after: list[str]
    stopped: str
    median_error: float | None
    steps: list[PlanStepEntry]


def plan_entry(plan: Plan) -> PlanEntry:
    """A finished plan for a report."""
    from optimizer.plan import described

    return PlanEntry(
        objective=plan.objective,
        eager_ttft_seconds=plan.start.eager.ttft,
        eager_tpot_seconds=plan.start.eager.tpot,
        before=described(plan.start),
        after=plan.limits,
        stopped=plan.stopped,
        median_error=median_error(plan.pairs),
        steps=[_step(step) for step in plan.steps],
    )


def _step(step: PlanStep) -> PlanStepEntry:
    predicted, measured = step.predicted, None if step.attempt is None else step.attempt.times
    both = predicted is not None and measured is not None
    return PlanStepEntry(
        candidate=step.candidate.name,
        predicted_ttft_seconds=predicted.ttft if predicted else None,
        predicted_tpot_seconds=predicted.tpot if predicted else None,
        measured_ttft_seconds=measured.ttft if measured else None,
        measured_tpot_seconds=measured.tpot if measured else None,
        ttft_error=relative_error(predicted.ttft, measured.ttft) if both and predicted and measured else None,
        tpot_error=relative_error(predicted.tpot, measured.tpot) if both and predicted and measured else None,
        quality=step.quality,
        kept=list(step.kept),
        chosen=step.chosen,
        reason=step.reason,
    )
