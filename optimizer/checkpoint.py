"""Checkpoints of optimized models: compressed-tensors `pack-quantized`, as transformers, vLLM and SGLang load it.

Each quantized linear `name` `[N, K]` is stored as

    name.weight_packed      int32 [N, ceil(K b / 32)], q + 2^(b-1), low bits first
    name.weight_scale       [N, G], the model's own type
    name.weight_shape       int64 [2]
    name.weight_zero_point  int32, packed along N, only when asymmetric

and everything else under its own name. Merged layers are written as the layers they came from, a tied head once. The
safetensors metadata is exactly `{"format": "pt"}`: two keys would be written in an order that changes from run to run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.linear import QuantizedLinear, linear_layers, stored_weight
from optimizer.errors import ModelError
from optimizer.quant.formats import Format
from optimizer.quant.rtn import QuantizedWeight

SHARD_BYTES = 5 * 10**9


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights, configuration, generation defaults and tokenizer of `model` into `folder`."""
    from safetensors.torch import save_file

    tensors = checkpoint_tensors(model)
    shards, index = _shards(tensors)
    for name, keys in shards.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if index is not None:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    text = json.dumps(model_config(model), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        # Not `save_pretrained`: it refuses settings that models in use have, as a temperature beside greedy search.
        text = model.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def model_config(model: Any) -> dict[str, Any]:
    """`config.json` of the model as it is: its real type, its quantization, and a quantized head no longer tied."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("quantization_config", "_name_or_path"):  # the source's, and where it lay on this machine
        config.pop(name, None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if (quantization := quantization_config(model)) is not None:
        config["quantization_config"] = quantization
    layers = linear_layers(model)
    tied = [name.removesuffix(".weight") for name in _tied(model)]
    if any(isinstance(layers.get(name), QuantizedLinear) for name in tied):
        config["tie_word_embeddings"] = False
    return config


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name there."""
    layers = linear_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        weight, bias = stored_weight(module), module.bias
        tensors.update(packed(name, weight) if isinstance(weight, QuantizedWeight) else {f"{name}.weight": weight})
        if isinstance(bias, Tensor):
            tensors[f"{name}.bias"] = bias
    inside = tuple(f"{name}." for name in layers)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            tensors[name] = tensor
    for name, source in _tied(model).items():
        if name in tensors and source in tensors and tensors[name].data_ptr() == tensors[source].data_ptr():
            del tensors[name]
    return {name: tensors[name].detach().cpu() for name in sorted(tensors)}


def _tied(model: Any) -> dict[str, str]:
    """The weights that the configuration ties, each with the one it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def packed(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that store one quantized weight, packed by compressed-tensors' own code."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {
        f"{name}.weight_packed": pack_to_int32(weight.q, weight.format.bits),
        f"{name}.weight_scale": weight.scale,
        f"{name}.weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        zero = pack_to_int32(weight.zero, weight.format.bits, packed_dim=0)
        tensors[f"{name}.weight_zero_point"] = zero
    return tensors


def quantization_config(model: Any) -> dict[str, Any] | None:
    """The `quantization_config` of the model as it is: one group a format, every other linear in `ignore`."""
    formats: dict[Format, list[str]] = {}
    plain: list[str] = []
    for name, module in linear_layers(model).items():
        weight = stored_weight(module)
        if isinstance(weight, QuantizedWeight):
            formats.setdefault(weight.format, []).append(name)
        else:
            plain.append(name)
    if not formats:
        return None
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(formats) == 1 else names,
            "weights": format.as_compressed_tensors(),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, (format, names) in enumerate(formats.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": plain,
    }


def load_checkpoint(folder: Path, device: torch.device) -> Any:
    """The model of a checkpoint written by `save_checkpoint`, quantized layers on our own kernels.

    Raises `ModelError` when a tensor is missing, is not the model's, or has another shape than the model's.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device=str(device)) as reader:
            tensors.update({key: reader.get_tensor(key) for key in reader.keys()})  # noqa: SIM118 (not a mapping)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = _take_quantized(tensors, quantization)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    _require_same(folder, expected, found | {f"{name}.weight": w.q.shape for name, w in weights.items()}, _tied(model))
    for name, weight in weights.items():
        model.set_submodule(name, QuantizedLinear(weight, tensors.pop(f"{name}.bias", None)))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _require_same(
    folder: Path, expected: dict[str, torch.Size], found: dict[str, torch.Size], tied: Collection[str]
) -> None:
    problems = {
        "missing": [name for name in expected if name not in found and name not in tied],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name, shape in found.items() if expected.get(name, shape) != shape],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise ModelError(f"{folder} does not hold the tensors of its config.json ({listed}). Write or copy it again.")


def _take_quantized(tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> dict[str, QuantizedWeight]:
    """Take the packed weights out of `tensors`, by the name of their layer."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    groups = (quantization or {}).get("config_groups", {}).values()
    weights = {}
    for name in names:
        group = next((g for g in groups if name in g["targets"] or "Linear" in g["targets"]), None)
        if group is None:
            raise ModelError(f"{name} is packed, but no config group of the checkpoint targets it.")
        format = Format.from_compressed_tensors(group["weights"])
        parts = ("weight_shape", "weight_packed", "weight_scale") + (() if format.symmetric else ("weight_zero_point",))
        if missing := [part for part in parts if f"{name}.{part}" not in tensors]:
            raise ModelError(f"{name} is packed, but its {', '.join(missing)} is missing. Write or copy it again.")
        shape, packed, scale, *zeros = (tensors.pop(f"{name}.{part}") for part in parts)
        q = unpack_from_int32(packed, format.bits, torch.Size(shape.tolist()))
        zero = unpack_from_int32(zeros[0], format.bits, scale.shape, packed_dim=0) if zeros else None
        weights[name] = QuantizedWeight(q, scale, zero, format)
    return weights


def _shards(tensors: dict[str, Tensor]) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """File names with the tensors in each, and the index when there is more than one file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    index = None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return split.filename_to_tensors, index
