"""Power against simulation: A/A runs pass, planted regressions do not, at the rates that the function states."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from optimizer.errors import UsageError
from optimizer.evals.noninferiority import paired_loss, score_statistic
from optimizer.evals.power import Sampling, items_needed, power_of

RUNS = 20_000


def pass_rate(items: int, margin: float, flips: float, loss: float, alpha: float, seed: int = 0) -> float:
    """The share of simulated runs that pass: each draws how many of its answers are lost and gained."""
    shares = [(flips + loss) / 2, (flips - loss) / 2, 1 - flips]
    lost, gained, _ = np.random.default_rng(seed).multinomial(items, shares, RUNS).T
    return float(np.mean(score_statistic(lost, gained, items, margin) <= -stats.norm.isf(alpha)))


def three_sigma(rate: float) -> float:
    return 3 * math.sqrt(rate * (1 - rate) / RUNS)


# With a margin above the flip rate a run has two or three flips, and rates move in steps of several points.
@pytest.mark.parametrize(("margin", "flips"), [(0.01, 0.02), (0.01, 0.05), (0.01, 0.2), (0.03, 0.05), (0.03, 0.2)])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_models_without_loss_pass_as_often_as_stated_and_a_planted_loss_does_not(flips, margin, power):
    alpha = 0.05
    items = items_needed(margin, flips=flips, alpha=alpha, power=power)
    # The normal approximation is within one point of the truth at these counts.
    assert pass_rate(items, margin, flips, 0.0, alpha) == pytest.approx(power, abs=0.01 + three_sigma(power))
    assert pass_rate(items, margin, flips, margin, alpha) <= alpha + 0.005 + three_sigma(alpha)


def test_the_headline_a_planted_loss_of_one_percent_is_caught_and_a_copy_is_not():
    items = items_needed(0.01, flips=0.05, alpha=0.05, power=0.96)
    assert pass_rate(items, 0.01, 0.05, 0.0, 0.05) >= 0.95
    assert 1 - pass_rate(items, 0.01, 0.05, 0.01, 0.05) >= 0.95 - 0.005
    assert 1 - pass_rate(items, 0.01, 0.05, 0.02, 0.05) > 0.999


def test_too_few_items_pass_neither():
    assert pass_rate(200, 0.01, 0.05, 0.0, 0.05) < 0.2


@pytest.mark.parametrize("alpha", [0.025, 0.05, 0.2])
def test_power_agrees_with_the_exact_sum_over_all_outcomes(alpha):
    items, flips, margin = 400, 0.1, 0.05
    flipped = np.arange(items + 1)
    exact = 0.0
    for count, chance in zip(flipped, stats.binom.pmf(flipped, items, flips), strict=True):
        lost = np.arange(count + 1)
        passed = score_statistic(lost, count - lost, items, margin) <= -stats.norm.isf(alpha)
        exact += chance * float(stats.binom.pmf(lost, count, 0.5)[passed].sum())
    assert power_of(items, margin, flips=flips, alpha=alpha) == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_scores_of_any_deviation_pass_as_often_as_stated(power):
    margin, deviation, alpha = 0.02, 0.08, 0.05
    items = items_needed(margin, deviation=deviation, alpha=alpha, power=power)
    generator = np.random.default_rng(1)

    def rate(loss: float) -> float:
        drawn = generator.normal(loss, deviation, (4000, items))
        reach = stats.t.isf(alpha, items - 1) * drawn.std(1, ddof=1) / math.sqrt(items)
        return float(np.mean(drawn.mean(1) + reach <= margin))

    assert rate(0.0) == pytest.approx(power, abs=0.02)
    assert rate(margin) == pytest.approx(alpha, abs=0.011)


def test_the_simulated_test_is_the_one_the_gate_uses():
    generator = np.random.default_rng(2)
    for _ in range(30):
        first = generator.integers(0, 2, 80).astype(float)
        second = np.where(generator.random(80) < 0.2, 1 - first, first)
        lost, gained = ((first > second).sum(), (first < second).sum())
        passed = score_statistic(lost, gained, 80, 0.1) <= -stats.norm.isf(0.05)
        assert (paired_loss(first, second, alpha=0.05).high <= 0.1) == passed


def test_power_grows_with_items_and_meets_what_was_asked():
    for margin, flips in ((0.01, 0.05), (0.02, 0.0), (0.2, 0.5)):
        needed = items_needed(margin, flips=flips, power=0.9)
        assert power_of(needed, margin, flips=flips) >= 0.9 - 1e-9
        if needed > 1:
            assert power_of(needed - 1, margin, flips=flips) < 0.9
    assert items_needed(0.005, flips=0.05) > 3.9 * items_needed(0.01, flips=0.05)


def test_the_figures_of_the_documentation():
    assert items_needed(0.01, flips=0.05, alpha=0.05, power=0.8) == 3162
    assert items_needed(0.01, flips=0.05, alpha=0.05, power=0.95) == 5505


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"margin": 0.0, "flips": 0.05}, "margin is 0"),
        ({"margin": -0.1, "flips": 0.05}, "margin"),
        ({"margin": math.nan, "flips": 0.05}, "margin"),
        ({"margin": 1.5, "flips": 0.05}, "cannot lose more than 1"),
        ({"margin": 1e-300, "flips": 0.05}, "give a larger one"),
        ({"margin": 0.1}, "either flips"),
        ({"margin": 0.1, "flips": 0.1, "deviation": 0.1}, "either flips"),
        ({"margin": 0.1, "flips": 1.1}, "share of the items"),
        ({"margin": 0.1, "flips": math.nan}, "share of the items"),
        ({"margin": 0.1, "deviation": math.nan}, "deviation"),
        ({"margin": 0.1, "flips": 0.1, "power": 1.0}, "power is 1"),
        ({"margin": 0.1, "flips": 0.1, "alpha": 0.7}, "alpha is 0.7"),
        ({"margin": 0.1, "flips": 0.02, "loss": 0.05}, "at least the loss"),
    ],
)
def test_impossible_questions_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        items_needed(**options)


def test_a_limit_on_a_ratio_is_a_margin_on_the_difference():
    points = Sampling(deviation=0.2, alpha=0.05, power=0.8, null=1.0, sign=-1, unit=0.6)
    assert points.margin(0.95) == pytest.approx(0.03)  # 95 % of an accuracy of 0.6
    assert points.items(0.95) == items_needed(0.03, deviation=0.2)
    assert points.items(1.02) is None  # asks for an improvement
    ratio = Sampling(deviation=0.02, alpha=0.05, power=0.8, null=1.0, log=True)
    assert ratio.margin(1.005) == pytest.approx(math.log(1.005))
    assert Sampling(math.nan, 0.05, 0.8).items(0.1) is None
    assert Sampling(0.1, 0.05, 0.8).items(0.0) is None
    assert Sampling(0.1, 0.05, 0.8, flip_rate=0.1).items(1e-200) is None
