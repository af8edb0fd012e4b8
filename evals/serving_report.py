"""How well an engine serves many requests at once: latencies, throughput and goodput from the records of a replay.

Times are seconds. TTFT is arrival to first token (see `optimizer.evals.serving`), TPOT a request's mean gap between
later tokens, ITL every such gap, E2E arrival to last token; goodput is what was served within an objective (`Slo`).

Nothing is dropped. A request that was cancelled or not finished misses the objective and counts as infinitely late in
E2E and TPOT, and in TTFT if it got no token, so that shedding load cannot flatter a percentile. A request of one token
has no TPOT: it meets the objective by its TTFT alone. One that finished without a token misses.

A percentile needs at least 1 / (1 − q) samples (2, 20 and 100 for p50, p95 and p99), or it is None with the reason.
Its interval is Woodruff's (JASA 1952, "Confidence intervals for medians and other position measures"): the order
statistics at the levels q ± z·e, where e is the standard error of the share of samples up to the percentile, clustered
by request, since the gaps of one request are alike. A p99 so has a finite upper end only from about 380 requests on.
Requests count as independent of each other; under load they wait for the same steps, so repeat a run with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import UsageError
from optimizer.evals import arithmetic
from optimizer.evals.serving import RequestRecord
from optimizer.evals.statistics import Array, Interval, standard_error

LEVELS = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Percentiles in seconds, linearly interpolated, with their intervals; `missing` says why one is None.

    An interval ends at 0 or infinity where the samples cannot bound the percentile.
    """

    p50: Interval | None
    p95: Interval | None
    p99: Interval | None
    samples: int
    requests: int
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, groups: Iterable[Sequence[float]], *, confidence: float = 0.95) -> Quantiles:
        """The percentiles of the samples in `groups`, one group a request; what is infinitely late is infinite."""
        filled = [group for group in groups if len(group)]
        values = np.array([value for group in filled for value in group], dtype=np.float64)
        sizes = np.array([len(group) for group in filled], dtype=np.int64)
        found: dict[str, Interval | None] = {}
        missing = []
        for level, q in LEVELS.items():
            least = round(1 / (1 - q))
            found[level] = _quantile(values, sizes, q, confidence) if len(values) >= least else None
            if len(values) < least:
                missing.append(f"{level} of {name} is not measured: it takes {least} samples, there are {len(values)}")
        return cls(found["p50"], found["p95"], found["p99"], len(values), len(filled), tuple(missing))


@dataclass(frozen=True, slots=True)
class Slo:
    """What a client is promised: the first token within `ttft_seconds`, later ones `tpot_seconds` apart on average."""

    ttft_seconds: float
    tpot_seconds: float

    def __post_init__(self) -> None:
        if not (self.ttft_seconds > 0 and self.tpot_seconds > 0):
            raise UsageError(f"{self}: both limits must be above 0 seconds; math.inf leaves one out")

    def met(self, record: RequestRecord) -> bool:
        """Whether the request finished with both times within the limits; one token is judged by its TTFT."""
        if record.outcome != "finished" or record.ttft is None:
            return False
        return record.ttft <= self.ttft_seconds and (record.tpot is None or record.tpot <= self.tpot_seconds)


