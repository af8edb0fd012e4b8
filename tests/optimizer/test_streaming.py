"""Block by block from disk: the bytes of the pass in memory, on whatever is read, interrupted wherever it may be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import optimizer.passes.quantize as quantize_pass
import optimizer.streaming as streaming
from optimizer import load
from optimizer.artifact import read_manifest, verify_artifact
from optimizer.calibration import load_calibration
from optimizer.checkpoint import checkpoint_tensors, find_layout, model_config
from optimizer.errors import DataError, ModelError, OutputError, RecipeError, UsageError
from optimizer.lazy_weights import return_freed_memory
from optimizer.passes.base import Context
from optimizer.passes.blocks import first_inputs
from optimizer.passes.quantize import Quantize
from optimizer.preflight import resident_bytes
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import load_source
from optimizer.streaming import quantize_checkpoint
from optimizer.work_folder import WorkFolder
from tests.optimizer.tiny_models import byte_tokenizer, tiny_llama
from tests.passes.small_architectures import ARCHITECTURES, tokens

ROWS = torch.randint(3, 320, (24, 32), generator=torch.Generator().manual_seed(5)).tolist()
INT4 = {"bits": 4, "group_size": 32}
PASSES: dict[str, dict[str, Any]] = {
    "rtn": INT4 | {"clip": "mse"},
    "gptq": INT4 | {"method": "gptq"},
    "awq": INT4 | {"method": "awq", "symmetric": False},
    "smooth": {"activations": "int8", "smooth": True},
    "fp8-static": {"weights": "fp8", "activations": "fp8-static"},
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, so that their order and their sums count."""
    monkeypatch.setattr(quantize_pass, "first_inputs", lambda m, c: first_inputs(m, c, batch_tokens=256))


def recipe(layout: str = "compressed-tensors", name: str = "tiny", **options: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": name,
            "evaluation": {"tasks": {"reference_perplexity": 1}},
            "calibration": {"samples": 24, "length": 32},
            "layout": layout,
            "passes": [{"name": "quantize", "unrouted": "rtn"} | options, {"name": "merge_linears"}],
            "floors": [{"metric": "weights.ratio", "at_most": 1.0}],
        }
    )


def data_for(chosen: Recipe) -> Any:
    step = chosen.build_passes()[0]
    assert isinstance(step, Quantize)
    return ROWS if step.calibrates else None


def stream(model: Path, chosen: Recipe, out: Path, **options: Any) -> Any:
    return quantize_checkpoint(model, chosen, out, calibration=data_for(chosen), device="cpu", **options)


def in_memory(folder: Path, chosen: Recipe) -> tuple[dict[str, Tensor], Any, Any]:
    """The tensors, configuration and report of the pass run on the model that transformers loads."""
    source = load_source(folder)
    model = source.model
    step = chosen.build_passes()[0]
    assert isinstance(step, Quantize)
    ctx = Context(scale_dtype=find_layout(chosen.layout).scale_dtype)
    if step.calibrates:
        ctx.calibration = load_calibration(ROWS, source.tokenizer, model.config, chosen.calibration)
    step.check(model, ctx)
    report = step.run(model, ctx)
    return checkpoint_tensors(model, chosen.layout), model_config(model, chosen.layout), report


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (other, tensor)]
        assert torch.equal(*raw), name


def digest(out: Path) -> str:
    assert not verify_artifact(out)
    return read_manifest(out).digest


