"""Which kind a name is of, how its variant is called, and what is refused before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from optimizer import variants
from optimizer.errors import ExportError, ModelError, OptimizerError, UsageError
from optimizer.variants import OPENERS, Options, find_opener, open_variants, split_label
from tests.optimizer.tiny_models import tiny_llama


@pytest.fixture(autouse=True, scope="module")
def without_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("variants") / "tiny")


def kind(name: str) -> str:
    return next(opener.kind for opener in OPENERS if opener.matches(name))


def test_each_name_is_of_one_kind(model: Path, tmp_path: Path) -> None:
    artifact, quantized, onnx, engine = (tmp_path / name for name in ("artifact", "gptq", "onnx", "trt"))
    for folder in (artifact, quantized, onnx, engine):
        folder.mkdir()
    (artifact / "manifest.json").write_text("{}")
    (quantized / "config.json").write_text("{}")
    (quantized / "quantize_config.json").write_text("{}")
    (onnx / "model.onnx").write_text("")
    (engine / "rank0.engine").write_text("")
    kinds = {
        "reference": "model", "org/name": "model", str(model): "model", "http://h/v1#m": "endpoint",
        "HTTPS://h/v1#m": "endpoint", str(artifact): "artifact", str(quantized): "quantized checkpoint",
        str(onnx): "onnx", str(onnx / "model.onnx"): "onnx", str(engine): "tensorrt",
        str(engine / "rank0.engine"): "tensorrt", "no/such/folder": "model", "x" * 5000: "model",
    }  # fmt: skip
    assert {name: kind(name) for name in kinds} == kinds


def test_a_model_folder_with_an_onnx_copy_is_a_model(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.onnx").write_text("")
    assert kind(str(folder)) == "model"


@pytest.mark.parametrize(("file", "words"), [("m.onnx", "an ONNX model"), ("m.plan", "a TensorRT engine")])
def test_a_file_of_another_runtime_is_refused_with_the_remedy(
    tmp_path: Path, file: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).write_text("")
    monkeypatch.setattr(variants, "_open_model", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ExportError, match=f"is {words}.* Give the artifact"):
        open_variants(["reference", str(tmp_path)], Options())


def test_a_kind_without_an_opener_becomes_one_by_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_text("")

    def open_onnx(name: str, options: Options) -> variants.Variant:
        return variants.Variant("mine", name, "onnx")

    table = [o if o.kind != "onnx" else variants.Opener(o.kind, o.matches, open_onnx) for o in OPENERS]
    monkeypatch.setattr(variants, "OPENERS", tuple(table))
    assert find_opener(str(tmp_path)) is open_onnx


def test_labels(model: Path, tmp_path: Path) -> None:
    assert split_label("a b=reference") == ("a b", "reference")
    assert split_label("reference") == (None, "reference")
    assert split_label("http://h/v1#a=b") == (None, "http://h/v1#a=b")
    assert split_label("x=http://h/v1#a=b") == ("x", "http://h/v1#a=b")
    (odd := tmp_path / "a=b").mkdir()
    assert split_label(str(odd)) == (None, str(odd))


def test_names_are_made_to_differ(model: Path) -> None:
    found = open_variants([str(model), str(model), f"tiny={model}", f"other={model}"], Options(device="cpu"))
    assert [v.name for v in found] == ["tiny", "tiny (2)", "tiny (3)", "other"]
    assert {v.digest for v in found} == {found[0].digest}
    assert found[0].stored_bytes == (model / "model.safetensors").stat().st_size
    assert all(v.given == str(model) for v in found)


def test_too_few_or_missing_variants(model: Path) -> None:
    with pytest.raises(UsageError, match="given 1 variants; name at least two"):
        open_variants([str(model)], Options())
    with pytest.raises(ModelError, match="no hub id"):
        open_variants([str(model), "no such thing"], Options(device="cpu"))
    with pytest.raises(OptimizerError, match="names no host or no model"):
        open_variants([str(model), "http://h/v1"], Options())
