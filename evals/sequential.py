"""Evaluation in batches of items that stops as soon as the answer is clear.

The documents of a task are divided among a few looks. After each, the floors of the task are judged at that look's
own level (`optimizer.evals.spending`), so that looking often costs no error. A task stops when each of its floors is
settled: the unfavourable end of its interval holds (passed), or the favourable end does not (failed). What is open
after the last look is judged as any floor is.

Both models must be given the same prompts, and lm-eval draws few-shot examples in the order in which a run meets the
documents. So both are evaluated in the same slices, each slice a run of its own from the same seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optimizer.errors import UsageError
from optimizer.evals.gate import Floor, judge
from optimizer.evals.quality import MetricComparison, MetricResult, QualityResult, evidence
from optimizer.evals.spending import Look, looks
from optimizer.evals.statistics import LINKS, standard_error

Measure = Callable[[Mapping[str, range]], QualityResult]
"""Evaluates these documents of these tasks."""
Settled = Callable[[str, QualityResult, float], bool]
"""Whether a task may stop, from its name, the answers so far, and the level of this look."""


@functools.cache
def plan(size: int, count: int, alpha: float) -> tuple[Look, ...]:
    """At most `count` looks at `size` documents, as even as whole documents allow."""
    ends = sorted({math.ceil(size * (index + 1) / count) for index in range(count)})
    return looks([end / size for end in ends], alpha)


def evaluate_in_looks(
    measure: Measure,
    sizes: Mapping[str, int],
    plans: Mapping[str, Sequence[Look]],
    settled: Settled | None = None,
) -> QualityResult:
    """Evaluate the tasks slice by slice; a task that is `settled` is not evaluated further.

    `sizes` holds the documents of each task, `plans` its looks. Without `settled` every document is evaluated, in the
    same slices. `levels` of the result says at which level each task stopped.
    """
    done: QualityResult | None = None
    levels: dict[str, float] = {}
    for index in range(max(map(len, plans.values()), default=0)):
        left = {task: own for task, own in plans.items() if task not in levels}
        if not left:
            break
        fresh = measure({task: _slice(own, index, sizes[task]) for task, own in left.items()})
        done = fresh if done is None else merge([done, fresh])
        for task, own in left.items():
            look = own[index]
            if look.fraction == 1 or (settled is not None and settled(task, done, look.alpha)):
                levels[task] = look.alpha
    if done is None:
        raise UsageError("there is no task to evaluate; name at least one")
    return replace(done, levels=levels)


def _slice(own: Sequence[Look], index: int, size: int) -> range:
    ends = [round(look.fraction * size) for look in own]
    return range(ends[index - 1] if index else 0, ends[index])


def is_settled(floors: Iterable[Floor], comparisons: Sequence[MetricComparison]) -> bool:
    """Whether no further item is needed to judge the floors on the loss of these metrics."""
    verdict = judge(list(floors), evidence(comparisons))
    return all(floor.passed or not floor.inconclusive for floor in verdict.floors)


def may_stop(floors: Sequence[Floor]) -> bool:
    """Whether a task with these floors may stop early: all of them bound a loss by its interval.

    The other intervals are bootstraps, which cannot reach the small error rates of early looks.
    """
    return bool(floors) and all(each.metric.endswith(".loss") and each.bound == "interval" for each in floors)


def of_task(result: QualityResult, task: str, level: float) -> QualityResult:
    """What `result` says of one task, to be judged at `level`."""
    metrics = tuple(metric for metric in result.metrics if metric.task == task)
    return replace(result, metrics=metrics, levels={task: level})


def restrict(whole: QualityResult, part: QualityResult) -> QualityResult:
    """`whole` without the documents that `part` did not get to in its looks, so that the two can be compared."""
    answered = {metric.key: set(metric.documents) for metric in part.metrics if metric.task in part.levels}
    metrics = (_only(metric, answered[metric.key]) if metric.key in answered else metric for metric in whole.metrics)
    return replace(whole, metrics=tuple(metrics))


def _only(metric: MetricResult, wanted: set[str]) -> MetricResult:
    if metric.kind is None or set(metric.documents) <= wanted:
        return metric
    kept = [index for index, document in enumerate(metric.documents) if document in wanted]
    return _made_of(metric, *(tuple(row[index] for index in kept) for row in _rows(metric)))


def merge(results: Sequence[QualityResult]) -> QualityResult:
    """One result of several over different documents of the same tasks. lm-eval's figures follow the merged values.

    Raises `UsageError` for a metric that is not a function of a mean: parts of it say nothing of the whole.
    """
    parts: dict[tuple[str, str, str], list[MetricResult]] = {}
    for metric in (metric for result in results for metric in result.metrics):
        parts.setdefault(metric.key, []).append(metric)
    metrics = tuple(_joined(found) for found in parts.values())
    samples: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for task, rows in result.samples.items():
            samples[task] = samples.get(task, []) + rows
    return QualityResult(metrics, sum(r.non_finite for r in results), _lm_eval(results, metrics, samples), samples)


def _joined(found: Sequence[MetricResult]) -> MetricResult:
    if len(found) == 1:
        return found[0]
    first = found[0]
    if first.kind is None:
        raise UsageError(
            f"{first.task} {first.metric} is not a function of a mean, so it cannot be evaluated in parts; "
            "set evaluation.sequential to false"
        )
    rows = zip(*map(_rows, found), strict=True)
    return _made_of(first, *(tuple(item for row in column for item in row) for column in rows))


def _rows(metric: MetricResult) -> tuple[tuple[Any, ...], ...]:
    return metric.documents, metric.totals, metric.weights


def _made_of(metric: MetricResult, documents: Any, totals: Any, weights: Any) -> MetricResult:
    assert metric.kind is not None
    if not totals:
        return replace(metric, value=math.nan, stderr=None, documents=(), totals=(), weights=())
    with np.errstate(all="ignore"):
        value = float(LINKS[metric.kind](np.asarray(sum(totals)), np.asarray(sum(weights))))
    error = standard_error(totals, weights, kind=metric.kind)
    return replace(metric, value=value, stderr=error, documents=documents, totals=totals, weights=weights)


def _lm_eval(
    results: Sequence[QualityResult], metrics: Sequence[MetricResult], samples: Mapping[str, Any]
) -> dict[str, Any]:
    """lm-eval's tables over all parts: groups, which would be those of one part, are left out."""
    merged: dict[str, Any] = {}
    for result in results:
        for key, part in result.lm_eval.items():
            if isinstance(part, dict):
                merged[key] = merged.get(key, {}) | part
            else:
                merged.setdefault(key, part)
    merged.pop("groups", None)
    merged["group_subtasks"] = {}
    tables = {task: dict(row) for task, row in merged.get("results", {}).items() if task in samples}
    for metric in metrics:
        if metric.task in tables:
            tables[metric.task][f"{metric.metric},{metric.filter}"] = metric.value
            tables[metric.task]["sample_len"] = len(metric.documents)
    merged["results"] = tables
    sizes = merged.get("n-samples", {})
    merged["n-samples"] = {
        task: {**sizes.get(task, {}), "effective": len({row["doc_id"] for row in rows})}
        for task, rows in samples.items()
    }
    return merged
