"""Checkpoints of optimized models: tensors and `config.json`, in any of the formats of `optimizer.layouts`.

Quantized linears are stored as the layout says and everything else under its own name on disk: merged layers as the
layers they came from, experts one by one, a tied head once. The safetensors metadata is exactly `{"format": "pt"}`:
two keys would be written in an order that changes from run to run.

What a format cannot say of a layer, as the outlier threshold of LLM.int8, lies in `config.json` under
`roofline_optimizer`, never in `quantization_config`, where consumers refuse what they do not know. They then read the
layer as weight-only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import QuantizedLinear, linear_layers, stored_scheme, stored_weight
from optimizer.checkpoint_reader import EXTRAS, load_checkpoint
from optimizer.errors import UsageError
from optimizer.layouts import LAYOUTS, Layout, StoredLayer
from optimizer.passes.linearize import CheckpointNames, checkpoint_names
from optimizer.quant.formats import ActivationFormat, Scheme
from optimizer.quant.weight import QuantizedWeight

__all__ = [
    "SHARD_BYTES",
    "check_layout",
    "checkpoint_tensors",
    "config_entries",
    "find_layout",
    "layer_tensors",
    "load_checkpoint",
    "model_config",
    "quantization_config",
    "save_checkpoint",
    "save_configuration",
]

SHARD_BYTES = 5 * 10**9
DEFAULT_LAYOUT = "compressed-tensors"
_ROUTER = re.compile("Router|Gating|Gate(?![a-z])")


def save_checkpoint(model: Any, tokenizer: Any, folder: Path, layout: str = DEFAULT_LAYOUT) -> None:
    """Write weights, configuration, generation defaults and tokenizer of `model` into `folder`.

    Raises `UsageError`, before anything is written, when `layout` cannot hold the model exactly.
    """
    from safetensors.torch import save_file

    names = checkpoint_names(model)
    schemes, plain = _schemes(model, names)
    document = _model_config(model, find_layout(layout), schemes, plain)
    tensors = checkpoint_tensors(model, layout)
    shards, index = _shards(tensors)
    for name, keys in shards.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if index is not None:
        _write_json(folder / "model.safetensors.index.json", index)
    _write_configuration(model, find_layout(layout), document, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_configuration(
    model: Any, layout: str, schemes: Mapping[str, Scheme], plain: Sequence[str], folder: Path
) -> None:
    """Write everything of a checkpoint but its tensors and tokenizer.

    For writers that never hold the whole model: `schemes` are those of the quantized layers and `plain` the linear
    layers left as they are, by their names on disk. Of `model` only the configuration and the module tree are read.
    """
    kind = find_layout(layout)
    _write_configuration(model, kind, _model_config(model, kind, schemes, plain), folder)


def find_layout(name: str) -> Layout:
    """The layout of this name; `UsageError` lists those there are."""
    if name not in LAYOUTS:
        raise UsageError(f"unknown checkpoint layout {name!r:.80}. Use one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def check_layout(layout: str, layers: Mapping[str, tuple[Scheme, int, int]], plain: Sequence[str] = ()) -> None:
    """`UsageError` with a remedy unless the layout can hold layers `[n, k]` of these schemes in one checkpoint.

    For asking before hours of work. `layers` holds scheme, n and k by name.
    """
    kind = find_layout(layout)
    for name, (scheme, n, k) in layers.items():
        kind.check(name, scheme, n, k)
    config_entries({name: scheme for name, (scheme, _, _) in layers.items()}, plain, layout)


def config_entries(
    schemes: Mapping[str, Scheme], plain: Sequence[str], layout: str = DEFAULT_LAYOUT
) -> dict[str, dict[str, Any]]:
    """The entries of `config.json` about quantization, for layers by their names on disk; empty without any."""
    if not schemes:
        return {}
    kind = find_layout(layout)
    entries = {"quantization_config": kind.quantization_config(schemes, plain)}
    untold: dict[ActivationFormat, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme.activation is not None and not kind.expresses(scheme.activation):
            untold.setdefault(scheme.activation, []).append(name)
    if untold:
        activations = [{"layers": names, "format": asdict(format)} for format, names in untold.items()]
        entries[EXTRAS] = {"activations": activations}
    return entries


def layer_tensors(name: str, module: nn.Module, dtype: torch.dtype, layout: str = DEFAULT_LAYOUT) -> dict[str, Tensor]:
    """The tensors of one linear layer, its bias included, under its name on disk; `dtype` is the model's."""
    weight, bias = stored_weight(module), module.bias
    if isinstance(weight, QuantizedWeight):
        layer = StoredLayer(weight, module.activation, module.input_scale)  # type: ignore[arg-type]
        tensors = find_layout(layout).layer_tensors(name, layer, dtype)
    else:
        tensors = {f"{name}.weight": weight}
    return tensors | ({f"{name}.bias": bias} if isinstance(bias, Tensor) else {})


