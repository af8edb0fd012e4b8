"""Levels of the looks against published boundaries, and the error rate of the whole by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from optimizer.errors import UsageError
from optimizer.evals.noninferiority import score_statistic
from optimizer.evals.power import items_needed
from optimizer.evals.sequential import plan
from optimizer.evals.spending import looks, spent

RUNS = 20_000


def test_five_looks_have_the_published_boundaries():
    # Lan and DeMets' O'Brien-Fleming bounds for five equal looks, two-sided 0.05 (R package ldbounds).
    found = [-stats.norm.ppf(look.alpha) for look in looks([0.2, 0.4, 0.6, 0.8, 1.0], 0.025)]
    assert found == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
def test_one_look_is_the_plain_test(alpha):
    (look,) = looks([1.0], alpha)
    assert look.alpha == pytest.approx(alpha)


@pytest.mark.parametrize("fractions", [[0.5, 1], [0.1, 0.15, 0.9, 1], [k / 20 for k in range(1, 21)]])
def test_any_look_succeeds_by_chance_as_often_as_alpha(fractions):
    alpha = 0.05
    steps = np.sqrt(np.diff([0.0, *fractions]))
    paths = np.cumsum(np.random.default_rng(0).normal(size=(200_000, len(fractions))) * steps, axis=1)
    z = paths / np.sqrt(fractions)
    bounds = [-stats.norm.ppf(look.alpha) for look in looks(fractions, alpha)]
    assert np.mean((z >= bounds).any(axis=1)) == pytest.approx(alpha, abs=3 * np.sqrt(alpha * (1 - alpha) / 200_000))


def test_all_of_alpha_is_spent_at_the_end_and_little_before():
    assert spent(1.0, 0.05) == pytest.approx(0.05)
    assert spent(0.2, 0.05) < 1e-4
    found = looks([0.25, 0.5, 0.75, 1.0], 0.05)
    assert [look.alpha for look in found] == sorted(look.alpha for look in found)


@pytest.mark.parametrize("fractions", [[], [0.5], [0.5, 0.5, 1], [0, 1], [0.6, 0.4, 1], [0.5, 1.1]])
def test_fractions_that_do_not_increase_to_one_are_refused(fractions):
    with pytest.raises(UsageError, match="increasing fractions"):
        looks(fractions, 0.05)


def sequential(items: int, margin: float, flips: float, loss: float, count: int = 5) -> tuple[float, float]:
    """The share of simulated sequential tests that pass, and the mean share of the items they took.

    A test stops when the loss is shown to be below the margin or above it, at the level of its look.
    """
    shares = [(flips + loss) / 2, (flips - loss) / 2, 1 - flips]
    generator, own = np.random.default_rng(7), plan(items, count, 0.05)
    lost, gained, passed = np.zeros(RUNS), np.zeros(RUNS), np.zeros(RUNS, dtype=bool)
    taken, seen = np.full(RUNS, -1.0), 0
    for look in own:
        now = round(look.fraction * items)
        new = generator.multinomial(now - seen, shares, RUNS)
        lost, gained, seen = lost + new[:, 0], gained + new[:, 1], now
        z, critical = score_statistic(lost, gained, now, margin), -stats.norm.ppf(look.alpha)
        stops = (taken < 0) & ((np.abs(z) >= critical) | (look.fraction == 1))
        passed[stops] = z[stops] <= -critical
        taken[stops] = look.fraction
    return float(passed.mean()), float(taken.mean())


def test_looking_five_times_keeps_both_error_rates_and_saves_items():
    items = items_needed(0.01, flips=0.05, power=0.96)
    rate, taken = sequential(items, 0.01, 0.05, loss=0.0)
    assert rate >= 0.95  # A/A
    assert taken < 0.8
    rate, _ = sequential(items, 0.01, 0.05, loss=0.01)
    assert rate <= 0.05 + 0.005 + 3 * np.sqrt(0.05 * 0.95 / RUNS)  # a planted loss of the margin
    rate, taken = sequential(items, 0.01, 0.05, loss=0.03)
    assert rate == 0
    assert taken < 0.5  # a clear loss stops early


@pytest.mark.parametrize("skewed", [False, True])
def test_students_t_in_five_looks_keeps_alpha(skewed):
    documents, margin, runs = 120, 0.005, 10_000
    generator = np.random.default_rng(3)
    noise = generator.gamma(4, 1, (runs, documents)) - 4 if skewed else generator.normal(size=(runs, documents)) * 2
    passed, going = np.zeros(runs, dtype=bool), np.ones(runs, dtype=bool)
    for look in plan(documents, 5, 0.05):
        seen = margin + 0.01 * noise[:, : round(look.fraction * documents)]
        count = seen.shape[1]
        reach = stats.t.isf(look.alpha, count - 1) * seen.std(1, ddof=1) / np.sqrt(count)
        passed |= going & (seen.mean(1) + reach <= margin)
        going &= (np.abs(seen.mean(1) - margin) < reach) & (look.fraction < 1)
    # A skewed loss errs a little more: the mean of few documents is then low where their spread is.
    assert passed.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs) + (0.02 if skewed else 0)


def test_a_naive_test_at_every_look_would_not():
    # What alpha spending is for: the same simulation with the full level at each look errs more than twice as often.
    fractions = [0.2, 0.4, 0.6, 0.8, 1.0]
    steps = np.sqrt(np.diff([0.0, *fractions]))
    paths = np.cumsum(np.random.default_rng(0).normal(size=(RUNS, 5)) * steps, axis=1)
    assert np.mean((paths / np.sqrt(fractions) >= stats.norm.isf(0.05)).any(axis=1)) > 0.1


@pytest.mark.parametrize(("size", "count"), [(1, 5), (3, 5), (7, 5), (240, 5), (700, 20)])
def test_plans_divide_any_number_of_documents(size, count):
    own = plan(size, count, 0.05)
    ends = [round(look.fraction * size) for look in own]
    assert ends == sorted(set(ends))
    assert ends[-1] == size
    assert len(own) == min(size, count)
