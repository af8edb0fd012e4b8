"""`optimize`, `Result.save` and `load`, end to end on tiny models."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import optimizer
from optimizer.api import NotReleasedError, Result, load, optimize
from optimizer.artifact import read_manifest, verify_artifact
from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.linear import QuantizedLinear
from optimizer.backends.runner import EagerRunner
from optimizer.calibration import BUILT_IN
from optimizer.checkpoint import save_checkpoint
from optimizer.errors import ArtifactError, DataError, DeviceError, ModelError, OutputError, RecipeError, UsageError
from optimizer.progress import Progress
from optimizer.quant.formats import Format, Scheme
from optimizer.recipe import Recipe
from tests.optimizer.quantized_models import quantized_llama
from tests.optimizer.small_jobs import PERPLEXITY, recipe, with_ruinous_passes, without_measuring_the_machine
from tests.optimizer.tiny_models import byte_tokenizer, tiny_llama

TOKENS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
NEVER = {"metric": "weights.ratio", "at_most": 0.0}


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    """No measuring of the machine, and no bars of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        with_ruinous_passes(patch)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@dataclass(frozen=True)
class Job:
    """A passed job and its artifact."""

    result: Result
    artifact: Path
    phases: tuple[str, ...]


@pytest.fixture(scope="module")
def passed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    out = tmp_path_factory.mktemp("out") / "artifact"
    progress = Progress()
    return Job(optimize(folder, recipe(), out=out, progress=progress), out, tuple(progress.seconds))


@pytest.fixture(scope="module")
def failed(folder: Path) -> Result:
    return optimize(folder, recipe(NEVER))