def model_config(model: Any, layout: str = DEFAULT_LAYOUT) -> dict[str, Any]:
    """`config.json` of the model as it is: its real type, its quantization, and a quantized head no longer tied."""
    return _model_config(model, find_layout(layout), *_schemes(model, checkpoint_names(model)))


def quantization_config(model: Any, layout: str = DEFAULT_LAYOUT) -> dict[str, Any] | None:
    """The `quantization_config` of the model as it is; None when nothing is quantized."""
    schemes, plain = _schemes(model, checkpoint_names(model))
    return config_entries(schemes, plain, layout).get("quantization_config")


def checkpoint_tensors(model: Any, layout: str = DEFAULT_LAYOUT) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name there."""
    layers, names = linear_layers(model), checkpoint_names(model)
    transposed = _transposed(model)
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        on_disk = names.to_checkpoint(name)
        tensors |= layer_tensors(on_disk, module, model.dtype, layout)
        if name in transposed and f"{on_disk}.weight" in tensors and not isinstance(module, QuantizedLinear):
            tensors[f"{on_disk}.weight"] = tensors[f"{on_disk}.weight"].t()
    inside = tuple(f"{name}." for name in layers)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    tensors |= {names.tensors[name]: tensor for name, tensor in others.items() if name in names.tensors}
    tensors |= _converted(model, {name: tensor for name, tensor in others.items() if name not in names.tensors})
    for name, source in _tied(model).items():
        head, shared = (names.tensors.get(key, key) for key in (name, source))
        if head in tensors and shared in tensors and tensors[head].data_ptr() == tensors[shared].data_ptr():
            del tensors[head]
    return _apart({name: tensors[name].detach().cpu() for name in sorted(tensors)})


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what lies where an earlier one does, as the tensor scale of merged layers: files hold both."""
    places: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in places:
            tensors[name] = tensor.clone()
        places.add(tensor.data_ptr())
    return tensors


def _converted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the files hold split or rearranged, as fused experts, in the form that `save_pretrained` would write."""
    if not tensors:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted


def _schemes(model: Any, names: CheckpointNames) -> tuple[dict[str, Scheme], list[str]]:
    """Quantized layers with their schemes, and the other linear layers, by their names on disk."""
    schemes: dict[str, Scheme] = {}
    plain: list[str] = []
    for name, module in linear_layers(model).items():
        scheme = stored_scheme(module)
        if scheme is None:
            plain.append(names.to_checkpoint(name))
        else:
            schemes[names.to_checkpoint(name)] = scheme
    return schemes, plain


def _model_config(model: Any, layout: Layout, schemes: Mapping[str, Scheme], plain: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("quantization_config", EXTRAS, "_name_or_path"):  # the source's, and where it lay on this machine
        config.pop(name, None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    names = checkpoint_names(model)
    routers = [name for name in _routers(model, names) if name not in plain]
    config |= config_entries(schemes, [*plain, *routers], layout.name)
    tied = [name.removesuffix(".weight") for name in _tied(model)]
    if any(names.modules.get(name, name) in schemes for name in tied):
        config["tie_word_embeddings"] = False
    return config


def _routers(model: nn.Module, names: CheckpointNames) -> list[str]:
    """Routers of experts: no `nn.Linear` here, but consumers know them as one and must be told to leave them."""
    return [
        names.modules[name]
        for name, module in model.named_modules()
        if _ROUTER.search(type(module).__name__)
        and name in names.modules
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, nn.Linear | QuantizedLinear)
    ]


def _transposed(model: Any) -> frozenset[str]:
    """Linear layers that the files hold as `[K, N]`: those that the architecture makes as transformers' `Conv1D`."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    conv = getattr(sys.modules[type(model).__module__], "Conv1D", None)
    if conv is None or any(isinstance(module, conv) for module in model.modules()):
        return frozenset()
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        skeleton = type(model)(model.config)
    return frozenset(name for name, module in skeleton.named_modules() if isinstance(module, conv))


def _tied(model: Any) -> dict[str, str]:
    """The weights that the configuration ties, each with the one it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _write_configuration(model: Any, layout: Layout, document: dict[str, Any], folder: Path) -> None:
    _write_json(folder / "config.json", document)
    if (quantization := document.get("quantization_config")) is not None:
        for name, content in layout.other_files(quantization).items():
            _write_json(folder / name, content)
    if getattr(model, "generation_config", None) is not None:
        # Not `save_pretrained`: it refuses settings that models in use have, as a temperature beside greedy search.
        text = model.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: dict[str, Tensor]) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """File names with the tensors in each, and the index when there is more than one file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    index = None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return split.filename_to_tensors, index
