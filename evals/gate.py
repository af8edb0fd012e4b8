"""The gate: floors judged against measurements, with the evidence kept beside each verdict.

A floor names a metric and the least (`at_least`) or most (`at_most`) it may be. With `bound="interval"` the
pessimistic end of the confidence interval must satisfy it, so that noise cannot pass a model; a metric without an
interval is judged by its value. What was not measured, or is not a finite number, fails.

A floor is missed for one of two reasons, which its verdict tells apart: the model is worse than the limit, or there
were too few samples to tell. In the second case the reason says how many the limit needs; see `optimizer.evals.power`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optimizer.errors import UsageError
from optimizer.evals.power import Sampling


@dataclass(frozen=True)
class Measurement:
    """A measured value, its confidence interval where one exists, how many samples it rests on, and its unit.

    `sampling` says how the value varies from sample to sample, where that is known.
    """

    value: float
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    unit: str = ""
    sampling: Sampling | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None and self.high is None else f" [{_number(self.low)}, {_number(self.high)}]"
        unit = f" {self.unit}" if self.unit else ""
        samples = "" if self.samples is None else f" over {self.samples} samples"
        return f"{self.value:.6g}{unit}{ends}{samples}"


@dataclass(frozen=True)
class Floor:
    """A limit on one metric: exactly one of `at_least` and `at_most`, in the metric's own unit."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    bound: Literal["interval", "value"] = "interval"

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise UsageError(f"the floor on {self.metric!r} needs exactly one of at_least and at_most")
        if not math.isfinite(self.limit):
            raise UsageError(f"the floor on {self.metric!r} is {self.limit}; a limit must be a finite number")
        if self.bound not in ("interval", "value"):
            raise UsageError(f"the floor on {self.metric!r} has bound {self.bound!r}; use 'interval' or 'value'")

    @property
    def limit(self) -> float:
        """The number that must not be crossed."""
        chosen = self.at_most if self.at_least is None else self.at_least
        assert chosen is not None
        return chosen

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_least is None else '>='} {self.limit:.6g}"


@dataclass(frozen=True)
class FloorVerdict:
    """Whether one floor holds, the measurement it was judged on (None when missing) and why.

    `inconclusive` is a miss that more samples may turn: the optimistic end of the interval holds. `items_needed` is how
    many a model without loss needs to pass, where that can be said.
    """

    floor: Floor
    measurement: Measurement | None
    passed: bool
    reason: str
    inconclusive: bool = False
    items_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on every floor; `passed` only if each of them passed."""

    passed: bool
    floors: tuple[FloorVerdict, ...]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _missing(floor: Floor, evidence: Mapping[str, Measurement]) -> str:
    near = difflib.get_close_matches(floor.metric, evidence, n=3, cutoff=0.4)
    if not near:
        return f"{floor.metric} was not measured; " + ("nothing was" if not evidence else "nothing alike was either")
    return f"{floor.metric} was not measured; the nearest measured are {', '.join(near)}"


def _judge_one(floor: Floor, evidence: Mapping[str, Measurement]) -> FloorVerdict:
    measured = evidence.get(floor.metric)
    if measured is None:
        return FloorVerdict(floor, None, False, _missing(floor, evidence))
    end_name, end = ("low", measured.low) if floor.at_least is not None else ("high", measured.high)
    by_interval = floor.bound == "interval" and end is not None
    needed = None
    if measured.sampling is not None and by_interval:
        needed = measured.sampling.items(floor.limit)
    # The value must hold as well, so an interval that does not contain its own value cannot pass a ruined one.
    judged = {"value": measured.value} | ({f"{end_name} end of the interval": end} if by_interval else {})
    for name, number in judged.items():
        if number is None or not math.isfinite(number):
            reason = f"{floor}: the {name} is {_number(number)}, not a finite number"
            return FloorVerdict(floor, measured, False, reason, items_needed=needed)
        if not _holds(floor, number):
            other = measured.high if floor.at_least is not None else measured.low
            open_still = by_interval and other is not None and _holds(floor, other)
            reason = f"{floor} is missed: the {name} is {number:.6g} ({measured})"
            if open_still:
                reason += f"; the interval does not exclude that it holds{_too_few(measured, needed)}"
            return FloorVerdict(floor, measured, False, reason, open_still, needed)
    return FloorVerdict(floor, measured, True, f"{floor} holds: {measured}", items_needed=needed)


def _holds(floor: Floor, number: float) -> bool:
    return number >= floor.limit if floor.at_least is not None else number <= floor.limit


def _too_few(measured: Measurement, needed: int | None) -> str:
    """How many samples the limit needs, where that is more than there were."""
    if measured.sampling is None or measured.samples is None or (needed is not None and needed <= measured.samples):
        return ""
    if needed is None:
        return ", and no number of items can show it to be within"
    return (
        f", and this limit needs about {needed:,} items for a model without loss to pass with probability "
        f"{measured.sampling.power:g}; there were {measured.samples:,}"
    )


def judge(floors: Sequence[Floor], evidence: Mapping[str, Measurement]) -> Verdict:
    """Judge every floor. Raises `UsageError` without floors: where nothing is judged, nothing has passed."""
    if not floors:
        raise UsageError("there are no floors to judge; give at least one, or ask for an ungated run")
    verdicts = tuple(_judge_one(floor, evidence) for floor in floors)
    return Verdict(all(verdict.passed for verdict in verdicts), verdicts)
