"""Power: how many items a margin needs before a test can be expected to exclude a loss as large.

Too few items fail a sound model: the interval is then wider than the margin, and no verdict is possible. With error
rate alpha, the margin m, and a model whose true loss is `loss` < m, a test of n items passes with probability

    power = Φ(((m - loss)·√n - z(alpha)·s0) / s1)

where s1 is the standard deviation of one item's paired difference, and s0 the same under the hypothesis that is tested
(loss = m). For 0/1 answers of which a share `flips` changes, s1² = flips - loss², and s0² is the variance of the score
test (Nam 1997, Biometrics 53:1422); otherwise both are the deviation that was observed. Solved for n:

    n = ((z(alpha)·s0 + z(power)·s1) / (m - loss))²

so halving a margin takes four times the items. With 5 % of answers flipped, at alpha 0.05, excluding a loss of 1 %
takes 3,162 items for power 0.8 and 5,505 for 0.95.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimizer.errors import UsageError
from optimizer.evals.noninferiority import check_alpha, score_statistic

_MOST = 1e8
"""Square root of more items than anything has."""


def _deviations(margin: float, loss: float, flips: float | None, deviation: float | None) -> tuple[float, float]:
    """s0 and s1 of the module, of one item."""
    if (flips is None) == (deviation is None):
        raise UsageError("power needs either flips (the share of 0/1 answers that change) or a deviation")
    if deviation is not None:
        if not deviation >= 0:
            raise UsageError(f"the deviation of one item is {deviation}; it cannot be negative")
        return deviation, deviation
    assert flips is not None
    if not abs(loss) <= flips <= 1:
        raise UsageError(f"flips is {flips}; it is a share of the items, and at least the loss of {loss}")
    if margin > 1:
        raise UsageError(f"the margin is {margin}; 0/1 answers cannot lose more than 1")
    share_lost, share_gained = (flips + loss) / 2, (flips - loss) / 2
    # z of expected counts is (loss - margin)·√n / s0, here of one item.
    z = float(score_statistic(share_lost, share_gained, 1.0, margin))
    return (loss - margin) / z, math.sqrt(max(flips - loss**2, 0.0))


def _checked(margin: float, loss: float, alpha: float) -> float:
    from scipy.special import ndtri

    check_alpha(alpha)
    if not loss < margin < math.inf:
        raise UsageError(f"the margin is {margin}; it must be finite and above the model's true loss of {loss}")
    return -float(ndtri(alpha))


def items_needed(
    margin: float,
    *,
    flips: float | None = None,
    deviation: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    loss: float = 0.0,
) -> int:
    """Items with which a model of true `loss` passes with probability `power`.

    Give `flips`, the share of 0/1 answers that change, or the `deviation` of one item's difference. Raises `UsageError`
    for a margin that does not lie above the loss, and rates outside (0, 1).
    """
    from scipy.special import ndtri

    critical = _checked(margin, loss, alpha)
    if not 0 < power < 1:
        raise UsageError(f"power is {power}; it lies between 0 and 1, 0.8 and 0.95 are usual")
    null, true = _deviations(margin, loss, flips, deviation)
    root = max(critical * null + float(ndtri(power)) * true, 0.0) / (margin - loss)
    if not root < _MOST:
        raise UsageError(f"a margin of {margin} needs more than {_MOST**2:.0e} items; give a larger one")
    count = root**2
    if flips is None:
        count += critical**2 / 2  # Student's t is wider than the normal (Guenther 1981)
    return max(math.ceil(count), 1 if flips is not None else 2)


def power_of(
    items: int,
    margin: float,
    *,
    flips: float | None = None,
    deviation: float | None = None,
    alpha: float = 0.05,
    loss: float = 0.0,
) -> float:
    """The probability that a model of true `loss` passes a test of so many items; see `items_needed`."""
    from scipy.special import ndtr

    critical = _checked(margin, loss, alpha)
    if items < 1:
        raise UsageError(f"items is {items}; a test needs at least 1")
    null, true = _deviations(margin, loss, flips, deviation)
    reach = (margin - loss) * math.sqrt(items) - critical * null
    return float(ndtr(reach / true)) if true > 0 else float(reach >= 0)


@dataclass(frozen=True)
class Sampling:
    """How a measured value varies from item to item, so that a limit can be told how many items it needs.

    A model without any loss has the value `null`. `sign` is 1 where larger values are worse. The distance of a limit
    from `null`, its logarithm where `log`, times `unit` is a margin in the unit of `deviation`; `flip_rate` takes the
    place of the deviation for 0/1 answers.
    """

    deviation: float
    alpha: float
    power: float
    null: float = 0.0
    sign: int = 1
    unit: float = 1.0
    log: bool = False
    flip_rate: float | None = None

    def margin(self, limit: float) -> float:
        """The loss that `limit` allows, in the unit of the deviation."""
        distance = self.sign * (limit - self.null)
        if self.log:
            distance = math.log1p(distance) if distance > -1 else -math.inf
        return distance * self.unit

    def items(self, limit: float) -> int | None:
        """Items that a model without loss needs to pass at `limit`; None where no number is enough or it is unknown."""
        margin, binary = self.margin(limit), self.flip_rate is not None
        if not (0 < margin < math.inf and math.isfinite(self.deviation)):
            return None
        spread = {"flips": self.flip_rate} if binary else {"deviation": self.deviation}
        try:
            return items_needed(min(margin, 1.0) if binary else margin, alpha=self.alpha, power=self.power, **spread)
        except UsageError:  # more items than anything has
            return None
