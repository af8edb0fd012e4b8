"""The `ModelShape` of a model: read from its modules, from its configuration, or from a parameter count alone.

Modules say what is stored; the configuration says what attention does. A configuration alone is turned into modules on
the meta device, which hold no memory, so both sources count the same operations for every architecture that
transformers knows: biases, query and key norms, position tables, shared experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from optimizer.errors import ModelError
from optimizer.evals.roofline import NORM_FLOPS, Attention, Kind, Lookup, ModelShape, Precision, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_KEYS = {  # what it means: the names that configurations give it, most common first
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "active_experts": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"),
}
WINDOW_KEYS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
HEAD_NAMES = frozenset({"lm_head", "embed_out"})  # where a model does not name its output embeddings itself
ROUTER_NAMES = frozenset({"gate", "router"})
_EXPERT_INDEX = re.compile(r"(?<=experts\.)\d+(?=\.)")  # a list of separate experts becomes one bank


@runtime_checkable
class StoredLinear(Protocol):
    """A linear, quantized or merged, that says itself how many bytes it reads: weights, scales, zero points, bias."""

    weight_bytes: int
    in_features: int
    out_features: int


@runtime_checkable
class StoredTable(Protocol):
    """An embedding that says itself how many bytes it stores."""

    weight_bytes: int
    num_embeddings: int
    embedding_dim: int


def from_module(
    model: nn.Module, *, config: Mapping[str, Any] | PretrainedConfig | None = None, kv: Precision | None = None
) -> ModelShape:
    """The shape of a live causal language model, as its weights are stored now.

    A `StoredLinear` is charged its own `weight_bytes`, every other module its parameters. `config` defaults to
    `model.config`; `kv` to the precision of the activations, which is that of the first floating parameter.

    Raises:
        ModelError: no configuration, or one that lacks what attention needs.
    """
    settings = _settings(config if config is not None else getattr(model, "config", None))
    element_bytes = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 2)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}

    ops: list[Weights | Lookup] = []
    charged: tuple[str, ...] = ()  # modules that spoke for everything below them
    for name, module in model.named_modules():
        if name.startswith(charged):
            continue
        if isinstance(module, StoredLinear):
            charged += (f"{name}.",)
            kind = _matrix_kind(name, is_head=module is head)
            ops.append(_matrix(name, kind, module.out_features, module.in_features, int(module.weight_bytes)))
        elif isinstance(module, StoredTable):
            charged += (f"{name}.",)
            ops.append(Lookup(name, module.num_embeddings, module.embedding_dim, int(module.weight_bytes)))
        elif isinstance(module, nn.Embedding):
            table = module.weight
            rows, width = table.shape
            ops.append(Lookup(name, rows, width, table.nbytes, tied=id(table) in shared))
        else:
            ops.extend(_plain(name, module, settings, is_head=module is head))
    attentions = tuple(_attentions(settings, kv or Precision(8 * element_bytes)))
    return ModelShape(str(settings.get("model_type", "model")), (*_banks(ops, settings), *attentions), element_bytes)


def from_config(
    config: Mapping[str, Any] | PretrainedConfig,
    *,
    weights: Precision = Precision(16),  # noqa: B008 (frozen)
    head: Precision | None = None,
    kv: Precision | None = None,
) -> ModelShape:
    """The shape of the model that a configuration describes, with its linears stored in `weights`.

    Activations, norms, routers and embeddings are bfloat16, and so are the head and the cache unless `head` and `kv`
    say otherwise. Nothing is allocated: the modules are built on the meta device.

    Raises:
        ModelError: the configuration names no architecture that transformers can build, or lacks a needed key.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    refusals = (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError)

    try:
        known = AutoConfig.for_model(**config) if isinstance(config, Mapping) else config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16)
    except refusals as error:
        kind = config.get("model_type") if isinstance(config, Mapping) else config.model_type
        raise ModelError(
            f"config: model_type={kind!r} is no causal language model that transformers can build ({error}); "
            "correct the configuration or pass the live model to from_module"
        ) from error
    return from_module(model, config=known, kv=kv).stored_as(weights, head=head)


def from_parameters(
    parameters: float,
    *,
    weights: Precision = Precision(16),  # noqa: B008 (frozen)
    d_model: int = 0,
    layers: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
    kv: Precision = Precision(16),  # noqa: B008 (frozen)
) -> ModelShape:
    """The shape of a model known by its size: one matrix of `parameters`, used whole by every token.

    `d_model` adds one activation vector a token; `layers`, `heads`, `kv_heads` and `head_dim` add attention.

    Raises:
        ModelError: no parameters, or only some of the four sizes of attention.
    """
    count = int(parameters)
    if count < 1:
        raise ModelError(f"parameters={parameters!r} must be at least 1; give the number of weights, such as 70e9")
    sizes = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    if any(sizes.values()) and min(sizes.values()) < 1:
        raise ModelError(f"attention needs all of layers, heads, kv_heads and head_dim, not {sizes}; give all or none")
    matrix = Weights("weights", "linear", 1, count, weights.bytes(1, count), flops=2 * count, elements=d_model)
    attentions = (Attention(f"layers.{i}.attention", heads, kv_heads, head_dim, kv=kv) for i in range(layers))
    return ModelShape(f"{parameters:.3g} parameters", (matrix, *attentions))


def _settings(config: Mapping[str, Any] | PretrainedConfig | None) -> dict[str, Any]:
    """The configuration of the text model as plain data."""
    if config is None:
        raise ModelError("the model has no .config, which says what its attention does; pass config=")
    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return plain | (plain.get("text_config") or {})


