"""What binds, in the report of a job: both models, on the times that the gate judged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from optimizer.api import Result, optimize
from optimizer.job_diagnosis import with_diagnosis
from optimizer.plan_command import base_recipe
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.report import Report
from tests.optimizer.small_jobs import recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        patch.setenv("KINETO_LOG_LEVEL", "6")
        logging.disable_progress_bar()
        folder = tiny_llama(tmp_path_factory.mktemp("m") / "model", dtype=torch.float32)
        yield optimize(folder, recipe().updated({"diagnose": True}))
        logging.enable_progress_bar()


def test_both_models_and_phases_are_diagnosed_on_the_times_that_were_judged(done: Result) -> None:
    report = done.report
    assert [(e.variant, e.phase) for e in report.diagnosis] == [
        (variant, phase) for variant in ("original", "optimized") for phase in ("prefill", "decode")
    ]
    cell = report.speed[0]
    times = [s.p50 for stats in (cell.baseline, cell.optimized) for s in (stats.ttft_seconds, stats.tpot_seconds)]
    assert [entry.seconds for entry in report.diagnosis] == times
    for entry in report.diagnosis:
        assert 0 < entry.attained < 1
        assert 0 < entry.share <= 1
        assert (entry.next is None) == (entry.next_gain is None)
    assert any(cost.phase == "diagnose" and cost.seconds > 0 for cost in report.costs)


def test_every_form_of_the_report_has_it(done: Result) -> None:
    report = done.report
    assert Report.from_json(report.to_json()) == report
    for text in (report.to_markdown(), report.to_html()):
        assert "What binds" in text
        for entry in report.diagnosis:
            assert entry.term in text
            assert entry.verdict in text
    without = report.model_copy(update={"diagnosis": []})
    assert "What binds" not in without.to_markdown() + without.to_html()


def test_steps_of_the_diagnosis_are_not_those_of_the_ledger(done: Result) -> None:
    counted = done.report.ledger
    assert with_diagnosis(done.report, done.outcome, Progress(), replaced=False).ledger == counted
    assert done.outcome.runner.ledger.steps["eager"] > counted.eager


def test_what_cannot_be_diagnosed_is_a_warning(done: Result) -> None:
    found = with_diagnosis(done.report, done.outcome, Progress(), replaced=True)
    assert {entry.variant for entry in found.diagnosis} == {"optimized"}
    assert "took its place" in found.warnings[-1]


def test_auto_is_diagnosed_and_other_recipes_as_they_say() -> None:
    assert base_recipe().diagnose
    assert not base_recipe("default").diagnose
    assert not Recipe.load("default").diagnose
