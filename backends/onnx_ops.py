"""How our layers are said in ONNX: quantized linears by a table of formats, in the dialect of what will run the graph.

    int4        MatMulNBits of ONNX Runtime: `B [N, K/b, b/2]` uint8, the even element of a pair in the lower nibble,
                each stored as q + 8; `scales [N, K/b]`; `zero_points [N, ⌈K/b/2⌉]` likewise packed, absent if symmetric
    int8, fp8   DequantizeLinear of a weight `[K, N]`, scales `[N]`, or `[K/g, N]` for groups along K, then MatMul
    inputs      rounded by the same arithmetic as in PyTorch (`quant.activations`), exported operator by operator

TensorRT has neither MatMulNBits nor zero points: there int4 is a DequantizeLinear of INT4 elements `[K, N]` with scales
`[K/g, N]`, and what it cannot say is refused with the remedy before anything is traced.

A module here stands for one layer while the model is exported: its buffers are what the file will hold, exactly the
elements and float32 scales that the quantizer made.

Sources: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits,
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import linear_layers, stored_weight
from optimizer.errors import UsageError
from optimizer.quant.activations import quantize_activation
from optimizer.quant.formats import BLOCK, ActivationFormat
from optimizer.quant.packing import pack_nibbles
from optimizer.quant.weight import QuantizedWeight

NBITS_BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes, largest first."""


class OnnxLinear(nn.Module):
    """`y = x Ŵᵀ + b` of a layer `[N, K]`, its input rounded first where the layer rounds it."""

    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: ActivationFormat | None,
        input_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.q.shape
        self.activation = activation
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` to `[..., N]`."""
        if self.activation is not None:
            x = quantize_activation(x, self.activation, self.input_scale).to(x.dtype)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """The product alone."""
        raise NotImplementedError


class MatMulNBits(OnnxLinear):
    """A 4-bit integer weight. With `int8_inputs` ONNX Runtime rounds inputs to int8 by blocks, which is faster."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: ActivationFormat | None,
        input_scale: Tensor | None,
        dtype: torch.dtype,
        int8_inputs: bool = False,
    ) -> None:
        super().__init__(weight, bias, activation, input_scale, dtype)
        n, k = weight.q.shape
        group = k // weight.scale.shape[1]
        self.block = next((b for b in NBITS_BLOCKS if group % b == 0), 0)
        if not self.block:
            raise UsageError(f"groups of {group} weights hold no whole block of {NBITS_BLOCKS[-1]}")
        self.accuracy_level = 4 if int8_inputs else 1
        codes = (weight.q.to(torch.int16) + 8).to(torch.uint8)
        repeats = group // self.block
        self.register_buffer("data", pack_nibbles(codes).reshape(n, k // self.block, self.block // 2))
        self.register_buffer("scales", weight.scale.to(dtype).repeat_interleave(repeats, 1).contiguous())
        zeros = None
        if weight.zero is not None:
            zeros = (weight.zero.to(torch.int16) + 8).to(torch.uint8).repeat_interleave(repeats, 1)
            zeros = pack_nibbles(nn.functional.pad(zeros, (0, zeros.shape[1] % 2)))
        self.register_buffer("zeros", zeros)

    def product(self, x: Tensor) -> Tensor:
        """The contributed operator as it is."""
        attributes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "bits": 4,
            "block_size": self.block,
            "accuracy_level": self.accuracy_level,
        }
        inputs = [x, self.data, self.scales, *([] if self.zeros is None else [self.zeros])]
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class DequantizedMatMul(OnnxLinear):
    """An 8-bit weight, integer or e4m3, whose scales are its rows', its groups', its blocks' or the tensor's."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: ActivationFormat | None,
        input_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, bias, activation, input_scale, dtype)
        n, k = weight.q.shape
        scale = weight.scale.float()
        if weight.format.granularity == "block":
            if k % BLOCK:
                raise UsageError(f"{k} input features do not fill blocks of {BLOCK}")
            scale = scale.repeat_interleave(BLOCK, 0)[:n]
        elif weight.format.granularity == "tensor":
            scale = scale.reshape(1, 1).expand(n, 1)
        zero = None if weight.zero is None else weight.zero.to(torch.int8).expand_as(scale)
        groups = scale.shape[1]
        self.attributes: dict[str, Any] = {"axis": 1} if groups == 1 else {"axis": 0, "block_size": k // groups}
        self.register_buffer("data", weight.q.t().contiguous())
        self.register_buffer("scales", _along_rows(scale.to(dtype)))
        self.register_buffer("zeros", None if zero is None else _along_rows(zero))

    def product(self, x: Tensor) -> Tensor:
        """The weight is decoded by the runtime, which may keep it so or multiply it as it is."""
        inputs = [self.data, self.scales, *([] if self.zeros is None else [self.zeros])]
        shape = (self.in_features, self.out_features)
        weight = torch.onnx.ops.symbolic("DequantizeLinear", inputs, self.attributes, dtype=x.dtype, shape=shape)
        return x @ weight


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


class TensorRTMatMul(DequantizedMatMul):
    """A symmetric weight as TensorRT takes it: int4 in groups along K, int8 and e4m3 by row or by tensor.

    The elements of an int4 weight travel as int8, in a buffer named `int4`; `pack_int4` narrows them in the graph.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: ActivationFormat | None,
        input_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        if weight.zero is not None:
            raise UsageError("TensorRT knows symmetric weights only: quantize with `symmetric: true`")
        if weight.format.bits == 8 and weight.format.granularity in ("group", "block"):
            raise UsageError("TensorRT takes 8-bit weights by row or by tensor: quantize with `group_size: -1`")
        super().__init__(weight, bias, activation, input_scale, dtype)
        if weight.format.bits == 4:
            groups = weight.scale.shape[1]
            self.attributes = {"axis": 0, "block_size": self.in_features // groups}
            self.int4 = self.data
            self.scales = weight.scale.to(dtype).t().contiguous()
            del self.data

    def product(self, x: Tensor) -> Tensor:
        """The weight is decoded by the engine, in the kernel that multiplies it."""
        data = self.int4 if hasattr(self, "int4") else self.data
        shape = (self.in_features, self.out_features)
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear", [data, self.scales], self.attributes, dtype=x.dtype, shape=shape
        )
        return x @ weight


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


def _along_rows(scale: Tensor) -> Tensor:
    """Scales `[N, G]` as `[N]`, or `[G, N]` where there are groups."""
    return scale[:, 0].contiguous() if scale.shape[1] == 1 else scale.t().contiguous()


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
    for name, module in list(linear_layers(model).items()):
        weight, bias = stored_weight(module), module.bias
        replacement: nn.Module
        if isinstance(weight, QuantizedWeight):
            replacement = _quantized(name, module, weight, dtype, table, int8_inputs)
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
    int8_inputs: bool,
) -> OnnxLinear:
    build = table.get((weight.format.bits, weight.format.kind))
    if build is None:
        raise UsageError(
            f"{name}: {weight.format.name} weights have no ONNX operator here. Use int4, int8 or fp8 weights."
        )
    options = {"int8_inputs": True} if int8_inputs and build is MatMulNBits else {}
    try:
        return build(weight, module.bias, module.activation, module.input_scale, dtype, **options)
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
