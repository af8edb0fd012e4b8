"""Requests that come and go: from a recipe to evidence, floors and the report, and from the shell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.paged_runner import PagedRunner
from optimizer.cli import app
from optimizer.errors import RecipeError, UsageError
from optimizer.pipeline import Outcome, run
from optimizer.progress import Progress
from optimizer.recipe import Recipe, ServingSpec, serving_spec
from optimizer.report_build import build_report
from optimizer.report_html import render_html
from optimizer.serving import describe, paged, serve, serving_evidence
from optimizer.source import Source, load_source
from tests.optimizer.small_jobs import recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama

PAGED = {"name": "decode", "cache": "paged", "kv": "int8", "block_size": 8, "compile": False}
SPECULATE = {"name": "speculate", "drafts": 2}
SERVING = {"requests": 25, "concurrency": 3, "max_batch": 2, "ttft_ms": 60_000.0, "tpot_ms": 60_000.0}


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(tiny_llama(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32))


def job(*floors: dict[str, Any], passes: tuple[dict[str, Any], ...] = (PAGED, SPECULATE), **serving: Any) -> Recipe:
    document = recipe(*floors, passes=passes).model_dump()
    return Recipe.from_dict(document | {"serving": SERVING | serving})


@pytest.fixture(scope="module")
def outcome(source: Source) -> Outcome:
    floors = (
        {"metric": "serving.met_share", "at_least": 0.5, "bound": "value"},
        {"metric": "serving.ttft_p95_seconds", "at_most": 60.0, "bound": "value"},
        {"metric": "serving.ttft_p99_seconds", "at_most": 60.0},
        {"metric": "kv.ratio", "at_most": 0.5},
        {"metric": "steps.eager", "at_most": 0.0},
    )
    return run(source, job(*floors))


def test_what_clients_saw_is_evidence_and_too_few_requests_fail_a_floor(outcome: Outcome) -> None:
    assert outcome.served is not None
    report, shape = outcome.served
    assert report.finished == 25
    assert shape.name == "chat"
    assert outcome.evidence["serving.met_share"].value == 1
    assert outcome.evidence["serving.tokens_per_second"].value == pytest.approx(report.tokens_per_second)
    verdicts = {item.floor.metric: item for item in outcome.verdict.floors}
    assert verdicts["serving.met_share"].passed
    assert verdicts["serving.ttft_p95_seconds"].passed
    assert not verdicts["serving.ttft_p99_seconds"].passed  # a p99 takes 100 requests
    assert verdicts["serving.ttft_p99_seconds"].measurement is None
    assert verdicts["kv.ratio"].passed
    assert not verdicts["steps.eager"].passed  # nothing was compiled here, and a recipe may insist on it


def test_all_steps_can_be_compiled_before_the_first_request_with_progress(source: Source) -> None:
    seen: list[tuple[str, float, float]] = []

    class Recorder(Progress):
        def update(self, what: str, done: float, total: float) -> None:
            seen.append((what, done, total))

    work = PAGED | {"capture": "ahead", "max_batch": 16, "recent": 16}
    outcome = run(source, job(passes=(work,), requests=4), progress=Recorder())
    assert [update for update in seen if update[0] == "steps"] == [("steps", done, 10) for done in range(11)]
    assert outcome.costs["compile"] >= outcome.runner.ledger.compile_seconds > 0
    assert isinstance(outcome.runner, PagedRunner)
    assert len(outcome.runner._steps) == 10  # 1, 2, 4, 8 and 16 rows, greedy and drawn, and no other was needed


def test_an_objective_that_is_missed_fails_its_floor(source: Source) -> None:
    floor = {"metric": "serving.met_share", "at_least": 0.5, "bound": "value"}
    missed = run(source, job(floor, ttft_ms=1e-3))
    assert missed.evidence["serving.met_share"].value == 0
    assert not missed.verdict.passed


def test_the_report_shows_serving_speculation_and_the_smaller_cache(outcome: Outcome) -> None:
    report = build_report(outcome)
    assert report.serving is not None
    assert report.serving.requests == 25
    assert report.serving.met_share == 1
    assert [row.name for row in report.serving.latencies] == ["TTFT", "TPOT", "ITL", "E2E"]
    assert report.serving.latencies[0].p99 is None
    assert report.memory.kv_bytes_per_token_after < report.memory.kv_bytes_per_token_before
    assert (
        "tokens a step and row" in report.ledger.notes["speculation"] or "no step" in report.ledger.notes["speculation"]
    )
    markdown, page = report.to_markdown(), render_html(report)
    for text in (markdown, page):
        assert "not measured" in text
        assert "requests like chat" in text
        assert "goodput" in text
    assert report.from_json(report.to_json()) == report


def test_serving_without_an_engine_is_refused_before_any_work(source: Source) -> None:
    with pytest.raises(UsageError, match="cache: paged"):
        run(source, job(passes=({"name": "decode", "compile": False},)))
    with pytest.raises(UsageError, match="CompiledRunner runs batches in lockstep"):
        serve(CompiledRunner(source.model, source.tokenizer, compile=False), ServingSpec())


@pytest.mark.parametrize("options", [{"preset": "poetry"}, {"requests": 0}, {"rate": 0.0}, {"ttft_ms": -1.0}], ids=str)
def test_a_workload_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"serving: .*{next(iter(options))}"):
        serving_spec(**options)


@pytest.mark.parametrize("arrivals", [{"rate": 200.0}, {"rate": 200.0, "burst": 3}, {}], ids=str)
def test_requests_arrive_as_asked(source: Source, arrivals: dict[str, Any]) -> None:
    runner = paged(CompiledRunner(source.model, source.tokenizer, compile=False))
    assert isinstance(runner, PagedRunner)
    runner.compile = False
    report, shape = serve(runner, ServingSpec(requests=6, max_batch=2, **arrivals))
    assert report.finished == 6
    assert "serving.goodput_tokens_per_second" in serving_evidence(report)
    assert len(describe(report, shape)) == 6
    assert runner.cache.bytes_in_use == 0


def test_a_paged_runner_is_kept_unless_another_cache_is_asked_for(source: Source) -> None:
    runner = paged(CompiledRunner(source.model, source.tokenizer, compile=False))
    assert paged(runner) is runner
    rounded = paged(runner, "fp8")
    assert rounded.options.kv == "fp8"
    assert rounded.kv_bytes_per_token < runner.kv_bytes_per_token


def test_the_command_prints_one_json_document(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer import serving

    folder = tiny_llama(tmp_path / "model", dtype=torch.float32)
    monkeypatch.setattr(serving, "paged", lambda runner, _kv: _uncompiled(paged(runner)))
    ran = CliRunner().invoke(app, ["serve", str(folder), "--requests", "3", "--max-batch", "2", "--json", "--quiet"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["finished"] == 3
    assert document["ledger"]["eager"] > 0
    assert CliRunner().invoke(app, ["serve", str(folder), "--workload", "poetry"]).exit_code == 2


def _uncompiled(runner: PagedRunner) -> PagedRunner:
    runner.compile = False
    return runner
