"""`optimizer export` and the runner of its folder: from an artifact to text, and what hostile or broken folders get."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from optimizer import compare, export_command
from optimizer.api import load
from optimizer.artifact import ManifestInfo, SourceRecord, read_manifest, write_artifact
from optimizer.backends import onnx_runner, onnx_weights
from optimizer.backends.onnx_export import MODEL_FILE, OPSET, Exported, float_copy, past_names
from optimizer.backends.onnx_runner import OnnxRunner, check_external_data
from optimizer.backends.runner import EagerRunner
from optimizer.checkpoint import save_checkpoint
from optimizer.cli import app
from optimizer.errors import ArtifactError, DeviceError, OutputError, PassError, UsageError
from optimizer.evals.runner import Runner
from optimizer.evals.timing import Workload
from optimizer.export_command import Reference, allowed, export_model, genai_config, reference, rehearse
from optimizer.quant.formats import Format, Scheme
from optimizer.variants import Options, find_opener
from tests.optimizer.quantized_models import fresh_llama, quantize
from tests.optimizer.tiny_models import byte_tokenizer, tiny_llama

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def mixed() -> Any:
    """A tied Llama with int4, int4 with zero points, and int8 layers, and layers left as they are."""
    formats = {
        "q_proj": Format(4, group_size=32),
        "k_proj": Format(4, group_size=32, symmetric=False),
        "o_proj": Format(8),
        "down_proj": Format(8, group_size=32),
    }

    def choose(name: str) -> Scheme | None:
        format = formats.get(name.rpartition(".")[2])
        return None if format is None else Scheme(format)

    return quantize(fresh_llama(dtype=torch.float32, layers=1), choose)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """An artifact, its export by the command line, and what that printed."""
    root = tmp_path_factory.mktemp("export")
    source = SourceRecord(name="tiny", revision=None, digest="0" * 64)

    def build(folder: Path) -> None:
        save_checkpoint(mixed(), byte_tokenizer(), folder)

    write_artifact(root / "artifact", build=build, manifest=ManifestInfo(source=source, verdict="passed"))
    ran = CliRunner().invoke(
        app, ["export", str(root / "artifact"), "--to", "onnx", "--out", str(root / "onnx"), "--json", "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    return root / "artifact", root / "onnx", json.loads(ran.stdout)


@pytest.fixture
def copy(folders: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[1], tmp_path / "copy"))


def test_the_command_says_what_it_wrote(folders: Any) -> None:
    artifact, folder, said = folders
    assert said["logit_difference"] <= said["logit_bound"] == 1e-4
    assert said["kernels"]["model.layers.0.self_attn.q_proj"] == "MatMulNBits"
    assert said["kernels"]["model.layers.0.self_attn.o_proj"] == "DequantizedMatMul"
    assert said["kernels"]["model.layers.0.mlp.up_proj"] == said["kernels"]["lm_head"] == "MatMul"
    manifest = read_manifest(folder)
    assert said["bytes"] == sum(record.bytes for record in manifest.files.values())
    assert manifest.verdict == "ungated"
    assert (manifest.source.name, manifest.source.digest) == ("tiny", read_manifest(artifact).digest)


def test_the_graph_has_the_interface_that_consumers_rely_on(folders: Any) -> None:
    file = folders[1] / MODEL_FILE
    graph = onnx.load(str(file), load_external_data=False)
    onnx.checker.check_model(str(file))
    assert {o.domain: o.version for o in graph.opset_import} == {"": 21, "com.microsoft": 1}

    def dims(values: Any) -> dict[str, list[Any]]:
        return {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}

    inputs, outputs = dims(graph.graph.input), dims(graph.graph.output)
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *past_names(1)]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.0.value"] == ["batch_size", 2, "cache_length", 16]
    assert list(outputs) == ["logits", *past_names(1, "present")]
    assert outputs["logits"] == ["batch_size", "sequence_length", 320]
    assert outputs["present.0.key"] == ["batch_size", 2, "cache_length", 16]
    table = [t for t in graph.graph.initializer if sorted(t.dims) == [64, 320]]
    assert len(table) == 1  # a tied head is stored once


def test_genai_finds_every_name_of_its_configuration_in_the_graph(folders: Any) -> None:
    config = json.loads((folders[1] / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    graph = onnx.load(str(folders[1] / decoder["filename"]), load_external_data=False).graph
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        assert {name.replace("%d", "0") for name in decoder[side].values()} == {value.name for value in values}
    assert decoder["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "1"
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == (1, 2)
    assert config["search"]["past_present_share_buffer"] is True
    settings = json.loads((folders[1] / "export.json").read_text())
    assert settings["shared_buffer"] is True
    assert settings["attention"] == "GroupQueryAttention with rotary embedding"
    assert settings["attention_note"] == ""


def test_genai_config_takes_ends_from_the_generation_defaults() -> None:
    model = fresh_llama()
    model.generation_config.eos_token_id = [5, 6]
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    found = genai_config(model.config, model.generation_config)["model"]
    assert (found["eos_token_id"], found["pad_token_id"]) == ([5, 6], 5)


@pytest.fixture(scope="module")
def runners(folders: Any) -> tuple[OnnxRunner, EagerRunner]:
    return load(folders[1]), EagerRunner(mixed(), byte_tokenizer())  # type: ignore[return-value]


def test_the_runner_is_one_of_ours(runners: Any) -> None:
    runner, original = runners
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.max_context) == (320, 256)
    assert runner.ledger.kernel_counts() == {"MatMul": 4, "MatMulNBits": 2, "DequantizedMatMul": 2}
    assert runner.kv_bytes_per_token == original.kv_bytes_per_token
    assert 0 < runner.bytes_per_step(1, 0) < 320 * 64 * 4 + 64 * 64 * 4 * 12
    assert runner.bytes_per_step(2, 10) - runner.bytes_per_step(2, 0) == 20 * runner.kv_bytes_per_token


def test_greedy_tokens_are_those_of_pytorch_for_128(runners: Any) -> None:
    runner, original = runners
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    seen: list[torch.Tensor] = []
    found = runner.generate(tokens, mask, max_new_tokens=128, on_token=seen.append)
    assert torch.equal(found, original.generate(tokens, mask, max_new_tokens=128))
    assert torch.equal(torch.stack(seen, 1), found[:, 4:])
    assert runner.ledger.steps["onnxruntime"] >= 127


def test_logits_of_every_token_and_of_steps(runners: Any) -> None:
    runner, original = runners
    tokens = torch.randint(320, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = original.prefill(tokens, all_logits=True)
    bound = 1e-5 * float(expected.abs().max())
    assert (runner.prefill(tokens, all_logits=True) - expected).abs().max() <= bound
    assert (runner.prefill(tokens) - expected[:, -1]).abs().max() <= bound
    for step in range(3):
        assert (runner.decode(tokens[:, step]) - original.decode(tokens[:, step])).abs().max() <= bound


def test_a_step_writes_into_the_buffer_and_copies_none_of_it(runners: Any) -> None:
    """Past and present are one address from step to step, and what lies beyond the text, here NaN, is never touched."""
    runner, original = runners
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    original.prefill(prompt)
    runner.prefill(prompt)
    buffers = runner._cache._values
    assert len(buffers) == 2
    for buffer in buffers:
        buffer.numpy()[:, :, 3:] = float("nan")
    addresses = [buffer.data_ptr() for buffer in buffers]
    for step in range(3):
        token = torch.tensor([7 + step, 9 + step])
        assert (runner.decode(token) - original.decode(token)).abs().max() <= 1e-5
        _, *present = runner._binding.get_outputs()
        assert [value.data_ptr() for value in present] == addresses
        for buffer in buffers:
            written = ~torch.isnan(torch.from_numpy(buffer.numpy()))
            assert written[:, :, : 4 + step].all()
            assert not written[:, :, 4 + step :].any()


def test_no_operator_of_a_step_makes_a_cache(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the runtime's own profile, at a cache that is larger than all else in the graph."""
    monkeypatch.setattr(onnx_runner, "FIRST_ROOM", 256)
    runner = OnnxRunner(folders[1])
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    runner._session = onnxruntime.InferenceSession(
        str(folders[1] / MODEL_FILE), options, providers=["CPUExecutionProvider"]
    )
    runner.prefill(torch.ones(8, 2, dtype=torch.long))
    runner.decode(torch.ones(8, dtype=torch.long))
    cache = 8 * 2 * 256 * 16 * 4
    events = [
        event for event in json.loads(Path(runner._session.end_profiling()).read_text()) if event["cat"] == "Node"
    ]
    made = [(event["args"]["op_name"], int(event["args"].get("output_size", 0))) for event in events]
    attention = [size for name, size in made if name == "GroupQueryAttention"]
    assert max(attention) >= 2 * cache  # the buffers that it was given
    assert 0 < max(size for name, size in made if name != "GroupQueryAttention") < cache


