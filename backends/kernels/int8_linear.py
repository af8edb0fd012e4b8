"""Linear layer on 8-bit integers: inputs and weights, one scale a row each.

`y[m, n] = (Σ_k q[m, k] data[n, k]) q_scale[m] scale[n] + bias[n]`

    q        [..., K] int8, with q_scale [..., 1] float32, or [1] for a static one
    data     [N, K] int8, with scale [N, 1] float32
    bias     [N], any float type

Sums are 32-bit integers, so exact, for K < 2^17; scaled in float32 and rounded once to `dtype`. Moves at least N K
bytes of weights.

On a GPU: a GEMV for one row, Triton's tiles for few, `torch._int_mm` (cuBLAS) and a scaling kernel for many rows in
the shapes it takes, else Triton. On a CPU the reference: float32 products of 1024 columns, whose integer sums stay
within 1024 · 128² = 2^24 and are exact in any order. (`torch._int_mm` is a plain loop there without VNNI.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.scaled_matmul import FEW_ROWS, combine, kernel_for, multiply
from optimizer.backends.kernels.scaled_operands import Operands, operands, scaled_linear_fake

EXACT_COLUMNS = 1024
"""Products of two int8 whose sum float32 holds exactly: 1024 · 128² = 2^24."""

INT_MM_ROWS = FEW_ROWS + 1
"""The fewest rows for `torch._int_mm`, which takes no fewer than 17; not yet measured against Triton."""


def int8_linear_ref(
    q: Tensor, q_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The specification: exact integer sums, scaled in float32, rounded once."""
    op = operands(q, q_scale, data, scale, bias, dtype, torch.int8)
    return scaled_sums(int8_sums(op.a, op.b), op, dtype)


def int8_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, K]` by `b [N, K]`, int8, as exact int32 `[M, N]`."""
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], EXACT_COLUMNS):
        part = slice(first, first + EXACT_COLUMNS)
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


def scaled_sums(total: Tensor, op: Operands, dtype: torch.dtype) -> Tensor:
    """Sums `[M, N]` under the scales of rows, plus the bias, as y of type `dtype`."""
    y = total.float() * op.a_scale * op.b_scale.t()
    return (y if op.bias is None else y + op.bias.float()).to(dtype).view(op.shape)


def gpu_kernel(rows: int, n: int, k: int) -> str:
    """What runs on a GPU: `gemv`, `few_rows`, `int_mm` (cuBLAS) or `gemm` (Triton)."""
    if rows >= INT_MM_ROWS and k and n % 8 == k % 8 == 0:
        return "int_mm"
    return kernel_for(rows)


def _int8_linear_cuda(
    q: Tensor, q_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return launch(operands(q, q_scale, data, scale, bias, dtype, torch.int8), dtype)


def launch(op: Operands, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """Run what `gpu_kernel` says; `addend [M, N]` float32 joins the sums once they are scaled by `a_scale`."""
    if gpu_kernel(len(op.a), *op.b.shape) != "int_mm" or not len(op.b):
        return multiply(op, dtype, addend)
    total = torch._int_mm(op.a.contiguous(), op.b.contiguous().t())
    return combine(total.unsqueeze(0), op, dtype, addend)


int8_linear = define(
    "int8_linear(Tensor q, Tensor q_scale, Tensor data, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    int8_linear_ref,
    scaled_linear_fake,
    cuda=_int8_linear_cuda,
)
