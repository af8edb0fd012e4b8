"""What a model answered, read from lm-eval's own log: the answer must be the one that was scored."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optimizer.evals.items import SHOWN, Item, items_of
from optimizer.evals.quality import evaluate
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer


@pytest.fixture(scope="module")
def items() -> tuple[Item, ...]:
    tasks = ["reference_next_line", "reference_perplexity", "reference_cloze"]
    runner = SmallRunner(small_model())
    return evaluate(runner, small_tokenizer(), tasks, limit=8, batch_size=8, max_length=128).items


def test_an_answer_is_gold_where_and_only_where_it_scored(items: tuple[Item, ...]) -> None:
    choices = [item for item in items if item.task == "reference_next_line"]
    assert len(choices) == 8
    assert 0 < sum(item.scores["acc_norm"] for item in choices) < 8  # both kinds occur
    for item in choices:
        assert (item.answer == item.gold) == (item.scores["acc_norm"] == 1)
    for item in (item for item in items if item.task == "reference_cloze"):
        assert (item.answer == item.gold) == (item.scores["exact_match"] == 1)


def test_a_scored_text_has_its_likelihood_and_no_gold(items: tuple[Item, ...]) -> None:
    for item in (item for item in items if item.task == "reference_perplexity"):
        assert item.gold is None
        assert item.likelihood is not None
        assert item.likelihood < 0
        assert item.answer.endswith("nats per character")


def row(arguments: Any, responses: Any, target: Any = "0", **scores: float) -> dict[str, Any]:
    return {
        "doc_id": 3, "doc_hash": "f" * 64, "filter": "none", "arguments": arguments, "filtered_resps": responses,
        "target": target, "metrics": list(scores), **scores,
    }  # fmt: skip


def test_the_choice_is_made_as_the_metric_makes_it() -> None:
    arguments = [("Q:", " a"), ("Q:", " a much longer answer")]
    scored = [(-4.0, False), (-5.0, False)]
    (by_sum,) = items_of("t", [row(arguments, scored, 0, acc=1.0)])
    (by_length,) = items_of("t", [row(arguments, scored, 1, acc=0.0, acc_norm=1.0)])
    assert (by_sum.answer, by_sum.gold) == (" a", " a")
    assert by_length.answer == by_length.gold == " a much longer answer"
    assert by_sum.key == ("t", "none", f"3:{'f' * 16}")


def test_beginnings_that_differ_stand_for_their_choice() -> None:
    arguments = [("He is the trophy", " is big."), ("He is the case", " is big.")]
    (item,) = items_of("t", [row(arguments, [(-9.0, False), (-3.0, False)], "1", acc=1.0)])
    assert item.answer == item.gold == "He is the case"


def test_a_model_that_scores_nan_has_an_answer_all_the_same() -> None:
    arguments = [("Q", "a"), ("Q", "b")]
    (item,) = items_of("t", [row(arguments, [(math.nan, False), (-1.0, False)], 0, acc=0.0)])
    assert item.answer == "b"


def test_one_continuation_says_whether_it_is_the_greedy_one() -> None:
    (item,) = items_of("t", [row([("Q", "a")], [(-1.0, True)], "a", acc=1.0)])
    assert item.answer == "a (greedy)"


def test_long_texts_are_cut_where_it_hurts_least() -> None:
    (item,) = items_of("t", [row([("x" * 5000 + "end", {})], ["y" * 5000], "gold", exact_match=0.0)])
    assert item.context.endswith("end")
    assert len(item.context) == len(item.answer) == SHOWN + 1
    assert items_of("t", [row([("Q", {})], [], "gold")]).__next__().answer == ""


@pytest.mark.parametrize(
    "odd",
    [
        row([], ["x"]), row([("Q",)], []), row([("Q",)], [None]), row(None, ["x"]),
        row([("Q", "a"), ("Q",)], [(0.0, True)] * 2),
        {"doc_id": 1}, row([("Q", "a"), ("Q", "b")], [("x", True), ("y", False)]),
    ],
)  # fmt: skip
def test_a_sample_of_another_shape_is_left_out_and_stops_nothing(odd: dict[str, Any]) -> None:
    good = row([("Q", {})], ["text"], "gold")
    assert [item.answer for item in items_of("t", [good, odd, good])] == ["text", "text"]
