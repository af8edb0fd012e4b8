"""Paired statistics: what can be said about the optimized model from the items both models answered.

Every supported metric is a link function of a mean, m = sum(total_i) / sum(weight_i) over documents i:

| kind       | total_i, weight_i                   | metric        | used by                          |
|------------|-------------------------------------|---------------|----------------------------------|
| mean       | score, 1                            | m             | accuracy, exact match            |
| perplexity | log-likelihood (nats), words/bytes  | exp(-m)       | word, byte and token perplexity  |
| bits       | log-likelihood (nats), bytes        | -m / ln 2     | bits per byte                    |

so one bootstrap serves all of them. Documents are resampled *in pairs* (the same documents for both models): the
difficulty of an item cancels, which is why a 2-point loss that two unpaired runs of 1000 items miss is seen here.
Intervals are BCa (Efron 1987, https://doi.org/10.1080/01621459.1987.10478410): a ratio is skewed and biased in small
samples, and the percentile interval is not corrected for either. Accuracy flips are also tested with McNemar's exact
test (McNemar 1947, https://doi.org/10.1007/BF02295996).

Degenerate samples never look better than they are:
- one document says nothing about spread: the interval is unbounded (-inf, inf);
- no difference on any document: the interval is the point itself;
- a baseline at or below zero has no ratio: NaN, and a gate fails on NaN;
- a NaN anywhere makes value and interval NaN; a resample without a ratio counts as extreme at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optimizer.errors import DataError, UsageError

Array = NDArray[np.float64]
Kind = Literal["mean", "perplexity", "bits"]
Statistic = Callable[[Array], Array]
"""Column sums `[..., C]` of the (re)sampled documents in, one number per sample `[...]` out."""

_CHUNK = 4_000_000  # resampled cells held at once: 32 MB an array


def _mean(total: Array, weight: Array) -> Array:
    return total / weight


def _perplexity(total: Array, weight: Array) -> Array:
    return np.exp(-total / weight)


def _bits(total: Array, weight: Array) -> Array:
    return -total / weight / math.log(2)


LINKS: Mapping[Kind, Callable[[Array, Array], Array]] = {"mean": _mean, "perplexity": _perplexity, "bits": _bits}


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval. `low` and `high` are infinite where the sample cannot bound the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """How 0/1 answers changed: `lost` right to wrong, `gained` wrong to right, and McNemar's exact two-sided p."""

    lost: int
    gained: int
    p_value: float


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95")
    if resamples < 100:
        raise UsageError(f"resamples is {resamples}; a bootstrap interval needs at least 100, 2000 is usual")


