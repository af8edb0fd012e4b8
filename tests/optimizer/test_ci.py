"""`optimizer ci`: verdicts, exit codes and files of runs that pass, miss, break, are misused or are killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml
from click.testing import Result as Ran
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer import api, baseline_cache, ci, linear_times, pipeline, plan_command
from optimizer.api import Result, optimize
from optimizer.artifact import read_manifest
from optimizer.candidates import WEIGHTS, Candidate
from optimizer.ci import run_ci
from optimizer.ci_comment import marker
from optimizer.ci_config import CiConfig
from optimizer.cli import app
from optimizer.recipe import Recipe
from optimizer.report import Report
from tests.optimizer.small_jobs import recipe, with_ruinous_passes, without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama

NEVER = {"metric": "weights.ratio", "at_most": 0.0}
UNKNOWN = {"metric": "quality.reference_perplexity.bite_perplexity.ratio", "at_most": 2.0}


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes written out: one that passes, one that misses floors, one that breaks halfway."""
    named = {
        "easy": recipe(),
        "never": recipe(NEVER, UNKNOWN),
        "broken": recipe(passes=[{"name": "break"}, {"name": "decode", "compile": False}]),
    }
    return {name: item.model_dump(mode="json") | {"name": name} for name, item in named.items()}


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        with_ruinous_passes(patch)
        for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
            patch.delenv(name, raising=False)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(folder / "model", dtype=torch.float32)
    return folder


