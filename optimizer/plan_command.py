"""The automatic plan as a user asks for it: `optimizer plan`, and the recipe `auto`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer.backends.runner import BaseRunner
from optimizer.calibration import load_calibration
from optimizer.candidates import candidates
from optimizer.errors import OptimizerError, OutputError, UsageError
from optimizer.evals.gate import Floor
from optimizer.passes.calibration import Calibration
from optimizer.pipeline import Baseline, Outcome, choose_device, replace_model
from optimizer.plan import Plan, Search, objective_of, with_quality
from optimizer.plan_bench import ModelBench, Records
from optimizer.plan_entry import PlanEntry, PlanStepEntry, plan_entry
from optimizer.progress import Progress
from optimizer.quality_looks import floors_of
from optimizer.recipe import Recipe
from optimizer.report_units import PERCENT, SECONDS
from optimizer.source import Source, load_source

AUTO = "auto"
"""The name of the recipe that is made by a plan."""

MINUTES = 10.0
"""How long a plan takes at most unless told otherwise: no try is begun that would end later."""

SPEED_FLOORS = (Floor("decode.speedup", at_least=1.0), Floor("ttft.speedup", at_least=0.9))
"""What a planned model must reach besides quality where no recipe says more: not slower than the original."""


class NoPlanError(OptimizerError):
    """Nothing was measured in the time that there was, so there is no recipe."""


@dataclass(frozen=True)
class Planned:
    """A finished search, and what it measured with."""

    plan: Plan
    bench: ModelBench

    @property
    def recipe(self) -> Recipe:
        """The chosen candidate as a recipe. Raises `NoPlanError` where none was measured and kept its quality."""
        chosen = self.plan.chosen
        if chosen is None:
            raise NoPlanError(f"no candidate kept its quality: {self.plan.stopped}. Give it more --minutes.")
        return self.bench.candidate_recipe(chosen.candidate, chosen.ignore)

    def outcome(self, *, inplace: bool = False) -> Outcome:
        """The chosen candidate carried out: in this process already, or now where it was measured by an earlier one.

        `inplace` makes the caller's model the optimized one.
        """
        chosen, recipe, best = self.plan.chosen, self.recipe, self.bench.best
        held = best is not None and chosen is not None and best[0] == chosen.candidate
        outcome = best[1] if held and best is not None else self.bench.carry_out(recipe)
        if inplace:
            replace_model(self.bench.source.model, outcome.runner.model)
        return outcome


def base_recipe(
    recipe: str | Path | Recipe = AUTO, *, goals: Sequence[Floor] = (), quality: float | None = None,
    workload: dict[str, int | None] | None = None,
) -> Recipe:  # fmt: skip
    """What a plan holds to: workload, evaluation, calibration and floors of `recipe`, whose passes it replaces.

    `auto` is the recipe `default` with `SPEED_FLOORS` and its floors on tasks; that on divergence is what INT8 reaches,
    and would rule out 4 bits that the tasks cannot tell from the original. A goal takes the place of a floor on the
    same metric.
    """
    base = Recipe.load("default" if recipe == AUTO else recipe)
    floors = floors_of(base)
    if recipe == AUTO:
        tasks = [f for f in floors if f.metric.startswith("quality.") and not f.metric.startswith("quality.kl.")]
        floors = tasks + list(SPEED_FLOORS)
    if quality is not None:
        floors = with_quality(floors, quality)
    floors = [floor for floor in floors if floor.metric not in {goal.metric for goal in goals}] + list(goals)
    changed = {key: value for key, value in (workload or {}).items() if value is not None}
    plain = base.model_dump()
    return Recipe.from_dict(
        plain
        | {
            "name": AUTO,
            "workload": plain["workload"] | changed,
            "floors": [asdict(floor) for floor in floors],
            "diagnose": recipe == AUTO or base.diagnose,
        }
    )


def plan_model(
    source: Source, base: Recipe, *, goals: Sequence[Floor] = (), calibration: Calibration | None = None,
    minutes: float = MINUTES, folder: Path | None = None, progress: Progress | None = None,
    baseline: Callable[[BaseRunner], Baseline] | None = None,
) -> Planned:  # fmt: skip
    """Search for the fastest candidate that holds the floors of `base`; `goals` say which phase is made faster.

    With a `folder` what was measured is kept there, and a search that was killed goes on. `baseline` gives the quality
    of the original and the ceilings of the machine; without it they are measured.
    """
    if base.serving is not None:
        raise UsageError("a plan is made for one workload; take `serving` out of the recipe.")
    progress = progress or Progress()
    bench = ModelBench(source, base, calibration, progress, Records(), baseline)
    with bench.resumable(folder) if folder is not None else nullcontext():
        search = Search(
            bench, candidates(), floors_of(base), objective_of(goals, base.workload.output), base.workload.output,
            60 * minutes, tell=progress.said,
        )  # fmt: skip
        return Planned(search.run(), bench)


def make_plan(
    model: Any, base: Recipe, out: Path, *, goals: Sequence[Floor] = (), minutes: float = MINUTES,
    calibration: Any = None, device: str | None = None, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Planned:  # fmt: skip
    """Load a model, search, and write the chosen recipe to `out/plan.yaml`; what was measured is kept in `out`.

    Raises a subclass of `OptimizerError`.
    """
    progress = progress or Progress()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be used: {error}. Choose another folder with --out.") from None
    with progress.phase("load"):
        source = load_source(model, device=choose_device(device), trust_remote_code=trust_remote_code)
    with progress.phase("calibration data"):
        data = load_calibration(calibration, source.tokenizer, source.model.config, base.calibration)
    planned = plan_model(
        source, base, goals=goals, calibration=data, minutes=minutes, folder=out / "measured", progress=progress
    )
    target = out / "plan.yaml"
    target.unlink(missing_ok=True)  # an earlier plan's, if this one chose nothing
    if planned.plan.chosen is not None:
        target.write_text(planned.recipe.to_yaml(), encoding="utf-8")
    return planned


def document(planned: Planned) -> dict[str, Any]:
    """The plan as one JSON document."""
    plan = planned.plan
    return {
        "verdict": "passed" if plan.passed else "failed",
        "recipe": None if plan.chosen is None else planned.recipe.model_dump(mode="json"),
        "plan": plan_entry(plan).model_dump(mode="json"),
    }


def describe(planned: Planned) -> str:
    """The plan for people: what binds, the table of candidates, and what was chosen."""
    plan = planned.plan
    entry = plan_entry(plan)
    lines = [*entry.before, ""]
    lines += [
        *table(entry),
        "",
        *(f"kept as it is in {s.candidate}: {k}" for s in entry.steps if s.chosen for k in s.kept),
    ]
    lines += [f"after: {line}" for line in entry.after]
    lines.append(f"stopped: {entry.stopped}")
    if entry.median_error is not None:
        lines.append(f"predictions were off by {entry.median_error:.0%} in the median")
    if plan.chosen is None:
        lines.append("nothing was chosen")
    elif plan.chosen.missed:
        lines.append(f"fastest: {plan.chosen.candidate.name}, which missed {', '.join(plan.chosen.missed)}")
    else:
        lines.append(f"chosen: {plan.chosen.candidate.name}, every floor holds")
    return "\n".join(lines)


def table(entry: PlanEntry) -> list[str]:
    """One line a candidate."""
    rows: list[tuple[str, ...]] = [
        ("candidate", "TTFT predicted", "measured", "TPOT predicted", "measured", "quality", "")
    ]
    rows += [row(step) for step in entry.steps]
    widths = [max(len(line[i]) for line in rows) for i in range(6)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]) for line in rows
    ]


def row(step: PlanStepEntry) -> tuple[str, ...]:
    """The cells of one candidate: name, predicted and measured TTFT and TPOT, quality, and what came of it."""
    return (
        f"{'* ' if step.chosen else '  '}{step.candidate}",
        SECONDS.format(step.predicted_ttft_seconds) if step.predicted_ttft_seconds is not None else "–",
        _measured(step.measured_ttft_seconds, step.ttft_error),
        SECONDS.format(step.predicted_tpot_seconds) if step.predicted_tpot_seconds is not None else "–",
        _measured(step.measured_tpot_seconds, step.tpot_error),
        step.quality,
        step.reason,
    )


def _measured(seconds: float | None, error: float | None) -> str:
    if seconds is None:
        return "–"
    return SECONDS.format(seconds) + ("" if error is None else f" ({PERCENT.format(error)} off)")
