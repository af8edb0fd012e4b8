"""Evaluation in looks: the same documents as at once, stopped when clear, and never where it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from optimizer.errors import UsageError
from optimizer.evals.gate import Floor, judge
from optimizer.evals.quality import MetricResult, QualityResult, compare, evaluate, evidence, task_sizes
from optimizer.evals.sequential import evaluate_in_looks, is_settled, may_stop, merge, of_task, plan, restrict
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer

TASKS = ["reference_next_line", "reference_perplexity", "reference_cloze"]


class Answers:
    """A model that is known by its answers: `scores[task]`, 0 or 1 for each document."""

    def __init__(self, **scores: np.ndarray) -> None:
        self.scores, self.asked = scores, []

    def __call__(self, documents: Mapping[str, range]) -> QualityResult:
        self.asked.append(dict(documents))
        return QualityResult(tuple(self.metric(task, rows) for task, rows in documents.items()), 0)

    def metric(self, task: str, rows: range) -> MetricResult:
        totals = tuple(float(self.scores[task][row]) for row in rows)
        names = tuple(f"{row}:h" for row in rows)
        return MetricResult(
            task, "acc", "none", float(np.mean(totals)), True, None, "mean", names, totals, (1.0,) * len(totals)
        )


def run(before: np.ndarray, after: np.ndarray, margin: float, count: int = 5, alpha: float = 0.05):
    sizes, floor = {"t": len(before)}, Floor("quality.t.acc.loss", at_most=margin)
    plans = {"t": plan(len(before), count, alpha)}
    baseline = evaluate_in_looks(Answers(t=before), sizes, plans)

    def settled(task: str, found: QualityResult, level: float) -> bool:
        part = of_task(found, task, level)
        return is_settled([floor], compare(restrict(of_task(baseline, task, level), part), part, resamples=100))

    model = Answers(t=after)
    found = evaluate_in_looks(model, sizes, plans, settled)
    comparisons = compare(restrict(baseline, found), found, resamples=100, alpha=alpha)
    (verdict,) = judge([floor], evidence(comparisons)).floors
    return verdict, model.asked, found


def test_a_ruined_model_stops_at_the_first_look():
    right = np.ones(1000)
    verdict, asked, found = run(right, right * 0, margin=0.05)
    assert not verdict.passed
    assert not verdict.inconclusive
    assert asked == [{"t": range(200)}]
    assert len(found.metrics[0].documents) == 200


def test_a_copy_stops_as_soon_as_the_margin_is_excluded():
    right = np.ones(4000)
    verdict, asked, found = run(right, right, margin=0.02)
    assert verdict.passed
    assert len(asked) < 5
    assert verdict.measurement.samples == len(found.metrics[0].documents) < 4000
    assert found.levels["t"] == plan(4000, 5, 0.05)[len(asked) - 1].alpha


def test_what_stays_open_uses_every_item_and_fails():
    generator = np.random.default_rng(0)
    before = generator.integers(0, 2, 300).astype(float)
    after = np.where(generator.random(300) < 0.2, 1 - before, before)
    verdict, asked, found = run(before, after, margin=0.02)
    assert not verdict.passed
    assert verdict.inconclusive
    assert len(asked) == 5
    assert [rows["t"].start for rows in asked] == [0, 60, 120, 180, 240]
    assert len(found.metrics[0].documents) == 300
    assert "needs about" in verdict.reason
    assert "there were 300" in verdict.reason


def test_answers_that_are_not_numbers_settle_as_failed():
    right = np.ones(500)
    verdict, asked, _ = run(right, right * math.nan, margin=0.05)
    assert not verdict.passed
    assert "not a finite number" in verdict.reason
    assert len(asked) == 1


@pytest.mark.slow
def test_the_gate_errs_no_more_often_than_alpha_when_it_looks_five_times():
    # The whole path, on answers that lose exactly the margin; the vectorised simulation is in test_spending.
    generator, passed = np.random.default_rng(1), 0
    for _ in range(150):
        before = (generator.random(400) < 0.7).astype(float)
        flip = generator.random(400)
        after = np.where(flip < 0.1, 0.0, np.where(flip > 0.95, 1.0, before))  # lost 0.1·0.7, gained 0.05·0.3
        passed += run(before, after, margin=0.055)[0].passed
    assert passed <= 17  # the 99.9th percentile of 150 draws at 5 %


def test_tasks_stop_one_by_one():
    sizes = {"short": 100, "long": 1000}
    model = Answers(short=np.ones(100), long=np.ones(1000))
    plans = {task: plan(size, 5, 0.05) for task, size in sizes.items()}
    found = evaluate_in_looks(model, sizes, plans, lambda task, *_: task == "short")
    assert model.asked[0] == {"short": range(20), "long": range(200)}
    assert model.asked[1:] == [{"long": range(k * 200, k * 200 + 200)} for k in range(1, 5)]
    assert {metric.task: len(metric.documents) for metric in found.metrics} == {"short": 20, "long": 1000}


def test_only_tasks_whose_floors_bound_a_loss_may_stop():
    loss = Floor("quality.t.acc.loss", at_most=0.01)
    assert may_stop([loss])
    assert not may_stop([])
    assert not may_stop([loss, Floor("quality.t.acc.recovery", at_least=0.9)])
    assert not may_stop([Floor("quality.t.acc.loss", at_most=0.01, bound="value")])


@pytest.fixture(scope="module")
def runner():
    return SmallRunner(small_model())


def test_parts_of_a_run_are_together_the_run(runner):
    limits = dict.fromkeys(TASKS, 7)
    whole = evaluate(runner, small_tokenizer(), TASKS, limit=limits, max_length=256)
    sizes = task_sizes(TASKS, limits)
    assert sizes == limits

    def measure(documents):
        return evaluate(runner, small_tokenizer(), list(documents), documents=documents, max_length=256)

    parts = evaluate_in_looks(measure, sizes, {task: plan(7, 3, 0.05) for task in TASKS})
    found = {metric.key: metric for metric in parts.metrics}
    for metric in whole.metrics:
        other = found[metric.key]
        assert other.documents == metric.documents
        assert other.totals == pytest.approx(metric.totals, rel=1e-5)  # padding differs between batches
        assert other.value == pytest.approx(metric.value, rel=1e-5)
        assert other.stderr == pytest.approx(metric.stderr, rel=1e-3)
        row = parts.lm_eval["results"][metric.task]
        assert row[f"{metric.metric},{metric.filter}"] == pytest.approx(
            whole.lm_eval["results"][metric.task][f"{metric.metric},{metric.filter}"], rel=1e-5
        )
    assert {task: len(rows) for task, rows in parts.samples.items()} == {
        task: len(rows) for task, rows in whole.samples.items()
    }
    assert parts.lm_eval["n-samples"]["reference_next_line"]["effective"] == 7


def test_documents_of_no_task_or_of_another_are_refused(runner):
    for documents in ({}, {"reference_cloze": range(2)}):
        with pytest.raises(UsageError, match="documents must name some of each task"):
            evaluate(runner, small_tokenizer(), ["reference_next_line"], documents=documents)


def test_the_sizes_are_those_of_the_data():
    assert task_sizes(TASKS, {"reference_cloze": 5}) == {
        "reference_next_line": 700, "reference_perplexity": 317, "reference_cloze": 5,
    }  # fmt: skip


def test_a_metric_that_is_no_mean_is_refused_in_parts():
    part = QualityResult((MetricResult("t", "f1", "none", 0.5, True),), 0)
    with pytest.raises(UsageError, match=r"set evaluation\.sequential to false"):
        merge([part, part])


def test_no_task_is_refused():
    with pytest.raises(UsageError, match="no task"):
        evaluate_in_looks(Answers(), {}, {})


def test_restricting_to_nothing_is_not_a_number():
    empty = QualityResult((Answers(t=np.ones(3)).metric("t", range(3)),), 0)
    other = Answers(t=np.ones(9)).metric("t", range(5, 9))
    (metric,) = restrict(empty, QualityResult((other,), 0, levels={"t": 0.05})).metrics
    assert math.isnan(metric.value)
