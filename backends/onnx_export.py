"""A causal language model as one ONNX graph for prompts and steps, with its key-value cache as explicit inputs.

    in     input_ids [B, S] int64, attention_mask [B, P + S] int64 (1 where a token is real), position_ids [B, S] int64,
           past_key_values.i.key and .value [B, H_kv, P, d] of each layer i
    out    logits [B, S, V], present.i.key and .value [B, H_kv, P + S, d]

B, S and P are dynamic, and P may be 0: the same graph runs a prompt and every later step. The names are those that
onnxruntime-genai expects. `torch.export` traces the model's own forward; attention is done without repeating the keys
and values of grouped heads, in standard operators; quantized linears are those of `onnx_ops`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import weight_bytes
from optimizer.backends.onnx_ops import kernels, pack_int4, translate
from optimizer.errors import ModelError, UsageError

OPSET = 21
"""The first with blocked DequantizeLinear and 4-bit integers."""

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ATTENTION = "optimizer_onnx_attention"
REMEDY = "install them with: pip install 'roofline-optimizer[onnx]'"


@dataclass(frozen=True)
class Exported:
    """What was written: opset, the type of activations and cache, and the operator of each linear layer.

    `step_weight_bytes` are those that one decode step reads: all but an embedding that is not the head as well.
    """

    opset: int
    dtype: str
    kernels: dict[str, str]
    step_weight_bytes: int


def past_names(layers: int, side: str = "past_key_values") -> list[str]:
    """Names of the cache's tensors, `side` being past_key_values or present: keys and values layer by layer."""
    return [f"{side}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export(
    model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, dialect: str = "onnxruntime",
    int8_inputs: bool = False,
) -> Exported:  # fmt: skip
    """Write `model.onnx`, and `model.onnx.data` with its tensors, into `folder`; `model` is left as it was.

    Activations, cache and unquantized weights are in `dtype`. `int8_inputs` lets the runtime round the inputs of
    quantized layers to int8.

    Raises:
        UsageError: onnx or onnxscript is missing, or a layer's format has no operator in the dialect.
        ModelError: the architecture cannot be exported; the message names the operator, its module and source line.
    """
    _require_packages()
    own = float_copy(model, dtype)
    _check(own)
    translate(own, dtype, dialect=dialect, int8_inputs=int8_inputs)
    own.config._attn_implementation = _register()
    step = _Step(own)
    names = past_names(step.layers)
    program = _traced(step, dtype)
    with _quiet():
        onnx_program = _converted(program, ["input_ids", "attention_mask", "position_ids", *names], step.layers)
        if dialect == "tensorrt":
            pack_int4(onnx_program.model.graph)
        onnx_program.save(folder / MODEL_FILE, external_data=True)
    _checked(folder / MODEL_FILE)
    return Exported(OPSET, str(dtype).removeprefix("torch."), kernels(own), weight_bytes(own) - _looked_up_bytes(own))


def _looked_up_bytes(model: Any) -> int:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    shared = getattr(head, "weight", None) is not None and head.weight.data_ptr() == table.data_ptr()
    return 0 if shared else table.numel() * table.element_size()


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX export needs {' and '.join(missing)}; {REMEDY}")


def float_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the module tree whose floating-point parameters are in `dtype`; packed weights are shared.

    Buffers stay as they are: rotary frequencies are float32 in every model, and quantized layers are replaced.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        kept = parameter.detach()
        kept = kept.to(dtype) if kept.is_floating_point() and kept.element_size() > 1 else kept
        shared[id(parameter)] = nn.Parameter(kept, requires_grad=False)
    own = copy.deepcopy(model, shared).cpu().eval()
    own.config.dtype = dtype
    return own


def _check(model: Any) -> None:
    """Refuse, before any tracing, architectures whose cache or attention this graph does not describe."""
    from transformers import DynamicCache

    config = model.config
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} has an encoder, and only decoders are exported. Use a causal language model.")
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    other = layers - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if other:
        raise ModelError(
            f"{kind} keeps {', '.join(sorted(other))} between tokens, and only keys and values are exported. "
            "Export a model whose every layer is attention."
        )
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ModelError(f"{kind} routes tokens to experts, which are not exported yet. Use a dense model.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{kind} does its attention itself, so it cannot be said in standard operators here.")


