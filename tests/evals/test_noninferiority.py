"""The bound on a loss, against likelihoods maximised by scipy, its t test, and samples that are hard to be right on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from optimizer.errors import DataError, UsageError
from optimizer.evals.noninferiority import paired_loss, score_interval, score_statistic


def reference_z(lost: int, gained: int, count: int, margin: float) -> float:
    """Tango's z with the flip rates found by maximising the multinomial likelihood under the margin."""

    def unlikely(gain: float) -> float:
        shares = [gain + margin, gain, 1 - 2 * gain - margin]
        return -float(stats.multinomial.logpmf([lost, gained, count - lost - gained], count, shares))

    ends = (max(0.0, -margin) + 1e-12, (1 - margin) / 2 - 1e-12)
    gain = optimize.minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
    return float((lost - gained - count * margin) / math.sqrt(count * (2 * gain + margin - margin**2)))


@pytest.mark.parametrize(
    ("lost", "gained", "count", "margin"),
    [(5, 3, 100, 0.05), (0, 0, 50, 0.01), (12, 0, 40, 0.1), (3, 9, 200, -0.02), (0, 4, 30, 0.2), (90, 80, 3000, 0.01)],
)
def test_the_score_statistic_is_that_of_the_constrained_likelihood(lost, gained, count, margin):
    assert score_statistic(lost, gained, count, margin) == pytest.approx(
        reference_z(lost, gained, count, margin), abs=1e-5
    )


def answers(lost: int, gained: int, same: int) -> tuple[list[float], list[float]]:
    return [1.0] * lost + [0.0] * gained + [1.0] * same, [0.0] * lost + [1.0] * gained + [1.0] * same


@pytest.mark.parametrize("count", [1, 5, 50, 5000])
def test_no_flips_do_not_bound_the_loss_at_zero(count):
    z = stats.norm.isf(0.05)
    loss = paired_loss(*answers(0, 0, count), alpha=0.05)
    assert loss.value == 0
    assert loss.high == pytest.approx(z**2 / (count + z**2), rel=1e-9)
    assert loss.low == pytest.approx(-loss.high)


@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.05, 1e-5])
def test_the_bound_is_where_the_test_turns(alpha):
    for lost, gained, same in [(8, 3, 90), (0, 0, 40), (5, 0, 0), (0, 5, 0), (1, 0, 0), (10, 10, 0), (200, 150, 9000)]:
        low, high = score_interval(lost, gained, lost + gained + same, alpha)
        z = stats.norm.isf(alpha)
        for end, sign in ((high, -1), (low, 1)):
            if abs(end) < 1:
                inside, outside = (
                    float(score_statistic(lost, gained, lost + gained + same, end + step))
                    for step in (sign * 1e-7, -sign * 1e-7)
                )
                assert sign * inside <= z + 1e-3
                assert sign * outside >= z - 1e-3
        assert -1 <= low <= (lost - gained) / (lost + gained + same) <= high <= 1


def test_alpha_of_a_half_is_the_value_itself():
    loss = paired_loss(*answers(7, 3, 90), alpha=0.5)
    assert loss.low == pytest.approx(loss.value, abs=1e-9)
    assert loss.high == pytest.approx(0.04, abs=1e-9)


def test_all_answers_lost_or_gained():
    assert paired_loss(*answers(20, 0, 0)).high == 1.0
    assert paired_loss(*answers(20, 0, 0)).value == 1.0
    assert paired_loss(*answers(0, 20, 0)).low == -1.0


def test_scores_take_students_t():
    generator = np.random.default_rng(3)
    first, second = generator.random(40), generator.random(40)
    for better, sign in ((True, 1), (False, -1)):
        loss = paired_loss(first, second, higher_is_better=better, alpha=0.05)
        ends = stats.ttest_rel(first, second).confidence_interval(0.9)
        assert sorted([loss.low, loss.high]) == pytest.approx(sorted([sign * ends.low, sign * ends.high]))
        assert loss.value == pytest.approx(sign * float(np.mean(first - second)))