def _find(settings: Mapping[str, Any], meaning: str) -> int | None:
    return next((settings[key] for key in CONFIG_KEYS[meaning] if settings.get(key) is not None), None)


def _need(settings: Mapping[str, Any], meaning: str) -> int:
    value = _find(settings, meaning)
    if not isinstance(value, int) or value < 1:
        keys = ", ".join(CONFIG_KEYS[meaning])
        raise ModelError(f"config: {meaning}={value!r} must be a positive integer; set one of {keys}")
    return value


def _attentions(settings: Mapping[str, Any], kv: Precision) -> Iterator[Attention]:
    """One `Attention` a layer that keeps keys and values; recurrent layers have none."""
    if settings.get("kv_lora_rank"):
        raise ModelError(
            f"config: kv_lora_rank={settings['kv_lora_rank']} means multi-head latent attention, whose cache the "
            "roofline does not count; use from_parameters with the cached heads given by hand"
        )
    layers, heads = _need(settings, "layers"), _need(settings, "heads")
    head_dim = _find(settings, "head_dim") or _need(settings, "hidden") // heads
    single = settings.get("multi_query") and not settings.get("new_decoder_architecture")  # Falcon, StarCoder
    kv_heads = 1 if single else (_find(settings, "kv_heads") or heads)
    windowed = settings.get("sliding_window") and settings.get("use_sliding_window", True)
    kinds = settings.get("layer_types") or ["sliding_attention" if windowed else "full_attention"] * layers
    for layer, kind in enumerate(kinds):
        if kind in WINDOW_KEYS or kind == "full_attention":
            window = settings.get(WINDOW_KEYS[kind]) if kind in WINDOW_KEYS else None
            yield Attention(f"layers.{layer}.attention", heads, kv_heads, head_dim, window or None, kv)


def _matrix_kind(name: str, *, is_head: bool, rows: int = 0, experts: int | None = None) -> Kind:
    if is_head or name in HEAD_NAMES:
        return "lm_head"
    if experts and rows == experts and name.rpartition(".")[2] in ROUTER_NAMES:
        return "router"
    return "expert" if _EXPERT_INDEX.search(name) else "linear"


def _matrix(name: str, kind: Kind, rows: int, columns: int, weight_bytes: int, bias_bytes: int = 0) -> Weights:
    return Weights(name, kind, rows, columns, weight_bytes, 2 * rows * columns, rows + columns, bias_bytes)


def _plain(name: str, module: nn.Module, settings: Mapping[str, Any], *, is_head: bool) -> Iterator[Weights]:
    """The operations of a module's own parameters, by their rank: vectors, a matrix, or a bank of matrices."""
    own = dict(module.named_parameters(recurse=False))
    vectors = [p for p in own.values() if p.dim() < 2]
    vector_bytes = sum(p.nbytes for p in vectors)
    if own and len(vectors) == len(own):
        width = max(p.numel() for p in vectors)
        kind: Kind = "norm" if "norm" in f"{name}{type(module).__name__}".lower() else "other"
        yield Weights(name, kind, 1, width, vector_bytes, NORM_FLOPS * width, 2 * width)
    for key, parameter in own.items():
        if name.endswith("experts") and parameter.dim() in (2, 3):  # [E, N, K], or the biases [E, N]
            experts, *matrix = parameter.shape
            rows, columns = matrix if len(matrix) == 2 else (1, *matrix)
            bank = _matrix(f"{name}.{key}", "expert", rows, columns, parameter.nbytes // experts)
            bank = bank if len(matrix) == 2 else replace(bank, kind="other", elements=0)
            yield replace(bank, experts=experts, active=_need(settings, "active_experts"))
        elif parameter.dim() == 2:
            rows, columns = parameter.shape if type(module).__name__ != "Conv1D" else parameter.shape[::-1]
            kind = _matrix_kind(name, is_head=is_head, rows=rows, experts=_find(settings, "experts"))
            label = name if key == "weight" else f"{name}.{key}"
            yield _matrix(label, kind, rows, columns, parameter.nbytes + vector_bytes, vector_bytes)
            vector_bytes = 0  # belongs to the first matrix
        elif parameter.dim() > 2:  # a short convolution: one multiply-add a weight and token
            count = parameter.numel()
            yield Weights(f"{name}.{key}", "other", 1, count, parameter.nbytes, 2 * count, 2 * parameter.shape[0])


def _banks(ops: list[Weights | Lookup], settings: Mapping[str, Any]) -> list[Weights | Lookup]:
    """Fold the separate experts `experts.0.up`, `experts.1.up`, … into one bank `experts.*.up` of their mean bytes."""

    def star(name: str) -> str:
        return _EXPERT_INDEX.sub("*", name)

    indexed = [op for op in ops if isinstance(op, Weights) and _EXPERT_INDEX.search(op.name)]
    copies = Counter(star(op.name) for op in indexed)
    stored: Counter[str] = Counter()
    for expert in indexed:
        stored[star(expert.name)] += int(expert.weight_bytes)
    folded: dict[str, Weights | Lookup] = {}
    for op in ops:
        name = star(op.name)
        if name == op.name or isinstance(op, Lookup):
            folded[op.name] = op
        elif name not in folded:
            count, active = copies[name], _need(settings, "active_experts")
            folded[name] = replace(op, name=name, weight_bytes=stored[name] / count, experts=count, active=active)
    return list(folded.values())