def _pair(baseline: ArrayLike, optimized: ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(optimized, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise DataError(
            f"the samples have shapes {first.shape} and {second.shape}; pairing needs two equal, non-empty rows: "
            "evaluate both models on the same documents"
        )
    return first, second


def _replicates(columns: Array, statistic: Statistic, resamples: int, seed: int) -> Array:
    """The statistic `[R]` of `resamples` draws of `n` documents with replacement; `columns [n, C]`."""
    count, width = columns.shape
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // (count * width))
    sums = [
        columns[generator.integers(count, size=(min(rows, resamples - start), count))].sum(axis=1)
        for start in range(0, resamples, rows)
    ]
    return statistic(np.concatenate(sums))


def _bca_levels(value: float, replicates: Array, leave_one_out: Array, confidence: float) -> tuple[float, float]:
    """The two quantile levels that BCa reads off the replicates, or the plain percentiles where BCa is undefined."""
    from scipy.special import ndtr, ndtri

    plain = ((1 - confidence) / 2, (1 + confidence) / 2)
    below = np.mean(replicates < value) + np.mean(replicates == value) / 2  # ties shared, as 0/1 metrics tie often
    if not (0 < below < 1 and np.isfinite(leave_one_out).all()):
        return plain
    influence = leave_one_out.mean() - leave_one_out
    spread = np.sum(influence**2)
    if spread == 0:
        return plain
    bias, acceleration = ndtri(below), np.sum(influence**3) / (6 * spread**1.5)
    shifted = bias + ndtri(np.array(plain))
    levels = ndtr(bias + shifted / (1 - acceleration * shifted))
    return float(levels[0]), float(levels[1])


def bootstrap(
    columns: ArrayLike, statistic: Statistic, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """BCa interval of `statistic` over documents; `columns [n, C]` holds what each document adds to the sums.

    Raises `UsageError` for impossible options. Degenerate samples: see the module.
    """
    _check_options(confidence, resamples)
    cells = np.asarray(columns, dtype=np.float64)
    sums = cells.sum(axis=0)
    with np.errstate(all="ignore"):
        value = float(statistic(sums))
        if math.isnan(value) or np.isnan(cells).any():
            return Interval(math.nan, math.nan, math.nan)
        if len(cells) < 2:
            return Interval(value, -math.inf, math.inf)
        replicates = _replicates(cells, statistic, resamples, seed)
        levels = _bca_levels(value, replicates, statistic(sums - cells), confidence)
    undefined = np.isnan(replicates)
    ends = (
        float(np.quantile(np.where(undefined, extreme, replicates), level, method="inverted_cdf"))
        for level, extreme in zip(levels, (-math.inf, math.inf), strict=True)
    )
    return Interval(value, *ends)


def compare_paired(
    baseline: ArrayLike,
    optimized: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    kind: Kind = "mean",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Interval, Interval]:
    """The metric's ratio optimized/baseline and its difference optimized − baseline, each with a paired interval.

    `baseline`, `optimized` and `weights` are `[n]`, one entry a document, in the same order. Raises `DataError` when
    they do not pair up.
    """
    first, second = _pair(baseline, optimized)
    weight = _pair(first, np.ones_like(first) if weights is None else weights)[1]
    columns, link = np.stack([first, second, weight], axis=1), LINKS[kind]

    def ratio(sums: Array) -> Array:
        before, after = link(sums[..., 0], sums[..., 2]), link(sums[..., 1], sums[..., 2])
        return np.where(before > 0, after / before, np.nan)

    def difference(sums: Array) -> Array:
        return link(sums[..., 1], sums[..., 2]) - link(sums[..., 0], sums[..., 2])

    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    found = tuple(bootstrap(columns, rule, **options) for rule in (ratio, difference))  # type: ignore[arg-type]
    if len(first) > 1 and np.array_equal(first, second):  # also where few resamples have a ratio
        found = tuple(Interval(each.value, each.value, each.value) for each in found)
    return found[0], found[1]


def recovery(
    baseline: ArrayLike, optimized: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Recovery of a higher-is-better mean score: mean(optimized) / mean(baseline), paired by item `[n]`."""
    return compare_paired(baseline, optimized, confidence=confidence, resamples=resamples, seed=seed)[0]


def perplexity_ratio(
    baseline: ArrayLike,
    optimized: ArrayLike,
    weights: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Perplexity of the optimized model over the baseline's, from log-likelihoods (nats) `[n]` a document.

    `weights [n]` counts the tokens, words or bytes of each document.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return compare_paired(baseline, optimized, weights, kind="perplexity", **options)[0]  # type: ignore[arg-type]


def standard_error(totals: ArrayLike, weights: ArrayLike | None = None, *, kind: Kind = "mean") -> float | None:
    """Standard error of one model's metric by the delta method; None for fewer than two documents.

    For a mean of equal weights it is the usual s / sqrt(n); for a ratio of sums the linearised (Taylor) error of
    Cochran 1977, section 2.11, carried through the link.
    """
    total, weight = _pair(totals, np.ones_like(np.asarray(totals, dtype=np.float64)) if weights is None else weights)
    count = len(total)
    if count < 2:
        return None
    with np.errstate(all="ignore"):
        mean = total.sum() / weight.sum()
        error = math.sqrt(np.sum((total - mean * weight) ** 2) * count / (count - 1)) / weight.sum()
        slope = {"mean": 1.0, "perplexity": float(np.exp(-mean)), "bits": 1 / math.log(2)}[kind]
        return float(error * slope)


def mcnemar(baseline: ArrayLike, optimized: ArrayLike) -> Flips:
    """McNemar's exact test on paired 0/1 scores `[n]`. With no flips p is 1. Raises `DataError` for other values."""
    from scipy.stats import binomtest

    first, second = _pair(baseline, optimized)
    for name, values in (("baseline", first), ("optimized", second)):
        if odd := sorted(set(values.tolist()) - {0.0, 1.0}):
            raise DataError(f"the {name} scores hold {odd[0]}; McNemar's test takes only 0 and 1")
    lost, gained = int(np.sum((first == 1) & (second == 0))), int(np.sum((first == 0) & (second == 1)))
    p_value = float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
    return Flips(lost, gained, p_value)
