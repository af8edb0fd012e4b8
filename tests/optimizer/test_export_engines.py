"""`optimizer export --to tensorrt` and `--to aot`: engines of real models for GPUs that are not here, and packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from optimizer import export_command
from optimizer.api import load
from optimizer.artifact import read_manifest, verify_artifact
from optimizer.backends.runner import EagerRunner
from optimizer.cli import app
from optimizer.errors import ArtifactError, DeviceError
from optimizer.export_engines import EngineOptions, profiles
from tests.optimizer.tiny_models import tiny_llama

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx_bindings")

TARGETS = ("sm80", "sm86", "sm89", "sm120")
LINEARS = 7  # of a Llama block, none of them merged


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments, "--quiet"])


def said(*arguments: str) -> dict[str, Any]:
    ran = run(*arguments, "--json")
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def artifact(folder: Path, model: str | Path, **options: Any) -> Path:
    """An artifact of `model`, quantized with these options and not evaluated."""
    recipe = folder / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps({
        "name": "r", "evaluation": {"tasks": {"reference_cloze": 2}}, "calibration": {"samples": 8, "length": 64},
        "passes": [{"name": "quantize", **options}], "floors": [{"metric": "weights.ratio", "at_most": 1.0}],
    }))  # fmt: skip
    ran = CliRunner().invoke(
        app, ["quantize", str(model), "--recipe", str(recipe), "--out", str(folder / "artifact"), "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    return folder / "artifact"


def engines_of(model: str | Path, out: Path, *options: str) -> dict[str, Any]:
    targets = [part for target in TARGETS for part in ("--target", target)]
    return said(str(model), "--to", "tensorrt", "--out", str(out), *targets, *options)


def assert_held(found: dict[str, Any], kind: str, weights: int) -> None:
    assert [engine["target"] for engine in found["engines"]] == list(TARGETS)
    assert found["weights"] == weights
    for engine in found["engines"]:
        assert not engine["fell_back"]
        assert engine["constant_bytes"][kind] > 0


@pytest.mark.slow
def test_int4_engines_of_the_built_in_model(tmp_path: Path) -> None:
    quantized = artifact(tmp_path, "reference", bits=4, group_size=64)
    found = engines_of(quantized, tmp_path / "out")
    assert_held(found, "int4", 6 * LINEARS)
    assert found["logit_difference"] <= found["logit_bound"]
    # Independent of what the engine states: half a byte a quantized weight, two bytes of the embedding, and kernels.
    assert all(engine["bytes"] < 20e6 for engine in found["engines"])
    assert verify_artifact(tmp_path / "out") == []
    assert read_manifest(tmp_path / "out").verdict == "ungated"
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="sees no GPU here"):
            load(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), [("float16", "half"), ("float32", "float")])
def test_float_engines_of_the_built_in_model(tmp_path: Path, dtype: str, kind: str) -> None:
    assert_held(engines_of("reference", tmp_path / "out", "--dtype", dtype), kind, 0)


@pytest.mark.slow
def test_int8_engines_of_the_built_in_model(tmp_path: Path) -> None:
    assert_held(engines_of(artifact(tmp_path, "reference", bits=8), tmp_path / "out"), "int8", 6 * LINEARS)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"weights": "fp8-tensor", "activations": "fp8-static"}, "fp8_e4m3"),
        pytest.param({"bits": 8, "activations": "int8-static", "smooth": True}, "int8", marks=pytest.mark.slow),
    ],
)
def test_rounded_inputs_meet_weights_of_their_type(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    quantized = artifact(tmp_path, tiny_llama(tmp_path / "model", layers=1), **options)
    shape = ("--target", "sm89", "--target", "sm120", "--context", "64", "--prompt", "32")
    found = said(str(quantized), "--to", "tensorrt", *shape, "--out", str(tmp_path / "out"))
    assert found["weights"] == found["rounded"] == LINEARS
    assert found["logit_difference"] <= found["logit_bound"]
    for engine in found["engines"]:
        assert not engine["fell_back"]
        assert not engine["multiplied_otherwise"]
        # In each profile, with query, key and value in one product and gate and up in another, or every one alone.
        assert 2 * 4 <= engine["products"][f"{kind} × {kind}"] <= 2 * LINEARS


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"bits": 4, "symmetric": False, "group_size": 32}, "symmetric: true"),
        ({"bits": 8, "group_size": 32}, "group_size: -1"),
        ({"bits": 8, "activations": "int8"}, "activations: int8-static"),
        ({"weights": "fp8", "activations": "fp8"}, "activations: fp8-static"),
        ({"bits": 4, "group_size": 32, "activations": "int8-static"}, "quantize both to one type"),
    ],
)
def test_what_tensorrt_cannot_express_is_refused_with_the_remedy(
    tmp_path: Path, options: dict[str, Any], remedy: str
) -> None:
    quantized = artifact(tmp_path, tiny_llama(tmp_path / "model", layers=1), **options)
    ran = run(str(quantized), "--to", "tensorrt", "--target", "sm89", "--out", str(tmp_path / "out"))
    assert ran.exit_code == 2
    assert remedy in ran.output
    assert "layers.0" in ran.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnx", "--target", "sm89"), "takes no --target"),
        (("--to", "aot", "--dtype", "float16"), "takes no --dtype"),
        (("--to", "torchscript"), "use one of onnx, tensorrt, aot"),
        (("--to", "tensorrt", "--target", "sm90", "--context", "128", "--prompt", "64"), "cannot build for sm90"),
        (("--to", "tensorrt", "--target", "sm89", "--context", "4096"), "made for 256 positions"),
        (("--to", "tensorrt", "--target", "sm89", "--prompt", "99", "--context", "64"), "no longer a prompt"),
        (("--to", "tensorrt", "--target", "sm89", "--dtype", "bfloat16"), "use one of float32, float16"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    ran = run(str(tiny_llama(tmp_path / "model")), *options, "--out", str(tmp_path / "out"))
    assert ran.exit_code == 2, ran.output
    assert message in ran.output
    assert not (tmp_path / "out").exists()


def test_profiles_cover_every_length_once() -> None:
    prefill, decode = profiles(EngineOptions(batch=4, prompt=128, context=256))
    assert prefill.dimensions["total_sequence_length"] == (1, 32, 128)
    assert decode.dimensions["past_sequence_length"] == (1, 127, 255)
    assert decode.dimensions["total_sequence_length"][2] == 256
    assert decode.dimensions["batch_size"] == (1, 4, 4)


def test_a_graph_that_computes_something_else_is_never_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "rehearse", lambda *_: float("nan"))
    model = str(tiny_llama(tmp_path / "model"))
    lengths = ("--context", "128", "--prompt", "64")
    ran = run(model, "--to", "tensorrt", "--target", "sm89", *lengths, "--out", str(tmp_path / "out"))
    assert ran.exit_code == 3
    assert "does not compute what the model does" in ran.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # three compilations; tests/backends/test_aot_package.py has them by default
def test_a_package_is_loaded_like_every_artifact(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    found = said(str(model), "--to", "aot", "--context", "64", "--out", str(tmp_path / "out"))
    assert found["entries"] == ["decode", "prefill", "score"]
    assert found["logit_difference"] <= found["logit_bound"]
    runner = load(tmp_path / "out")
    from transformers import AutoModelForCausalLM

    eager = EagerRunner(AutoModelForCausalLM.from_pretrained(model))
    tokens = torch.tensor([[40, 41, 42, 43, 44]])
    expected = eager.prefill(tokens, all_logits=True)
    scores = runner.prefill(tokens, all_logits=True)
    assert float((scores - expected).abs().max() / expected.abs().max()) <= found["logit_bound"]
    assert runner.generate_text("def", max_new_tokens=4)
    shutil.copy(tmp_path / "out" / "config.json", tmp_path / "out" / "package" / "model.pt2")
    with pytest.raises(ArtifactError, match="not as it was written"):
        load(tmp_path / "out")