class _Step(nn.Module):
    """The graph's interface around the model's own forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.kinds = list(getattr(config, "layer_types", None) or [])
        self.window = getattr(config, "sliding_window", None)
        if not self.kinds and self.window:
            self.kinds = ["sliding_attention"] * self.layers
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits and the grown cache."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for index in range(self.layers):
            layer = DynamicLayer()
            layer.keys, layer.values = past[2 * index], past[2 * index + 1]
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        masks = self._masks(attention_mask, past[0].shape[2], input_ids.shape[1], past[0].dtype)
        out = self.model(
            input_ids=input_ids, attention_mask=masks, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *present)

    def _masks(self, mask: Tensor, past: int, new: int, dtype: torch.dtype) -> Any:
        """What is added to the scores, `[B, 1, S, P + S]`: 0 where a token is seen, the least number elsewhere."""
        query = torch.arange(past, past + new)[:, None]
        key = torch.arange(past + new)[None, :]
        real = mask[:, None, None, :] > 0
        full = (key <= query)[None, None] & real
        kinds: dict[str, Tensor] = {"full_attention": full}
        if self.window and "sliding_attention" in self.kinds:
            kinds["sliding_attention"] = full & (key > query - self.window)[None, None]
        least = torch.finfo(dtype).min
        added = {kind: torch.where(seen, 0.0, least).to(dtype) for kind, seen in kinds.items()}
        used = set(self.kinds) or {"full_attention"}
        if len(used) == 1:
            return added[used.pop()]
        return added


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of `query [B, H, S, d]` over `key`, `value [B, H_kv, T, d]`: a group's heads share a product."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} wants {name} in its attention, which is not exported yet.")
    assert attention_mask is not None
    batch, heads, new, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    scale = width**-0.5 if scaling is None else scaling
    rows = (query * scale).reshape(batch, kv_heads, group * new, width)
    scores = rows @ key.transpose(2, 3)  # [B, H_kv, group · S, T]
    scores = scores.reshape(batch, kv_heads, group, new, -1) + attention_mask[:, :, None]
    weights = torch.softmax(scores, -1).reshape(batch, kv_heads, group * new, -1)
    out = (weights @ value).reshape(batch, heads, new, width)
    return out.transpose(1, 2), None


def _register() -> str:
    """Make the attention above known to transformers, and return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    return ATTENTION


def _traced(step: _Step, dtype: torch.dtype) -> Any:
    """The graph of the model as `torch.export` sees it, at 2 rows of 3 new tokens after 4 (none of which is kept)."""
    batch, new, past = 2, 3, 4
    tokens, positions = (torch.zeros(batch, new, dtype=torch.long) for _ in range(2))  # one would become one input
    cache = [torch.zeros(batch, step.kv_heads, past, step.head_dim, dtype=dtype) for _ in range(2 * step.layers)]
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, [{0: auto, 2: auto} for _ in cache])
    mask = torch.ones(batch, past + new, dtype=torch.long)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(step, (tokens, mask, positions, cache), dynamic_shapes=shapes, strict=False)
    except (ModelError, UsageError):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(step.model).__name__} cannot be traced for ONNX: {_first_line(error)}. {_place(error)}"
        ) from error


def _converted(program: Any, inputs: list[str], layers: int) -> Any:
    """The ONNX graph of a traced model."""
    names = {0: "batch_size", 1: "sequence_length"}
    cache = [{0: "batch_size", 2: "past_sequence_length"} for _ in range(2 * layers)]
    shapes = (names, {0: "batch_size", 1: "total_sequence_length"}, names, cache)
    try:
        return torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=inputs,
            output_names=["logits", *past_names(layers, "present")], dynamic_shapes=shapes, verbose=False,
        )  # fmt: skip
    except Exception as error:
        raise ModelError(_untranslated(program, error)) from error


def _untranslated(program: Any, error: BaseException) -> str:
    """Which operator of which module and source line has no translation.

    Operators are taken apart before they are translated, so the one that failed may be a part of what the model called.
    """
    text = "\n".join(str(cause) for cause in _causes(error))
    parts = set(re.findall(r"op='\w+\.(\w+)'", text))
    for node in program.graph.nodes:
        if node.op == "call_function" and any(part in str(node.target) for part in parts):
            stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
            place = lines[-1] if lines else "no source line"
            module = stack[-1][0] or "the model"
            return f"{node.target} of {module} ({place}) has no ONNX translation. Export another model."
    return f"the graph has no ONNX form: {_first_line(list(_causes(error))[-1])}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """The innermost line of a model's own source in a traceback."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/transformers/models/" in f.filename]
    return f"It stopped at {frames[-1].filename}:{frames[-1].lineno}." if frames else "Export another model."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of the exporter, which speak of its own inside."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _checked(file: Path) -> None:
    """What ONNX's own checker and shape inference say of the file; contributed operators are not theirs to judge."""
    import onnx

    try:
        onnx.checker.check_model(str(file))
        onnx.shape_inference.infer_shapes_path(str(file), str(file.with_suffix(".inferred")), strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is not valid ONNX: {_first_line(error)}") from error
    finally:
        file.with_suffix(".inferred").unlink(missing_ok=True)
