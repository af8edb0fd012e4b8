"""Quality: lm-eval tasks run on a `Runner`, and the paired comparison of two such runs.

lm-eval builds the requests, filters and scores; this module keeps every document's contribution to every metric, so
that baseline and optimized models are compared on the same documents (`compare`) instead of by two averages. Tasks
`reference_*` are built in and need no network; any other name is looked up among lm-eval's own tasks.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimizer.errors import DataError, UsageError
from optimizer.evals.gate import Measurement
from optimizer.evals.items import Item, items_of
from optimizer.evals.noninferiority import Loss, paired_loss
from optimizer.evals.power import Sampling
from optimizer.evals.runner import Runner
from optimizer.evals.statistics import Flips, Interval, Kind, compare_paired, mcnemar, standard_error

if TYPE_CHECKING:
    from optimizer.evals.runner_lm import RunnerLM

TASKS = Path(__file__).parent / "tasks"
AGGREGATIONS: Mapping[str, Kind] = {
    "mean": "mean",
    "perplexity": "perplexity",
    "weighted_perplexity": "perplexity",
    "bits_per_byte": "bits",
}
"""lm-eval's aggregations that are a function of a mean, and so have paired intervals; see `statistics`."""

RatioName = Literal["recovery", "perplexity ratio", "ratio"]


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task under one filter, with every document's part in it.

    `documents` identifies each document by id and content hash. Document i adds `totals[i]` (a score, or a
    log-likelihood in nats) with weight `weights[i]` (1, or its words or bytes). `kind` says how they make `value`;
    it is None, with no samples, for the few metrics that are not a function of a mean (F1, BLEU, ...).
    """

    task: str
    metric: str
    filter: str
    value: float
    higher_is_better: bool
    stderr: float | None = None
    kind: Kind | None = None
    documents: tuple[str, ...] = ()
    totals: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """What pairs it with the other model's result."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True)
