from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import DataError, UsageError
from optimizer.evals import statistics as ours

NO_BOUND = (-math.inf, math.inf)


def paired_accuracy(n: int, before: float, lost: float, gained: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    first = (draw.random(n) < before).astype(float)
    flip = draw.random(n) < np.where(first == 1, lost, gained)
    return first, np.where(flip, 1 - first, first)


def test_intervals_agree_with_scipy():
    first, second = paired_accuracy(150, 0.7, 0.1, 0.05, seed=3)

    def ratio(a, b, axis=-1):
        return b.mean(axis=axis) / a.mean(axis=axis)

    def difference(a, b, axis=-1):
        return b.mean(axis=axis) - a.mean(axis=axis)

    found = ours.compare_paired(first, second, resamples=9999, seed=1)
    for interval, statistic in zip(found, (ratio, difference), strict=True):
        theirs = scipy.stats.bootstrap(
            (first, second), statistic, paired=True, vectorized=True, method="BCa", rng=np.random.default_rng(2)
        ).confidence_interval
        width = theirs.high - theirs.low
        # Both are Monte-Carlo: an end of 9999 replicates moves by about 2 % of the width; accuracies step by 1/150.
        assert interval.low == pytest.approx(theirs.low, abs=0.08 * width)
        assert interval.high == pytest.approx(theirs.high, abs=0.08 * width)
        assert interval.value == pytest.approx(statistic(first, second))


def test_skewed_ratio_agrees_with_scipy():
    draw = np.random.default_rng(5)
    weights = draw.integers(20, 400, 60).astype(float)
    before = -weights * draw.gamma(4, 0.3, 60)
    after = before * draw.gamma(60, 1.02 / 60, 60)

    def ratio(b, o, w, axis=-1):
        return np.exp((b.sum(axis=axis) - o.sum(axis=axis)) / w.sum(axis=axis))

    theirs = scipy.stats.bootstrap(
        (before, after, weights), ratio, paired=True, vectorized=True, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    found = ours.perplexity_ratio(before, after, weights, resamples=9999)
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(ratio(before, after, weights))
    assert found.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_coverage_of_the_recovery_interval():
    """95 % intervals hold the true recovery 90 to 99 % of the time (200 trials: standard error 1.5 points)."""
    truth = (0.7 * 0.9 + 0.3 * 0.1) / 0.7
    held = 0
    for trial in range(200):
        first, second = paired_accuracy(120, 0.7, 0.1, 0.1, seed=trial)
        interval = ours.recovery(first, second, resamples=500, seed=trial)
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / 200 <= 0.99


def test_pairing_sees_what_two_unpaired_runs_cannot():
    first, second = paired_accuracy(1000, 0.7, 0.035, 0.01, seed=0)
    paired = ours.compare_paired(first, second)[1]
    shuffled = np.random.default_rng(1).permutation(second)
    unpaired = ours.compare_paired(first, shuffled)[1]
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high < 0 < unpaired.high
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mean", lambda m: m), ("perplexity", lambda m: math.exp(-m)), ("bits", lambda m: -m / math.log(2))],
)
def test_links(kind, expected):
    totals, weights = np.array([-3.0, -5.0, -1.0]), np.array([2.0, 4.0, 1.0])
    ratio, difference = ours.compare_paired(totals, totals * 2, weights, kind=kind)
    before, after = expected(-9 / 7), expected(-18 / 7)
    assert difference.value == pytest.approx(after - before)
    assert ratio.value == pytest.approx(after / before) if kind != "mean" else math.isnan(ratio.value)


@pytest.mark.parametrize("scores", [[1.0, 0.0, 1.0, 1.0], [1.0] + [0.0] * 19])
def test_identical_runs_are_a_point(scores):
    ratio, difference = ours.compare_paired(scores, scores)
    assert ratio == ours.Interval(1.0, 1.0, 1.0)
    assert difference == ours.Interval(0.0, 0.0, 0.0)


def test_everything_lost_is_a_point_at_zero():
    assert ours.recovery(np.ones(30), np.zeros(30)) == ours.Interval(0.0, 0.0, 0.0)


def test_one_document_bounds_nothing():
    ratio = ours.recovery([1.0], [1.0])
    assert (ratio.value, ratio.low, ratio.high) == (1.0, *NO_BOUND)
    assert ours.standard_error([1.0]) is None


def test_a_baseline_of_zero_has_no_ratio():
    ratio, difference = ours.compare_paired(np.zeros(20), np.r_[np.ones(5), np.zeros(15)])
    assert all(math.isnan(number) for number in (ratio.value, ratio.low, ratio.high))
    assert difference.value == 0.25


def test_resamples_without_a_baseline_widen_the_interval():
    """With one right answer in 20, 36 % of the resamples hold none of it, so neither end is known."""
    scores = np.r_[np.ones(1), np.zeros(19)]
    ratio = ours.recovery(scores, np.r_[np.ones(2), np.zeros(18)])
    assert (ratio.value, ratio.low, ratio.high) == (2.0, *NO_BOUND)


@pytest.mark.parametrize("kind", ["mean", "perplexity", "bits"])
def test_nan_stays_nan(kind):
    weights = np.full(10, 5.0)
    after = np.r_[np.full(9, -2.0), math.nan]
    for interval in ours.compare_paired(np.full(10, -2.0), after, weights, kind=kind):
        assert all(math.isnan(number) for number in (interval.value, interval.low, interval.high))


def test_an_impossible_document_makes_the_perplexity_infinite():
    ratio = ours.perplexity_ratio(np.full(10, -20.0), np.r_[np.full(9, -20.0), -math.inf], np.full(10, 5.0))
    assert ratio.value == ratio.high == math.inf
    overflow = ours.perplexity_ratio(np.full(10, -20.0), np.full(10, -1e6), np.full(10, 5.0))
    assert overflow.value == overflow.low == overflow.high == math.inf


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 0.0]), ([[1.0]], [[1.0]])])
def test_samples_that_do_not_pair(first, second):
    for function in (ours.recovery, ours.mcnemar):
        with pytest.raises(DataError, match="same documents"):
            function(first, second)