def write(folder: Path, work: Path, *names: str, **changes: Any) -> Path:
    """An optimizer.yaml in `folder` of the model in `work` with the named recipes."""
    given = {"models": str(work / "model"), "out": "out", "recipes": [recipes()[name] for name in names]} | changes
    (folder / "optimizer.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    return folder / "optimizer.yaml"


def invoke(config: Path, *options: str) -> Ran:
    return CliRunner().invoke(app, ["ci", "--config", str(config), "--quiet", *options])


@pytest.fixture(scope="module")
def refused(work: Path) -> Result:
    """What `optimize` returns for a model that the gate refuses, for tests of what comes after it."""
    return optimize(work / "model", Recipe.from_dict(recipes()["never"]), device="cpu")


@pytest.fixture(scope="module")
def matrix(work: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """A run of three jobs: one breaks, one misses floors, one passes."""
    folder = tmp_path_factory.mktemp("matrix")
    return invoke(write(folder, work, "broken", "never", "easy", title="Tiny"), "--json"), folder / "out"


def suites(out: Path) -> dict[str, ET.Element]:
    return {str(suite.get("name")): suite for suite in ET.parse(out / "junit.xml").getroot()}


def test_a_job_that_breaks_stops_no_other_and_the_worst_is_the_exit_code(matrix: tuple[Ran, Path]) -> None:
    ran, _ = matrix
    assert ran.exit_code == 3
    document = json.loads(ran.stdout)
    assert [job["verdict"] for job in document["jobs"]] == ["error", "failed", "passed"]
    assert [job["exit_code"] for job in document["jobs"]] == [3, 1, 0]
    assert document["verdict"] == "error"
    assert "this pass fails halfway" in document["jobs"][0]["summary"]
    assert "Traceback" in ran.stderr  # a defect can be found


def test_the_passed_job_has_its_artifact_and_reports_and_the_others_none(matrix: tuple[Ran, Path]) -> None:
    ran, out = matrix
    jobs = json.loads(ran.stdout)["jobs"]
    assert jobs == json.loads((out / "results.json").read_text(encoding="utf-8"))["jobs"]
    assert jobs[2]["digest"] == read_manifest(out / "model-easy" / "artifact").digest
    assert [job["artifact"] is None for job in jobs] == [True, True, False]
    assert {path.name for path in (out / "model-never").iterdir()} == {"report.html", "report.md", "report.json"}
    assert not (out / "model-broken").exists()
    report = Report.from_json((out / "model-easy" / "report.json").read_bytes())
    assert report.verdict == "passed"
    assert any("were kept from" in warning for warning in report.warnings)  # the baseline of the job before


def test_junit_tells_floors_missed_and_not_measured_from_a_job_that_broke(matrix: tuple[Ran, Path]) -> None:
    found = suites(matrix[1])
    assert {name: (suite.get("errors"), suite.get("failures")) for name, suite in found.items()} == {
        "model-broken": ("1", "0"), "model-never": ("0", "2"), "model-easy": ("0", "0"),
    }  # fmt: skip
    kinds = {failure.get("type"): failure.get("message") for failure in found["model-never"].iter("failure")}
    assert set(kinds) == {"FloorMissed", "NotMeasured"}
    assert "the nearest measured are quality.reference_perplexity.byte_perplexity.ratio" in str(kinds["NotMeasured"])


def test_the_comment_says_it_all(matrix: tuple[Ran, Path]) -> None:
    text = (matrix[1] / "comment.md").read_text(encoding="utf-8")
    assert text.startswith(marker("Tiny"))
    for part in ("💥 Tiny: NO VERDICT", "`model-never`: FAILED", "`weights.ratio`", "this pass fails halfway"):
        assert part in text


def test_a_second_run_takes_the_baseline_from_the_cache_and_times_it_again(
    matrix: tuple[Ran, Path], work: Path, tmp_path: Path
) -> None:
    shutil.copytree(matrix[1].parent / ".optimizer", tmp_path / ".optimizer")
    ran = invoke(write(tmp_path, work, "easy"), "--json")
    assert ran.exit_code == 0, ran.stderr
    assert "were kept from" in json.loads(ran.stdout)["jobs"][0]["notes"][0]
    report = Report.from_json((tmp_path / "out/model-easy/report.json").read_bytes())
    phases = {cost.phase for cost in report.costs}
    assert "speed" in phases
    assert "baseline quality" not in phases
    assert len(list((tmp_path / ".optimizer/baselines").glob("*.json"))) == 1


def test_a_missed_floor_exits_1_and_an_artifact_of_an_earlier_run_is_not_named(
    matrix: tuple[Ran, Path], refused: Result, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "out/model-easy/artifact"
    shutil.copytree(matrix[1] / "model-easy/artifact", earlier)
    digest = read_manifest(earlier).digest
    monkeypatch.setattr(ci, "optimize", lambda *_, **__: refused)
    ran = invoke(write(tmp_path, work, "easy"))
    assert ran.exit_code == 1
    assert "missed: weights.ratio" in ran.stdout
    assert "is an earlier run's, untouched" in ran.stdout
    env = (tmp_path / "out/optimizer.env").read_text(encoding="utf-8")
    assert "OPTIMIZER_ARTIFACT=\n" in env
    assert "OPTIMIZER_VERDICT=failed\n" in env
    assert read_manifest(earlier).digest == digest


class Killed(BaseException):
    """What nothing in the job catches, as nothing catches a kill."""


def test_what_a_killed_run_leaves_tells_of_no_verdict(
    matrix: tuple[Ran, Path], refused: Result, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(matrix[1], tmp_path / "out")
    config = CiConfig.from_yaml(write(tmp_path, work, "easy", "never"))

    def killed_in(victim: str) -> Any:
        def run(model: Any, given: Any, **options: Any) -> Any:
            if given.name == victim:
                raise Killed
            return refused

        return run

    for victim, errors in (("easy", ["1", "1"]), ("never", ["0", "1"])):
        monkeypatch.setattr(ci, "optimize", killed_in(victim))
        with pytest.raises(Killed):
            run_ci(config)
        assert [suite.get("errors") for suite in suites(tmp_path / "out").values()] == errors
        for file, says in (
            ("junit.xml", "did not run to its end"), ("optimizer.env", "OPTIMIZER_VERDICT=error\n"),
            ("comment.md", "NO VERDICT"), ("results.json", '"verdict": "error"'),
        ):  # fmt: skip
            assert says in (tmp_path / "out" / file).read_text(encoding="utf-8")
        report = tmp_path / "out/model-easy/report.json"  # never that of the run before
        assert report.exists() == (victim == "never")


def test_usage_is_refused_before_any_work_and_github_is_told(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ci, "optimize", lambda *_, **__: pytest.fail("the job was started"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    for changes, message in (
        ({"recipe": "x"}, "Did you mean 'recipes'"),
        ({"recipes": "defualt"}, "Did you mean 'default'"),
        ({"out": "optimizer.yaml"}, "optimizer.yaml"),
    ):
        ran = invoke(write(tmp_path, work, "easy", **{"recipes": [recipes()["easy"]], **changes}))
        assert ran.exit_code == 2, ran.output
        assert message in ran.stderr
        assert ran.stdout == ""
    assert (tmp_path / "output").read_text(encoding="utf-8").count("\nerror\n") == 3
    ran = invoke(tmp_path / "none.yaml")
    assert ran.exit_code == 2
    assert "cannot be read" in ran.stderr


def test_a_model_that_cannot_be_used_is_usage_in_its_job_and_the_next_runs(
    refused: Result, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(model: str, given: Any, **options: Any) -> Result:
        return refused if model == str(work / "model") else optimize(model, given, **options)

    monkeypatch.setattr(ci, "optimize", run)
    ran = invoke(write(tmp_path, work, "easy", models=["no/such/model/anywhere", str(work / "model")]), "--json")
    assert ran.exit_code == 2
    document = json.loads(ran.stdout)
    assert [job["verdict"] for job in document["jobs"]] == ["error", "failed"]
    assert document["jobs"][0]["summary"].startswith("ModelError: ")
    assert "Traceback" not in ran.stderr


def test_calibration_goes_to_the_recipes_that_calibrate_alone(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def note(model: Any, given: Any, *, calibration: Any, **_: Any) -> Any:
        seen[given.name] = calibration
        raise ZeroDivisionError

    monkeypatch.setattr(ci, "optimize", note)
    invoke(write(tmp_path, work, recipes=["default", "w4a16-gptq"], calibration="c.txt"))
    assert seen == {"default": None, "w4a16-gptq": tmp_path / "c.txt"}


def test_auto_plans_on_the_kept_baseline_and_says_what_it_chose(
    matrix: tuple[Ran, Path], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = "quality.reference_perplexity.byte_perplexity.ratio<=1.05"
    base = Recipe.from_dict(recipes()["easy"]).updated({"name": "auto", "repair": False})
    asked = []

    def held_to(*, goals: Any, quality: Any) -> Recipe:
        asked.append(([floor.metric for floor in goals], quality))
        return base

    monkeypatch.setattr(plan_command, "base_recipe", held_to)
    monkeypatch.setattr(api, "base_recipe", held_to)
    monkeypatch.setattr(plan_command, "candidates", lambda: [Candidate(o) for o in WEIGHTS if o.name == "int8"])
    monkeypatch.setattr(  # a tiny layer is not faster quantized, and would be left as it is
        linear_times,
        "time_variants",
        lambda of, **_: {v: dict.fromkeys(of[v], 2e-4 if v == "plain" else 1e-4) for v in of},
    )
    monkeypatch.setattr(pipeline, "measure_baseline", lambda *_: pytest.fail("the baseline was measured again"))
    monkeypatch.setattr(baseline_cache, "measure_baseline", pipeline.measure_baseline)
    shutil.copytree(matrix[1].parent / ".optimizer", tmp_path / ".optimizer")  # kept by jobs of other recipes
    ran = invoke(write(tmp_path, work, recipes="auto", plan={"minutes": 5, "goals": [goal]}), "--json")
    assert ran.exit_code == 0, ran.stdout
    assert asked == [([goal.split("<")[0]], None)] * 2  # by the file before any work, and by the job
    (job,) = json.loads(ran.stdout)["jobs"]
    assert (job["job"], job["verdict"]) == ("model-auto", "passed")
    report = Report.from_json((tmp_path / "out/model-auto/report.json").read_bytes())
    assert report.plan is not None
    (best,) = [step for step in report.plan.steps if step.chosen]
    assert best.candidate == "int8"
    assert any("were kept from" in warning for warning in report.warnings)
    text = (tmp_path / "out/comment.md").read_text(encoding="utf-8")
    assert f"Planned for a request of 4 tokens: `{best.candidate}`" in text
    saved = Recipe.from_yaml(tmp_path / "out/model-auto/artifact/recipe.yaml")
    assert [step["name"] for step in saved.passes] == ["quantize", "merge_linears", "decode"]


def test_a_sink_that_fails_is_a_note_and_changes_no_verdict(
    refused: Result, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ci, "optimize", lambda *_, **__: refused)
    monkeypatch.setattr(ci, "missing", lambda name: f"sink {name}: is not installed")
    records = []

    def publish(name: str, record: Any, **options: Any) -> str:
        records.append((name, record, options))
        return f"sink {name}: nothing was logged: no server"

    monkeypatch.setattr(ci, "publish", publish)
    ran = invoke(write(tmp_path, work, "easy", sinks=[{"name": "mlflow", "project": "p", "uri": "u"}]))
    assert ran.exit_code == 1
    assert "warning: sink mlflow: is not installed" in ran.stderr  # before the work
    assert "note: sink mlflow: nothing was logged: no server" in ran.stdout
    assert "no server" in (tmp_path / "out/comment.md").read_text(encoding="utf-8")
    ((name, record, options),) = records
    assert (name, options) == ("mlflow", {"project": "p", "uri": "u"})
    assert record.tags["verdict"] == "failed"
    assert {"weights.ratio", "decode.speedup", "decode.speedup.low"} <= record.metrics.keys()
    assert record.flat_params()["passes.0.name"] == "quantize"
    assert all(Path(file).is_file() for file in record.files)


def test_help_names_the_options() -> None:
    ran = CliRunner().invoke(app, ["ci", "--help"])
    assert ran.exit_code == 0
    assert {"--config", "--out", "--cache", "--json", "--quiet"} <= set(ran.stdout.replace(",", " ").split())