def test_perplexity_is_a_relative_loss_and_bits_an_absolute_one():
    generator = np.random.default_rng(4)
    first = -generator.gamma(5, 10, 30)
    second, tokens = first - generator.normal(0.5, 0.3, 30), np.full(30, 50.0)
    log_ratio = (first - second) / 50
    ends = stats.ttest_1samp(log_ratio, 0).confidence_interval(0.9)
    found = paired_loss(first, second, tokens, kind="perplexity", higher_is_better=False)
    assert found.value == pytest.approx(math.expm1(log_ratio.mean()))
    assert [found.low, found.high] == pytest.approx([math.expm1(ends.low), math.expm1(ends.high)])
    bits = paired_loss(first, second, tokens, kind="bits", higher_is_better=False)
    assert [bits.low, bits.high] == pytest.approx([ends.low / math.log(2), ends.high / math.log(2)])


def test_documents_of_unlike_length_have_the_error_of_the_jackknife():
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 400, 200).astype(float)
    first = -2.0 * tokens
    second = first - tokens * generator.normal(0.01, 0.02, 200)
    found = paired_loss(first, second, tokens, kind="perplexity", higher_is_better=False, alpha=0.025)
    worse = first - second
    left_out = (worse.sum() - worse) / (tokens.sum() - tokens)
    error = math.sqrt(199 / 200 * ((left_out - left_out.mean()) ** 2).sum())
    half = (math.log1p(found.high) - math.log1p(found.low)) / 2
    assert half == pytest.approx(stats.t.isf(0.025, 199) * error, rel=0.02)


def test_one_document_of_a_perplexity_bounds_nothing():
    loss = paired_loss([-5.0], [-5.0], [10.0], kind="perplexity", higher_is_better=False)
    assert (loss.low, loss.high) == (-math.inf, math.inf)


def test_identical_log_likelihoods_are_no_loss():
    loss = paired_loss([-5.0, -7.0], [-5.0, -7.0], [10.0, 11.0], kind="perplexity", higher_is_better=False)
    assert (loss.value, loss.low, loss.high) == (0, 0, 0)


def test_identical_scores_on_few_items_do_not_show_a_small_loss():
    loss = paired_loss([0.25, 0.5, 0.75], [0.25, 0.5, 0.75], alpha=0.05)
    assert loss.value == 0
    assert loss.high == pytest.approx(1 - 0.05 ** (1 / 3))  # 3 items of which none changed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["mean", "perplexity", "bits"])
def test_what_is_not_finite_is_not_bounded(bad, kind):
    loss = paired_loss([-1.0, -2.0, -3.0], [-1.0, bad, -3.0], [1.0, 2.0, 1.0], kind=kind)
    assert math.isnan(loss.high)


def test_a_huge_perplexity_is_infinite_and_no_error():
    loss = paired_loss([-1.0, -2.0], [-1e6, -2e6], [1.0, 2.0], kind="perplexity", higher_is_better=False)
    assert loss.value == math.inf


@pytest.mark.parametrize("alpha", [0, 0.6, math.nan, -1])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha"):
        paired_loss([1.0], [1.0], alpha=alpha)


def test_samples_that_do_not_pair_are_refused():
    for pair in (([1.0], [1.0, 0.0]), ([], []), ([[1.0]], [[1.0]])):
        with pytest.raises(DataError, match="same documents"):
            paired_loss(*pair)
    with pytest.raises(DataError, match="do not fit"):
        score_interval(3, 0, 2, 0.05)


counts = st.integers(0, 200)


@given(counts, counts, counts.filter(bool), st.floats(1e-6, 0.5))
def test_losing_one_more_answer_never_lowers_the_bound(lost, gained, same, alpha):
    total = lost + gained + same
    before = score_interval(lost, gained, total, alpha)
    after = score_interval(lost + 1, gained, total, alpha)
    assert after[1] >= before[1] - 1e-9
    mirrored = score_interval(gained, lost, total, alpha)
    assert mirrored == pytest.approx((-before[1], -before[0]), abs=1e-9)
