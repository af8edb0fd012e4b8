"""Sinks: what each tracker's local store holds afterwards, and that none can change or hold up a verdict.

Each tracker is tested where it is installed (`pip install 'roofline-optimizer[mlflow,wandb,trackio]'`).
"""

from __future__ import annotations

import math
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from optimizer import sinks
from optimizer.sinks import SINKS, Record, missing, publish

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    report = tmp_path / "report.md"
    report.write_text("# a report", encoding="utf-8")
    return Record(
        "tiny-small",
        {"model": "tiny", "verdict": "passed"},
        {"name": "small", "passes": [{"name": "quantize", "bits": 8}], "serving": None, "long": "x" * 9000},
        {"decode.speedup": 2.5, "quality.task.exact_match,first.recovery": 0.75, "odd": math.nan, "ruin": math.inf},
        [str(report)],
    )


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a module `mlflow` can be written that the sink then imports."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sinks, "find_spec", lambda _: object())
    return folder


def test_nested_parameters_become_flat_text(record: Record) -> None:
    found = record.flat_params()
    assert found["passes.0.bits"] == "8"
    assert found["serving"] == ""
    assert found["name"] == "small"


@pytest.mark.parametrize("name", [name for name in SINKS if find_spec(name) is None])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name: str, record: Record) -> None:
    assert publish(name, record, project="p") == missing(name)
    assert str(missing(name)).endswith(f"pip install 'roofline-optimizer[{name}]'")


def test_no_note_holds_a_password(record: Record, shadowed: Path) -> None:
    (shadowed / "mlflow.py").write_text("raise OSError('no answer from https://me:s3cret@host:1/x')", encoding="utf-8")
    assert publish("mlflow", record, project="p").endswith("OSError: no answer from https://host:1/x")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise RuntimeError('no server')", "RuntimeError: no server"),
        ("raise SystemExit('log in first')", "log in first"),
        ("import os; os._exit(7)", "left with 7"),
        ("import os; os.kill(os.getpid(), 11)", "left with -11"),
        ("import os; os._exit(0)", "left with 0"),
        ("print('chatter')", "AttributeError"),
    ],
)
def test_a_tracker_that_fails_in_any_way_is_a_note(code: str, says: str, record: Record, shadowed: Path) -> None:
    (shadowed / "mlflow.py").write_text(code, encoding="utf-8")
    note = publish("mlflow", record, project="p")
    assert note.startswith("sink mlflow: nothing was logged: ")
    assert says in note


def test_a_tracker_that_hangs_is_stopped(record: Record, shadowed: Path) -> None:
    (shadowed / "mlflow.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    began = time.perf_counter()
    assert publish("mlflow", record, project="p", seconds=1).endswith("it took more than 1 s")
    assert time.perf_counter() - began < 30


def test_the_callers_folder_shadows_nothing(
    record: Record, shadowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shadowed / "mlflow.py").write_text("raise RuntimeError('the real one')", encoding="utf-8")
    for name in ("json", "mlflow", "optimizer"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadow')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "the real one" in publish("mlflow", record, project="p")


def test_the_process_of_a_sink_loads_nothing_heavy() -> None:
    code = "import sys, optimizer.sinks.__main__; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert not {"torch", "pydantic", "numpy", "mlflow", "wandb", "trackio"} & loaded


def test_mlflow_keeps_metrics_parameters_tags_and_files(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask before they use a plain folder
    uri = (tmp_path / "mlruns").as_uri()
    note = publish("mlflow", record, project="models", uri=uri)
    assert "logged to run " in note, note
    run = note.split("logged to run ")[1].split()[0]
    code = (
        "import json, sys, mlflow; c = mlflow.MlflowClient(sys.argv[1]); r = c.get_run(sys.argv[2]); "
        "print(json.dumps([r.data.metrics, r.data.params, r.data.tags, "
        "[f.path for f in c.list_artifacts(r.info.run_id)], "
        "c.get_experiment(r.info.experiment_id).name, r.info.status]))"
    )
    metrics, params, tags, files, experiment, status = read_back(code, uri, run)
    assert metrics["decode.speedup"] == 2.5
    assert metrics["quality.task.exact_match_first.recovery"] == 0.75
    assert math.isnan(metrics["odd"])
    assert params["passes.0.bits"] == "8"
    assert tags["verdict"] == "passed"
    assert files == ["report.md"]
    assert (experiment, status) == ("models", "FINISHED")


def test_wandb_keeps_a_run_offline(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    note = publish("wandb", record, project="models")
    assert "logged to run " in note, note
    (log,) = tmp_path.rglob("run-*.wandb")
    raw = log.read_bytes()  # protocol buffers in a log: names and JSON values stand there as they are
    assert re.search(rb"decode\.speedup.{1,4}2\.5", raw, re.DOTALL)
    assert re.search(rb'verdict.{1,4}"passed"', raw, re.DOTALL)
    assert re.search(rb'"name": ?"quantize"', raw)
    assert b"report.md" in raw


def test_trackio_keeps_a_run_in_its_local_database(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    note = publish("trackio", replace(record, metrics={"decode.speedup": 2.5, "odd": math.nan}), project="models")
    assert "logged to run tiny-small in project models" in note, note
    (database,) = (tmp_path / "trackio").rglob("models*.db")
    with sqlite3.connect(database) as connection:
        metrics = connection.execute("select metrics from metrics where run_name = 'tiny-small'").fetchall()
        configs = connection.execute("select config from configs where run_name = 'tiny-small'").fetchall()
    connection.close()
    assert '"decode.speedup":2.5' in str(metrics).replace(" ", "")
    assert "passes.0.bits" in str(configs)
    assert "passed" in str(configs)


def read_back(code: str, *arguments: str) -> Any:
    """What another process reads of a store."""
    import json

    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