def test_weights_must_pair_too():
    with pytest.raises(DataError, match="same documents"):
        ours.perplexity_ratio([-1.0, -2.0], [-1.0, -2.0], [1.0])


@pytest.mark.parametrize("options", [{"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95}, {"resamples": 10}])
def test_impossible_options(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ours.recovery([1.0, 0.0], [1.0, 1.0], **options)


def test_seeded_and_alone():
    first, second = paired_accuracy(80, 0.6, 0.2, 0.2, seed=1)
    states = random.getstate(), np.random.get_state()
    one, again, other = (ours.recovery(first, second, seed=seed) for seed in (4, 4, 5))
    assert one == again
    assert (one.low, one.high) != (other.low, other.high)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])


def test_memory_is_bounded_without_changing_the_result(monkeypatch):
    first, second = paired_accuracy(80, 0.6, 0.2, 0.2, seed=1)
    whole = ours.recovery(first, second)
    monkeypatch.setattr(ours, "_CHUNK", 1000)
    assert ours.recovery(first, second) == whole


def test_wider_confidence_is_wider():
    first, second = paired_accuracy(200, 0.6, 0.2, 0.2, seed=1)
    narrow, wide = (ours.recovery(first, second, confidence=c) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_mcnemar_known_value():
    # 10 lost, 2 gained: two-sided exact p = 2 * sum(C(12, k), k <= 2) / 2^12 = 2 * 79 / 4096.
    first = np.r_[np.ones(10), np.zeros(2), np.ones(50)]
    second = np.r_[np.zeros(10), np.ones(2), np.ones(50)]
    assert ours.mcnemar(first, second) == ours.Flips(10, 2, pytest.approx(158 / 4096))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_mcnemar_against_the_binomial_sum(lost, gained, same):
    first = np.r_[np.ones(lost), np.zeros(gained), np.ones(same)]
    second = np.r_[np.zeros(lost), np.ones(gained), np.ones(same)]
    tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    assert ours.mcnemar(first, second).p_value == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_refuses_graded_scores():
    with pytest.raises(DataError, match=r"0\.5"):
        ours.mcnemar([1.0, 0.0], [0.5, 1.0])


def test_standard_error_of_a_mean_is_the_usual_one():
    scores = np.random.default_rng(0).random(50)
    assert ours.standard_error(scores) == pytest.approx(float(scipy.stats.sem(scores)))


@pytest.mark.parametrize("kind", ["perplexity", "bits"])
def test_standard_error_of_a_ratio_is_that_of_its_bootstrap(kind):
    draw = np.random.default_rng(0)
    weights = draw.integers(100, 300, 400).astype(float)
    totals = -weights * draw.gamma(20, 0.05, 400)
    rows = draw.integers(400, size=(4000, 400))
    link = {"perplexity": lambda m: np.exp(-m), "bits": lambda m: -m / math.log(2)}[kind]
    spread = np.std(link(totals[rows].sum(1) / weights[rows].sum(1)))
    assert ours.standard_error(totals, weights, kind=kind) == pytest.approx(spread, rel=0.05)
