import math

import numpy as np
import pytest

from optimizer.errors import UsageError
from optimizer.evals import arithmetic
from optimizer.evals.serving import RequestRecord
from optimizer.evals.serving_report import Quantiles, ServingReport, Slo
from optimizer.evals.statistics import Interval

SLO = Slo(ttft_seconds=1.0, tpot_seconds=0.5)


def served(arrival, *tokens, outcome="finished", ended=None, submitted=None):
    submitted = arrival if submitted is None else submitted
    return RequestRecord(arrival, submitted, tokens, ended or tokens[-1], outcome)


GOOD = served(1.0, 1.5, 2.0, 2.25)  # TTFT 0.5, TPOT 0.375
LATE = served(1.5, 3.0, 3.5, submitted=2.0)  # TTFT 1.5, TPOT 0.5
SLOW = served(2.0, 3.0, 4.0, 5.0)  # TTFT 1.0, TPOT 1.0
SINGLE = served(2.5, 3.0)  # TTFT 0.5, no TPOT
CANCELLED = served(2.5, 3.0, 3.5, outcome="cancelled")
UNFINISHED = RequestRecord(4.0, None, (), 5.0, "unfinished")


def test_a_report_by_hand():
    report = ServingReport.of([GOOD, LATE, SLOW, SINGLE], SLO)
    assert report.makespan_seconds == 4.0  # 1.0 to 5.0
    assert (report.finished, report.cancelled, report.unfinished) == (4, 0, 0)
    assert report.output_tokens == 3 + 2 + 3 + 1
    assert (report.tokens_per_second, report.requests_per_second) == (9 / 4, 4 / 4)
    assert report.goodput_requests_per_second == 2 / 4  # GOOD and SINGLE
    assert report.goodput_tokens_per_second == (3 + 1) / 4
    assert report.met_share.value == 0.5
    assert report.ttft.p50.value == np.median([0.5, 1.5, 1.0, 0.5])
    assert report.tpot.p50.value == np.median([0.375, 0.5, 1.0])
    assert report.itl.p50.value == np.median([0.5, 0.25, 0.5, 1.0, 1.0])
    assert report.e2e.p50.value == np.median([1.25, 2.0, 3.0, 0.5])
    assert (report.delay.p50.value, report.delay.samples) == (0.0, 4)
    samples = [(each.samples, each.requests) for each in (report.ttft, report.tpot, report.itl, report.e2e)]
    assert samples == [(4, 4), (3, 3), (5, 3), (4, 4)]
    assert report.peak_concurrency == 3  # LATE, SLOW and SINGLE, from 2.5 to 3.0


def test_goodput_agrees_with_the_closed_formula():
    records = [GOOD, LATE, SLOW]
    pairs = [(record.ttft, record.tpot) for record in records]
    report = ServingReport.of(records, SLO)
    expected = arithmetic.goodput(pairs, report.makespan_seconds, ttft_slo=1.0, tpot_slo=0.5)
    assert report.goodput_requests_per_second == expected == 1 / 4


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (GOOD, True),
        (LATE, False),
        (SLOW, False),
        (SINGLE, True),  # no TPOT: its TTFT decides
        (served(0.0, 1.5), False),
        (served(0.0, 1.0, 1.5), True),  # limits are inclusive
        (CANCELLED, False),
        (UNFINISHED, False),
        (RequestRecord(0.0, 0.0, (), 1.0, "finished"), False),  # finished without a token
    ],
)
def test_what_meets_an_objective(record, met):
    assert SLO.met(record) is met


def test_lost_requests_are_misses_and_infinitely_late():
    report = ServingReport.of([GOOD, CANCELLED, UNFINISHED], SLO)
    assert (report.finished, report.cancelled, report.unfinished) == (1, 1, 1)
    assert report.met_share.value == 1 / 3
    assert report.makespan_seconds == 4.0
    assert (report.requests_per_second, report.goodput_requests_per_second) == (1 / 4, 1 / 4)
    assert report.tokens_per_second == (3 + 2) / 4  # those of the cancelled were made
    assert report.goodput_tokens_per_second == 3 / 4
    assert (report.ttft.samples, report.ttft.p50.value) == (3, 0.5)  # 0.5, 0.5, ∞
    assert (report.tpot.samples, report.tpot.p50.value) == (3, math.inf)  # 0.375, ∞, ∞
    assert (report.e2e.samples, report.e2e.p50.value) == (3, math.inf)
    assert report.delay.samples == 3
    assert report.itl.samples == 2 + 1  # the gaps there were
    assert report.peak_concurrency == 1  # GOOD had ended; the unfinished one was never submitted


def test_a_loss_shows_in_the_percentile_of_many():
    records = [served(0.0, 0.5, 1.0) for _ in range(19)] + [CANCELLED]
    report = ServingReport.of(records, SLO)
    assert report.e2e.p50.value == 1.0
    assert report.e2e.p95.value == math.inf
    assert report.met_share.value == 0.95


