"""RMSNorm, alone or with the residual addition before it and the rounding to 8 bits after it.

`y = x · (mean(x²) + eps)^-½ · (weight + offset)`, over the last dimension; Zhang and Sennrich, arXiv:1910.07467.

    x, residual  [..., N] float32, bfloat16 or float16
    weight       [N] any float;  offset is 0 for Llama, 1 for Gemma
    sum          [..., N] x + residual in the type of x, as the model's own addition rounds it: what is normalized
    q, scale     [..., N] int8 or e4m3 and [..., 1] float32: y, rounded to the type of x, then per token as
                 `quant.activations` rounds

Everything in between is float32. For M rows of b bytes an element at least `2 M N b` bytes move; with the addition
`4 M N b`; with the rounding M N of those b are 1. Separate kernels would read and write the row again for each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl, triton
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import (
    as_bytes,
    as_rows,
    check_format,
    check_rows,
    elements,
    load_sum,
    magnitude,
    quantize_rows_ref,
    quantized_fake,
    rounded,
    rounding_of,
    row_builds,
    row_scale,
    rows_for,
)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The specification: in float32, rounded once."""
    check_rows("rms_norm", x, weight=weight)
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return y.to(x.dtype).contiguous()


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The sum is rounded before it is normalized."""
    check_rows("add_rms_norm", x, residual)
    total = (x + residual).contiguous()
    return rms_norm_ref(total, weight, eps, offset), total


def rms_norm_quantize_ref(
    x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm, then the rounding."""
    check_format("rms_norm_quantize", dtype)
    return quantize_rows_ref(rms_norm_ref(x, weight, eps, offset), dtype)


def add_rms_norm_quantize_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The addition, then the norm, then the rounding."""
    check_format("add_rms_norm_quantize", dtype)
    y, total = add_rms_norm_ref(x, residual, weight, eps, offset)
    return *quantize_rows_ref(y, dtype), total


@jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    sum_ptr,
    m,
    n,
    x_stride,
    residual_stride,
    eps,
    offset,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kind = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        x = load_sum(x_ptr, residual_ptr, column, (row < m) & (column < n), ADD)
        squares += x * x
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1, keep_dims=True) / n + eps))  # [ROWS, 1]

    if QUANTIZE != "none":
        sizes = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, bound(n) if WIDE else 1, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            x = load_sum(x_ptr, residual_ptr, column, (row < m) & (column < n), ADD)
            weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, magnitude(rounded(x * inverse * (weight + offset), kind)))
        scale = row_scale(tl.max(sizes, 1, keep_dims=True), QUANTIZE)

    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < m) & (column < n)
        x = load_sum(x_ptr, residual_ptr, column, inside, ADD)
        weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        y = rounded(x * inverse * (weight + offset), kind)
        if ADD:
            tl.store(sum_ptr + row * n + column, rounded(x, kind), mask=inside)
        if QUANTIZE != "none":
            y = elements(y, scale, QUANTIZE)
        tl.store(out_ptr + row * n + column, y, mask=inside)
    if QUANTIZE != "none":
        tl.store(scale_ptr + row, scale, mask=row < m)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y or q, scale, sum)`; what was not asked for is empty."""
    check_rows("rms_norm", x, residual, weight=weight)
    out, scale = quantized_fake(x, dtype) if dtype else (x.new_empty(x.shape), x.new_empty(0))
    total = x.new_empty(x.shape if residual is not None else 0)
    n = x.shape[-1]
    m = x.numel() // n
    if m:
        rows = as_rows(x)
        others = rows if residual is None else as_rows(residual)
        size = rows_for(n)
        _rms_norm_kernel[(triton.cdiv(m, size.rows),)](
            rows, others, weight.contiguous(), as_bytes(out), scale, total, m, n, rows.stride(0), others.stride(0),
            eps, offset, ADD=residual is not None, QUANTIZE=rounding_of(x, dtype), **size.constants,
            num_warps=size.warps,
        )  # fmt: skip
    return out, scale, total


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _launch(x, None, weight, eps, offset, None)[0]


def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, total = _launch(x, residual, weight, eps, offset, None)
    return y, total


def _rms_norm_quantize_cuda(
    x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_format("rms_norm_quantize", dtype)
    return _launch(x, None, weight, eps, offset, dtype)[:2]


def _add_rms_norm_quantize_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    check_format("add_rms_norm_quantize", dtype)
    return _launch(x, residual, weight, eps, offset, dtype)


rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    rms_norm_ref,
    lambda x, *_: x.new_empty(x.shape),
    cuda=_rms_norm_cuda,
)
add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    add_rms_norm_ref,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    cuda=_add_rms_norm_cuda,
)
rms_norm_quantize = define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, float offset, ScalarType dtype) -> (Tensor, Tensor)",
    rms_norm_quantize_ref,
    lambda x, *rest: quantized_fake(x, rest[-1]),
    cuda=_rms_norm_quantize_cuda,
)
add_rms_norm_quantize = define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, float offset, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    add_rms_norm_quantize_ref,
    lambda x, *rest: (*quantized_fake(x, rest[-1]), x.new_empty(x.shape)),
    cuda=_add_rms_norm_quantize_cuda,
)


def _shipped() -> tuple[Shipped, ...]:
    """Each size with the most that a launch asks of it, and the other roundings at the size of most models."""
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), "*bf16")
    numbers = {"m": "i32", "n": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32", "offset": "fp32"}
    return tuple(
        Shipped(
            _rms_norm_kernel,
            f"add, {rounding}, {'wide' if size.wide else size.block}",
            pointers | {"out_ptr": out, "scale_ptr": "*fp32", "sum_ptr": "*bf16"} | numbers,
            {"ADD": True, "QUANTIZE": rounding, **size.constants},
            num_warps=size.warps,
            unaligned=("m",),
            expects=("load128", "no-atomics"),
            registers=128,
            targets=targets,
        )
        for size, rounding, out, targets in row_builds()
    )


SHIPPED = _shipped()
