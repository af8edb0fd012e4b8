"""A causal language model as one ONNX graph for prompts and steps, with its key-value cache as explicit inputs.

    in     input_ids [B, S] int64, attention_mask [B, P + S] int64 (1 where a token is real), position_ids [B, S] int64,
           past_key_values.i.key and .value [B, H_kv, C, d] of each layer i
    out    logits [B, S, V], present.i.key and .value [B, H_kv, C, d]

for S new tokens after P. With a shared buffer, past and present are the same memory with room for C >= P + S tokens,
and rows are padded on the right. Otherwise the past has P tokens and present P + S, and rows are padded on the left. B,
S, P and C are dynamic, and P may be 0: the same graph runs a prompt and every later step. The names are those that
onnxruntime-genai expects. `torch.export` traces the model's own forward; attention is that of `onnx_attention`, and
quantized linears are those of `onnx_ops`.
"""

from __future__ import annotations

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
from optimizer.backends.onnx_attention import Attention, Standard, Unfit, candidates
from optimizer.backends.onnx_ops import kernels, pack_int4, translate
from optimizer.backends.onnx_weights import Postponed, cast_copy
from optimizer.errors import ModelError, UsageError

OPSET = 21
"""The first with blocked DequantizeLinear and 4-bit integers."""

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
REMEDY = "install them with: pip install 'roofline-optimizer[onnx]'"


@dataclass(frozen=True)
class Exported:
    """What was written: opset, the type of activations and cache, and the operator of each linear layer.

    `step_weight_bytes` are those that one decode step reads: all but an embedding that is not the head as well.
    `attention` names its operator, `attention_note` says why it is no better one, and with `shared_buffer` past and
    present are the same memory.
    """

    opset: int
    dtype: str
    kernels: dict[str, str]
    step_weight_bytes: int
    attention: str = Standard.operator
    attention_note: str = ""
    shared_buffer: bool = False


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
    postponed = Postponed(model, dtype)
    own = postponed.model
    _check(own)
    translate(own, dtype, dialect=dialect, int8_inputs=int8_inputs)
    step, program, reason = _step_of(own, dtype, dialect)
    with _quiet():
        onnx_program = _converted(program, step.attention)
        if dialect == "tensorrt":
            pack_int4(onnx_program.model.graph)
        postponed.save(onnx_program, folder / MODEL_FILE)
    _checked(folder / MODEL_FILE)
    return Exported(
        OPSET, str(dtype).removeprefix("torch."), kernels(own), weight_bytes(own) - _looked_up_bytes(own),
        step.attention.operator, reason, step.attention.shared_buffer,
    )  # fmt: skip


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
    return cast_copy(model, dtype, lambda parameter: parameter.to(dtype))


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

    def __init__(self, model: Any, attention: Attention) -> None:
        super().__init__()
        self.model, self.attention = model, attention

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits and the cache with the new tokens in it."""
        cache, mask = self.attention.begin(attention_mask, past, input_ids.shape[1])
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (out.logits, *self.attention.present(cache))


def _step_of(model: Any, dtype: torch.dtype, dialect: str) -> tuple[_Step, Any, str]:
    """The traced graph with the first kind of attention that can say what the model does, and why others could not."""
    reasons: list[str] = []
    for make in candidates(model, dtype, dialect):
        try:
            attention = make()
            with attention.installed(model):
                step = _Step(model, attention)
                return step, _traced(step, dtype), "; ".join(reasons)
        except Unfit as reason:
            reasons.append(str(reason))
    raise AssertionError("standard operators fit every model")


def _traced(step: _Step, dtype: torch.dtype) -> Any:
    """The graph of the model as `torch.export` sees it, at 2 rows of 3 new tokens after 4 (none of which is kept)."""
    batch, new, past = 2, 3, 4
    layers = step.attention.layers
    tokens, positions = (torch.zeros(batch, new, dtype=torch.long) for _ in range(2))  # one would become one input
    room = past + (5 if step.attention.shared_buffer else 0)
    cache = [torch.zeros(batch, layers.kv_heads, room, layers.head_dim, dtype=dtype) for _ in range(2 * layers.count)]
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, [{0: auto, 2: auto} for _ in cache])
    mask = torch.ones(batch, past + new, dtype=torch.long)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(step, (tokens, mask, positions, cache), dynamic_shapes=shapes, strict=False)
    except (ModelError, UsageError, Unfit):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(step.model).__name__} cannot be traced for ONNX: {_first_line(error)}. {_place(error)}"
        ) from error


def _converted(program: Any, attention: Attention) -> Any:
    """The ONNX graph of a traced model."""
    layers = attention.layers.count
    inputs = ["input_ids", "attention_mask", "position_ids", *past_names(layers)]
    names = {0: "batch_size", 1: "sequence_length"}
    length = "cache_length" if attention.shared_buffer else "past_sequence_length"
    cache = [{0: "batch_size", 2: length} for _ in range(2 * layers)]
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