@dataclass(frozen=True, slots=True)
class ServingReport:
    """What the clients of a replay saw.

    Rates are over the makespan, first arrival to last end. `tokens_per_second` counts every output token, those of
    cancelled requests too; `requests_per_second` the finished requests; goodput those that met the objective.
    `met_share` is of all requests, with a Wilson interval. `delay` is arrival to submission: what a TTFT counted from
    submission would hide. `peak_concurrency` is the most requests in the engine at once, queued or running.
    """

    slo: Slo
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2e: Quantiles
    delay: Quantiles
    finished: int
    cancelled: int
    unfinished: int
    output_tokens: int
    makespan_seconds: float
    tokens_per_second: float
    requests_per_second: float
    goodput_tokens_per_second: float
    goodput_requests_per_second: float
    met_share: Interval
    peak_concurrency: int

    @classmethod
    def of(cls, records: Sequence[RequestRecord], slo: Slo, *, confidence: float = 0.95) -> ServingReport:
        """Summarise a replay. Raises `UsageError` for no records, no time, or a confidence outside (0, 1)."""
        if not records or not 0 < confidence < 1:
            raise UsageError(
                f"ServingReport.of: {len(records)} records and confidence={confidence!r}; it takes at least one "
                "record of a replay, and a confidence between 0 and 1"
            )
        seconds = max(record.ended for record in records) - min(record.arrival for record in records)
        if not seconds > 0:
            raise UsageError(f"ServingReport.of: {len(records)} records span {seconds} s; rates need time that passed")
        good = [record for record in records if slo.met(record)]
        outcomes = [record.outcome for record in records]
        tokens = _tokens(records)
        late = {name: Quantiles.of(name, of, confidence=confidence) for name, of in _latencies(records).items()}
        return cls(
            slo=slo,
            **late,
            finished=outcomes.count("finished"),
            cancelled=outcomes.count("cancelled"),
            unfinished=outcomes.count("unfinished"),
            output_tokens=tokens,
            makespan_seconds=seconds,
            tokens_per_second=tokens / seconds,
            requests_per_second=outcomes.count("finished") / seconds,
            goodput_tokens_per_second=_tokens(good) / seconds,
            goodput_requests_per_second=len(good) / seconds,
            met_share=_share(len(good), len(records), confidence),
            peak_concurrency=_peak(records),
        )

    def cost_per_million_tokens(self, price_per_hour: float) -> float:
        """What a million output tokens cost on a device of this price, in its currency; infinite for no tokens."""
        if not self.output_tokens:
            return math.inf
        return arithmetic.cost_per_million_tokens(price_per_hour, self.tokens_per_second)


def _latencies(records: Sequence[RequestRecord]) -> dict[str, list[Sequence[float]]]:
    """Samples of each metric, one group a request; a request that was lost is infinitely late."""

    def never(value: float | None) -> tuple[float]:
        return (math.inf if value is None else value,)

    return {
        "ttft": [never(record.ttft) for record in records],
        "tpot": [
            never(record.tpot if record.outcome == "finished" else None)
            for record in records
            if record.outcome != "finished" or record.tpot is not None
        ],
        "itl": [record.gaps for record in records],
        "e2e": [never(record.e2e) for record in records],
        "delay": [never(None if record.submitted is None else record.submitted - record.arrival) for record in records],
    }


def _tokens(records: Iterable[RequestRecord]) -> int:
    return sum(len(record.token_times) for record in records)


def _share(count: int, total: int, confidence: float) -> Interval:
    """A share with its Wilson interval."""
    from scipy.stats import binomtest

    bounds = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return Interval(count / total, float(bounds.low), float(bounds.high))


def _peak(records: Iterable[RequestRecord]) -> int:
    """Most requests submitted and not ended at once; one that ends as another is submitted has made room for it."""
    sent = [(record.submitted, record.ended) for record in records if record.submitted is not None]
    changes = sorted([(begin, 1) for begin, _ in sent] + [(end, -1) for _, end in sent])
    return max(np.cumsum([change for _, change in changes]).tolist(), default=0)


def _quantile(values: Array, sizes: NDArray[np.int64], q: float, confidence: float) -> Interval:
    """Woodruff's interval of quantile `q`; `values [n]` are the samples of requests with `sizes [R]`, one by one."""
    ordered, count = np.sort(values), len(values)
    place = q * (count - 1)
    below, above = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    value = below if below == above else below + (above - below) * (place % 1)  # inf − inf is no number
    starts = np.cumsum(sizes) - sizes
    error = standard_error(np.add.reduceat((values <= value).astype(np.float64), starts), sizes)
    if error is None:
        return Interval(value, 0.0, math.inf)
    # Ties and requests that are all alike must not make the interval narrower than independent samples would.
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * max(error, math.sqrt(q * (1 - q) / count))
    low = float(ordered[math.ceil((q - margin) * count) - 1]) if q > margin else 0.0
    high = float(ordered[math.ceil((q + margin) * count) - 1]) if q + margin <= 1 else math.inf
    return Interval(value, min(low, value), max(high, value))
