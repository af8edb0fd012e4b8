"""Who is blamed for a loss: planted culprits, single, paired and added up; and what happens when time runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest

from optimizer.attribution import Attribution, Loss, attribute, attribute_layers
from optimizer.evals.bisect import OutOfBudget

SUSPECTS = ("rotate", "quantize", "quantize.activations", "merge_linears", "decode.int8_inputs", "decode.kv")


class Job:
    """A job whose loss is what `harm` gives for the suspects that are active; the floor allows 1."""

    def __init__(self, harm: Callable[[frozenset[str]], float], budget: int = 10**6) -> None:
        self.harm, self.budget = harm, budget
        self.seen: dict[frozenset[str], Loss] = {}

    def __call__(self, reverted: frozenset[str]) -> Loss:
        if reverted not in self.seen:
            if len(self.seen) == self.budget:
                raise OutOfBudget
            loss = self.harm(frozenset(SUSPECTS) - reverted)
            self.seen[reverted] = Loss(loss, loss, loss, loss - 1)
        return self.seen[reverted]


def adding(losses: Mapping[str, float]) -> Callable[[frozenset[str]], float]:
    return lambda active: sum(losses.get(name, 0) for name in active)


def blamed(found: Attribution) -> set[tuple[str, ...]]:
    return {finding.names for finding in found.guilty}


@pytest.mark.parametrize("culprit", SUSPECTS)
def test_a_pass_that_does_all_the_harm_is_found_and_is_the_repair(culprit: str) -> None:
    job = Job(adding({culprit: 5}))
    found = attribute(SUSPECTS, job)
    assert blamed(found) == {(culprit,)}
    assert found.repairs == [frozenset({culprit})]
    assert found.complete
    assert len(job.seen) <= 2 * len(SUSPECTS) + 1
    (row,) = found.guilty
    assert (row.kind, row.without.value, row.alone.value) == ("pass", 0, 5)  # type: ignore[union-attr]


@pytest.mark.parametrize("pair", [("quantize", "decode.kv"), ("rotate", "merge_linears"), SUSPECTS[-2:]])
def test_two_passes_that_do_harm_only_together_are_blamed_as_a_pair(pair: tuple[str, str]) -> None:
    job = Job(lambda active: 5.0 if active.issuperset(pair) else 0.1 * len(active))
    found = attribute(SUSPECTS, job)
    assert blamed(found) == {pair}
    assert found.guilty[0].kind == "pair"
    assert all(not finding.guilty for finding in found.findings if finding.kind == "pass")
    assert {frozenset({name}) for name in pair} == set(found.repairs)
    n = len(SUSPECTS)
    assert len(job.seen) <= 2 * n + 1 + n * (n - 1) // 2


def test_two_culprits_are_both_blamed_and_reverted_together() -> None:
    found = attribute(SUSPECTS, Job(adding({"quantize": 5, "decode.kv": 3})))
    assert blamed(found) == {("quantize",), ("decode.kv",)}
    assert found.repairs == [frozenset({"quantize", "decode.kv"})]


def test_two_pairs_are_both_found_and_one_of_each_is_reverted() -> None:
    pairs = (("rotate", "quantize"), ("decode.int8_inputs", "decode.kv"))
    found = attribute(SUSPECTS, Job(lambda active: 5.0 * sum(active.issuperset(pair) for pair in pairs)))
    assert blamed(found) == set(pairs)
    (repair,) = found.repairs
    assert all(len(repair & set(pair)) == 1 for pair in pairs)


def test_losses_that_only_add_up_have_no_culprit_and_the_largest_are_reverted() -> None:
    found = attribute(SUSPECTS, Job(adding(dict.fromkeys(SUSPECTS, 0.3))))  # 1.8, at most 1: three must go
    assert not found.guilty
    assert "add up" in found.notes[0]
    (repair,) = found.repairs
    assert len(repair) == 3


def test_where_everything_is_to_blame_everything_is_reverted() -> None:
    found = attribute(SUSPECTS, Job(adding(dict.fromkeys(SUSPECTS, 2))))
    assert blamed(found) == {(name,) for name in SUSPECTS}
    assert found.repairs == [frozenset(SUSPECTS)]


def test_a_loss_that_no_pass_carries_is_said_to_be_so_after_one_candidate() -> None:
    job = Job(lambda _: 2.0)
    found = attribute(SUSPECTS, job)
    assert (found.findings, found.repairs, len(job.seen)) == ([], [], 1)
    assert "no pass carries this loss" in found.notes[0]


def test_a_recipe_with_nothing_to_take_back_is_said_to_be_so() -> None:
    found = attribute((), Job(lambda _: 2.0))
    assert found.notes == ["no pass of the recipe can be taken back"]


def test_a_single_suspect_is_blamed() -> None:
    found = attribute(("quantize",), Job(adding({"quantize": 2})))
    assert (blamed(found), found.repairs) == ({("quantize",)}, [frozenset({"quantize"})])


def test_a_candidate_that_cannot_be_measured_accuses_nobody_and_repairs_nothing() -> None:
    sound = Job(adding({"quantize": 5}))

    def measure(reverted: frozenset[str]) -> Loss:
        if reverted == {"decode.kv"} or reverted == frozenset(SUSPECTS) - {"rotate"}:
            return Loss(math.nan, math.nan, math.nan, math.nan, "the pass refused")
        return sound(reverted)

    found = attribute(SUSPECTS, measure)
    assert blamed(found) == {("quantize",)}
    assert found.repairs == [frozenset({"quantize"})]


def test_a_model_that_gives_no_number_misses() -> None:
    found = attribute(SUSPECTS, Job(lambda active: math.nan if "decode.kv" in active else 0.0))
    assert blamed(found) == {("decode.kv",)}
    assert found.repairs == [frozenset({"decode.kv"})]


def test_any_other_error_is_passed_on() -> None:
    def broken(_: frozenset[str]) -> Loss:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        attribute(SUSPECTS, broken)


@pytest.mark.parametrize("budget", range(30))
def test_what_was_found_before_time_ran_out_is_kept(budget: int) -> None:
    job = Job(lambda active: 5.0 if active >= {"quantize", "decode.kv"} else 0.0, budget)
    found = attribute(SUSPECTS, job)
    assert len(job.seen) <= budget
    assert found.complete == (budget >= 1 + 2 * 6 + 15)
    for repair in found.repairs:
        assert job.seen[repair].holds  # only what was measured is offered
    if budget >= 7:
        assert frozenset({"quantize"}) in found.repairs


def test_harm_that_is_not_monotone_still_gives_only_repairs_that_were_measured() -> None:
    """Two passes that mend each other: without either, all is lost."""
    job = Job(lambda active: 5.0 if ("rotate" in active) != ("quantize" in active) or "decode.kv" in active else 0.0)
    found = attribute(SUSPECTS, job)
    assert ("decode.kv",) in blamed(found)
    assert frozenset({"decode.kv"}) in found.repairs
    assert all(job.seen[repair].holds for repair in found.repairs)


def test_ruined_layers_are_found() -> None:
    layers = [f"model.layers.{i}.mlp.down_proj" for i in range(48)]
    asked = []

    def measure(reverted: frozenset[str]) -> Loss:
        asked.append(reverted)
        loss = sum(2.0 for layer in (layers[3], layers[40]) if layer not in reverted)
        return Loss(loss, loss, loss, loss - 1)

    removal, finding = attribute_layers(layers, measure)
    assert finding.names == (layers[3], layers[40])
    assert (finding.guilty, finding.without.value, removal.minimal) == (True, 0, True)  # type: ignore[union-attr]
    assert len(set(asked)) <= 2 * (2 * math.log2(48) + 3) + 1


def test_layers_that_are_not_to_blame_are_not_blamed() -> None:
    removal, finding = attribute_layers(["a", "b"], lambda _: Loss(2, 2, 2, 1))
    assert (removal.holds, finding.guilty, finding.names) == (False, False, ())