class QualityResult:
    """Every metric of a run, lm-eval's own results, and its logged samples by task.

    `non_finite` counts requests whose log-likelihood was NaN or infinite; anything above 0 means a broken model.
    `levels` holds the one-sided level of the tests of each task that was looked at more than once: see `sequential`.
    """

    metrics: tuple[MetricResult, ...]
    non_finite: int
    lm_eval: dict[str, Any] = field(repr=False, default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(repr=False, default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)

    @property
    def items(self) -> tuple[Item, ...]:
        """What was answered to each document, read from the samples."""
        return tuple(item for name, logged in self.samples.items() for item in items_of(name, logged))


@dataclass(frozen=True)
class MetricComparison:
    """One metric of the baseline and the optimized model, paired document by document.

    `ratio` is optimized/baseline: "recovery" where higher is better, "perplexity ratio" or "ratio" where lower is.
    `difference` is optimized − baseline. `flips` is None for metrics that are not 0/1. `loss` is how much worse the
    optimized model is, bounded for a test of non-inferiority; None for metrics that are not a function of a mean.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    baseline: float
    optimized: float
    ratio_name: RatioName
    ratio: Interval
    difference: Interval
    flips: Flips | None
    samples: int
    confidence: float
    kind: Kind | None = None
    loss: Loss | None = None


@contextlib.contextmanager
def _left_as_found(seed: int) -> Iterator[None]:
    """Run lm-eval quietly and from `seed`, then put back the random states, the environment and its logging."""
    import lm_eval.api.task
    import numpy as np
    import torch

    logger = logging.getLogger("lm_eval")
    level, environment, bars = logger.level, dict(os.environ), lm_eval.api.task.tqdm
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        lm_eval.api.task.tqdm = bars
        logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def built_in_tasks() -> list[str]:
    """Names of the tasks that ship with this package."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


@functools.cache
def _task_manager(defaults: bool) -> Any:
    """lm-eval's index of tasks. Its own 14,000 take several seconds to read, so they are only read when needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=defaults)


def _load(names: Sequence[str], seed: int) -> dict[str, Any]:
    """lm-eval's tasks, groups and their map for these names, ready to run."""
    if not names:
        raise UsageError(f"no tasks were named; the built-in ones are {', '.join(built_in_tasks())}")
    manager = _task_manager(any(name not in built_in_tasks() and not Path(name).is_file() for name in names))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(f"there is no task {name!r}; the nearest are {', '.join(near or built_in_tasks())}")
    loaded: dict[str, Any] = manager.load(list(dict.fromkeys(names)))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
        if hasattr(task, "_aggregation_list"):
            task._aggregation_list = {name: _saturating(rule) for name, rule in task._aggregation_list.items()}
    return loaded


def _saturating(aggregate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A perplexity too large for a float is infinite, a verdict on the model, and not an error of the run."""

    @functools.wraps(aggregate)
    def saturating(items: Any) -> Any:
        try:
            return aggregate(items)
        except OverflowError:
            return math.inf

    return saturating


@dataclass(frozen=True)
class TaskFacts:
    """How many documents a task has, and whether it has the model generate rather than score."""

    documents: int
    generates: bool


def task_facts(tasks: Sequence[str], *, seed: int = 0) -> dict[str, TaskFacts]:
    """The facts of each task, of the members of a group. Raises `UsageError` for an unknown task."""
    with _left_as_found(seed):
        loaded = _load(tasks, seed)["tasks"]
        return {name: TaskFacts(len(t.eval_docs), t.OUTPUT_TYPE == "generate_until") for name, t in loaded.items()}


def _chosen(
    tasks: Mapping[str, Any], limit: int | Mapping[str, int] | None, documents: Mapping[str, range] | None
) -> dict[str, range] | None:
    """The documents of each task, as lm-eval's `samples`: those given, or the first `limit`; None for all."""
    if documents is not None:
        if odd := sorted(set(tasks) ^ set(documents)):  # lm-eval would evaluate all of a task that is not named
            raise UsageError(f"documents must name some of each task and of no other; {', '.join(odd)} differ")
        return dict(documents)
    if limit is None:
        return None
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    for name, count in limits.items():
        if count < 1:
            raise UsageError(f"the limit of task {name!r} is {count}; at least 1 document must be evaluated")
        if name not in tasks:
            raise UsageError(f"a limit names {name!r}, which is not among the tasks {', '.join(tasks)}")
    # A range, since lm-eval asks for the membership of every document.
    return {name: range(min(limits[name], len(tasks[name].eval_docs))) for name in limits}


def _kind(task: Any, metric: str) -> Kind | None:
    """How the metric is aggregated, where that is known."""
    from lm_eval.api.registry import get_aggregation

    rule = task.aggregation().get(metric)
    rule = getattr(rule, "__wrapped__", rule)
    return next((kind for name, kind in AGGREGATIONS.items() if rule is get_aggregation(name)), None)


def _metric_result(task: Any, metric: str, rule: str, value: Any, logged: Sequence[Mapping[str, Any]]) -> MetricResult:
    name, better = task.task_name, bool(task.higher_is_better().get(metric, True))
    rows = [row for row in logged if row["filter"] == rule and metric in row]
    kind = _kind(task, metric)
    if kind is None:
        return MetricResult(name, metric, rule, float(value), better)
    pairs = [row[metric] if isinstance(row[metric], (tuple, list)) else (row[metric], 1) for row in rows]
    totals, weights = (tuple(float(pair[part]) for pair in pairs) for part in (0, 1))
    documents = tuple(f"{row['doc_id']}:{row['doc_hash'][:16]}" for row in rows)
    error = standard_error(totals, weights, kind=kind)
    return MetricResult(name, metric, rule, float(value), better, error, kind, documents, totals, weights)


def _collect(tasks: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[MetricResult]:
    for name, task in tasks.items():
        for key, value in results["results"][name].items():
            metric, comma, rule = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                yield _metric_result(task, metric, rule, value, results["samples"][name])


def evaluate(
    runner: Runner,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | Mapping[str, int] | None = None,
    documents: Mapping[str, range] | None = None,
    batch_size: int = 16,
    generate_batch: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> QualityResult:
    """Run lm-eval `tasks` on `runner`.

    `batch_size` rows are scored at a time, `generate_batch` generated (the batch that is deployed, for a runner that
    compiles each). `limit` takes the first documents of every task, or of each named one; `documents` instead names
    them by task, and each task must have some: see `task_sizes`. `max_length` bounds the
    window in tokens. `seed` draws few-shot examples and samples, if a task does either. `progress` receives the kind
    of request, how many are done and how many there are. The caller's random states, environment and logging stay.

    Raises `UsageError` for an unknown task or limit, `DataError` for a document that the window cannot score.
    """
    from optimizer.evals.runner_lm import RunnerLM

    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")

    def make() -> RunnerLM:
        return RunnerLM(
            runner, tokenizer, batch_size=batch_size, generate_batch=generate_batch, max_length=max_length, seed=seed,
            progress=progress,
        )  # fmt: skip

    return evaluate_model(make, tasks, limit=limit, documents=documents, seed=seed)


def evaluate_model(
    make: Callable[[], RunnerLM],
    tasks: Sequence[str],
    *,
    limit: int | Mapping[str, int] | None = None,
    documents: Mapping[str, range] | None = None,
    seed: int = 0,
) -> QualityResult:
    """`evaluate` for what is no `Runner`: `make` builds its lm-eval adapter, once the tasks are known to exist."""
    from lm_eval.evaluator import evaluate as run

    with _left_as_found(seed):
        loaded = _load(tasks, seed)
        model = make()
        # lm-eval's standard errors are switched off: they fork processes and print. Ours are computed in `_collect`.
        chosen = _chosen(loaded["tasks"], limit, documents)
        results = run(model, loaded, samples=chosen, bootstrap_iters=0, log_samples=True)
        metrics = tuple(_collect(loaded["tasks"], results))
    rest = {key: part for key, part in results.items() if key != "samples"}
    return QualityResult(metrics, model.non_finite, rest, dict(results["samples"]))


def task_sizes(tasks: Sequence[str], limit: Mapping[str, int] | None = None, *, seed: int = 0) -> dict[str, int]:
    """How many documents each task has, a group by its tasks, and no more than its `limit`."""
    with _left_as_found(seed):
        loaded = _load(tasks, seed)["tasks"]
        chosen = _chosen(loaded, limit or None, None) or {}
        return {name: len(chosen.get(name, task.eval_docs)) for name, task in loaded.items()}


def _ratio_name(result: MetricResult) -> RatioName:
    if result.higher_is_better:
        return "recovery"
    return "perplexity ratio" if result.kind == "perplexity" else "ratio"


def _compare_one(
    before: MetricResult, after: MetricResult, options: Mapping[str, Any], alpha: float
) -> MetricComparison:
    if before.documents != after.documents or before.weights != after.weights:
        raise DataError(
            f"{before.task} {before.metric}: the baseline answered {len(before.documents)} documents and the optimized "
            f"model {len(after.documents)}, or not the same ones; evaluate both with the same tasks, limit and data"
        )
    flips, loss = None, None
    if before.kind is None:
        ratio = after.value / before.value if before.value > 0 else math.nan
        pair = tuple(Interval(value, -math.inf, math.inf) for value in (ratio, after.value - before.value))
    else:
        pair = compare_paired(before.totals, after.totals, before.weights, kind=before.kind, **options)
        loss = paired_loss(
            before.totals, after.totals, before.weights, kind=before.kind, higher_is_better=before.higher_is_better,
            alpha=alpha,
        )  # fmt: skip
        if before.kind == "mean" and set(before.totals) | set(after.totals) <= {0.0, 1.0}:
            flips = mcnemar(before.totals, after.totals)
    return MetricComparison(
        *before.key,
        higher_is_better=before.higher_is_better,
        baseline=before.value,
        optimized=after.value,
        ratio_name=_ratio_name(before),
        ratio=pair[0],
        difference=pair[1],
        flips=flips,
        samples=len(before.documents),
        confidence=options["confidence"],
        kind=before.kind,
        loss=loss,
    )


def compare(
    baseline: QualityResult,
    optimized: QualityResult,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    alpha: float = 0.05,
) -> list[MetricComparison]:
    """Compare two runs metric by metric, document by document, in the order of the baseline.

    `alpha` is the one-sided error rate of each loss's bounds, but for the tasks in `optimized.levels`.

    Raises `DataError` when the runs do not hold the same metrics over the same documents. A metric that is not a
    function of a mean has no paired interval: its ratio is unbounded, so a gate on its interval does not pass.
    """
    found = {result.key: result for result in optimized.metrics}
    expected = {result.key for result in baseline.metrics}
    if odd := sorted(expected ^ set(found)):
        raise DataError(
            f"only one of the two runs holds {', '.join(' '.join(key) for key in odd)}; "
            "evaluate both models on the same tasks"
        )
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    level = {result.task: optimized.levels.get(result.task, alpha) for result in baseline.metrics}
    return [_compare_one(result, found[result.key], options, level[result.task]) for result in baseline.metrics]


def evidence(
    comparisons: Sequence[MetricComparison], *, power: float = 0.8, alpha: float | None = None
) -> dict[str, Measurement]:
    """What the gate judges, `quality.<task>.<metric>.` and then

    - `recovery`, or `ratio` where lower is better: optimized over baseline, with an interval of `confidence`;
    - `loss`: how much worse the optimized model is, with one-sided bounds: see `noninferiority`;
    - `flip_rate`, `lost_rate`, `gained_rate`: shares of 0/1 answers that changed, went wrong, and became right.

    A task scored under several filters has one entry for each, its metric written as lm-eval does: `metric,filter`.
    `power` and `alpha` are what the number of items that a limit needs is for; alpha is by default that of the bounds.
    """
    filters: dict[tuple[str, str], int] = {}
    for item in comparisons:
        filters[item.task, item.metric] = filters.get((item.task, item.metric), 0) + 1
    measured = {}
    for item in comparisons:
        metric = item.metric if filters[item.task, item.metric] == 1 else f"{item.metric},{item.filter}"
        stem = f"quality.{item.task}.{metric}"
        ratio, loss = item.ratio, item.loss
        name = f"{stem}.{'recovery' if item.higher_is_better else 'ratio'}"
        measured[name] = Measurement(ratio.value, ratio.low, ratio.high, item.samples, sampling=_of_ratio(item, power))
        if loss is not None:
            log = item.kind == "perplexity"
            sampling = Sampling(loss.deviation, alpha or loss.alpha, power, log=log, flip_rate=loss.flip_rate)
            measured[f"{stem}.loss"] = Measurement(loss.value, loss.low, loss.high, item.samples, sampling=sampling)
        if item.flips is not None:
            lost, gained = item.flips.lost, item.flips.gained
            for word, count in (("flip", lost + gained), ("lost", lost), ("gained", gained)):
                measured[f"{stem}.{word}_rate"] = _share(count, item.samples, item.confidence)
    return measured


def _of_ratio(item: MetricComparison, power: float) -> Sampling | None:
    """How a ratio varies, from how its difference does: near 1, ratio - 1 is the difference over the baseline."""
    if item.loss is None or not item.baseline > 0:
        return None
    unit = {"mean": item.baseline, "perplexity": 1.0, "bits": item.baseline}[item.kind or "mean"]
    return Sampling(
        item.loss.deviation, (1 - item.confidence) / 2, power, 1.0, -1 if item.higher_is_better else 1, unit,
        item.kind == "perplexity", item.loss.flip_rate,
    )  # fmt: skip


def _share(count: int, samples: int, confidence: float) -> Measurement:
    """A share of the items with its exact interval (Clopper and Pearson 1934, https://doi.org/10.2307/2331986)."""
    from scipy.stats import binomtest

    ends = binomtest(count, samples).proportion_ci(confidence)
    return Measurement(count / samples, float(ends.low), float(ends.high), samples)
