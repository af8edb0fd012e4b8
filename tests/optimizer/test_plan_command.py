"""A plan of a real tiny model: measured, tried, gated, resumed, and reproduced by the recipe that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer import linear_times, plan_bench, plan_command
from optimizer.api import optimize
from optimizer.backends.linear import QuantizedLinear
from optimizer.candidates import WEIGHTS, Candidate
from optimizer.cli import app
from optimizer.errors import OutputError, RecipeError, UsageError
from optimizer.evals.gate import Floor
from optimizer.linear_times import served, time_variants
from optimizer.plan_bench import ModelBench, Records
from optimizer.plan_command import NoPlanError, base_recipe, describe, document, make_plan, plan_model
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.report import Report
from optimizer.source import Source, load_source
from tests.optimizer.small_jobs import PERPLEXITY, recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import llama, tiny_llama

UNCOMPILED = ({"name": "decode", "compile": False},)
FEW = [Candidate(option) for option in WEIGHTS if option.name in ("unquantized", "int8", "int4-g32")]


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        patch.setattr(plan_command, "candidates", lambda: FEW)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return load_source(folder)


def small(*floors: dict[str, Any], **workload: int) -> Recipe:
    return recipe(*(floors or ({"metric": PERPLEXITY, "at_most": 3.0},)), passes=UNCOMPILED, **workload)


def forbid(patch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        patch.setattr(plan_bench, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called again"))


@pytest.fixture(scope="module")
def planned(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[plan_command.Planned, Path]:
    work = tmp_path_factory.mktemp("plan")
    return plan_model(source, small(), folder=work), work


def test_a_plan_tries_and_chooses_a_recipe_that_holds_its_floors(
    planned: tuple[plan_command.Planned, Path], source: Source
) -> None:
    plan = planned[0].plan
    assert plan.passed
    assert plan.chosen is not None
    assert {step.candidate.name for step in plan.steps} == {"unquantized", "int8", "int4-g32"}
    for step in plan.steps:
        assert step.predicted is not None or step.reason
    outcome = planned[0].outcome()
    assert outcome.recipe == planned[0].recipe
    assert outcome.verdict.passed
    assert planned[0].outcome() is outcome  # made once
    assert not any(isinstance(module, QuantizedLinear) for module in source.model.modules())


def test_each_prediction_was_kept_before_its_try(planned: tuple[plan_command.Planned, Path]) -> None:
    (work,) = (path for path in planned[1].iterdir() if path.is_dir())
    tries = {path.name.removeprefix("try-"): path for path in work.glob("try-*.json")}
    assert tries
    for name, path in tries.items():
        prediction = work / f"prediction-{name}"
        assert prediction.stat().st_mtime_ns < path.stat().st_mtime_ns
        assert json.loads(prediction.read_text())["predicted"] == json.loads(path.read_text())["predicted"]


def test_a_second_plan_measures_nothing_again_and_says_the_same(
    planned: tuple[plan_command.Planned, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "run", "measure_baseline", "measure_generation", "time_kinds")
    again = plan_model(load_source(folder), small(), folder=planned[1])
    assert document(again)["plan"]["steps"] == document(planned[0])["plan"]["steps"]
    assert document(again) == document(planned[0])
    assert describe(again) == describe(planned[0])


def test_another_goal_is_judged_on_what_was_measured(
    planned: tuple[plan_command.Planned, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floors are no part of what a measurement is of; a goal that nothing meets has every candidate tried."""
    goal = Floor("decode.speedup", at_least=1e6)
    base = small({"metric": PERPLEXITY, "at_most": 3.0}, {"metric": goal.metric, "at_least": 1e6})
    found = plan_model(load_source(folder), base, goals=[goal], folder=planned[1])
    assert not found.plan.passed
    assert found.plan.chosen is not None
    assert found.plan.chosen.missed == ("decode.speedup",)
    assert any("binds" in line for line in found.plan.limits)
    assert "decode.speedup" in describe(found)
    assert document(found)["verdict"] == "failed"


def test_other_inputs_are_not_mixed(planned: tuple[plan_command.Planned, Path], source: Source) -> None:
    bench = ModelBench(source, small(), None, Progress(), Records())
    other = load_source(llama(seed=1, dtype=torch.float32), tokenizer=source.tokenizer)
    assert bench.digest == planned[0].bench.digest
    fewer = recipe(passes=UNCOMPILED, tasks={"reference_perplexity": 1})
    digests = {
        bench.digest,
        ModelBench(other, small(), None, Progress(), Records()).digest,
        ModelBench(source, small(batch=2), None, Progress(), Records()).digest,
        ModelBench(source, fewer, None, Progress(), Records()).digest,
    }
    assert len(digests) == 4