@pytest.mark.parametrize(
    ("count", "measured"), [(0, ""), (1, ""), (2, "p50"), (19, "p50"), (20, "p50 p95"), (99, "p50 p95"), (100, "all")]
)
def test_a_percentile_without_enough_samples_is_not_measured(count, measured):
    quantiles = Quantiles.of("ttft", [(float(i),) for i in range(count)])
    found = [level for level in ("p50", "p95", "p99") if getattr(quantiles, level) is not None]
    assert found == ("p50 p95 p99" if measured == "all" else measured).split()
    assert len(quantiles.missing) == 3 - len(found)
    if count == 20:
        assert quantiles.missing == ("p99 of ttft is not measured: it takes 100 samples, there are 20",)


def test_percentiles_are_those_of_numpy_in_any_order_and_grouping():
    values = np.random.default_rng(0).exponential(size=600)
    single = Quantiles.of("x", [(value,) for value in values])
    grouped = Quantiles.of("x", [values[:1], (), values[1:400], values[400:]])
    for level, q in (("p50", 50), ("p95", 95), ("p99", 99)):
        expected = np.percentile(values, q)
        assert getattr(single, level).value == pytest.approx(expected)
        assert getattr(grouped, level).value == pytest.approx(expected)
    assert (grouped.samples, grouped.requests) == (600, 3)


def test_an_interval_ends_where_the_samples_can_bound_the_percentile():
    hundred = Quantiles.of("x", [(float(i),) for i in range(100)])
    assert hundred.p50.value == 49.5
    # z·e = 1.96·sqrt(0.25/99) = 0.0985: the 41st and the 60th of the ordered samples, 0 being the first
    assert (hundred.p50.low, hundred.p50.high) == (40, 59)
    assert hundred.p99.high == math.inf
    many = Quantiles.of("x", [(float(i),) for i in range(400)])
    assert many.p99.low < many.p99.value < many.p99.high < math.inf
    one = Quantiles.of("x", [(0.1, 0.2, 0.3)])
    assert one.p50 == Interval(0.2, 0.0, math.inf)
    assert Quantiles.of("x", [(1.0,)] * 5).p50 == Interval(1.0, 1.0, 1.0)


def coverage(draw, level, truth):
    """How often the interval holds the true percentile, over 200 runs."""
    generator = np.random.default_rng(4)
    intervals = [getattr(Quantiles.of("x", draw(generator)), level) for _ in range(200)]
    return sum(interval.low <= truth <= interval.high for interval in intervals) / 200


@pytest.mark.parametrize(("level", "q"), [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)])
def test_an_interval_covers_the_percentile_as_often_as_it_says(level, q):
    share = coverage(lambda g: g.exponential(size=(500, 1)), level, -math.log(1 - q))
    assert 0.91 <= share <= 0.99  # nominal 0.95; the binomial's own spread is 0.015


@pytest.mark.parametrize(("level", "q"), [("p50", 0.5), ("p95", 0.95)])
def test_gaps_that_are_alike_within_a_request_do_not_narrow_the_interval(level, q):
    def draw(generator):
        return generator.exponential(size=(100, 1)) + generator.uniform(0, 1e-6, size=(100, 15))

    assert 0.9 <= coverage(draw, level, -math.log(1 - q)) <= 0.99
    as_if_independent = coverage(lambda g: draw(g).reshape(-1, 1), level, -math.log(1 - q))
    assert as_if_independent < 0.6  # 15 alike: sqrt(15) too narrow, which covers P(|z| < 1.96 / 3.87) = 0.39


def test_the_share_that_met_the_objective_has_a_wilson_interval():
    share = ServingReport.of([GOOD] * 10, SLO).met_share
    assert share.value == 1.0
    assert share.low == pytest.approx(1 / (1 + 1.959964**2 / 10))  # Wilson's lower end for 10 of 10: n / (n + z²)
    assert share.high == pytest.approx(1.0)


def test_peak_concurrency_counts_what_overlaps():
    back_to_back = [served(0.0, 1.0), served(0.0, 2.0, submitted=1.0), served(2.0, 3.0)]
    assert ServingReport.of(back_to_back, SLO).peak_concurrency == 1
    assert ServingReport.of([served(0.0, 1.0)] * 5, SLO).peak_concurrency == 5
    assert ServingReport.of([UNFINISHED], SLO).peak_concurrency == 0


def test_cost_is_the_price_over_the_throughput():
    report = ServingReport.of([GOOD, LATE, SLOW, SINGLE], SLO)
    assert report.cost_per_million_tokens(3.6) == pytest.approx(3.6 / (2.25 * 3600) * 1e6)
    assert ServingReport.of([UNFINISHED], SLO).cost_per_million_tokens(3.6) == math.inf


def test_records_that_say_nothing_are_refused():
    with pytest.raises(UsageError, match="0 records"):
        ServingReport.of([], SLO)
    with pytest.raises(UsageError, match=r"1 records span 0.0 s"):
        ServingReport.of([served(1.0, 1.0)], SLO)
    for confidence in (0, 1, math.nan):
        with pytest.raises(UsageError, match="confidence"):
            ServingReport.of([GOOD], SLO, confidence=confidence)


@pytest.mark.parametrize("limits", [(0, 1), (1, 0), (-1, 1), (math.nan, 1), (1, math.nan)])
def test_impossible_objectives_are_refused(limits):
    with pytest.raises(UsageError, match=r"Slo\(.*must be above 0 seconds"):
        Slo(*limits)
    assert Slo(math.inf, math.inf).met(SLOW)
