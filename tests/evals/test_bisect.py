"""The search for culprits, on planted ones: found, no more of them than needed, and in few tests."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest

from optimizer.evals.bisect import Budget, OutOfBudget, Removal, minimal_removal

SUSPECTS = tuple(range(100))


class Test:
    """Holds once `rule` does; counts how often it was asked, and refuses after `budget` times."""

    __test__ = False

    def __init__(self, rule: Callable[[frozenset[int]], bool], budget: int = 10**6) -> None:
        self.rule, self.budget, self.asked = rule, budget, list[frozenset[int]]()

    def __call__(self, removed: frozenset[int]) -> bool:
        if len(self.asked) == self.budget:
            raise OutOfBudget
        self.asked.append(removed)
        return self.rule(removed)


def without(*culprits: int) -> Callable[[frozenset[int]], bool]:
    return lambda removed: removed.issuperset(culprits)


def bound(k: int, n: int) -> float:
    return k * (2 * math.log2(n) + 3) + 1


@pytest.mark.parametrize("culprit", [0, 1, 2, 50, 98, 99])
def test_a_single_culprit_is_found_wherever_it_stands(culprit: int) -> None:
    test = Test(without(culprit))
    found = minimal_removal(SUSPECTS, test)
    assert found == Removal((culprit,), holds=True, minimal=True, needed=1)
    assert len(test.asked) <= bound(1, 100)


def test_a_culprit_that_stands_first_takes_three_tests() -> None:
    test = Test(without(0))
    minimal_removal(SUSPECTS, test)
    assert len(test.asked) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_several_culprits_are_found_in_few_tests(seed: int) -> None:
    culprits = random.Random(seed).sample(SUSPECTS, 1 + seed % 5)
    test = Test(without(*culprits))
    found = minimal_removal(SUSPECTS, test)
    assert (set(found.removed), found.holds, found.minimal) == (set(culprits), True, True)
    assert len(test.asked) <= bound(len(culprits), 100)


def test_of_two_that_do_harm_only_together_one_is_enough() -> None:
    found = minimal_removal(SUSPECTS, Test(lambda removed: bool(removed & {17, 60})))
    assert found.minimal
    assert found.removed == (17,)


@pytest.mark.parametrize("seed", range(10))
def test_no_member_can_be_spared_where_removing_more_never_hurts(seed: int) -> None:
    """Losses that add up to more than a limit: any set found holds, and no smaller part of it does."""
    draw = random.Random(seed)
    losses = [draw.random() ** 8 for _ in range(30)]

    def holds(removed: frozenset[int]) -> bool:
        return sum(loss for i, loss in enumerate(losses) if i not in removed) <= 0.6 * sum(losses)

    order = sorted(range(30), key=lambda i: -losses[i])
    found = minimal_removal(order, Test(holds), most=30)
    assert holds(frozenset(found.removed))
    assert found.minimal
    for spared in found.removed:
        assert not holds(frozenset(found.removed) - {spared})


def test_where_everything_is_to_blame_all_go() -> None:
    found = minimal_removal(range(6), Test(without(*range(6))))
    assert (set(found.removed), found.holds, found.minimal) == (set(range(6)), True, True)


def test_a_loss_that_is_spread_gives_the_shortest_prefix_and_says_that_it_is_not_minimal() -> None:
    test = Test(lambda removed: len(removed) >= 40)
    found = minimal_removal(SUSPECTS, test)
    assert found.holds
    assert not found.minimal
    assert (len(found.removed), found.needed) == (40, 8)
    assert len(test.asked) <= bound(8, 100)


def test_where_nothing_helps_it_says_so_after_one_test() -> None:
    test = Test(lambda _: False)
    found = minimal_removal(SUSPECTS, test)
    assert (found.holds, found.complete, len(test.asked)) == (False, True, 1)
    assert minimal_removal((), test) == Removal((), holds=False, minimal=False)


@pytest.mark.parametrize("budget", range(30))
def test_with_no_budget_left_it_returns_the_best_it_has_tested(budget: int) -> None:
    test = Test(without(33, 70), budget)
    found = minimal_removal(SUSPECTS, test)
    assert found.complete == (len(test.asked) < budget or found.minimal)
    assert found.holds == (budget > 0)
    if found.holds:
        assert frozenset(found.removed) in test.asked
        assert {33, 70} <= set(found.removed)


def test_with_noise_the_set_returned_was_tested_to_hold() -> None:
    """Answers drawn by lot, not monotone at all: it ends, within the bound, with a set that once held."""
    for seed in range(200):
        draw = random.Random(seed)
        answers: dict[frozenset[int], bool] = {frozenset(range(32)): True}
        test = Test(lambda removed, a=answers, d=draw: a.setdefault(removed, d.random() < 0.5))
        found = minimal_removal(range(32), test)
        assert answers[frozenset(found.removed)]
        assert len(test.asked) <= bound(8, 32)


def test_any_other_error_of_a_test_is_passed_on() -> None:
    def broken(_: Iterable[int]) -> bool:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        minimal_removal(SUSPECTS, broken)


def test_every_planted_set_of_a_small_case_is_found() -> None:
    for size in range(1, 6):
        for culprits in itertools.combinations(range(5), size):
            assert set(minimal_removal(range(5), Test(without(*culprits))).removed) == set(culprits)


def test_the_worked_example() -> None:
    asked: list[str] = []

    def holds(removed: frozenset[str]) -> bool:
        asked.append("".join(sorted(removed)))
        return {"b", "d"} <= removed

    assert minimal_removal("abcd", holds).removed == ("d", "b")
    assert asked == ["abcd", "a", "abc", "d", "ad", "abd", "bd"]


def test_a_budget_refuses_what_would_end_too_late() -> None:
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])
    for seconds in (3, 4):
        with budget.candidate():
            now[0] += seconds
    with pytest.raises(OutOfBudget):  # 7 are spent, and one took 4
        budget.candidate().__enter__()
    assert (budget.candidates, budget.spent, budget.longest) == (2, 7, 4)


def test_a_candidate_that_failed_has_spent_its_time() -> None:
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])

    def fails() -> None:
        with budget.candidate():
            now[0] = 6
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (budget.candidates, budget.longest) == (1, 6)