def test_a_search_that_was_killed_goes_on_after_the_finished_try(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = small({"metric": PERPLEXITY, "at_most": 1e-3})  # nothing holds it, so that the next is tried
    monkeypatch.setattr(
        linear_times,
        "time_variants",
        lambda variants, **_: {v: dict.fromkeys(calls, 1.0 if v == "plain" else 1e-3) for v, calls in variants.items()},
    )
    run, calls = plan_bench.run, []

    def dies(source: Any, recipe: Recipe, **options: Any) -> Any:
        calls.append(recipe.description)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(source, recipe, **options)

    monkeypatch.setattr(plan_bench, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        plan_model(source, strict, folder=tmp_path)
    found = plan_model(source, strict, folder=tmp_path)
    assert calls == [calls[0], calls[1], calls[1]]  # the one that was killed, and no other, began twice
    assert calls[0] != calls[1]
    assert found.plan.chosen is None
    with pytest.raises(NoPlanError, match="no candidate kept its quality"):
        _ = found.recipe


def test_a_damaged_record_is_refused(planned: tuple[plan_command.Planned, Path], folder: Path, tmp_path: Path) -> None:
    import shutil

    work = shutil.copytree(planned[1], tmp_path / "copy")
    next(work.glob("*/start.json")).write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        plan_model(load_source(folder), small(), folder=work)


def test_two_searches_of_the_same_do_not_share_a_folder(source: Source, tmp_path: Path) -> None:
    bench = ModelBench(source, small(), None, Progress(), Records())
    with bench.resumable(tmp_path), pytest.raises(OutputError, match="another process"):
        plan_model(source, small(), folder=tmp_path)


def test_layers_that_are_slower_quantized_are_left_out_of_the_recipe(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow_down(variants: Any, **_: Any) -> dict[str, dict[str, float]]:
        """The second kind takes longer quantized, every other half as long."""
        return {v: {c: 2e-4 * (1 if v == "plain" else 1.5 if c == "1" else 0.5) for c in variants[v]} for v in variants}

    monkeypatch.setattr(linear_times, "time_variants", slow_down)
    found = plan_model(source, small(), folder=tmp_path)
    step = next(step for step in found.plan.steps if step.candidate.name == "int8")
    assert step.kept
    kinds = {name.rpartition(".")[2] for name in step.ignore}
    spec = found.bench.candidate_recipe(step.candidate, step.ignore).passes[0]
    assert set(spec["ignore"]) == {"lm_head", *kinds}  # by their last part, since all of each are meant
    model, _ = found.bench.applied([spec])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert name.rpartition(".")[2] in kinds | {"lm_head"}


def test_a_part_of_the_layers_of_a_name_is_named_in_full() -> None:
    layers = {f"layers.{i}.{name}": None for i in range(2) for name in ("q_proj", "k_proj")}
    assert plan_bench._patterns(["layers.0.q_proj", "layers.1.q_proj"], layers) == ["q_proj"]
    assert plan_bench._patterns(["layers.0.q_proj"], layers) == ["layers.0.q_proj"]


def test_variants_take_turns_so_that_each_finds_its_own_weights_in_the_caches() -> None:
    log: list[str] = []
    calls = {v: {c: (lambda name=f"{v}{c}": log.append(name)) for c in "12"} for v in ("a", "b")}
    found = time_variants(calls, repeats=2, device=torch.device("cpu"))
    assert {v: set(seconds) for v, seconds in found.items()} == {"a": {"1", "2"}, "b": {"1", "2"}}
    turns = [name[0] for name in log]
    assert "".join(turns) == ("a" * 6 + "b" * 6) * linear_times.ROUNDS  # a warm-up and two samples of each call


def test_served_products_cover_every_layer_once(source: Source) -> None:
    bench = ModelBench(source, small(), None, Progress(), Records())
    merged = served(bench.applied([{"name": "quantize"}, {"name": "merge_linears"}])[0])
    names = [name for group in merged for name in group]
    assert len(names) == len(set(names)) == 15  # 2 × (q, k, v, o, gate, up, down) and the head
    assert sum(len(group) for group in merged if len(group) == 3) == 6


def test_the_plan_of_the_recipe_auto_is_part_of_the_report_and_its_recipe_reproduces_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.api.base_recipe", lambda **_: small())
    ran = CliRunner().invoke(
        app, ["run", str(folder), "--recipe", "auto", "--minutes", "5", "--out", str(tmp_path), "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    report = Report.from_json((tmp_path / "artifact" / "report.json").read_text())
    assert report == Report.from_json((tmp_path / "report.json").read_text())
    assert report.plan is not None
    (best,) = [step for step in report.plan.steps if step.chosen]
    assert best.measured_tpot_seconds is not None
    assert best.tpot_error == pytest.approx(best.predicted_tpot_seconds / best.measured_tpot_seconds - 1)
    for text in (report.to_markdown(), report.to_html()):
        assert best.candidate in text
        assert report.plan.stopped in text
    assert (tmp_path / ".artifact.plan").is_dir()
    saved = Recipe.from_yaml(tmp_path / "artifact" / "recipe.yaml")
    assert saved == Recipe.from_yaml(tmp_path / "plan.yaml")
    assert saved.model_dump(mode="json") == report.recipe
    again = optimize(folder, tmp_path / "plan.yaml").report
    assert again.memory.weights_bytes_after == report.memory.weights_bytes_after
    assert again.quality == report.quality
    assert again.plan is None


def test_inplace_makes_the_model_the_planned_one(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.api.base_recipe", lambda **_: small())
    model = llama(dtype=torch.float32, seed=3)
    result = optimize(model, "auto", tokenizer=source.tokenizer, inplace=True)
    planned_layers = [type(m).__name__ for m in result.model.model.modules()]
    assert [type(m).__name__ for m in model.modules()] == planned_layers


@pytest.mark.parametrize("given", [{"minutes": 3}, {"quality": 0.9}, {"goals": ["decode.speedup>=2"]}])
def test_minutes_goals_and_quality_belong_to_a_plan(given: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="Use recipe auto"):
        optimize(folder, "default", **given)


def test_a_plan_without_time_says_so(source: Source) -> None:
    found = plan_model(source, small(), minutes=1e-6)
    assert found.plan.chosen is None
    with pytest.raises(NoPlanError, match="the time was up"):
        found.outcome()


def test_the_base_of_a_plan_has_the_quality_floors_of_default_and_takes_goals_in() -> None:
    base = base_recipe(
        goals=[Floor("decode.speedup", at_least=3)], quality=0.99, workload={"batch": 8, "prompt": None, "output": 32}
    )
    floors = {floor.metric: floor for floor in base.floors}
    assert floors["decode.speedup"].at_least == 3
    assert floors["ttft.speedup"].at_least == 0.9
    assert floors[PERPLEXITY].at_most == pytest.approx(1 / 0.99)
    assert "weights.ratio" not in floors
    assert (base.workload.batch, base.workload.prompt, base.workload.output) == (8, 128, 32)
    assert "weights.ratio" in {floor.metric for floor in base_recipe("default").floors}


def test_a_recipe_of_served_requests_is_no_workload_of_a_plan(source: Source) -> None:
    with pytest.raises(UsageError, match="serving"):
        plan_model(source, base_recipe("int8-kv8"))


def test_a_workload_that_the_model_has_no_positions_for_is_refused(source: Source) -> None:
    with pytest.raises(UsageError, match="positions"):
        plan_model(source, small(prompt=10_000))


def test_the_command_writes_the_recipe_and_tells_the_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_command, "base_recipe", lambda *_, **__: small())
    done = CliRunner().invoke(app, ["plan", str(folder), "--out", str(tmp_path / "p"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "chosen: " in done.output
    assert Recipe.from_yaml(tmp_path / "p" / "plan.yaml").name == "auto"
    told = CliRunner().invoke(app, ["plan", str(folder), "--out", str(tmp_path / "p"), "--quiet", "--json"])
    assert json.loads(told.stdout)["verdict"] == "passed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--goal", "fast"], "is no condition"),
        (["--quality", "2"], "share of quality"),
        (["--minutes", "0"], "positive and finite"),
        (["--recipe", "nothing"], "unknown recipe"),
    ],
)
def test_wrong_options_are_usage_errors(options: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(folder), "--out", str(tmp_path / "p"), "--quiet", *options])
    assert done.exit_code == 2
    assert message in done.output


def test_an_output_that_is_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        make_plan(folder, small(), tmp_path / "file")


def test_a_group_size_that_does_not_fit_takes_a_candidate_out(source: Source) -> None:
    bench = ModelBench(source, small(), None, Progress(), Records())
    with pytest.raises(RecipeError, match="group size 128"):
        bench.linears(next(option for option in WEIGHTS if option.name == "int4-g128"))
