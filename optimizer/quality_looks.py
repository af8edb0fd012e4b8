"""A recipe's evaluation in parts: which tasks may stop early, and when they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optimizer.evals.gate import Floor
from optimizer.evals.quality import QualityResult, compare, task_sizes
from optimizer.evals.sequential import evaluate_in_looks, is_settled, may_stop, of_task, plan, restrict
from optimizer.recipe import Recipe


def floors_of(recipe: Recipe, task: str | None = None) -> list[Floor]:
    """The recipe's floors for the gate, or those on the quality of one task."""
    floors = [Floor(f.metric, f.at_least, f.at_most, f.bound) for f in recipe.floors]
    return [floor for floor in floors if task is None or floor.metric.startswith(f"quality.{task}.")]


def evaluate_by_looks(
    measure: Callable[..., QualityResult], recipe: Recipe, before: QualityResult | None
) -> QualityResult:
    """Evaluate the recipe's tasks in parts, all of them, or against `before` until each task's floors are settled.

    `measure` is `evals.quality.evaluate` but for its tasks and documents. A task with any floor that is not on a loss,
    or with no floor, is evaluated in one part.
    """
    spec = recipe.evaluation
    limits = {task: limit for task, limit in spec.tasks.items() if limit is not None}
    sizes = task_sizes(list(spec.tasks), limits, seed=spec.seed)
    floors = {task: floors_of(recipe, task) for task in sizes}
    plans = {task: plan(size, spec.looks if may_stop(floors[task]) else 1, spec.alpha) for task, size in sizes.items()}

    def part(documents: Any) -> QualityResult:
        return measure(list(documents), documents=documents)

    def settled(task: str, after: QualityResult, level: float) -> bool:
        assert before is not None
        part = of_task(after, task, level)
        # The bootstraps are not looked at, only the loss: the fewest resamples do.
        found = compare(restrict(of_task(before, task, level), part), part, resamples=100)
        return is_settled(floors[task], found)

    return evaluate_in_looks(part, sizes, plans, None if before is None else settled)
