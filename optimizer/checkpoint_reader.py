"""Checkpoints into models: our own, and quantized ones that other tools made.

Read are the layouts of `optimizer.layouts`, by the `quant_method` of `config.json`. The result is the model class that
the configuration names, each quantized linear a `QuantizedLinear` with exactly the stored numbers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.experts import is_fused_experts
from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import ModelError, UsageError
from optimizer.inspection import INDEX, SINGLE, load_config, read_header, read_tensors
from optimizer.layouts import LAYOUTS, StoredLayer
from optimizer.passes.linearize import checkpoint_names, linearize
from optimizer.quant.formats import ActivationFormat

EXTRAS = "roofline_optimizer"
"""The entry of `config.json` with what the layout cannot say."""


def load_checkpoint(folder: Path, device: torch.device) -> Any:
    """The model of a checkpoint folder, quantized layers on our own kernels.

    Takes what `save_checkpoint` wrote, and compressed-tensors, GPTQ, AWQ and block-FP8 checkpoints made elsewhere.
    Raises `ModelError` for a quantization that is not run here, and when a tensor is missing, is not the model's, or
    does not have the type or shape that it must.
    """
    from transformers import GenerationConfig

    config = load_config(folder, trust_remote_code=False)
    quantization, extras = _pop(config, "quantization_config"), _pop(config, EXTRAS)
    if quantization is None and (legacy := folder / "quantize_config.json").is_file():
        quantization = {"quant_method": "gptq"} | _object(json.loads(legacy.read_bytes()), str(legacy))
    tensors = _read(folder, device)
    layers = _take_quantized(tensors, quantization)
    if quantization is not None:
        layers = _with_extras(layers, extras)
    model, transposed = _skeleton(config, linear=quantization is not None)
    names = checkpoint_names(model)
    modules = {disk: own for own, disk in names.modules.items()}
    own_tensors = {disk: own for own, disk in names.tensors.items()}
    layers = {modules.get(disk, disk): layer for disk, layer in layers.items()}
    tensors = {_own_name(disk, modules, own_tensors): tensor for disk, tensor in tensors.items()}
    for name in transposed:
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].t()
    _drop_leftovers(tensors, model, layers, quantization)
    _require_fit(folder, model, tensors, layers)
    for name, layer in layers.items():
        model.set_submodule(name, _module(name, layer, tensors.pop(f"{name}.bias", None)))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _pop(config: Any, key: str) -> dict[str, Any] | None:
    value = getattr(config, key, None)
    if hasattr(config, key):
        delattr(config, key)
    return None if value is None else _object(value, f"{key} of config.json")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{what} must be an object, is {value!r:.80}.")
    return value


def _read(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors by name; the only file where there is just one, whatever it is called, as of GPTQ tools."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file() and len(files) == 1:
        stored = read_header(files[0])
    else:
        stored = read_tensors(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in stored.values()}):
        with safe_open(folder / file, framework="pt", device=str(device)) as reader:
            tensors.update({key: reader.get_tensor(key) for key in reader.keys()})  # noqa: SIM118 (not a mapping)
    return tensors


def _take_quantized(tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> dict[str, StoredLayer]:
    """Take the quantized layers out of `tensors`, by their names on disk."""
    method = "compressed-tensors" if quantization is None else str(quantization.get("quant_method"))
    if method not in LAYOUTS:
        raise ModelError(
            f"quantization method {method!r:.80} cannot be loaded; {', '.join(LAYOUTS)} can. "
            "Start from the unquantized model."
        )
    layout = LAYOUTS[method]
    names = layout.quantized_layers(tensors)
    if quantization is None:
        if names:
            raise ModelError(f"{names[0]} is packed, but no config group of the checkpoint targets it.")
        return {}
    try:
        read = layout.reader(quantization)
    except UsageError as error:
        raise ModelError(f"quantization_config: {error}") from None
    return {name: read(name, tensors) for name in names}


def _with_extras(layers: dict[str, StoredLayer], extras: dict[str, Any] | None) -> dict[str, StoredLayer]:
    """The layers with the activations that the layout had no place for."""
    entries = (extras or {}).get("activations", [])
    if not isinstance(entries, list):
        raise ModelError(f"{EXTRAS}.activations of config.json must be a list, is {entries!r:.80}.")
    found = dict(layers)
    for entry in entries:
        entry = _object(entry, f"an entry of {EXTRAS}.activations")
        activation = _activation(_object(entry.get("format"), f"{EXTRAS}.activations.format"))
        for name in entry.get("layers") or ():
            if name not in layers:
                raise ModelError(f"{EXTRAS}.activations names {name!r:.80}, which is no quantized layer.")
            found[name] = layers[name]._replace(activation=activation)
    return found


def _activation(entry: dict[str, Any]) -> ActivationFormat:
    known = {field.name for field in fields(ActivationFormat)}
    types = {"bits": int, "group_size": int, "dynamic": bool, "outlier_threshold": float | int | None}
    wrong = [key for key, value in entry.items() if key not in known or not isinstance(value, types.get(key, str))]
    if wrong:
        raise ModelError(f"{EXTRAS}.activations has {wrong[0]!r:.40}: {entry[wrong[0]]!r:.80}, which no format has.")
    return ActivationFormat(**entry)


def _skeleton(config: Any, *, linear: bool) -> tuple[Any, frozenset[str]]:
    """The model without data, and the layers that its files hold transposed.

    Experts are taken apart, and for a quantized checkpoint (`linear`) transposed layers become linear ones.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    transposed: frozenset[str] = frozenset()
    if linear or any(is_fused_experts(module) for module in model.modules()):
        transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
        linearize(model)
    return model, transposed