def test_a_text_that_outgrows_the_buffer_gets_one_of_twice_the_size(
    runners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, original = runners
    monkeypatch.setattr(onnx_runner, "FIRST_ROOM", 1)
    tokens, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    sizes: list[int] = []
    found = runner.generate(
        tokens, mask, max_new_tokens=40, on_token=lambda _: sizes.append(runner._cache._values[0].shape()[2])
    )
    assert torch.equal(found, original.generate(tokens, mask, max_new_tokens=40))
    assert sorted(set(sizes)) == [6, 12, 24, 48]


def test_the_runner_checks_its_inputs_like_every_other(runners: Any) -> None:
    runner, _ = runners
    for bad in (torch.tensor([[320]]), torch.zeros(1, 257, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long)):
        with pytest.raises(UsageError):
            runner.prefill(bad)
    assert runner.generate_text("ab", max_new_tokens=2)


def rename(location: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
        tensor = next(t for t in graph.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        (folder / MODEL_FILE).write_bytes(graph.SerializeToString())

    return change


def link(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.rename(folder.parent / "elsewhere")
    data.symlink_to(folder.parent / "elsewhere")


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("../model.onnx.data"), "is no plain file name"),
        (rename("/etc/passwd"), "is no plain file name"),
        (rename("sub/model.onnx.data"), "is no plain file name"),
        (rename(""), "is no plain file name"),
        (rename("other.data"), "is missing"),
        (rename("config.json"), "is not in the manifest"),
        (link, "is a symbolic link"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "is missing"),
        (lambda folder: (folder / MODEL_FILE).write_bytes(b"\x08garbage"), "is no ONNX graph|cannot load"),
        (lambda folder: (folder / MODEL_FILE).unlink(), "missing or a link"),
    ],
)
def test_external_data_that_may_not_be_read(change: Callable[[Path], Any], words: str, copy: Path) -> None:
    change(copy)
    with pytest.raises(ArtifactError, match=words):
        check_external_data(copy, {"model.onnx", "model.onnx.data"})


@pytest.mark.parametrize(
    "change", [flip("model.onnx.data"), flip(MODEL_FILE), flip("config.json"), link, lambda f: (f / "extra").touch()]
)
def test_a_changed_folder_is_refused_before_the_runtime_sees_it(
    change: Callable[[Path], Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runner, "open_session", lambda *_, **__: pytest.fail("it was opened"))
    change(copy)
    with pytest.raises(ArtifactError, match="is not as it was written"):
        load(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dtype": "bool", "step_weight_bytes": 1, "kernels": {}}'])
def test_settings_that_cannot_be_read(text: str, copy: Path) -> None:
    (copy / "export.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"export\.json cannot be read"):
        OnnxRunner(copy)


def test_a_missing_provider_or_runtime_says_what_to_install(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"no CUDAExecutionProvider: .*pip install onnxruntime-gpu"):
        load(copy, device="cuda")
    with pytest.raises(DeviceError, match="on cpu or cuda here, not on 'tpu'"):
        load(copy, device="tpu")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        load(copy)


@pytest.fixture
def without_graph(monkeypatch: pytest.MonkeyPatch, folders: Any) -> Iterator[None]:
    """`export` copies the graph of the fixture instead of tracing another."""

    def copied(model: Any, folder: Path, **_: Any) -> Any:
        for name in (MODEL_FILE, "model.onnx.data"):
            shutil.copy(folders[1] / name, folder / name)
        settings = json.loads((folders[1] / "export.json").read_text())
        return export_command.Exported(21, "float32", settings["kernels"], settings["step_weight_bytes"])

    monkeypatch.setattr(export_command, "export", copied)
    return iter(())


@pytest.mark.usefixtures("without_graph")
def test_a_graph_that_computes_something_else_is_not_released(tmp_path: Path, copy: Path) -> None:
    """Another model's graph, over an older export that must stay."""
    other = tiny_llama(tmp_path / "other", dtype=torch.float32, layers=1, seed=1)
    digest = read_manifest(copy).digest
    with pytest.raises(PassError, match="does not compute what the model does"):
        export_model(str(other), copy)
    assert read_manifest(copy).digest == digest
    assert load(copy).max_context == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "other"]


@pytest.mark.usefixtures("without_graph")
def test_an_interrupted_export_leaves_the_old_one(folders: Any, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_command, "rehearse", interrupted)
    digest = read_manifest(copy).digest
    with pytest.raises(KeyboardInterrupt):
        export_model(str(folders[0]), copy)
    assert read_manifest(copy).digest == digest
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_unknown_types(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype is 'int8'; use one of float32, float16"):
        export_model("reference", tmp_path / "out", dtype="int8")


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="no artifact"):
        export_model("reference", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_export_cannot_be_exported(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an export already"):
        export_model(str(copy), tmp_path / "again")


def test_rehearsal_sees_a_difference(runners: Any) -> None:
    runner, original = runners
    assert rehearse(reference(original.model, "float32"), runner) <= 1e-5
    assert rehearse(reference(fresh_llama(layers=1, seed=3), "float32"), runner) > 0.1


@pytest.mark.parametrize(("own", "bound"), [(0.01, 0.05), (0.05, 0.1), (0.4, 0.15), (float("nan"), 0.05)])
def test_the_bound_of_a_sensitive_model_is_measured_and_limited(own: float, bound: float) -> None:
    expected = Reference(torch.zeros(1, 8), torch.ones(1, 8), (), own)
    exported = Exported(OPSET, "float16", {"layer": "int8-channel × int8-token"}, 1)
    assert allowed(exported, expected) == pytest.approx(bound)
    assert allowed(replace(exported, kernels={"layer": "MatMul"}), expected) == export_command.BOUND["float16"]


def test_a_reference_in_float32_is_that_of_a_model_cast_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_weights, "LARGE", 1)
    model = fresh_llama(layers=1, seed=3).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    late = reference(model, "float32")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole = reference(float_copy(model, torch.float32), "float32")
    assert all(torch.equal(a, b) for a, b in zip(late.logits, whole.logits, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_model_of_a_billion_parameters_takes_little_more_than_its_size(dtype: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.randn_like(tensor) * 0.02)
    model.save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    size = sum(p.numel() for p in model.parameters()) * (2 if dtype == "float16" else 4)
    del model
    command = [sys.executable, "-c", "from optimizer.cli import main; main()", "export", str(tmp_path / "large")]
    child = subprocess.Popen([*command, "--dtype", dtype, "--out", str(tmp_path / "out"), "--quiet"])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert usage.ru_maxrss * 1024 < 2.2 * size  # libraries and all


def test_a_large_graph_is_checked_as_it_lies_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_command, "LARGE", 0)
    made = export_model("reference", tmp_path / "large")
    assert made.difference <= 1e-5


def test_eval_and_bench_take_an_export(folders: Any) -> None:
    ran = CliRunner().invoke(
        app, ["bench", str(folders[1]), "--prompt", "8", "--output", "4", "--repeats", "3", "--json", "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["runners"][str(folders[1])]["tokens_per_second"] > 0


def test_the_page_on_export_says_what_the_code_does() -> None:
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    allowed = [float(value) for value in re.findall(r"^\|.*\| ([\d.]+) \|$", page, re.MULTILINE)]
    bounds = export_command.BOUND
    assert allowed == [bounds["float32"], bounds["float16"], export_command.ROUNDED_BOUND, export_command.INT8_BOUND]
    for line in re.findall(r"^optimizer (.*)$", page, re.MULTILINE):
        name, *rest = line.split("#")[0].split()
        options = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
    assert f"Opset {OPSET}." in page


def test_an_export_can_be_compared(folders: Any) -> None:
    variant = find_opener(str(folders[1]))(str(folders[1]), Options(device="cpu"))
    assert variant.kind == "export"
    assert isinstance(variant.runner, OnnxRunner)
    entry = compare._describe(variant, Workload(1, 8, 4))
    assert entry.architecture == "LlamaForCausalLM"
    assert entry.weights_bytes == variant.runner.bytes_per_step(1, 0)
    assert sum(entry.kernels.values()) == len(folders[2]["kernels"])