def in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_passing_job_returns_the_verdict_the_runner_and_the_artifact(passed: Job) -> None:
    result = passed.result
    assert result.passed
    assert result.verdict == "passed"
    assert isinstance(result.model, CompiledRunner)
    assert result.report.recipe["name"] == "small"
    assert [entry.name for entry in result.report.passes] == ["quantize", "merge_linears", "decode"]
    assert all(entry.matched == entry.expected for entry in result.report.passes)
    assert result.report.failed_floors == []
    assert {"load", "pass quantize", "optimized quality", "speed", "save"} <= set(passed.phases)
    assert verify_artifact(passed.artifact) == []
    assert {path.name for path in passed.artifact.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors", "recipe.yaml",
        "report.html", "report.json", "report.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_artifact_says_what_it_is(passed: Job, folder: Path) -> None:
    manifest = read_manifest(passed.artifact)
    assert manifest.verdict == "passed"
    assert manifest.seeds == {"recipe": 0, "evaluation": 1234}
    assert manifest.source.name == "tiny"
    assert len(manifest.source.digest) == 64
    report = json.loads((passed.artifact / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "passed"
    assert "UNGATED" not in (passed.artifact / "README.md").read_text(encoding="utf-8")


def test_the_report_agrees_with_the_artifact_on_bytes_and_layers(passed: Job) -> None:
    report = passed.result.report
    linears = [m for m in passed.result.model.model.modules() if isinstance(m, QuantizedLinear)]
    assert len({id(m) for m in linears}) == 2 * 4  # per layer: qkv, o, gate+up, down
    assert [layer.format for layer in report.layers].count("int8-channel") == 2 * 7
    assert report.memory.weights_bytes_after < report.memory.weights_bytes_before
    assert report.ledger.compiled == 0
    assert report.ledger.eager > 0  # this recipe does not compile, and the report does not say that it did
    assert any("ran eagerly" in warning for warning in report.warnings)


def test_a_loaded_artifact_generates_the_same_tokens(passed: Job) -> None:
    runner = load(passed.artifact)
    assert isinstance(runner, CompiledRunner)
    assert torch.equal(
        runner.generate(TOKENS, max_new_tokens=12), passed.result.model.generate(TOKENS, max_new_tokens=12)
    )
    assert torch.equal(runner.prefill(TOKENS), passed.result.model.prefill(TOKENS))
    assert runner.generate_text("def f", max_new_tokens=4) == passed.result.model.generate_text(
        "def f", max_new_tokens=4
    )


def test_transformers_alone_loads_the_artifact_with_the_same_logits(passed: Job) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(passed.artifact, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(TOKENS).logits
    ours = passed.result.model.prefill(TOKENS, all_logits=True)
    assert (logits - ours).norm() <= 1e-5 * ours.norm()  # float32 sums of at most 128 terms in another order


def test_the_same_job_again_has_the_same_digest(passed: Job, folder: Path, tmp_path: Path) -> None:
    optimize(folder, recipe(), out=tmp_path / "again")
    assert read_manifest(tmp_path / "again").digest == read_manifest(passed.artifact).digest


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor, when it is first imported
def test_a_compiled_job_runs_every_step_compiled(folder: Path, tmp_path: Path) -> None:
    compiled = [{"name": "quantize", "bits": 4, "group_size": 32}, {"name": "merge_linears"}, {"name": "decode"}]
    result = optimize(folder, recipe({"metric": "weights.ratio", "at_most": 0.9}, passes=compiled))
    assert result.report.ledger.eager == 0
    assert result.report.ledger.compiled > 0
    plain = EagerRunner(result.model.model, result.model.tokenizer).generate(TOKENS[:1], max_new_tokens=5)
    assert torch.equal(result.model.generate(TOKENS[:1], max_new_tokens=5), plain)


def test_a_failed_job_writes_no_artifact(folder: Path, tmp_path: Path) -> None:
    result = optimize(folder, recipe(NEVER), out=tmp_path / "none")
    assert not result.passed
    assert result.verdict == "failed"
    assert "weights.ratio" in result.report.summary
    assert list(tmp_path.iterdir()) == []


def test_saving_a_failed_result_is_refused_and_writes_nothing(failed: Result, tmp_path: Path) -> None:
    with pytest.raises(NotReleasedError, match=r"weights\.ratio.*ungated=True") as caught:
        failed.save(tmp_path / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_ungated_artifact_is_marked_everywhere(failed: Result, tmp_path: Path) -> None:
    out = failed.save(tmp_path / "out", ungated=True)
    assert read_manifest(out).verdict == "ungated"
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["verdict"] == "ungated"
    for name in ("README.md", "report.md", "report.html"):
        assert "UNGATED" in (out / name).read_text(encoding="utf-8"), name
    assert failed.report.verdict == "failed"


def test_a_passed_result_is_not_marked_ungated_though_asked(passed: Job, tmp_path: Path) -> None:
    out = passed.result.save(tmp_path / "out", ungated=True)
    assert read_manifest(out).verdict == "passed"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "recipe.yaml", "tokenizer.json", "report.json"])
def test_a_flipped_byte_is_refused_by_name_and_let_through_only_unverified(
    file: str, passed: Job, tmp_path: Path
) -> None:
    out = passed.result.save(tmp_path / "out")
    raw = bytearray((out / file).read_bytes())
    raw[-3] ^= 1
    (out / file).write_bytes(bytes(raw))
    with pytest.raises(ArtifactError, match=file):
        load(out)
    if file == "model.safetensors":
        assert load(out, verify=False).generate(TOKENS, max_new_tokens=2).shape == (2, 9)


def test_a_folder_that_is_no_artifact_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in (folder, tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactError):
            load(path)


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_a_checkpoint_of_another_tool_is_served_by_our_kernels(layout: str, tmp_path: Path) -> None:
    # Such a folder has no recipe and no manifest, as those of GPTQModel, AutoAWQ and llm-compressor.
    model = quantized_llama(Scheme(Format(4, True, 32)), scale_dtype=torch.float16)
    save_checkpoint(model, byte_tokenizer(), tmp_path, layout)
    with torch.no_grad():
        expected = model(TOKENS).logits[:, -1]
    runner = load(tmp_path)
    assert isinstance(runner, CompiledRunner)
    torch.testing.assert_close(runner.prefill(TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert {kernel.partition("[")[0] for kernel in runner.ledger.kernels.values()} == {"w4a16_linear", "aten::linear"}


def test_a_checkpoint_that_is_quantized_already_can_be_optimized_further(tmp_path: Path) -> None:
    model = quantized_llama(Scheme(Format(8)))
    save_checkpoint(model, byte_tokenizer(), tmp_path)
    passes = [{"name": "merge_linears"}, {"name": "decode", "compile": False}]
    result = optimize(tmp_path, recipe({"metric": PERPLEXITY, "at_most": 1.05}, passes=passes))
    assert result.passed
    assert "w8a16_linear" in " ".join(result.model.ledger.kernels.values())


def state(model: Any) -> dict[str, Any]:
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = zip(a["tensors"].items(), b["tensors"].items(), strict=True)
    equal = all(x == y and p == q and torch.equal(t, u) for (x, (p, t)), (y, (q, u)) in tensors)
    return equal and all(a[key] == b[key] for key in a if key != "tensors")


@pytest.mark.parametrize("training", [False, True])
def test_a_model_handed_over_stays_as_it_was(folder: Path, training: bool) -> None:
    model = in_memory(folder).train(training)
    before = state(model)
    result = optimize(model, recipe(), tokenizer=byte_tokenizer())
    assert result.passed
    assert same(before, state(model))
    assert isinstance(result.model.model.get_submodule("model.layers.0.mlp.down_proj"), QuantizedLinear)


def test_in_place_changes_the_model_handed_over(folder: Path) -> None:
    model = in_memory(folder)
    result = optimize(model, recipe(), tokenizer=byte_tokenizer(), inplace=True)
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    with torch.no_grad():
        theirs, ours = model(TOKENS).logits[:, -1], result.model.prefill(TOKENS)
    assert (theirs - ours).norm() <= 1e-5 * ours.norm()  # the head sees one row in place of seven


def test_a_pass_that_fails_halfway_ends_the_job_and_the_model_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = in_memory(folder)
    before = state(model)
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match="fails halfway"):
            optimize(
                model, recipe(passes=[{"name": "break"}]), tokenizer=byte_tokenizer(), inplace=inplace,
                out=tmp_path / "out",
            )  # fmt: skip
        assert same(before, state(model))
    assert list(tmp_path.iterdir()) == []


def test_the_callers_random_states_threads_and_modes_stay_as_they_were(folder: Path) -> None:
    def surroundings() -> tuple[Any, ...]:
        return (
            random.getstate(), tuple(np.random.get_state()[1].tolist()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(), logging.get_verbosity(),
        )  # fmt: skip

    torch.manual_seed(5)
    before = surroundings()
    optimize(folder, recipe())
    assert surroundings() == before
    with torch.no_grad():
        optimize(folder, recipe())
        assert not torch.is_grad_enabled()


CALIBRATING = (
    {"bits": 4, "group_size": 32, "method": "gptq"},
    {"bits": 4, "group_size": 32, "method": "awq"},
    {"activations": "int8", "smooth": True},
    {"activations": "int8-static"},
)


def calibrating(**options: Any) -> Recipe:
    return recipe(passes=[{"name": "quantize", **options}, {"name": "decode", "compile": False}])


@pytest.mark.parametrize("options", CALIBRATING, ids=str)
def test_a_recipe_that_calibrates_uses_what_it_is_given(options: dict[str, Any], folder: Path) -> None:
    progress = Progress()
    text = "Calibrate on this, and on nothing else. " * 40
    result = optimize(folder, calibrating(**options), calibration=text, progress=progress)
    assert "calibration data" in progress.seconds
    notes = [note for _, report in result.outcome.passes for note in report.notes]
    assert "calibrated on 7 rows, 1600 tokens of given data" in notes


def test_a_recipe_that_calibrates_says_that_it_was_given_nothing(folder: Path) -> None:
    result = optimize(folder, calibrating(**CALIBRATING[0]))
    assert f"tokens of {BUILT_IN}" in str([report.notes for _, report in result.outcome.passes])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "the calibration data is empty"),
        ([], "the calibration data is empty"),
        ("too short", "has 9 tokens; at least 512 are needed"),
        ([b"bytes"], "row 0, of type bytes"),
        ([[320] * 600], "has token 320; the model's ids are 0 to 319"),
        (Path("no such file"), "does not exist"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused_before_any_work(data: Any, message: str, folder: Path) -> None:
    progress = Progress()
    with pytest.raises(DataError, match=message):
        optimize(folder, calibrating(**CALIBRATING[0]), calibration=data, progress=progress)
    assert set(progress.seconds) == {"load", "calibration data"}


@pytest.mark.parametrize("data", ["x" * 1000, ["x" * 500] * 2, "", []])
def test_calibration_for_a_recipe_that_does_not_calibrate_is_refused(data: Any, folder: Path) -> None:
    progress = Progress()
    with pytest.raises(RecipeError, match=r"no pass of recipe 'small' calibrates \(quantize, merge_linears, decode\)"):
        optimize(folder, recipe(), calibration=data, progress=progress)
    assert set(progress.seconds) == {"load"}


def test_a_model_without_tokenizer_is_refused_before_any_work(folder: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        optimize(in_memory(folder), recipe())


def test_a_workload_longer_than_the_model_is_refused_before_any_work(folder: Path) -> None:
    progress = Progress()
    with pytest.raises(UsageError, match=r"prompt 250 \+ output 7 exceed the model's 256 positions"):
        optimize(folder, recipe(prompt=250, output=7), progress=progress)
    assert set(progress.seconds) == {"load"}


def test_a_group_size_that_does_not_fit_is_refused_before_any_work(folder: Path) -> None:
    progress = Progress()
    wide = recipe(passes=[{"name": "quantize", "bits": 4, "group_size": 128}])
    with pytest.raises(RecipeError, match=r"group size 128 does not divide .*K = 64"):
        optimize(folder, wide, progress=progress)
    assert set(progress.seconds) == {"load"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_absent_is_an_error_and_no_fallback(folder: Path, passed: Job) -> None:
    with pytest.raises(DeviceError, match="PyTorch sees no CUDA device"):
        optimize(folder, recipe(), device="cuda")
    with pytest.raises(DeviceError):
        load(passed.artifact, device="cuda:1")


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", "mps"])
def test_a_device_that_does_not_exist_is_a_usage_error(device: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="Use cpu, cuda or auto"):
        optimize(folder, recipe(), device=device)


def test_an_output_folder_that_is_not_ours_is_refused_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\documentclass", encoding="utf-8")
    progress = Progress()
    with pytest.raises(OutputError, match="left alone"):
        optimize(folder, recipe(), out=tmp_path, progress=progress)
    assert progress.seconds == {}
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_recipe_and_a_missing_model_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'default'"):
        optimize(folder, "defualt")
    with pytest.raises(ModelError):
        optimize(folder / "missing", recipe())


def test_a_job_writes_over_its_own_earlier_artifact(folder: Path, passed: Job, tmp_path: Path) -> None:
    out = passed.result.save(tmp_path / "out")
    stricter = recipe({"metric": PERPLEXITY, "at_most": 1.5})
    assert optimize(folder, stricter, out=out).passed
    assert "1.5" in (out / "recipe.yaml").read_text(encoding="utf-8")
    assert verify_artifact(out) == []


def test_the_package_exports_what_it_says() -> None:
    assert optimizer.optimize is optimize
    assert optimizer.load is load
    assert optimizer.Result is Result
