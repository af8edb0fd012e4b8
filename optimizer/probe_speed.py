"""Measures what each pass costs in time: the refused job against the same job without it, interleaved."""

from __future__ import annotations

from optimizer.evals.bisect import Budget
from optimizer.evals.timing import Ratio, Workload, measure_generation, ratio
from optimizer.passes.base import view
from optimizer.passes.calibration import Calibration
from optimizer.passes.reverts import Revert, reverted
from optimizer.pipeline import Outcome, apply_passes, make_context
from optimizer.progress import Progress

TIMES = {
    "decode.speedup": "tpot", "decode.mbu": "tpot", "tpot.seconds": "tpot",
    "ttft.speedup": "ttft", "prefill.mfu": "ttft", "ttft.seconds": "ttft",
    "throughput.speedup": "e2e", "throughput.tokens_per_second": "e2e",
}  # fmt: skip
"""Floors of speed, and the time of a generation that they judge."""


class SpeedProbe:
    """How much faster a refused job is with a revert: both runners compiled, timed interleaved."""

    def __init__(
        self, outcome: Outcome, calibration: Calibration | None, confidence: float, budget: Budget, progress: Progress
    ) -> None:
        self.outcome, self.calibration, self.confidence = outcome, calibration, confidence
        self.budget, self.progress = budget, progress

    def speedups(self, revert: Revert) -> dict[str, Ratio]:
        """By `TIMES`' values: the time of the job over its time with the revert. Raises `OutOfBudget`."""
        recipe, source = self.outcome.recipe, self.outcome.source
        with self.budget.candidate():
            model, silent = view(source.model), Progress()
            context = make_context(source, recipe, self.calibration, silent)
            steps = recipe.model_copy(update={"passes": reverted(recipe.passes, [revert])}).build_passes()
            apply_passes(model, steps, context, silent)
            runner = context.make_runner(model, source.tokenizer)
            spec = recipe.workload
            if hasattr(runner, "warm_up"):
                runner.warm_up(spec.batch, spec.prompt + spec.output)
            timings = measure_generation(
                {"with": self.outcome.runner, "without": runner}, Workload(spec.batch, spec.prompt, spec.output),
                repeats=spec.repeats, seed=recipe.seed,
                progress=lambda done, total: self.progress.update(revert.what, done, total),
            )  # fmt: skip
        kinds = ("tpot", "ttft", "e2e")
        return {
            kind: ratio(*(getattr(timings[name], f"{kind}_rounds") for name in ("with", "without")),
                        confidence=self.confidence)
            for kind in kinds
        }  # fmt: skip
