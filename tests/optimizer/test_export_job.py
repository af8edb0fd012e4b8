"""A recipe that exports: the first export is what is measured, judged and saved; others stand beside it."""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from optimizer import export_command, export_forms, export_job, optimize
from optimizer.api import load
from optimizer.artifact import read_manifest, verify_artifact
from optimizer.backends.onnx_runner import OnnxRunner
from optimizer.errors import DeviceError, ModelError, PassError, UsageError
from optimizer.export_forms import ExportedRunner
from optimizer.passes.decode import Decode
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from tests.optimizer.quantized_models import fresh_llama
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


ENGINES = {"to": "tensorrt", "targets": ["sm89"]}
HAS_TENSORRT = find_spec("tensorrt_rtx_bindings") is not None
needs_tensorrt = pytest.mark.skipif(not HAS_TENSORRT, reason="needs TensorRT for RTX")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ceilings are measured, and PyTorch's runner is not compiled."""
    without_measuring_the_machine(monkeypatch)
    monkeypatch.setattr(export_job, "Decode", partial(Decode, compile=False))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where exports lie until they are saved."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_graph_is_judged_and_saved(tmp_path: Path, temporary: Path) -> None:
    """And engines, which cannot run here, have their row and ride along UNGATED."""
    engines = [ENGINES | {"context": 64}] if HAS_TENSORRT else []
    model = tiny_llama(tmp_path / "model", layers=1)
    result = optimize(model, recipe(export=[{"to": "onnx"}, *engines]), out=tmp_path / "artifact")
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
    assert_side_by_side(result)
    if engines and not torch.cuda.is_available():
        assert_rides_along(result.report, tmp_path / "artifact")
    del result
    assert not list(temporary.iterdir())


def assert_side_by_side(result: Any) -> None:
    """Every form that was measured has the figures of the run, the released one those that the floors judged."""
    forms, outcome = {form.name: form for form in result.report.forms}, result.outcome
    assert list(forms)[:3] == ["original", "pytorch", "onnx"]
    assert [name for name, form in forms.items() if form.released] == ["onnx"]
    assert forms["onnx"].bytes == outcome.evidence["weights.bytes"].value
    assert forms["original"].bytes == outcome.baseline_weight_bytes
    cell = result.report.speed[0]
    assert forms["onnx"].tpot_seconds == cell.optimized.tpot_seconds.p50
    assert forms["original"].ttft_seconds == cell.baseline.ttft_seconds.p50
    assert forms["pytorch"].tpot_seconds == outcome.speed.others["pytorch"].tpot.p50
    entries = {entry.label: entry for entry in result.report.quality}
    for name in ("onnx", "pytorch"):
        assert forms[name].build_seconds > 0
        for score, of_original in zip(forms[name].scores, forms["original"].scores, strict=True):
            assert score.label == of_original.label
            assert of_original.value == entries[score.label].baseline
            if name == "onnx":
                entry = entries[score.label]
                assert (score.value, score.ratio_low) == (entry.optimized, entry.ratio_low)


def assert_rides_along(report: Any, artifact: Path) -> None:
    form = report.forms[-1]
    assert (form.name, form.released) == ("tensorrt sm89", False)
    assert form.missing == "not measured: PyTorch sees no GPU here"
    assert (form.ttft_seconds, form.tpot_seconds, form.scores) == (None, None, [])
    rides = artifact / "ungated" / "tensorrt"
    assert form.bytes == (rides / "engines" / "sm89.engine").stat().st_size
    assert form.build_seconds > 0
    assert form.notes == ["all 7 quantized weights in their own type"]
    for shown in (report.to_markdown(), report.to_html()):
        assert form.missing in shown
    assert (read_manifest(artifact).verdict, read_manifest(rides).verdict) == ("passed", "ungated")
    assert verify_artifact(rides) == []
    with pytest.raises(DeviceError, match="sees no GPU"):
        load(rides)


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


def test_a_compiler_that_fails_is_the_reason_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(Decode, "run", fails)
    form = export_job.pytorch_form(fresh_llama(layers=1), None, recipe(), Progress())
    assert form.runner is None
    assert form.reason == "RuntimeError: no compiler here"


