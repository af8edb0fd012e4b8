"""Non-inferiority: a bound on how much worse the optimized model is, from the items that both models answered.

A gate must not ask "is there a significant loss?": too few items then pass everything. It asks the reverse, whether a
loss of `margin` or more can be *excluded* at a one-sided error rate alpha. That holds exactly where the upper end of
the loss's interval, of confidence 1 - 2·alpha, is at most the margin, so one bound serves every margin.

The loss is positive where the optimized model is worse, whatever the metric's direction:

| kind       | loss                                        | unit         | bound                                  |
|------------|---------------------------------------------|--------------|----------------------------------------|
| mean, 0/1  | share of answers lost - share gained        | 1 = 100 pts  | Tango's score interval                 |
| mean       | difference of the means                     | the score's  | Student's t on paired differences      |
| perplexity | ratio - 1, optimized over baseline          | 0.01 = +1 %  | t on the log ratio, linearised         |
| bits       | difference of bits per byte                 | bits a byte  | t on the difference, linearised        |

0/1 answers take the score interval of Tango 1998 (Statistics in Medicine 17:891), which inverts a test whose variance
is estimated *at the margin*. Where few answers flip, or none do, a bootstrap or a Wald interval collapses to a point
and passes anything; this one reaches z²/(n + z²). The others are ratios of sums, and take the linearised error of
Cochran 1977, section 2.11.

Degenerate samples never look better than they are: one document has no spread and no bound; a NaN is NaN everywhere;
means without any difference on n items bound the loss by 1 - alpha^(1/n) of a whole score, as n answers that did not
flip would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optimizer.errors import DataError, UsageError
from optimizer.evals.statistics import Kind

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Loss:
    """How much worse the optimized model is, bounded on each side with error rate `alpha`.

    `deviation` is the standard deviation of one item's part, so that the standard error is deviation / sqrt(n); for
    perplexities it is that of the logarithm. `flip_rate` is the share of 0/1 answers that changed, else None.
    """

    value: float
    low: float
    high: float
    alpha: float
    deviation: float
    flip_rate: float | None = None


def check_alpha(alpha: float) -> None:
    """`UsageError` for an error rate that no one-sided test can have."""
    if not 0 < alpha <= 0.5:
        raise UsageError(f"alpha is {alpha}; a one-sided error rate lies above 0 and is at most 0.5, 0.05 is usual")


def score_statistic(lost: ArrayLike, gained: ArrayLike, count: ArrayLike, margin: ArrayLike) -> Array:
    """Tango's z of the hypothesis that the loss is `margin`; below -z(alpha) a loss of the margin or more is excluded.

    All arguments broadcast: `lost` answers went right to wrong, `gained` the other way, among `count` pairs. The
    variance is that of the likeliest flip rates whose difference is the margin.
    """
    b, c, n, m = (np.asarray(each, dtype=np.float64) for each in (lost, gained, count, margin))
    linear = (2 * n - b + c) * m - b - c
    constant = -c * m * (1 - m)
    root = np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0))
    gain_rate = np.clip((root - linear) / (4 * n), np.maximum(0, -m), (1 - m) / 2)
    difference, variance = b - c - n * m, n * np.maximum(2 * gain_rate + m * (1 - m), 0)
    with np.errstate(all="ignore"):
        z = difference / np.sqrt(variance)
    # Without variance only the margin itself is possible: any other is excluded. Rounding leaves 1e-16 of either.
    certain = np.where(np.abs(difference) < 1e-9 * n, 0.0, np.copysign(np.inf, difference))
    return np.asarray(np.where(variance > 1e-12 * n, z, certain))


def score_interval(lost: int, gained: int, count: int, alpha: float) -> tuple[float, float]:
    """Tango's interval of the loss, each end with one-sided error rate `alpha`: the margins that are not excluded."""
    from scipy.special import ndtri

    check_alpha(alpha)
    if min(lost, gained) < 0 or lost + gained > count or count < 1:
        raise DataError(f"{lost} lost and {gained} gained answers do not fit {count} pairs")
    critical, value = -float(ndtri(alpha)), (lost - gained) / count
    ends = []
    for sign, edge in ((1, -1.0), (-1, 1.0)):  # z falls from +inf to -inf as the margin grows
        inside, outside = value, edge
        if sign * float(score_statistic(lost, gained, count, edge)) <= critical:
            inside = edge
        for _ in range(60):
            middle = (inside + outside) / 2
            holds = sign * float(score_statistic(lost, gained, count, middle)) <= critical
            inside, outside = (middle, outside) if holds else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def paired_loss(
    baseline: ArrayLike,
    optimized: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    kind: Kind = "mean",
    higher_is_better: bool = True,
    alpha: float = 0.05,
) -> Loss:
    """The loss of the optimized model with its bounds; arguments as `statistics.compare_paired`, one entry a document.

    `higher_is_better` matters to means alone: of perplexity and bits, less is always better. Raises `DataError` where
    the samples do not pair up and `UsageError` for an impossible alpha.
    """
    check_alpha(alpha)
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(optimized, dtype=np.float64)
    weight = np.ones_like(first) if weights is None else np.asarray(weights, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.shape != weight.shape or not first.size:
        raise DataError(
            f"the samples have shapes {first.shape}, {second.shape} and {weight.shape}; a paired test needs equal, "
            "non-empty rows: evaluate both models on the same documents"
        )
    worse = second - first if kind == "mean" and not higher_is_better else first - second
    with np.errstate(all="ignore"):
        if kind == "mean" and _equal(weight) and _is_binary(first) and _is_binary(second):
            return _binary(worse, alpha)
        return _linearised(worse, weight, kind, alpha, whole=_whole_score(first, second))


def _is_binary(values: Array) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _equal(weights: Array) -> bool:
    """Whether every document counts alike."""
    return bool((weights == 1).all())


def _whole_score(first: Array, second: Array) -> float:
    """The most that one document can lose, as far as the scores show: at least 1."""
    return max(1.0, float(np.abs(np.concatenate([first, second])).max()))


def _binary(worse: Array, alpha: float) -> Loss:
    lost, gained, count = int((worse == 1).sum()), int((worse == -1).sum()), len(worse)
    value, flips = (lost - gained) / count, (lost + gained) / count
    low, high = score_interval(lost, gained, count, alpha)
    return Loss(value, low, high, alpha, math.sqrt(max(flips - value**2, 0.0)), flips)


def _linearised(worse: Array, weight: Array, kind: Kind, alpha: float, whole: float) -> Loss:
    from scipy.special import stdtrit

    count, total = len(worse), float(weight.sum())
    mean = float(worse.sum() / total)
    residuals = worse - mean * weight
    if math.isnan(mean) or not np.isfinite(residuals).all():
        return Loss(math.nan, math.nan, math.nan, alpha, math.nan)
    if count < 2:
        return Loss(_in_units(mean, kind), -math.inf, math.inf, alpha, math.nan)
    error = math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / total
    reach = float(stdtrit(count - 1, 1 - alpha)) * error
    if kind == "mean" and not worse.any():
        reach = whole * (1 - alpha ** (1 / count))
    deviation = error * math.sqrt(count) / (math.log(2) if kind == "bits" else 1)
    value, low, high = (_in_units(end, kind) for end in (mean, mean - reach, mean + reach))
    return Loss(value, low, high, alpha, deviation)


def _in_units(nats: float, kind: Kind) -> float:
    if kind == "mean":
        return nats
    if kind == "bits":
        return nats / math.log(2)
    return math.expm1(nats) if nats < 700 else math.inf
