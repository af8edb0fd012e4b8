"""Linear layer with inputs rounded to int8 on the fly, and 4- or 8-bit integer weights: a product of integers.

`y[m, n] = Σ_s  a[m, s] · w[n, s] · Σ_{k in s} x̂[m, k] (q[n, k] - zero[n, s])  + b[n]`, where `s` runs over the
stretches of K that share both scales.

    x      [..., K] float32, bfloat16 or float16, rounded as `optimizer.quant.activations` does: int8, symmetric,
           a = max |x| / 127.5 over `group` values of a token (-1: the token), ties to even
    data   [N, K] int8, or [N, K / 2] uint8 in the block order of `w4a16_linear.py`
    scale  [N, G] float32 (w);  zero [N, G] float32 in units of q, absent when symmetric
    bias   [N], the activation type;  y [..., N] in the type of x

K, the weight's group and `group` are multiples of 32. Sums of integers are exact in int32 (K at most 2^18), those of
stretches are float32, and the result is rounded once. A value that is not finite makes its output row NaN. Moves at
least N K / 2 + 4 N G bytes for 4-bit weights.

On a CPU (`cpu/int8.h`) the inputs are rounded once, and a weight decoded once serves up to four of them. A sum of
integers is kept in lanes (8, or 16 with AVX-512), which are scaled and added in float32. A row's result does not depend
on the others in its batch; with VNNI, from 8 rows on (`cpu/int8_gemm.h`), it is summed in another order.
The instructions are vpdpbusd where there is VNNI, else vpmaddubsw and vpmaddwd (AVX2),
else what the compiler makes of a loop. It has run with AVX2 alone and with AVX-512 VNNI; AVX-VNNI without AVX-512 has
been compiled but not been run. All that differs there is `multiply` and the width of a vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import linear_fake
from optimizer.backends.kernels.w4a16_linear import BLOCK, unpack_int4
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements
from optimizer.quant.formats import ActivationFormat

MOST_FEATURES = 2**18
"""The largest K whose sums cannot overflow in the compiled kernel."""


def input_format(group: int) -> ActivationFormat:
    """How inputs are rounded: int8 in groups of `group` values of a token, -1 for the whole token."""
    return ActivationFormat() if group == -1 else ActivationFormat(granularity="group", group_size=group)


def dynamic_int8_linear_ref(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """The specification: exact sums of integers under one pair of scales (in float64), added up in float32."""
    if group != -1 and group % BLOCK:
        raise UsageError(f"inputs cannot be rounded in groups of {group}. Use -1, or a multiple of {BLOCK}.")
    rows, k = data.shape[0], x.shape[-1]
    weight = (unpack_int4(data) if data.dtype == torch.uint8 else data).double()
    if zero is not None:
        weight = weight - zero.double().repeat_interleave(k // zero.shape[1], 1)
    q, steps, _ = activation_elements(x.reshape(-1, k), input_format(group))
    size = math.gcd(k // steps.shape[-1], k // scale.shape[1])
    out = x.new_zeros((len(q), rows), dtype=torch.float32)
    for start in range(0, k, size):
        exact = q[:, start : start + size].double() @ weight[:, start : start + size].t()
        step, weight_step = steps[:, start * steps.shape[-1] // k], scale[:, start * scale.shape[1] // k]
        out = out + exact.float() * step.unsqueeze(1) * weight_step
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], rows)


dynamic_int8_linear = define(
    "dynamic_int8_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, int group) -> Tensor",
    dynamic_int8_linear_ref,
    linear_fake,
)
