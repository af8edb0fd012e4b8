"""How a quantized linear layer runs: the kernels that its formats, its shape and its device allow, best first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimizer.backends.kernels.decoded_linear import decoded_linear
from optimizer.backends.kernels.dynamic_int8_linear import dynamic_int8_linear
from optimizer.backends.kernels.float_linear import float_linear
from optimizer.backends.kernels.fp8_linear import fp8_linear
from optimizer.backends.kernels.gpu import triton
from optimizer.backends.kernels.int8_linear import int8_linear
from optimizer.backends.kernels.llm_int8_linear import llm_int8_linear
from optimizer.backends.kernels.quantize_rows import quantize_rows
from optimizer.backends.kernels.scaled_operands import INT32_COLUMNS
from optimizer.backends.kernels.w4a16_linear import w4a16_linear
from optimizer.backends.kernels.w8a16_linear import w8a16_linear, w8a16_linear_ref
from optimizer.quant.activations import activation_elements, quantize_activation

if TYPE_CHECKING:
    from optimizer.backends.linear import QuantizedLinear

Run = Callable[["QuantizedLinear", Tensor], Tensor]


def _integers(layer: QuantizedLinear, x: Tensor) -> Tensor:
    assert layer.int8_group is not None
    return dynamic_int8_linear(  # type: ignore[no-any-return]
        x, layer.data, layer.scale, layer.zero, layer.bias, layer.int8_group
    )


def _scaled(layer: QuantizedLinear, x: Tensor) -> Tensor:
    activation = layer.activation
    assert activation is not None
    if activation.dynamic:
        group = activation.group_size if activation.granularity == "group" else -1
        q, scale = quantize_rows(x, group, layer.data.dtype)
    else:
        q, _, _ = activation_elements(x, activation, layer.input_scale)
        scale = layer.input_scale
    multiply = int8_linear if layer.data.dtype == torch.int8 else fp8_linear
    return multiply(q, scale, layer.data, layer.weight_scale().float(), layer.bias, x.dtype)  # type: ignore[no-any-return]


def _outliers(layer: QuantizedLinear, x: Tensor) -> Tensor:
    assert layer.activation is not None
    assert layer.activation.outlier_threshold is not None
    return llm_int8_linear(  # type: ignore[no-any-return]
        x, layer.data, layer.scale, layer.bias, layer.activation.outlier_threshold
    )


def _rounded(product: Run) -> Run:
    """A product in float32 of the rounded input, whose values 16 bits do not hold; of the input as it is without."""

    def run(layer: QuantizedLinear, x: Tensor) -> Tensor:
        if layer.activation is None:
            return product(layer, x)
        return product(layer, quantize_activation(x, layer.activation, layer.input_scale)).to(x.dtype)

    return run


@_rounded
def _grouped(layer: QuantizedLinear, x: Tensor) -> Tensor:
    op = w4a16_linear if layer.data.dtype == torch.uint8 else w8a16_linear
    return op(x, layer.data, layer.scale, layer.zero, layer.bias)  # type: ignore[no-any-return]


@_rounded
def _floats(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return float_linear(x, layer.data, layer.scale, layer.global_scale, layer.bias)  # type: ignore[no-any-return]


@_rounded
def _decoded(layer: QuantizedLinear, x: Tensor) -> Tensor:
    if layer.plain:
        return w8a16_linear_ref(x, layer.data, layer.scale, layer.zero, layer.bias)
    blocks = layer.format.granularity == "block"
    return decoded_linear(  # type: ignore[no-any-return]
        x, layer.data, layer.scale, layer.zero, layer.global_scale, layer.bias, blocks
    )


def _multiplies_scaled(layer: QuantizedLinear) -> bool:
    """Whether a GPU kernel multiplies the rounded elements themselves: both 8 bits, of one kind, scales outside."""
    weight, activation = layer.format, layer.activation
    if not _on_gpu(layer) or activation is None or (weight.bits, activation.bits) != (8, 8):
        return False
    if weight.kind != activation.kind or activation.outlier_threshold is not None or layer.zero is not None:
        return False
    if weight.kind == "int":
        plain = weight.granularity == "channel" and activation.granularity != "group"
        return (
            plain
            and layer.in_features < INT32_COLUMNS
            and (not activation.dynamic or activation.granularity == "token")
        )
    return activation.granularity != "tensor" or not activation.dynamic


def _on_gpu(layer: QuantizedLinear) -> bool:
    return layer.data.device.type == "cuda" and triton is not None


def _takes_outliers(layer: QuantizedLinear) -> bool:
    activation = layer.activation
    found = activation is not None and activation.outlier_threshold is not None and layer.zero is None
    return _on_gpu(layer) and found and layer.data.dtype == torch.int8 and layer.format.granularity == "channel"


PLANS: dict[str, tuple[Callable[[QuantizedLinear], bool], Run]] = {
    "integers": (lambda layer: layer.int8_group is not None, _integers),
    "scaled": (_multiplies_scaled, _scaled),
    "outliers": (_takes_outliers, _outliers),
    "grouped": (lambda layer: layer.blocked, _grouped),
    "floats": (lambda layer: layer.floats, _floats),
    "decoded": (lambda _: True, _decoded),
}
"""How a layer may run, best first: when, and what is called.

integers: a CPU rounds the input to int8 and multiplies integers. scaled: a GPU multiplies the 8-bit elements of both.
outliers: LLM.int8. grouped, floats: weights are decoded in registers, for a rounded input in float32. decoded: they are
decoded in memory first, which is right for every format and fast for none.
"""
