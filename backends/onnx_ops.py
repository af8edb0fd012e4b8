"""How our layers are said in ONNX: linears by a table of formats, in the dialect of what will run the graph, and norms.

TensorRT has neither MatMulNBits nor zero points: there int4 is a DequantizeLinear of INT4 elements `[K, N]` with scales
`[K/g, N]`, and what it cannot say is refused with the remedy before anything is traced.

A module of `onnx_linears` stands for each quantized layer while the model is exported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import linear_layers, stored_weight
from optimizer.backends.onnx_linears import DequantizedMatMul, MatMulNBits, OnnxLinear, TensorRTMatMul
from optimizer.errors import UsageError
from optimizer.quant.weight import QuantizedWeight

ONNXRUNTIME: dict[tuple[int, str], Callable[..., OnnxLinear]] = {
    (4, "int"): MatMulNBits,
    (8, "int"): DequantizedMatMul,
    (8, "float"): DequantizedMatMul,
}
"""What stands for a weight of so many bits and such elements in ONNX Runtime's dialect."""


TENSORRT: dict[tuple[int, str], Callable[..., OnnxLinear]] = {
    (4, "int"): TensorRTMatMul,
    (8, "int"): TensorRTMatMul,
    (8, "float"): TensorRTMatMul,
}
"""The same for TensorRT."""

INT8_INPUTS: dict[tuple[int, str], Callable[..., OnnxLinear]] = ONNXRUNTIME | {
    (4, "int"): partial(MatMulNBits, int8_inputs=True),
    (8, "int"): partial(MatMulNBits, int8_inputs=True),
}
"""ONNX Runtime's where it may round inputs to int8: its 8-bit operator is fast only then."""

DIALECTS = {"onnxruntime": ONNXRUNTIME, "tensorrt": TENSORRT}
"""The tables by the name of what runs the graph."""


def translate(model: nn.Module, dtype: torch.dtype, *, dialect: str = "onnxruntime", int8_inputs: bool = False) -> None:
    """Replace every linear layer of `model` by what stands for it in the dialect; `model` must be the caller's own.

    Merged layers become what they were merged from. Unquantized ones become `nn.Linear` in `dtype`. Raises
    `UsageError` naming the layer and the format for which the dialect has no entry.
    """
    table = DIALECTS.get(dialect)
    if table is None:
        raise UsageError(f"unknown ONNX dialect {dialect!r}. Use one of {', '.join(DIALECTS)}.")
    if int8_inputs and dialect == "onnxruntime":
        table = INT8_INPUTS
    for name, module in list(linear_layers(model).items()):
        weight, bias = stored_weight(module), module.bias
        replacement: nn.Module
        if isinstance(weight, QuantizedWeight):
            replacement = _quantized(name, module, weight, dtype, table)
        elif type(module) is nn.Linear:
            continue  # a tied head stays tied
        else:
            replacement = _plain(weight, bias, dtype)  # type: ignore[arg-type]
        model.set_submodule(name, replacement)
    for name, module in list(model.named_modules()):
        norm = RMSNorm.standing_for(module)
        if norm is not None:
            model.set_submodule(name, norm)


def _quantized(
    name: str,
    module: nn.Module,
    weight: QuantizedWeight,
    dtype: torch.dtype,
    table: dict[tuple[int, str], Callable[..., OnnxLinear]],
) -> OnnxLinear:
    build = table.get((weight.format.bits, weight.format.kind))
    if build is None:
        raise UsageError(
            f"{name}: {weight.format.name} weights have no ONNX operator here. Use int4, int8 or fp8 weights."
        )
    try:
        return build(weight, module.bias, module.activation, module.input_scale, dtype)
    except UsageError as error:
        raise UsageError(f"{name}: {error}. Leave this layer as it is.") from None


def _plain(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
    return linear


def kernels(model: nn.Module) -> dict[str, str]:
    """The operator that stands for each linear layer of a translated model, by its name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, OnnxLinear):
            rounded = "" if module.activation is None else f" × {module.activation.name}"
            found[name] = f"{type(module).__name__}{rounded}"
        elif isinstance(module, nn.Linear):
            found[name] = "MatMul"
    return found


class RMSNorm(nn.Module):
    """`w x / √(mean(x²) + ε)`, in the form that ONNX Runtime joins into one kernel: a division, no product with 1/√.

    Computed in float32 and rounded once to the type of `x`.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight.detach(), requires_grad=False), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., N]` to the same shape."""
        y = x.float()
        return self.weight * (y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)

    @classmethod
    def standing_for(cls, module: nn.Module) -> RMSNorm | None:
        """What computes the same as `module`, tried on numbers; None for whatever is not such a norm."""
        weight, epsilon = (
            getattr(module, "weight", None),
            getattr(module, "variance_epsilon", getattr(module, "eps", None)),
        )
        if "RMSNorm" not in type(module).__name__ or not isinstance(epsilon, float) or getattr(weight, "ndim", 0) != 1:
            return None
        norm = cls(weight, epsilon)  # type: ignore[arg-type]
        x = torch.linspace(-3, 5, 4 * norm.weight.numel()).reshape(4, -1).to(norm.weight.dtype)
        with torch.no_grad():
            close = torch.allclose(module(x), norm(x), rtol=4 * torch.finfo(x.dtype).eps, atol=1e-6)
        return norm if close else None


def pack_int4(graph: Any) -> int:
    """Give every constant of an ONNX IR graph whose name ends in `.int4` that type, two elements a byte; how many."""
    import ml_dtypes
    import onnx_ir as ir

    found = [value for name, value in graph.initializers.items() if name.endswith(".int4")]
    for value in found:
        elements = value.const_value.numpy().astype(ml_dtypes.int4)
        value.const_value = ir.Tensor(elements, name=value.name)
        value.type = ir.TensorType(ir.DataType.INT4)
    return len(found)
