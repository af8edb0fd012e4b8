"""The `optimizer` command: exit codes, what goes to stdout and what to stderr, and what it costs to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result as Ran
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer import api
from optimizer.artifact import read_manifest
from optimizer.cli import app
from optimizer.recipe import builtin
from tests.optimizer.small_jobs import recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
NEVER = {"metric": "weights.ratio", "at_most": 0.0}


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two recipes: one that any model passes and one that none does."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(folder / "model", dtype=torch.float32)
    (folder / "easy.yaml").write_text(recipe().to_yaml(), encoding="utf-8")
    (folder / "never.yaml").write_text(recipe(NEVER).to_yaml(), encoding="utf-8")
    return folder


def invoke(*arguments: str | Path) -> Ran:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from optimizer.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


@pytest.fixture(scope="module")
def passed(work: Path) -> tuple[Ran, Path]:
    out = work / "passed"
    return invoke("run", work / "model", "--recipe", work / "easy.yaml", "--out", out, "--device", "cpu"), out


@pytest.fixture
def artifact(passed: tuple[Ran, Path], tmp_path: Path) -> Path:
    """A copy of the artifact, to be damaged."""
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in (passed[1] / "artifact").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_passing_run_exits_0_and_leaves_the_artifact_and_reports(passed: tuple[Ran, Path]) -> None:
    ran, out = passed
    assert ran.exit_code == 0, ran.stderr
    assert {path.name for path in out.iterdir()} >= {"artifact", "report.html", "report.md", "report.json"}
    assert read_manifest(out / "artifact").verdict == "passed"
    for part in ("metric", "Weights", f"artifact: {out / 'artifact'}", f"report:   {out / 'report.html'}"):
        assert part in ran.stdout


def test_a_run_leaves_both_evaluations_as_lm_eval_writes_them(passed: tuple[Ran, Path]) -> None:
    ran, out = passed
    assert f"lm-eval:  {out / 'lm_eval'}" in ran.stdout
    (model, optimized) = sorted((out / "lm_eval").iterdir(), key=lambda folder: len(folder.name))
    assert optimized.name.startswith(f"{model.name}-")
    values = []
    for folder in (model, optimized):
        (results,) = folder.glob("results_*.json")
        assert len(list(folder.glob("samples_reference_perplexity_*.jsonl"))) == 1
        document = json.loads(results.read_text(encoding="utf-8"))
        values.append(document["results"]["reference_perplexity"]["byte_perplexity,none"])
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (row,) = [row for row in report["quality"] if row["metric"] == "byte_perplexity"]
    assert values == [row["baseline"], row["optimized"]]


def test_progress_goes_to_stderr_in_plain_lines(passed: tuple[Ran, Path]) -> None:
    ran, _ = passed
    lines = ran.stderr.splitlines()
    assert {"load ...", "pass quantize ...", "speed ..."} <= set(lines)
    assert any(line.startswith("save: ") for line in lines)
    assert "\x1b" not in ran.stderr + ran.stdout
    assert "\r" not in ran.stderr
    assert "..." not in ran.stdout


def test_a_missed_floor_exits_1_writes_the_report_and_no_artifact(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = invoke("run", work / "model", "--recipe", work / "never.yaml", "--out", out, "--quiet")
    assert ran.exit_code == 1
    assert ran.stderr == ""
    assert "missed: weights.ratio: weights.ratio <= 0 is missed" in ran.stdout
    assert "artifact: none, the gate refused it" in ran.stdout
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "report.json", "lm_eval"}
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["verdict"] == "failed"


def test_ungated_writes_the_artifact_and_says_so_in_every_place(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = invoke("run", work / "model", "--recipe", work / "never.yaml", "--out", out, "--ungated", "--json", "--quiet")
    assert ran.exit_code == 1  # written as asked, and still a missed floor
    assert ran.stderr == ""
    assert json.loads(ran.stdout)["verdict"] == "ungated"
    assert read_manifest(out / "artifact").verdict == "ungated"
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["verdict"] == "ungated"


def test_json_in_a_process_of_its_own_is_one_document_and_nothing_else(work: Path, tmp_path: Path) -> None:
    ran = shell("run", work / "model", "--recipe", work / "easy.yaml", "--out", tmp_path / "out", "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["verdict"] == "passed"
    assert document["machine"]["kind"] in ("cpu", "cuda")
    assert "load ..." in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message"),
    [
        (("run", "{model}", "--recipe", "defualt"), 2, "RecipeError", "Did you mean 'default'"),
        (("run", "{model}", "--recipe", "no.yaml"), 2, "RecipeError", "cannot be read"),
        (("run", "no/such/model/anywhere"), 2, "ModelError", "no/such/model/anywhere"),
        (("run", "{model}", "--device", "gpu"), 2, "UsageError", "Use cpu, cuda or auto"),
        (("run", "{model}", "--device", "cuda"), 3, "DeviceError", "no CUDA device"),
        (("run", "{model}", "--out", "{model}/config.json"), 2, "OutputError", "config.json"),
        (("eval", "no/such/model/anywhere"), 2, "ModelError", "no/such/model/anywhere"),
        (("bench", "{model}", "--prompt", "250", "--output", "7"), 2, "UsageError", "max_context"),
        (("verify", "{model}"), 3, "ArtifactError", "manifest"),
        (("verify", "no/such/folder"), 3, "ArtifactError", "no/such/folder"),
        (("roofline",), 2, "UsageError", "give either a model folder"),
        (("roofline", "--params", "7e9", "--group-size", "0"), 2, "UsageError", "--group-size is 0"),
        (("roofline", "--params", "7e9", "--gpu", "H10"), 2, "UsageError", "did you mean"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_line_on_stderr_with_its_exit_code(
    arguments: tuple[str, ...], code: int, kind: str, message: str, as_json: bool, work: Path
) -> None:
    if kind == "DeviceError" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    given = [argument.format(model=work / "model") for argument in arguments]
    quiet = ["--quiet"] if given[0] in ("run", "eval", "bench") else []
    ran = invoke(*given, *quiet, *(["--json"] if as_json else []))
    assert ran.exit_code == code
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    if as_json:
        error = json.loads(line)
        assert error["error"] == kind
        assert message in error["message"]
    else:
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize(
    "arguments", [("rnu",), ("run", "--recip", "x"), ("bench", "--batch", "0"), ("roofline", "--params", "many")]
)
def test_a_slip_in_the_command_line_exits_2(arguments: tuple[str, ...]) -> None:
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.stderr


def test_an_output_folder_that_is_not_ours_is_refused_before_any_work(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "thesis.tex").write_text("x", encoding="utf-8")
    monkeypatch.setattr(api, "optimize", lambda *_, **__: pytest.fail("the job was started"))
    ran = invoke("run", work / "model", "--recipe", work / "easy.yaml", "--out", tmp_path)
    assert ran.exit_code == 2
    assert "left alone" in ran.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["artifact", "thesis.tex"]


def test_a_defect_keeps_its_traceback_and_exits_3(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(api, "optimize", broken)
    ran = invoke("run", work / "model", "--recipe", work / "easy.yaml", "--quiet")
    assert ran.exit_code == 3
    assert "Traceback" in ran.stderr
    assert ran.stderr.splitlines()[-1] == "error: a defect"


def test_an_interrupt_exits_130_without_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "optimize", interrupted)
    ran = invoke("run", work / "model", "--recipe", work / "easy.yaml", "--quiet")
    assert ran.exit_code == 130
    assert ran.stderr == "error: interrupted\n"


def test_verify_accepts_what_was_written(artifact: Path) -> None:
    ran = invoke("verify", artifact)
    assert ran.exit_code == 0
    assert f"files match; verdict PASSED, digest {read_manifest(artifact).digest}" in ran.stdout
    document = json.loads(invoke("verify", artifact, "--json").stdout)
    assert document == {"digest": read_manifest(artifact).digest, "verdict": "passed", "mismatches": []}


@pytest.mark.parametrize("file", ["model.safetensors", "report.md", "config.json"])
def test_verify_names_the_file_with_a_flipped_byte_and_exits_3(file: str, artifact: Path) -> None:
    raw = bytearray((artifact / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (artifact / file).write_bytes(bytes(raw))
    ran = invoke("verify", artifact)
    assert ran.exit_code == 3
    assert ran.stdout.splitlines()[0].startswith(f"{file}: ")
    as_json = invoke("verify", artifact, "--json")
    assert as_json.exit_code == 3
    assert [item["path"] for item in json.loads(as_json.stdout)["mismatches"]] == [file]


def test_quantize_writes_an_artifact_and_says_that_nothing_was_evaluated(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    ran = invoke("quantize", work / "model", "--recipe", work / "easy.yaml", "--out", out, "--device", "cpu")
    assert ran.exit_code == 0, ran.output
    assert "quantized 14 of 14 layers" in ran.stdout
    assert "left as it was: lm_head (named in ignore)" in ran.stdout
    assert "UNGATED: nothing was evaluated" in ran.stdout
    assert read_manifest(out).verdict == "ungated"
    again = invoke("quantize", work / "model", "--recipe", work / "easy.yaml", "--out", tmp_path / "b", "--json", "-q")
    assert json.loads(again.stdout)["report"]["matched"] == 14
    assert read_manifest(tmp_path / "b").digest == read_manifest(out).digest


def test_recipes_lists_the_built_in_ones() -> None:
    ran = invoke("recipes")
    assert [line.split()[0] for line in ran.stdout.splitlines()] == list(builtin())
    assert list(json.loads(invoke("recipes", "--json").stdout)) == list(builtin())


def test_doctor_names_every_check() -> None:
    ran = invoke("doctor")
    assert ran.exit_code == 0
    assert all(line[:3] in ("ok ", "no ") for line in ran.stdout.splitlines())
    document = json.loads(invoke("doctor", "--json").stdout)
    assert {"python", "torch", "cpu kernels", "cuda"} <= {check["name"] for check in document}
    assert all(set(check) == {"name", "ok", "detail"} for check in document)


def test_roofline_gives_the_worked_figures() -> None:
    sizes = ["--layers", "80", "--d-model", "8192", "--heads", "64", "--kv-heads", "8", "--head-dim", "128"]
    text = invoke("roofline", "--params", "70e9").stdout
    for part in ("573.4 TFLOP", "140 GB", "41.79 ms", "23.9 tok/s", "ridge 295"):
        assert part in text
    assert "10.45 ms" in invoke("roofline", "--params", "70e9", "--bits", "4").stdout
    assert "765.7 tok/s" in invoke("roofline", "--params", "70e9", "--batch", "32").stdout
    document = json.loads(invoke("roofline", "--params", "70e9", *sizes, "--context", "4096", "--json").stdout)
    assert document["kv_bytes_per_token"] == 327_680
    assert document["kv_cache_bytes"] == pytest.approx(1.342e9, rel=1e-3)


def test_eval_measures_a_model_and_an_artifact(work: Path, passed: tuple[Ran, Path]) -> None:
    values = []
    for model in (work / "model", passed[1] / "artifact"):
        ran = invoke("eval", model, "--tasks", "reference_perplexity", "--limit", "2", "--json", "--quiet")
        assert ran.exit_code == 0, ran.stderr
        rows = {row["metric"]: row for row in json.loads(ran.stdout)["metrics"]}
        assert rows["byte_perplexity"]["documents"] == 2
        values.append(rows["byte_perplexity"]["value"])
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_eval_writes_lm_eval_s_files_where_it_is_told(work: Path, tmp_path: Path) -> None:
    options = ("--tasks", "reference_perplexity", "--limit", "2", "--json", "--quiet", "--output-path", tmp_path / "o")
    ran = invoke("eval", work / "model", *options)
    assert ran.exit_code == 0, ran.stderr
    (results,) = (tmp_path / "o").glob("*/results_*.json")
    document = json.loads(results.read_text(encoding="utf-8"))
    assert document["config"]["limit"] == 2
    rows = {row["metric"]: row["value"] for row in json.loads(ran.stdout)["metrics"]}
    assert document["results"]["reference_perplexity"]["byte_perplexity,none"] == rows["byte_perplexity"]


def test_eval_of_a_broken_model_is_still_json(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer.evals import quality

    row = quality.MetricResult("t", "perplexity", "none", float("inf"), False, float("nan"))
    monkeypatch.setattr(quality, "evaluate", lambda *_, **__: quality.QualityResult((row,), 3))
    ran = invoke("eval", work / "model", "--json", "--quiet")
    document = json.loads(ran.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["metrics"][0]["value"] is None
    assert document["non_finite"] == 3


def test_bench_times_two_models_side_by_side(work: Path, passed: tuple[Ran, Path]) -> None:
    model, artifact = work / "model", passed[1] / "artifact"
    options = ("--prompt", "8", "--output", "3", "--repeats", "3", "--quiet")
    document = json.loads(invoke("bench", model, "--against", artifact, *options, "--json").stdout)
    assert set(document["runners"]) == {str(model), str(artifact)}
    assert document["decode_speedup"]["n"] == 3
    text = invoke("bench", model, "--against", model, *options)
    assert text.exit_code == 0
    assert f"{model} (again) is " in text.stdout


@pytest.mark.parametrize(
    "command",
    [
        "",
        "run",
        "plan",
        "quantize",
        "recipes",
        "eval",
        "bench",
        "serve",
        "compare",
        "history",
        "diagnose",
        "roofline",
        "power",
        "ci",
        "export",
        "verify",
        "doctor",
    ],
)
def test_every_command_has_help(command: str) -> None:
    for flag in ("--help", "-h"):
        ran = invoke(*([command] if command else []), flag)
        assert ran.exit_code == 0
        assert "Usage" in ran.stdout


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n', *sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.split(".")[0] for name in ran.stderr.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not {"torch", "transformers", "pydantic", "numpy", "lm_eval"} & loaded_by("import optimizer")


def test_help_loads_nothing_heavy() -> None:
    code = "sys.argv = ['optimizer', '--help']; from optimizer.cli import main; main()"
    found = loaded_by(code)
    assert "typer" in found
    assert not {"torch", "transformers", "pydantic", "numpy", "lm_eval", "altair"} & found


def test_a_reader_that_goes_away_is_no_traceback_and_no_verdict() -> None:
    command = [sys.executable, "-c", "from optimizer.cli import main; main()", "recipes", "--json"]
    read, write = os.pipe()
    os.close(read)
    try:
        ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    finally:
        os.close(write)
    assert ran.returncode == 141
    assert ran.stderr == ""
