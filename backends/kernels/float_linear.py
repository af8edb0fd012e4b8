"""Linear layer with 8- or 4-bit floating-point weights: e4m3 or e2m1 elements under scales.

`y = x Ŵᵀ + b`, `Ŵ[n, k] = element[n, k] * scale[n, g] / global_scale`, `g = k // group`.

    x      [..., K] float32, bfloat16 or float16
    data   [N, K] float8_e4m3fn, or [N, K / 2] uint8: codes of e2m1 in the block order of `w4a16_linear`
    scale  [N, G] float32, float8_e4m3fn or float8_e8m0fnu;  global_scale [1] float32, where scales are bytes
    bias   [N], the activation type

K is a multiple of 32, and so is the group; 4-bit weights may have groups of 16 (NVFP4). Accumulates in float32 and
rounds once. Moves at least N K (or N K / 2) + N G (or 4 N G) bytes of weights. On a CPU (`cpu/float.h`) it runs as
`w4a16_linear` does: elements are decoded in registers for fewer than 16 rows, once for more. A GPU decodes the weight
to the type of `x` and calls cuBLAS: right, and no faster than 16 bits.

That kernel takes no NaN: e4m3 bytes 0x7f and 0xff decode to ±480 there. `has_nan` finds them when a layer is built.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import float32_linear, linear_fake
from optimizer.backends.kernels.w4a16_linear import pack_int4, unpack_int4
from optimizer.quant.formats import FLOATS
from optimizer.quant.weight import from_elements

BLOCK = 32


def pack_float4(codes: Tensor) -> Tensor:
    """Codes of e2m1 `[N, K]` uint8 to `data [N, K / 2]` in block order."""
    return pack_int4(codes.to(torch.int8) - 8)


def unpack_float4(data: Tensor) -> Tensor:
    """The inverse of `pack_float4`."""
    return (unpack_int4(data) + 8).to(torch.uint8)


def takes(data_bits: int, k: int, groups: int) -> bool:
    """Whether `groups` scales a row suit the kernel for weights of `k` columns."""
    smallest = 16 if data_bits == 4 else BLOCK
    group = k // groups
    return k % BLOCK == 0 and k % groups == 0 and (group % BLOCK == 0 or group == smallest)


def has_nan(data: Tensor) -> bool:
    """Whether an e4m3 weight holds NaN; other elements cannot."""
    return data.dtype == torch.float8_e4m3fn and bool(((data.view(torch.uint8) & 0x7F) == 0x7F).any())


def _decoded(data: Tensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The weight as float32 `[N, K]`."""
    scale = scale.float() if global_scale is None else scale.float() * (1 / global_scale)
    packed = data.dtype == torch.uint8
    values = from_elements(unpack_float4(data), FLOATS["mxfp4"]) if packed else data.float()
    return (values.view(len(data), scale.shape[1], -1) * scale.unsqueeze(-1)).view(len(data), -1)


def float_linear_ref(
    x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The specification: decode to float32, multiply, round once to the type of `x`."""
    return float32_linear(x, _decoded(data, scale, global_scale), bias)


def _float_linear_cuda(
    x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Decode, and call cuBLAS in the type of `x`."""
    return F.linear(x, _decoded(data, scale, global_scale).to(x.dtype), None if bias is None else bias.to(x.dtype))


float_linear = define(
    "float_linear(Tensor x, Tensor data, Tensor scale, Tensor? global_scale, Tensor? bias) -> Tensor",
    float_linear_ref,
    linear_fake,
    cuda=_float_linear_cuda,
)
