"""How often each fusion matches in the architectures we know: so many a layer, and so many besides.

Counted in the graph of a decode step of transformers' own forward. A fusion that an architecture does not name must
match nowhere in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optimizer.backends.linear import DenseLinear, MergedSlice, QuantizedLinear

OURS = (QuantizedLinear, DenseLinear, MergedSlice)


class Sites(NamedTuple):
    """`layer` sites in each layer and `once` besides. `dense`: only where the layers around it are PyTorch's own."""

    layer: int
    once: int = 0
    dense: bool = False


@dataclass(frozen=True)
class Architecture:
    """The sites of a model type whose configuration has the values that this table `assumes`."""

    sites: Mapping[str, Sites]
    assumes: Mapping[str, object] = field(default_factory=dict)


SILU = {"hidden_act": "silu"}
ROPE = {"rope": Sites(1), "rope_kv_write": Sites(1)}
RMS = {"add_rms_norm": Sites(2), "rms_norm": Sites(0, 1)} | ROPE
HEAD_NORMS = {"rms_norm": Sites(2, 1)}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(RMS | {"silu_mul": Sites(1)}, SILU),
    "mistral": Architecture(RMS | {"silu_mul": Sites(1)}, SILU),
    "qwen2": Architecture(RMS | {"silu_mul": Sites(1)}, SILU),
    "qwen3": Architecture(RMS | HEAD_NORMS | {"silu_mul": Sites(1)}, SILU),
    "phi3": Architecture(RMS | {"silu_mul": Sites(1)}, SILU),
    "gemma2": Architecture(
        RMS | {"rms_norm": Sites(2, 1), "gelu_mul": Sites(1)}, {"hidden_activation": "gelu_pytorch_tanh"}
    ),
    "gemma3_text": Architecture(
        RMS | {"rms_norm": Sites(4, 1), "gelu_mul": Sites(1)}, {"hidden_activation": "gelu_pytorch_tanh"}
    ),
    "mixtral": Architecture(RMS | {"silu_mul": Sites(1, dense=True)}, SILU),
    "qwen3_moe": Architecture(
        RMS | HEAD_NORMS | {"silu_mul": Sites(1, dense=True)}, SILU | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    # The sum of the two embeddings comes before the first norm.
    "gpt2": Architecture(
        {"add_layer_norm": Sites(2, 1), "bias_gelu": Sites(1, dense=True)},
        {"activation_function": "gelu_new", "add_cross_attention": False},
    ),
    # Between the sum of the feed-forward layer and the next norm OPT changes the shape, for which there is no pattern.
    "opt": Architecture(
        {"add_layer_norm": Sites(1, 1), "layer_norm": Sites(1), "addmm_relu": Sites(1, dense=True)},
        {"do_layer_norm_before": True, "activation_function": "relu", "_remove_final_layer_norm": False},
    ),
    # Attention and feed-forward layer are parallel: one norm a layer, and no bias.
    "falcon": Architecture(
        {"add_layer_norm": Sites(1), "layer_norm": Sites(0, 1)} | ROPE,
        {"parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False, "activation": "gelu"},
    ),
    # Two norms of one sum a layer: the first takes the addition, the other has its result.
    "gpt_neox": Architecture(
        {"add_layer_norm": Sites(1), "layer_norm": Sites(1, 1), "bias_gelu": Sites(1, dense=True)} | ROPE,
        {"use_parallel_residual": True, "hidden_act": "gelu"},
    ),
}
"""By `config.model_type`."""

DECODED, WRITE = "dequantize_matmul", "rope_kv_write"
NOWHERE = (DECODED, "mm_bias", "addmm_gelu")
"""Fusions without a site in any of these: for models that are quantized already, or written otherwise."""

COUNTED = (*dict.fromkeys(name for architecture in ARCHITECTURES.values() for name in architecture.sites), *NOWHERE)
"""Fusions that have an expected number. Those of quantized rows depend on the recipe, and are reported as found."""


def expected(model: Any, writes: bool = False) -> tuple[dict[str, int], str]:
    """Matches to expect by fusion, zeros included, in one decode step; and why some or all have no expected number.

    `writes`: the step has `rope` in it, and one `kv_write` of each layer's keys after it.
    """
    config = model.config.get_text_config()
    kind = str(config.model_type)
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        return {}, f"no count is expected for {kind}: what was found is reported as it is"
    for name, wanted in architecture.assumes.items():
        found = getattr(config, name, None)
        if found != wanted:
            return {}, f"no count is expected: {kind} has {name} {found!r}, and the table is for {wanted!r}"
    layers = int(config.num_hidden_layers)
    sites = {name: architecture.sites.get(name, Sites(0)) for name in COUNTED}
    ours = any(isinstance(module, OURS) for module in model.modules())
    around = [name for name, site in sites.items() if site.dense and ours]
    notes = [f"{', '.join(around)}: no count is expected around layers of our own"] if around else []
    if _holds_integers(model):
        around.append(DECODED)
        notes.append(f"{DECODED}: no count is expected where layers that are not ours hold integers")
    counts = {name: site.layer * layers + site.once for name, site in sites.items() if name not in around}
    if not writes:
        counts[WRITE] = 0
    return counts, "; ".join(notes)


def _holds_integers(model: nn.Module) -> bool:
    """Whether another library's layers hold int8 weights, or tensors that wrap some."""
    return any(
        tensor.dtype == torch.int8 or is_traceable_wrapper_subclass(tensor)
        for module in model.modules()
        if not isinstance(module, OURS)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
