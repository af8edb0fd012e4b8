"""Linear layer with 8-bit weights and 16- or 32-bit activations.

`y = x Ŵᵀ + b`, `Ŵ[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`, `g = k // group`.

    x      [..., K] float32, bfloat16 or float16
    data   [N, K] int8
    scale  [N, G] float32;  zero [N, G] float32 in units of q, absent when symmetric
    bias   [N], the activation type

K and the group are multiples of 32 for the compiled kernel; the reference takes any. Accumulates in float32 and
rounds once. Moves at least N K + 4 N G bytes of weights. Runs on a CPU and on a CUDA device as `w4a16_linear` does.
"""

from __future__ import annotations

from torch import Tensor

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import dequantized_linear, linear_fake
from optimizer.backends.kernels.weight_only import build, weight_only_cuda


def w8a16_linear_ref(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """The specification: decode to float32, multiply, round once to the type of `x`."""
    return dequantized_linear(x, data, scale, zero, bias)


def _w8a16_linear_cuda(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    return weight_only_cuda(x, data, scale, zero, bias, bits=8)


w8a16_linear = define(
    "w8a16_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias) -> Tensor",
    w8a16_linear_ref,
    linear_fake,
    cuda=_w8a16_linear_cuda,
)

SHIPPED = (
    *(build(f"channel-wise, up to {rows} rows", 8, rows) for rows in (8, 16, 32, 64)),
    build("g128 asymmetric, up to 8 rows", 8, 8, groups=32, asym=True),
)