@no_gpu
@pytest.mark.parametrize(
    ("export", "kind", "message"),
    [
        (ENGINES, UsageError, r"the first export is what is .*no engine can run here.*to: onnx"),
        ([{"to": "onnx"}, {"to": "tensorrt"}], DeviceError, "Name the architecture to build for"),
        ([{"to": "onnx"}, ENGINES | {"targets": ["sm90"]}], UsageError, "cannot build for sm90"),
        ({"to": "aot", "context": 16}, UsageError, r"aot has a context of 16; the workload needs 20.*made for 256"),
        ({"to": "aot", "context": 512}, UsageError, "made for 256"),
    ],
)
@needs_tensorrt
def test_what_cannot_be_made_or_judged_is_refused_before_any_work(
    tmp_path: Path, export: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        optimize(tiny_llama(tmp_path / "model", layers=1), recipe(export=export))


def test_engines_for_another_gpu_are_not_judged_on_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_job, "check_engines", lambda *_: None)
    monkeypatch.setattr(export_job, "this_gpu", lambda: "sm89")
    with pytest.raises(UsageError, match="an engine for sm120 cannot be judged on sm89"):
        optimize(tiny_llama(tmp_path / "model", layers=1), recipe(export=ENGINES | {"targets": ["sm89", "sm120"]}))


def test_a_second_export_that_fails_leaves_nothing_of_the_first(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(_model: Any, _tokenizer: Any, kept: export_forms.ExportFolder, *_: Any) -> list[export_forms.Form]:
        (kept.path / "model.onnx").write_bytes(b"graph")
        return [export_forms.Form("onnx", "ONNX Runtime", 5, folder=kept)]

    def fails(*_: Any) -> None:
        assert list(temporary.glob("*/model.onnx"))
        raise ModelError("it cannot be followed")

    monkeypatch.setitem(export_forms.WRITERS, "onnx", writes)
    monkeypatch.setitem(export_forms.WRITERS, "aot", fails)
    both = recipe(export=[{"to": "onnx"}, {"to": "aot"}])
    with pytest.raises(ModelError, match="cannot be followed"):
        export_job.exported_forms(fresh_llama(layers=1), None, both, Progress())
    assert not list(temporary.iterdir())


@pytest.mark.slow  # three compilations
def test_a_package_is_judged_and_saved(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    floors = [{"metric": "quality.kl.mean", "at_most": 0.05}, {"metric": "weights.ratio", "at_most": 50.0}]
    result = optimize(model, recipe(export={"to": "aot", "context": 128}, floors=floors), out=tmp_path / "artifact")
    assert result.passed
    form = result.report.forms[-1]
    assert (form.name, form.released) == ("aot", True)
    assert form.bytes == (tmp_path / "artifact/package/model.pt2").stat().st_size
    tokens = torch.tensor([[40, 41, 42, 43]])
    expected = result.model.generate(tokens, max_new_tokens=6)
    assert torch.equal(load(tmp_path / "artifact").generate(tokens, max_new_tokens=6), expected)


def test_a_graph_that_computes_something_else_ends_the_job_and_leaves_nothing(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "rehearse", lambda *_: float("inf"))
    with pytest.raises(PassError, match="does not compute what the model does"):
        optimize(tiny_llama(tmp_path / "model"), recipe(), out=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"to": "tflite"}, "export"),
        ({"to": "onnx", "opset": 9}, "unknown key 'export.0.opset'"),
        ([{"to": "onnx"}, {"to": "aot", "contxt": 64}], "unknown key 'export.1.contxt'. Did you mean 'context'"),
        ({"dtype": "int8"}, "export"),
        ({"to": "aot", "dtype": "float16"}, "aot takes no dtype; it takes context"),
        ({"to": "onnx", "targets": ["sm89"]}, "onnx takes no targets; it takes dtype, int8_inputs"),
        ([{"to": "onnx"}, {"to": "onnx", "dtype": "float16"}], "onnx occurs twice"),
        ([], "at least 1"),
        ("onnx", "list"),
    ],
)
def test_what_export_does_not_know_is_refused(export: Any, message: str) -> None:
    with pytest.raises(UsageError, match="export") as error:
        recipe(export=export)
    assert message in str(error.value)


def test_a_recipe_keeps_what_it_was_given() -> None:
    made = recipe(export=[{"to": "onnx", "int8_inputs": True}, ENGINES])
    assert Recipe.from_dict(made.model_dump()) == made
    assert made.model_dump()["export"] == [{"to": "onnx", "int8_inputs": True}, ENGINES]
    assert recipe(export={"to": "onnx"}).export == recipe(export=[{"to": "onnx"}]).export
