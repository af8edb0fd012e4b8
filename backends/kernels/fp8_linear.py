"""Linear layer on 8-bit floats (e4m3): inputs and weights.

`y[m, n] = Σ_k q[m, k] data[n, k] · q_scale[m, k / 128] · scale[n / 128, k / 128] + bias[n]`

    q        [..., K] float8_e4m3fn, with q_scale float32 [..., 1], [..., K / 128], or [1] for a static one
    data     [N, K] float8_e4m3fn, with scale float32 [N, 1], [1, 1] or [⌈N / 128⌉, ⌈K / 128⌉]
    bias     [N], any float type

Products are exact in float32; sums are float32, block scales applied to the sum of their 128 columns. Rounded once to
`dtype`. Moves at least N K bytes of weights.

On a GPU with e4m3 (compute capability 8.9): a GEMV for one row, Triton's tiles for few rows and wherever scales are by
blocks, `torch._scaled_mm` (cuBLAS, CUTLASS) without its fast accumulation for many rows where it takes shapes and
types, else Triton. Elsewhere the reference. FP8: arXiv:2209.05433; blocks: arXiv:2412.19437 section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.int8_linear import scaled_sums
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.scaled_matmul import FEW_ROWS, kernel_for, multiply
from optimizer.backends.kernels.scaled_operands import Operands, operands, scaled_linear_fake
from optimizer.quant.formats import BLOCK

SCALED_MM_ROWS = FEW_ROWS + 1
"""The fewest rows for `torch._scaled_mm`; not yet measured."""

SCALED_MM_MULTIPLE = 16
"""What `torch._scaled_mm` wants K and N to be multiples of."""

FP8_CAPABILITY = (8, 9)
"""The compute capability from which there are instructions for e4m3."""


def fp8_linear_ref(
    q: Tensor, q_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The specification: float32 sums of 128 columns under their scales, or of all K under those of rows."""
    return _reference(operands(q, q_scale, data, scale, bias, dtype, torch.float8_e4m3fn), dtype)


def _reference(op: Operands, dtype: torch.dtype) -> Tensor:
    if not op.blocks:
        return scaled_sums(op.a.float() @ op.b.float().t(), op, dtype)
    k = op.a.shape[1]
    total = torch.zeros(len(op.a), len(op.b), device=op.a.device)
    for block in range(-(-k // BLOCK)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        a_scale, b_scale = (s[:, block if s.shape[1] > 1 else 0].unsqueeze(1) for s in (op.a_scale, op.b_scale))
        b_scale = b_scale.repeat_interleave(op.b_rows, 0)[: len(op.b)]
        total += op.a[:, part].float() @ op.b[:, part].float().t() * a_scale * b_scale.t()
    return (total if op.bias is None else total + op.bias.float()).to(dtype).view(op.shape)


def gpu_kernel(
    rows: int,
    n: int,
    k: int,
    *,
    blocks: bool,
    tensor_scales: bool,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    capability: tuple[int, int] | None,
) -> str:
    """What runs on a GPU: `gemv`, `few_rows`, `scaled_mm` (torch), `gemm` (Triton), or `reference` without e4m3.

    `blocks` says whether scales change along K, `tensor_scales` whether each side has a single one. A `capability` of
    None is Triton's interpreter, which has its kernels only.
    """
    if capability is not None and capability < FP8_CAPABILITY:
        return "reference"
    shapes = rows >= SCALED_MM_ROWS and k > 0 and n % SCALED_MM_MULTIPLE == k % SCALED_MM_MULTIPLE == 0
    # Scales of rows are sure to come with bfloat16 results only, and a bias in the type of the result.
    types = dtype == torch.bfloat16 or (tensor_scales and dtype == torch.float16)
    if capability is not None and shapes and types and not blocks and bias in (None, dtype):
        return "scaled_mm"
    return kernel_for(rows)


def _fp8_linear_cuda(
    q: Tensor, q_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    op = operands(q, q_scale, data, scale, bias, dtype, torch.float8_e4m3fn)
    tensor_scales = q_scale.numel() == scale.numel() == 1
    kernel = gpu_kernel(
        len(op.a), *op.b.shape, blocks=op.blocks, tensor_scales=tensor_scales, dtype=dtype,
        bias=None if bias is None else bias.dtype,
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
    )  # fmt: skip
    if kernel == "reference":
        return _reference(op, dtype)
    if kernel != "scaled_mm" or not len(op.b):
        return multiply(op, dtype)
    scales = (q_scale.view(1), scale.view(1))
    if not tensor_scales:
        scales = (op.a_scale.contiguous(), op.b_scale.contiguous().t())
    y = torch._scaled_mm(
        op.a.contiguous(), op.b.contiguous().t(), *scales, bias=op.bias, out_dtype=dtype, use_fast_accum=False
    )
    return y.view(op.shape)


fp8_linear = define(
    "fp8_linear(Tensor q, Tensor q_scale, Tensor data, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    fp8_linear_ref,
    scaled_linear_fake,
    cuda=_fp8_linear_cuda,
)
