"""Quantize exported models with llm-compressor and evaluate them. Runs in llm-compressor's own environment.

    /path/to/peer/python benchmarks/peers/llm_compressor.py FOLDER SCHEME

Imports nothing of this project. `FOLDER` holds `models/NAME` (Hugging Face folders) and `data.safetensors`: the token
ids `calibration [R, S]` and `windows [W, S]`. `run` is the whole protocol, and `benchmarks.peers_quality` puts our side
through the very same lines: load a model, quantize it, read off seconds and memory, and only then evaluate it. It
leaves `SIDE-SCHEME.json`, and one log-likelihood a window and model in `SIDE-SCHEME.safetensors`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("plain", "outliers")
"""Those of them that were exported run in this order; memory and the seconds of the process are the first's."""

BATCH = 8
"""Rows of a forward pass, in calibration and evaluation. All rows are of one length, so none is padded."""


@dataclass(frozen=True)
class Side:
    """A quantizer. `prepare` imports what a scheme needs and returns what quantizes a model in place, given the
    calibration rows `[R, S]`; `keep_activations` makes a quantized model leave its activations as they are."""

    name: str
    packages: tuple[str, ...]
    prepare: Callable[[str], Callable[[Any, Any], None]]
    keep_activations: Callable[[Any], None]


def run(side: Side, folder: Path, scheme: str) -> None:
    """Quantize and evaluate the models of the folder in a scheme."""
    import torch
    from safetensors.torch import load_file, save_file

    data = load_file(folder / "data.safetensors")
    quantize = side.prepare(scheme)
    process: dict[str, float] = {}
    models: dict[str, dict[str, float]] = {}
    likelihoods: dict[str, Any] = {}
    for name in (name for name in MODELS if (folder / "models" / name).is_dir()):
        model = load(folder / "models" / name)
        loaded, highest = memory_bytes("VmRSS"), memory_bytes("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
        began, worked = time.perf_counter(), time.process_time()
        quantize(model, data["calibration"])
        models[name] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        peak = memory_bytes("VmHWM")
        process = process or {
            "seconds": process_seconds(), "peak_bytes": max(peak, highest),
            "step_bytes": max(0, peak - loaded),  # Linux counts pages by CPU, in batches: a peak can read a page low
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        likelihoods[name] = log_likelihoods(model.eval(), data["windows"])
        models[name]["activation_effect"] = activation_effect(model, data["windows"][:1], side)
    save_file(likelihoods, folder / f"{side.name}-{scheme}.safetensors")
    facts = {"versions": {name: version(name) for name in side.packages}, "process": process, "models": models}
    (folder / f"{side.name}-{scheme}.json").write_text(json.dumps(facts), encoding="utf-8")


def load(folder: Path) -> Any:
    """The model of a folder in float32: few processors multiply 16-bit floats, and emulation takes 10 times as long."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits(model: Any, batch: Any) -> Any:
    """Those of `batch [B, S]` but for the last token's, `[B, S - 1, V]` float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=batch, use_cache=False).logits[:, :-1].float()


def log_likelihoods(model: Any, windows: Any) -> Any:
    """The log-likelihood (nats) of each window's tokens after the first, `[W]` float64, of `windows [W, S]`."""
    import torch

    found = []
    for batch in windows.split(BATCH):
        chosen = logits(model, batch).log_softmax(-1).gather(-1, batch[:, 1:, None])
        found.append(chosen.double().sum((1, 2)))
    return torch.cat(found)


def activation_effect(model: Any, batch: Any, side: Side) -> float:
    """How far rounding activations moves a logit, at most: 0 where a model does not do it. It does not from now on."""
    rounded = logits(model, batch)
    side.keep_activations(model)
    return float((rounded - logits(model, batch)).abs().max())


def memory_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process. (`ru_maxrss` begins with what the parent held.)"""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def process_seconds() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


MODIFIERS = {
    "AWQModifier": "llmcompressor.modifiers.transform.awq",
    "GPTQModifier": "llmcompressor.modifiers.gptq",
    "QuantizationModifier": "llmcompressor.modifiers.quantization",
    "SmoothQuantModifier": "llmcompressor.modifiers.transform.smoothquant",
}
"""Where each is found."""

Step = tuple[str, dict[str, Any]]


def _rtn(scheme: str, **options: Any) -> Step:
    return "QuantizationModifier", {"targets": "Linear", "ignore": ["lm_head"], "scheme": scheme, **options}


def _gptq(scheme: str, **options: Any) -> Step:
    return "GPTQModifier", _rtn(scheme, **options)[1]


SMOOTH: Step = ("SmoothQuantModifier", {"smoothing_strength": 0.8})

RECIPES: dict[str, list[Step]] = {
    "none": [],
    "w4a16-rtn": [_rtn("W4A16")],
    "w4a16-rtn-mse": [_rtn("W4A16", weight_observer="memoryless_mse")],
    "w4a16-gptq": [_gptq("W4A16")],
    "w4a16-gptq-mse": [_gptq("W4A16", weight_observer="memoryless_mse")],
    "w4a16-awq": [("AWQModifier", {}), _rtn("W4A16")],
    "w8a8-rtn": [_rtn("W8A8")],
    "w8a8-smoothquant": [SMOOTH, _rtn("W8A8")],
    "w8a8-smoothquant-gptq": [SMOOTH, _gptq("W8A8")],
    "fp8-dynamic": [_rtn("FP8_DYNAMIC")],
    "fp8-static": [_rtn("FP8")],
    "nvfp4": [_rtn("NVFP4")],
    "nvfp4-mse": [_rtn("NVFP4", weight_observer="nvfp4_expanded_mse")],
}
"""What its documentation recommends: its defaults (GPTQ in static activation order, 0.01 damping), strength 0.8."""


def prepare(scheme: str) -> Callable[[Any, Any], None]:
    """What runs `oneshot` on the calibration rows. The model then rounds weights and inputs whenever it runs."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    kinds = {name: getattr(import_module(module), name) for name, module in MODIFIERS.items()}
    if scheme == "w4a16-awq":  # it pins memory for copies to a device, and fails where there is none
        IntermediatesCache.pin_memory = lambda *_args, **_options: None

    def quantize(model: Any, calibration: Any) -> None:
        steps = [kinds[name](**options) for name, options in RECIPES[scheme]]
        rows = calibration.tolist()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        if steps:
            oneshot(
                model=model, recipe=steps, dataset=data, num_calibration_samples=len(rows),
                max_seq_length=len(rows[0]), batch_size=BATCH, shuffle_calibration_samples=False,
            )  # fmt: skip

    return quantize


def keep_activations(model: Any) -> None:
    """Leave the inputs of all layers as they are."""
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.input_activations = None


if __name__ == "__main__":
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    run(Side("theirs", packages, prepare, keep_activations), Path(sys.argv[1]), sys.argv[2])