def nothing_left(out: Path) -> None:
    """Neither artifact nor work: only what was there."""
    assert not [entry.name for entry in out.parent.iterdir() if entry.name.startswith(f".{out.name}")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tied", tied=True, shard="40KB")


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            ARCHITECTURES[name]().save_pretrained(root / name)
        return root / name

    return folder


# The same bytes as in memory


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma3", "phi3", "opt"])
def test_the_bytes_are_those_of_the_pass_in_memory(
    name: str, method: str, architectures: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen, folder = recipe(**PASSES[method]), architectures(name)
    done = stream(folder, chosen, tmp_path / "out")
    tensors, config, report = in_memory(folder, chosen)
    same_bits(on_disk(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == json.loads(json.dumps(config))
    assert done.report.layers == report.layers
    assert set(done.report.skipped) == set(report.skipped)
    assert done.report.notes == report.notes
    assert (done.report.matched, done.report.expected) == (report.matched, report.expected)
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("ignore", [["lm_head"], []], ids=["plain head", "quantized head"])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_heads_tied_or_not_quantized_or_not(
    kind: str, ignore: list[str], method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    chosen, folder = recipe(ignore=ignore, **PASSES[method]), request.getfixturevalue(kind)
    stream(folder, chosen, tmp_path / "out")
    tensors, config, _ = in_memory(folder, chosen)
    same_bits(on_disk(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == json.loads(json.dumps(config))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("gptq", INT4 | {"method": "gptq"}),
        ("awq", INT4 | {"method": "awq", "symmetric": False}),
        ("fp8", {"weights": "fp8-block", "activations": "fp8-group"}),
    ],
)
def test_every_layout_is_that_of_the_pass_in_memory(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    chosen, folder = recipe(layout, **options), tiny_llama(tmp_path / "model", hidden=128, dtype=torch.float16)
    stream(folder, chosen, tmp_path / "out")
    tensors, config, _ = in_memory(folder, chosen)
    same_bits(on_disk(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == json.loads(json.dumps(config))


@pytest.mark.parametrize("method", ["gptq", "fp8-static"])
def test_ours_and_transformers_load_the_same_model(method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "model", dtype=torch.float32)
    stream(folder, recipe(**PASSES[method]), tmp_path / "out")
    ids = tokens()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        ours = load(tmp_path / "out").model(ids).logits
        before = load_source(folder).model(ids).logits
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()  # products in another order
    assert 0 < (ours - before).norm() < 0.5 * before.norm()


def test_what_the_artifact_holds(llama: Path, tmp_path: Path) -> None:
    chosen = recipe(**INT4)
    done = stream(llama, chosen, tmp_path / "out")
    assert sorted(file.name for file in done.artifact.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "manifest.json", "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json",
        "quantization.json", "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    manifest = read_manifest(done.artifact)
    assert manifest.verdict == "ungated"
    assert "Not evaluated" in (done.artifact / "README.md").read_text()
    assert Recipe.from_yaml(done.artifact / "recipe.yaml") == chosen
    index = json.loads((done.artifact / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"].keys() == on_disk(done.artifact).keys()
    sizes = [tensor.numel() * tensor.element_size() for tensor in on_disk(done.artifact).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_generation_defaults_are_those_of_the_source(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.25, "do_sample": True}))
    stream(folder, recipe(**INT4), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25


# Interrupted


class Killed(BaseException):
    """Ends a run where a SIGKILL would: nothing may catch it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, call: int, *, after: bool) -> None:
    """Stop at the n-th file that is written to the work folder, before or after it is there."""
    seen = [0]

    def counting(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            seen[0] += 1
            if seen[0] == call and not after:
                raise Killed
            write(*args, **kwargs)
            if seen[0] == call:
                raise Killed

        return wrapped

    for name in ("write_record", "write_tensors"):
        monkeypatch.setattr(WorkFolder, name, counting(getattr(WorkFolder, name)))


@pytest.mark.parametrize(("kind", "options", "writes"), [
    ("llama", PASSES["gptq"] | {"ignore": []}, 9), ("tied", PASSES["rtn"], 7)
])  # fmt: skip
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_digest(
    kind: str, options: dict[str, Any], writes: int, after: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    chosen, folder, out = recipe(**options), request.getfixturevalue(kind), tmp_path / "out"
    stream(folder, chosen, tmp_path / "whole")
    wanted = digest(tmp_path / "whole")
    went_on = []
    for call in range(1, writes + 2):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, call, after=after)
            if call > writes:  # the counting itself: there is no other file
                stream(folder, chosen, out)
                break
            with pytest.raises(Killed):
                stream(folder, chosen, out)
        assert not out.exists()
        went_on.append(stream(folder, chosen, out).resumed_at)
        assert digest(out) == wanted
        nothing_left(out)
        shutil.rmtree(out)
    per_block = (writes - 3) // 2
    done_before = [max(0, call - (not after) - 1) // per_block for call in range(1, writes)]
    done_before.append(3 if after else 2)
    assert went_on == done_before


def test_a_run_killed_while_assembling_only_assembles(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(**PASSES["awq"])
    stream(llama, chosen, tmp_path / "whole")

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_artifact", stop)
        with pytest.raises(Killed):
            stream(llama, chosen, tmp_path / "out")
    monkeypatch.setattr(streaming, "quantize_layers", stop)
    monkeypatch.setattr(streaming, "quantize_block", stop)
    monkeypatch.setattr(streaming, "start", stop)
    assert stream(llama, chosen, tmp_path / "out").resumed_at == 3
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    nothing_left(tmp_path / "out")


SCRIPT = """
import json, os, signal, sys
from optimizer.recipe import Recipe
from optimizer.streaming import quantize_checkpoint
from optimizer.work_folder import WorkFolder

folder, out, recipe, rows = sys.argv[1:]
write = WorkFolder.write_record

def killing(self, name, record):
    write(self, name, record)
    if name == "part-00000.json":
        os.kill(os.getpid(), signal.SIGKILL)

WorkFolder.write_record = killing
quantize_checkpoint(folder, Recipe.from_dict(json.loads(recipe)), out, calibration=json.loads(rows), device="cpu")
"""


def test_kill_9_of_a_process_leaves_what_this_one_goes_on_with(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_pass, "first_inputs", first_inputs)  # batches as the other process makes them
    chosen, out = recipe(**PASSES["gptq"]), tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tied), str(out), chosen.model_dump_json(), json.dumps(ROWS)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not out.exists()
    assert stream(tied, chosen, out).resumed_at == 1
    stream(tied, chosen, tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")
    nothing_left(out)


def test_two_runs_give_one_digest(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        stream(llama, recipe(**PASSES["smooth"]), tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


# Another job


@pytest.fixture
def unfinished(llama: Path, tmp_path: Path) -> Path:
    """An output of GPTQ whose work stopped after the first block."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 5, after=False)
        with pytest.raises(Killed):
            stream(llama, recipe(**PASSES["gptq"]), out)
    return out


def test_another_recipe_model_or_data_is_refused_with_the_difference(
    unfinished: Path, llama: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = recipe(**PASSES["gptq"])
    others = [
        ("recipe.passes.0.damp: nothing there, 0.05 now", llama, recipe(damp=0.05, **PASSES["gptq"]), ROWS),
        ("recipe.layout: .* there, .gptq. now", llama, recipe("gptq", **PASSES["gptq"]), ROWS),
        ("recipe.seed: 0 there, 1 now", llama, same.model_copy(update={"seed": 1}), ROWS),
        ("model: ", tied, same, ROWS),
        ("calibration: ", llama, same, ROWS[::-1]),
    ]
    for difference, model, chosen, data in others:
        with pytest.raises(OutputError, match=difference):
            quantize_checkpoint(model, chosen, unfinished, calibration=data, device="cpu")
    versions = streaming.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(streaming.metadata, "version", lambda name: "0.1" if name == "torch" else versions(name))
        with pytest.raises(OutputError, match=r"versions.torch: .* there, \"0.1\" now"):
            stream(llama, same, unfinished)
    assert stream(llama, same, unfinished).resumed_at == 1  # nothing of it was lost


def test_what_changes_no_byte_of_the_weights_goes_on(unfinished: Path, llama: Path) -> None:
    chosen = recipe(name="renamed", **PASSES["gptq"])
    assert stream(llama, chosen, unfinished).resumed_at == 1


def test_restart_throws_the_other_job_away(unfinished: Path, llama: Path, tmp_path: Path) -> None:
    done = stream(llama, recipe(**INT4), unfinished, restart=True)
    assert done.resumed_at == 0
    stream(llama, recipe(**INT4), tmp_path / "fresh")
    assert digest(unfinished) == digest(tmp_path / "fresh")
    nothing_left(unfinished)


def test_a_damaged_part_is_refused(unfinished: Path, llama: Path) -> None:
    hidden = unfinished.with_name(".out.work") / "hidden-00001.safetensors"
    hidden.write_bytes(hidden.read_bytes()[:-8])
    with pytest.raises(OutputError, match=r"damaged.*--restart"):
        stream(llama, recipe(**PASSES["gptq"]), unfinished)


# What is refused


def edited(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_value_that_is_not_finite_is_an_error_that_names_its_tensor(
    name: str, bad: float, llama: Path, tmp_path: Path
) -> None:
    folder = edited(llama, tmp_path / "bad", lambda tensors: tensors[name].view(-1)[7:8].fill_(bad))
    with pytest.raises(ModelError, match=name):
        stream(folder, recipe(**INT4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_missing_of_another_shape_or_too_many(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(llama, tmp_path / "missing", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"lacks 1 tensors.*{name}"):
        stream(folder, recipe(**INT4), tmp_path / "out")
    folder = edited(llama, tmp_path / "shape", lambda tensors: tensors.update({name: tensors[name].t()}))
    with pytest.raises(ModelError, match=rf"{name} is \[64, 128\] .* \[128, 64\]"):
        stream(folder, recipe(**INT4), tmp_path / "out")
    folder = edited(llama, tmp_path / "extra", lambda tensors: tensors.update({"stray": torch.zeros(3)}))
    done = stream(folder, recipe(**INT4), tmp_path / "out")
    assert done.report.notes == ("1 tensors of the files are not the model's and are left out: stray",)
    assert "stray" not in on_disk(tmp_path / "out")


def test_keys_without_the_prefix_of_the_base_model(architectures: Callable[[str], Path], tmp_path: Path) -> None:
    """As the GPT-2 of the hub: every key but the head's lacks `transformer.`."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = edited(architectures("gpt2"), tmp_path / "stripped", strip)
    stream(folder, recipe(**INT4), tmp_path / "out")
    stream(architectures("gpt2"), recipe(**INT4), tmp_path / "plain")
    same_bits(on_disk(tmp_path / "out"), on_disk(tmp_path / "plain"))


def test_a_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    tied = tiny_llama(tmp_path / "tied", tied=True)
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    same = edited(tied, tmp_path / "same", lambda tensors: tensors.update({head: tensors[name].clone()}))
    moved = edited(tied, tmp_path / "moved", lambda tensors: tensors.update({head: tensors.pop(name)}))
    other = edited(tied, tmp_path / "other", lambda tensors: tensors.update({head: tensors[name] + 1}))
    stream(tied, recipe(**INT4), tmp_path / "out")
    for folder in (same, moved):
        stream(folder, recipe(**INT4), tmp_path / f"{folder.name}-out")
        same_bits(on_disk(tmp_path / f"{folder.name}-out"), on_disk(tmp_path / "out"))
    with pytest.raises(ModelError, match=r"ties lm_head.weight to model.embed_tokens.weight.*two different"):
        stream(other, recipe(**INT4), tmp_path / "out")


def test_a_checkpoint_in_another_type_than_its_configuration_says(llama: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.float() + 1e-4 for name, tensor in tensors.items()})

    folder = edited(llama, tmp_path / "wide", widen)
    stream(folder, recipe(**PASSES["gptq"]), tmp_path / "out")
    same_bits(on_disk(tmp_path / "out"), in_memory(folder, recipe(**PASSES["gptq"]))[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    stream(folder, recipe(**INT4), tmp_path / "float")
    same_bits(on_disk(tmp_path / "float"), in_memory(folder, recipe(**INT4))[0])


def test_a_quantized_checkpoint_is_no_source(llama: Path, tmp_path: Path) -> None:
    stream(llama, recipe(**INT4), tmp_path / "out")
    with pytest.raises(ModelError, match="quantized already"):
        stream(tmp_path / "out", recipe(**INT4), tmp_path / "again")


def test_recipes_that_are_not_one_quantize_pass(llama: Path, tmp_path: Path) -> None:
    for passes in ([{"name": "rotate"}, {"name": "quantize"}], [{"name": "merge_linears"}]):
        chosen = recipe(**INT4).model_copy(update={"passes": passes})
        with pytest.raises(RecipeError, match="optimizer run"):
            quantize_checkpoint(llama, chosen, tmp_path / "out", device="cpu")


def test_calibration_data_where_none_is_used_and_too_little_where_it_is(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not calibrate"):
        quantize_checkpoint(llama, recipe(**INT4), tmp_path / "out", calibration=ROWS, device="cpu")
    with pytest.raises(DataError, match="at least 512"):
        quantize_checkpoint(llama, recipe(**PASSES["gptq"]), tmp_path / "out", calibration=ROWS[:2], device="cpu")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (recipe("awq"), r"int8-channel|8 bits|bits"),
        (recipe(weights="fp8-block", activations="fp8-group"), r"group size 128 does not divide the input features"),
    ],
)
def test_what_a_layout_or_an_activation_cannot_hold_is_refused_before_the_work(
    chosen: Recipe, reason: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming._Job, "quantize", None)
    with pytest.raises(UsageError, match=reason):
        stream(llama, chosen, tmp_path / "out")


@pytest.mark.parametrize("what", ["RAM", "disk"])
def test_a_machine_that_is_too_small_is_refused(
    what: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizer import preflight

    if what == "RAM":
        monkeypatch.setattr(streaming, "system_memory", lambda: 1000)
    else:
        usage = preflight.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=f"needs about .* of {what}"):
        stream(llama, recipe(**INT4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_memory_is_not_too_little(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "system_memory", lambda: 0)
    assert stream(llama, recipe(**INT4), tmp_path / "out").report.matched == 14


# Around it


def test_memory_is_let_go_of(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block is quantized nothing else has data: no other block, no embedding, no tied head."""
    seen: list[set[str]] = []
    original = streaming.quantize_block

    def looking(step: Any, model: Any, path: str, *args: Any) -> Any:
        seen.append({n for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta and path not in n})
        return original(step, model, path, *args)

    monkeypatch.setattr(streaming, "quantize_block", looking)
    stream(tied, recipe(**PASSES["gptq"]), tmp_path / "out")
    assert seen == [set(), set()]


def test_progress_counts_the_blocks(llama: Path, tmp_path: Path) -> None:
    lines: list[tuple[str, int, int]] = []

    class Watching(Progress):
        def update(self, name: str, done: int, total: int) -> None:
            lines.append((name, done, total))

    stream(llama, recipe(**INT4), tmp_path / "out", progress=Watching())
    assert [line for line in lines if line[0] == "blocks"] == [("blocks", 1, 2), ("blocks", 2, 2)]
    assert lines[0][0].startswith("needs about")


def test_the_callers_generator_and_tokenizer_are_left_alone(llama: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    stream(llama, recipe(**PASSES["awq"]), tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert len(byte_tokenizer()) == 259


def test_freed_memory_is_given_back_or_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident_bytes()
    pieces = [torch.ones(250_000) for _ in range(200)]  # 1 MB each: from the heap, where glibc keeps what is freed
    kept = pieces[::20]
    del pieces
    return_freed_memory()
    assert resident_bytes() - before < 60_000_000
    assert sum(len(piece) for piece in kept) == 2_500_000
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    return_freed_memory()
