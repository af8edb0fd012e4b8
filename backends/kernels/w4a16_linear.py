"""Linear layer with 4-bit weights in groups and 16- or 32-bit activations.

`y = x Ŵᵀ + b`, `Ŵ[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`, `g = k // group`.

    x      [..., K] float32, bfloat16 or float16
    data   [N, K / 2] uint8: blocks of 32 weights are 16 bytes, byte i holding weight i (low) and i + 16 (high),
           each stored as q + 8
    scale  [N, G] float32;  zero [N, G] float32 in units of q, absent when symmetric
    bias   [N], the activation type

K and the group are multiples of 32. Accumulates in float32 and rounds once. Moves at least N K / 2 + 4 N G bytes
of weights. On a CPU (`cpu/linear.h`): a few rows run as a GEMV that decodes weights in registers; more decode the
weight once, for sgemm from 16 rows on. With bfloat16 activations and instructions our own GEMM starts at 8 rows, on
weights that are not rounded (`cpu/bf16_gemm.h`); with AMX it is ATen's, on the weight rounded to bfloat16.
On a CUDA device (`weight_only.py`): up to 64 rows of 16 bits multiply on the tensor cores while the weight is decoded
in registers, from this same layout; everything else decodes the weight once and calls cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import dequantized_linear, linear_fake
from optimizer.backends.kernels.weight_only import build, weight_only_cuda

BLOCK = 32


def pack_int4(q: Tensor) -> Tensor:
    """`q [N, K]` int8 in -8..7 to `data [N, K / 2]` uint8 in block order."""
    rows, k = q.shape
    pairs = (q + 8).to(torch.uint8).view(rows, k // BLOCK, 2, BLOCK // 2)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, k // 2)


def unpack_int4(data: Tensor) -> Tensor:
    """The inverse of `pack_int4`: `[N, K / 2]` uint8 to `[N, K]` int8."""
    rows, half = data.shape
    blocks = data.view(rows, half * 2 // BLOCK, 1, BLOCK // 2)
    return (torch.cat([blocks & 15, blocks >> 4], dim=2).to(torch.int8) - 8).reshape(rows, half * 2)


def w4a16_linear_ref(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """The specification: decode to float32, multiply, round once to the type of `x`."""
    return dequantized_linear(x, unpack_int4(data), scale, zero, bias)


def _w4a16_linear_cuda(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    return weight_only_cuda(x, data, scale, zero, bias, bits=4)


w4a16_linear = define(
    "w4a16_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias) -> Tensor",
    w4a16_linear_ref,
    linear_fake,
    cuda=_w4a16_linear_cuda,
)

SHIPPED = (
    *(build(f"g128, up to {rows} rows", 4, rows, groups=32) for rows in (8, 16, 32, 64)),
    build("g128, up to 8 rows, whole K", 4, 8, groups=32, split=False),
    build("g128 asymmetric, up to 8 rows", 4, 8, groups=32, asym=True),
    build("g128 asymmetric, up to 64 rows", 4, 64, groups=32, asym=True),
    build("g64, up to 8 rows", 4, 8, groups=64),
    build("channel-wise, up to 8 rows", 4, 8),
    build("g128 float16, up to 8 rows", 4, 8, groups=32, dtype=torch.float16),
)