def _own_name(disk: str, modules: Mapping[str, str], tensors: Mapping[str, str]) -> str:
    """The name in the model of a stored tensor; one that the model does not know goes where its module goes."""
    path, _, leaf = disk.rpartition(".")
    return tensors.get(disk) or (f"{modules[path]}.{leaf}" if path in modules else disk)


def _drop_leftovers(
    tensors: dict[str, Tensor], model: Any, layers: Collection[str], quantization: dict[str, Any] | None
) -> None:
    """What older tools wrote and no model has: rotary frequencies and, in GPTQ files, biases of zeros."""
    expected = model.state_dict().keys()
    gptq = quantization is not None and quantization.get("quant_method") == "gptq"
    for name in [name for name in tensors if name not in expected]:
        empty = gptq and name.removesuffix(".bias") in layers and not tensors[name].any()
        if name.endswith(".rotary_emb.inv_freq") or empty:
            del tensors[name]


def _require_fit(folder: Path, model: Any, tensors: dict[str, Tensor], layers: dict[str, StoredLayer]) -> None:
    """`ModelError` unless the checkpoint holds what the model needs, in its shapes, and nothing else."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    found |= {f"{name}.weight": layer.weight.q.shape for name, layer in layers.items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    floating = {name: tensor.dtype.is_floating_point and tensor.itemsize > 1 for name, tensor in tensors.items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    problems = {
        "missing": [name for name in expected if name not in found and name not in tied],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name, shape in found.items() if expected.get(name, shape) != shape],
        "quantized, but no linear layer": [n for n in layers if f"{n}.weight" in expected and n not in linear],
        "not floating-point, with no quantization that says so": [
            name for name in parameters if not floating.get(name, True)
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise ModelError(f"{folder} does not hold the tensors of its config.json ({listed}). Write or copy it again.")


def _module(name: str, layer: StoredLayer, bias: Tensor | None) -> QuantizedLinear:
    try:
        return QuantizedLinear(layer.weight, bias, layer.activation, layer.input_scale)
    except UsageError as error:
        raise ModelError(f"{name}: {error}") from None
