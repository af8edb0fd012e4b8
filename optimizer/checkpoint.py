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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    config = json.loads(model.config.to_json_string(use_diff=False))
    quantization = quantization_config(model)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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
    tied = getattr(model, "_tied_weights_keys", None) or {}
    for name, source in tied.items() if isinstance(tied, dict) else ():
        if name in tensors and source in tensors and tensors[name].data_ptr() == tensors[source].data_ptr():
            del tensors[name]
    return {name: tensors[name].detach().cpu() for name in sorted(tensors)}


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
    """The model of a checkpoint written by `save_checkpoint`, quantized layers on our own kernels."""
    from accelerate import init_empty_weights
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
    _restore_quantized(model, tensors, quantization)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    unfilled = [name for name, p in model.named_parameters() if p.is_meta]
    if unfilled or unexpected:
        raise ModelError(f"{folder}: missing tensors {unfilled[:5]}, unexpected tensors {unexpected[:5]}.")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _restore_quantized(model: nn.Module, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> None:
    """Put a `QuantizedLinear` where the checkpoint holds a packed weight, taking its tensors out of `tensors`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    groups = (quantization or {}).get("config_groups", {}).values()
    for name in names:
        group = next((g for g in groups if name in g["targets"] or "Linear" in g["targets"]), None)
        if group is None:
            raise ModelError(f"{name} is packed, but no config group of the checkpoint targets it.")
        format = Format.from_compressed_tensors(group["weights"])
        shape = torch.Size(tensors.pop(f"{name}.weight_shape").tolist())
        q = unpack_from_int32(tensors.pop(f"{name}.weight_packed"), format.bits, shape)
        scale = tensors.pop(f"{name}.weight_scale")
        zero = tensors.pop(f"{name}.weight_zero_point", None)
        if zero is not None:
            zero = unpack_from_int32(zero, format.bits, scale.shape, packed_dim=0)
        bias = tensors.pop(f"{name}.bias", None)
        model.set_submodule(name, QuantizedLinear(QuantizedWeight(q, scale, zero, format), bias))


def _shards(tensors: dict[str, Tensor]) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """File names with the tensors in each, and the index when there is more than one file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    index = None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return split.filename_to_tensors, index
