"""What a job is predicted to need, what is refused for want of it, and the rehearsal of its last step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import preflight
from optimizer.errors import ModelError, OutputError
from optimizer.layouts import LAYOUTS
from optimizer.passes.quantize import Quantize
from optimizer.preflight import Preflight, Sizes, predict, rehearse, require_room, resident_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = Sizes(block=10**9, outside=10**8, tensor=10**8, hidden=10**8, item=2, arithmetic=4)


def layers(blocks: int = 2, k: int = 4096, n: int = 4096) -> tuple[dict[str, nn.Linear], list[str]]:
    """Blocks of two layers without data, and their names."""
    names = [f"model.layers.{index}" for index in range(blocks)]
    made = {
        f"{b}.{leaf}": nn.Linear(k, n, bias=False, device="meta") for b in names for leaf in ("up_proj", "down_proj")
    }
    return made, names


def needs(step: Quantize, sizes: Sizes = SIZES, device: torch.device = CPU, **shape: int) -> Preflight:
    return predict(step, *layers(**shape), sizes, device=device)


INT4 = {"bits": 4, "group_size": 128}
STEPS = {
    "rtn": Quantize(**INT4),
    "gptq": Quantize(**INT4, method="gptq"),
    "awq": Quantize(**INT4, method="awq"),
    "smooth": Quantize(activations="int8", smooth=True),
}


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_memory_does_not_depend_on_the_depth(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "resident_bytes", lambda: 5 * 10**8)
    few, many = (needs(STEPS[name], device=device, blocks=count) for count in (2, 40))
    assert (few.ram, few.vram) == (many.ram, many.vram)
    stored = 38 * 2 * 4096 * 4096 * (4.125 if "bits" in INT4 and name != "smooth" else 8.0) / 8
    assert many.disk - few.disk == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("name", STEPS)
def test_the_device_holds_the_peak(name: str) -> None:
    on_cpu, on_gpu = needs(STEPS[name]), needs(STEPS[name], device=GPU)
    assert on_cpu.vram == 0
    assert on_gpu.vram > SIZES.block
    assert on_gpu.ram < on_cpu.ram
    assert on_gpu.disk == on_cpu.disk


def test_every_size_counts_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "resident_bytes", lambda: 5 * 10**8)
    for field in ("block", "outside", "tensor"):
        larger = replace(SIZES, **{field: 10**11})
        assert needs(STEPS["rtn"], larger).ram > needs(STEPS["rtn"]).ram + 9 * 10**10
    longer = replace(SIZES, hidden=10**11)
    assert needs(STEPS["rtn"], longer).ram == needs(STEPS["rtn"]).ram
    assert needs(STEPS["gptq"], longer).ram > needs(STEPS["gptq"]).ram + 10**11
    assert needs(STEPS["gptq"], longer).disk == needs(STEPS["gptq"]).disk + 2 * (10**11 - SIZES.hidden)
    assert needs(STEPS["gptq"]).ram > needs(STEPS["rtn"]).ram


def test_a_job_without_layers_needs_little() -> None:
    assert predict(STEPS["gptq"], {}, ["model.layers.0"], replace(SIZES, block=10**6), device=CPU).disk > 0


def test_layers_that_share_an_input_share_its_gram_matrix() -> None:
    together = {f"a.{leaf}": nn.Linear(64, 64, device="meta") for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert preflight._gram_bytes(together) == 2 * 4 * 64 * 64


def test_resident_memory_is_that_of_the_process() -> None:
    before = resident_bytes()
    held = torch.ones(50_000_000)
    assert resident_bytes() - before > 150_000_000
    del held
    assert resident_bytes() - before < 100_000_000


def test_memory_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: Any, **_kwargs: Any) -> str:
        raise OSError

    before = resident_bytes()
    monkeypatch.setattr(Path, "read_text", gone)
    assert before < resident_bytes() + 10**7
    assert resident_bytes() < 10**11


def test_room_is_required_of_each(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "yet"
    enough = Preflight(ram=10, vram=20, disk=30)
    require_room(enough, out, 10, 20)
    require_room(replace(enough, ram=10**15, vram=10**15), out, 0, 0)  # nobody knows
    for what, needed in {"RAM": replace(enough, ram=11), "VRAM": replace(enough, vram=21)}.items():
        with pytest.raises(OutputError, match=rf"needs about .* of {what}, .* are free: use fewer"):
            require_room(needed, out, 10, 20)
    with pytest.raises(OutputError, match=r"of disk, .* are free: choose another disk"):
        require_room(replace(enough, disk=10**18), out, 10, 20)


def test_what_lies_in_the_work_folder_need_not_be_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    usage = preflight.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="disk"):
        require_room(Preflight(1, 0, 150), work, 1, 0)
    (work / "part-00000.safetensors").write_bytes(bytes(60))
    require_room(Preflight(1, 0, 150), work, 1, 0)


def test_it_prints_what_matters() -> None:
    assert str(Preflight(2_100_000_000, 0, 4_400_000_000)) == "2.10 GB RAM, 4.40 GB disk"
    assert str(Preflight(2_100_000_000, 3_000_000_000, 0)) == "2.10 GB RAM, 3.00 GB VRAM, 0 B disk"


REHEARSED: list[tuple[str, dict[str, Any], torch.dtype | None]] = [
    ("compressed-tensors", INT4, None),
    ("compressed-tensors", {"activations": "int8"}, None),
    ("compressed-tensors", {"weights": "fp8", "activations": "fp8-static"}, None),
    ("compressed-tensors", {"weights": "nvfp4", "activations": "nvfp4"}, None),
    ("gptq", INT4, torch.float16),
    ("awq", INT4 | {"symmetric": False}, torch.float16),
    ("fp8", {"weights": "fp8-block", "activations": "fp8-group"}, None),
]


@pytest.mark.parametrize(("layout", "options", "dtype"), REHEARSED)
def test_a_layer_is_rehearsed_in_every_layout(
    layout: str, options: dict[str, Any], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    linear = nn.Linear(256, 128, bias=False, dtype=torch.float16)
    rehearse(layout, "model.layers.0.mlp.up_proj", linear, Quantize(**options), dtype, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_layout_that_returns_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = LAYOUTS["compressed-tensors"]
    write = type(kind).layer_tensors

    def wrong(self: Any, name: str, layer: Any, dtype: torch.dtype) -> Any:
        tensors = write(self, name, layer, dtype)
        tensors[f"{name}.weight_packed"] = tensors[f"{name}.weight_packed"] ^ 1
        return tensors

    monkeypatch.setattr(type(kind), "layer_tensors", wrong)
    linear = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="up_proj does not come back from a compressed-tensors checkpoint"):
        rehearse("compressed-tensors", "up_proj", linear, Quantize(**INT4), None, tmp_path)
    assert not list(tmp_path.iterdir())
