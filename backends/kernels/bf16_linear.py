"""Linear layer with bfloat16 weights, on a CPU and for few rows on a GPU.

`y = x Wᵀ + b`, `x [..., K]` of any floating type, `weight [N, K]` bfloat16, `bias [N]`. Accumulates in float32 and
rounds once to the type of `x`. Moves at least 2 N K bytes of weights. Without AVX512-BF16 or AMX, ATen's bfloat16
GEMM runs at an eighth of the float32 rate (19 against 133 GFLOP/s at 256 × 1024 × 1024 on two Zen 3 cores), so the
weight is widened instead: in registers for few rows, once into a buffer for sgemm above. Where the processor has
AVX512-BF16, 8 and more rows are multiplied by it, in blocks (`bf16_gemm.h`). On a CUDA device
(`weight_only.py`) up to 64 rows of bfloat16 run on the tensor cores with K split; everything else is cuBLAS, on the
weight in the type of `x`.
"""

from __future__ import annotations

from torch import Tensor

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import float32_linear, linear_fake
from optimizer.backends.kernels.weight_only import build, weight_only_cuda


def bf16_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification: float32 product of the exact operands, rounded once."""
    return float32_linear(x, weight.float(), bias)


def _bf16_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight_only_cuda(x, weight, None, None, bias, bits=16)


bf16_linear = define(
    "bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    bf16_linear_ref,
    linear_fake,
    cuda=_bf16_linear_cuda,
)

SHIPPED = tuple(build(f"up to {rows} rows", 16, rows) for rows in (8, 16, 32, 64))
