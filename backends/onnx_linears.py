"""Quantized linears in ONNX, one module a way to say them: its buffers are what the file will hold.

    MatMulNBits        ONNX Runtime's own: `B [N, K/b, b · bits / 8]` uint8, elements stored as q + 2^(bits - 1), of 4
                       bits the even element of a pair in the lower nibble; `scales [N, K/b]`; `zero_points` likewise
                       packed along a row, absent if symmetric
    DequantizedMatMul  DequantizeLinear of a weight `[K, N]`, scales `[N]`, or `[K/g, N]` in groups along K, then MatMul
    TensorRTMatMul     the same within what TensorRT takes, 4-bit elements as INT4; inputs by QuantizeLinear and
                       DequantizeLinear under one scale of the tensor, so that int8 meets int8, and e4m3 meets e4m3
    inputs             else rounded by the same arithmetic as in PyTorch (`quant.activations`), operator by operator

They hold exactly the elements and float32 scales that the quantizer made.

Sources: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits,
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import UsageError
from optimizer.quant.activations import quantize_activation
from optimizer.quant.formats import BLOCK, ActivationFormat, Format
from optimizer.quant.packing import pack_nibbles
from optimizer.quant.weight import QuantizedWeight

NBITS_BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes, largest first."""
ROUNDED_BLOCKS = NBITS_BLOCKS[1:]
"""The same where the inputs of a block are rounded to int8 with one scale: a larger block would round them coarser."""


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
        y = self.product(self.rounded(x))
        return y if self.bias is None else y + self.bias

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the layer rounds it, in the type of `x`."""
        if self.activation is None:
            return x
        return quantize_activation(x, self.activation, self.input_scale).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """The product alone."""
        raise NotImplementedError


class MatMulNBits(OnnxLinear):
    """An integer weight of 4 or 8 bits. With `int8_inputs` ONNX Runtime rounds inputs to int8 by blocks, as it decodes.

    Without, its 4-bit kernel multiplies float32 inputs, and its 8-bit one decodes the whole weight for every call.
    """

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
        self.bits = weight.format.bits
        group = k // weight.scale.shape[1]
        blocks = ROUNDED_BLOCKS if int8_inputs else NBITS_BLOCKS
        self.block = next((b for b in blocks if group % b == 0), 0)
        if not self.block:
            raise UsageError(f"groups of {group} weights hold no whole block of {blocks[-1]}")
        self.accuracy_level = 4 if int8_inputs else 1
        blocks_of_group, rows_of_scale = group // self.block, n // weight.scale.shape[0]

        def per_block(values: Tensor) -> Tensor:
            return values.repeat_interleave(rows_of_scale, 0).repeat_interleave(blocks_of_group, 1).contiguous()

        self.register_buffer("data", self._packed(weight.q).reshape(n, k // self.block, -1))
        self.register_buffer("scales", per_block(weight.scale.to(dtype)))
        self.register_buffer("zeros", None if weight.zero is None else self._packed(per_block(weight.zero)))

    def _packed(self, integers: Tensor) -> Tensor:
        """Signed `[N, M]` as the operator stores them, `[N, M]` or `[N, ⌈M/2⌉]` uint8."""
        codes = (integers.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        return codes if self.bits == 8 else pack_nibbles(nn.functional.pad(codes, (0, codes.shape[1] % 2)))

    def product(self, x: Tensor) -> Tensor:
        """The contributed operator as it is."""
        attributes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "bits": self.bits,
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


_ONNX_TYPES = {"int": (torch.int8, 3), "float": (torch.float8_e4m3fn, 17)}
"""The type of 8-bit elements by their kind, and its number in ONNX (TensorProto.DataType)."""


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
        if activation is not None:
            _check_static(weight.format, activation)
        super().__init__(weight, bias, activation, input_scale, dtype)
        if input_scale is not None:
            self.input_scale = input_scale.to(dtype).reshape(())
            if not (self.input_scale.isfinite() and self.input_scale > 0):
                raise UsageError(
                    f"the scale {input_scale.item():.3g} of its inputs is none in {str(dtype).removeprefix('torch.')}"
                )
        if weight.format.bits == 4:
            groups = weight.scale.shape[1]
            self.attributes = {"axis": 0, "block_size": self.in_features // groups}
            self.int4 = self.data
            self.scales = weight.scale.to(dtype).t().contiguous()
            del self.data

    def rounded(self, x: Tensor) -> Tensor:
        """Elements and back: TensorRT multiplies the elements, where both operands come from such a pair."""
        if self.activation is None:
            return x
        kind, number = _ONNX_TYPES[self.activation.kind]
        elements = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x, self.input_scale], {"output_dtype": number}, dtype=kind, shape=x.shape
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", [elements, self.input_scale], {}, dtype=x.dtype, shape=x.shape
        )

    def product(self, x: Tensor) -> Tensor:
        """The weight is decoded by the engine, in the kernel that multiplies it."""
        data = self.int4 if hasattr(self, "int4") else self.data
        shape = (self.in_features, self.out_features)
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear", [data, self.scales], self.attributes, dtype=x.dtype, shape=shape
        )
        return x @ weight


def _check_static(weight: Format, activation: ActivationFormat) -> None:
    """`UsageError` for rounded inputs that TensorRT would not multiply as they are."""
    static = "int8-static" if weight.kind == "int" else "fp8-static"
    if activation.dynamic:
        raise UsageError(
            f"TensorRT rounds inputs by one scale that calibration found, and {activation.name} takes its own from "
            f"each input: quantize with `activations: {static}`"
        )
    if (weight.bits, weight.kind) != (activation.bits, activation.kind):
        raise UsageError(
            f"TensorRT multiplies int8 by int8 and fp8 by fp8, and this layer has {weight.name} weights and "
            f"{activation.name} inputs: quantize both to one type, or leave `activations` out"
        )


def _along_rows(scale: Tensor) -> Tensor:
    """Scales `[N, G]` as `[N]`, or `[G, N]` where there are groups."""
    return scale[:, 0].contiguous() if scale.shape[1] == 1 else scale.t().contiguous()
