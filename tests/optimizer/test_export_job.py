"""A recipe that exports: the graph is what is measured, judged and saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from optimizer import export_command, optimize
from optimizer.api import load
from optimizer.artifact import verify_artifact
from optimizer.backends.onnx_runner import OnnxRunner
from optimizer.errors import PassError, UsageError
from optimizer.export_job import ExportedRunner
from optimizer.recipe import Recipe
from tests.optimizer.small_jobs import without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict({
        "name": "graph",
        "workload": {"batch": 1, "prompt": 16, "output": 4, "repeats": 3},
        "evaluation": {"tasks": {"reference_cloze": 2}, "divergence": {"documents": 2, "length": 32}},
        "passes": [{"name": "quantize", "bits": 4, "group_size": 32}],
        "export": {"to": "onnx"},
        "floors": [{"metric": "weights.ratio", "at_most": 50.0}],
    } | changes)  # fmt: skip


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    without_measuring_the_machine(monkeypatch)


def test_the_graph_is_judged_and_saved(tmp_path: Path) -> None:
    result = optimize(tiny_llama(tmp_path / "model"), recipe(), out=tmp_path / "artifact")
    assert result.passed
    assert isinstance(result.model, ExportedRunner)
    kernels = {layer.kernel for layer in result.report.layers if layer.format.startswith("int4")}
    assert kernels == {"MatMulNBits"}
    held = result.outcome.evidence["weights.bytes"].value
    assert held == sum((tmp_path / "artifact" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert result.outcome.evidence["kv.ratio"].value == 2.0  # float32 in the graph, bfloat16 in the model
    assert verify_artifact(tmp_path / "artifact") == []
    assert not list((tmp_path / "artifact").glob("*.safetensors"))
    assert {"recipe.yaml", "report.html", "genai_config.json"} <= {p.name for p in (tmp_path / "artifact").iterdir()}
    loaded = load(tmp_path / "artifact")
    assert isinstance(loaded, OnnxRunner)
    tokens = torch.tensor([[40, 41, 42, 43]])
    expected = result.model.generate(tokens, max_new_tokens=6)
    assert torch.equal(loaded.generate(tokens, max_new_tokens=6), expected)
    folder = result.model.folder
    del result
    assert not folder.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"passes": [{"name": "quantize", "bits": 8}, {"name": "merge_linears"}, {"name": "decode"}]},
        {"passes": [{"name": "quantize", "bits": 8}, {"name": "speculate"}]},
    ],
)
def test_passes_that_the_graph_would_not_have_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"export: the exported graph is what runs, and .*Leave them out"):
        optimize(tiny_llama(tmp_path / "model"), recipe(**changes))


def test_a_graph_that_computes_something_else_ends_the_job_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(export_command, "rehearse", lambda *_: float("inf"))
    with pytest.raises(PassError, match="does not compute what the model does"):
        optimize(tiny_llama(tmp_path / "model"), recipe(), out=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("export", [{"to": "tflite"}, {"to": "onnx", "opset": 9}, {"dtype": "int8"}])
def test_what_export_does_not_know_is_refused(export: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="export"):
        recipe(export=export)
