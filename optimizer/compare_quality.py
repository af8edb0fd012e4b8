"""The quality of several variants on the same documents, each paired with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimizer.compare_report import MetricEntry, Score
from optimizer.errors import UsageError
from optimizer.evals.quality import QualityResult, compare, evaluate, evaluate_model
from optimizer.pipeline import WINDOW, _reference
from optimizer.progress import Progress
from optimizer.variants import Variant

if TYPE_CHECKING:
    from optimizer.compare import Settings

HEADLINES = ("acc_norm", "acc", "exact_match", "byte_perplexity", "word_perplexity")
"""The metric that stands for a task in charts: the first of these that it has, else its first."""


def measure_quality(
    variants: Sequence[Variant], tokenizer: Any, settings: Settings, progress: Progress
) -> dict[str, QualityResult]:
    """Every task on every variant."""
    found = {}
    for variant in variants:
        with progress.phase(f"quality of {variant.name}"):
            found[variant.name] = _evaluate(variant, tokenizer, settings, progress)
    return found


def _evaluate(variant: Variant, tokenizer: Any, settings: Settings, progress: Progress) -> QualityResult:
    common: dict[str, Any] = {"limit": settings.limit, "seed": settings.seed}
    options: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed, "progress": progress.update}
    if variant.runner is not None:
        runner = _reference(variant.runner) if variant.kind == "model" else variant.runner
        return evaluate(
            runner, runner.tokenizer, settings.tasks, max_length=WINDOW, generate_batch=settings.workload.batch,
            **common, **{key: options[key] for key in ("batch_size", "progress")},
        )  # fmt: skip
    from optimizer.endpoint_lm import EndpointLM

    endpoint = variant.endpoint
    if endpoint is None or tokenizer is None:
        raise UsageError(
            f"{variant.name} is an endpoint, and scoring needs its tokenizer: give --tokenizer FOLDER, or a local "
            "variant with the same one"
        )
    return evaluate_model(
        lambda: EndpointLM(endpoint, tokenizer, max_length=WINDOW, **options), settings.tasks, **common
    )


def metric_entries(quality: Mapping[str, QualityResult], settings: Settings) -> list[MetricEntry]:
    """Each metric over all variants, paired with the first."""
    if not quality:
        return []
    first, *others = quality
    compared = {
        name: compare(quality[first], quality[name], confidence=settings.confidence, seed=settings.seed)
        for name in others
    }
    headlines = _headlines(quality[first])
    entries = []
    for index, base in enumerate(quality[first].metrics):
        scores = [Score(variant=first, value=base.value, stderr=base.stderr)]
        for name in others:
            item = compared[name][index]
            stderr = next(m.stderr for m in quality[name].metrics if m.key == base.key)
            flips = item.flips
            scores.append(
                Score(
                    variant=name,
                    value=item.optimized,
                    stderr=stderr,
                    ratio=item.ratio.value,
                    ratio_low=item.ratio.low,
                    ratio_high=item.ratio.high,
                    p_value=None if flips is None else flips.p_value,
                    flips_to_wrong=None if flips is None else flips.lost,
                    flips_to_right=None if flips is None else flips.gained,
                )
            )
        entries.append(
            MetricEntry(
                task=base.task,
                metric=base.metric,
                filter=base.filter,
                higher_is_better=base.higher_is_better,
                samples=len(base.documents),
                headline=base.key in headlines,
                scores=scores,
            )
        )
    return entries


def _headlines(result: QualityResult) -> set[tuple[str, str, str]]:
    """The key of one metric of each task."""
    chosen: dict[str, tuple[int, tuple[str, str, str]]] = {}
    for metric in result.metrics:
        rank = HEADLINES.index(metric.metric) if metric.metric in HEADLINES else len(HEADLINES)
        if metric.task not in chosen or rank < chosen[metric.task][0]:
            chosen[metric.task] = rank, metric.key
    return {key for _, key in chosen.values()}
