"""LayerNorm, alone or with the residual addition before it and the rounding to 8 bits after it.

`y = (x - μ) · (σ² + eps)^-½ · weight + bias`, over the last dimension; Ba, Kiros and Hinton, arXiv:1607.06450.

    x, residual   [..., N] float32, bfloat16 or float16
    weight, bias  [N] any float, or absent
    sum           [..., N] x + residual in the type of x, as the model's own addition rounds it: what is normalized
    q, scale      [..., N] int8 or e4m3 and [..., 1] float32: y, rounded to the type of x, then per token as
                  `quant.activations` rounds

Everything in between is float32. The variance is the corrected two-pass one (Chan, Golub and LeVeque, 1983): with
`c = x - m` for a rounded mean m, `μ = m + Σc / N` and `σ² = (Σc² - (Σc)² / N) / N`. What the rounding of m leaves is in
Σc, so a mean of 10⁴ costs no digit. For M rows of b bytes an element at least `2 M N b` bytes move; with the addition
`4 M N b`; with the rounding M N of those b are 1.
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


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The specification: in float32, rounded once. Centring twice leaves nothing of a rounded mean."""
    check_rows("layer_norm", x, weight=weight, bias=bias)
    centred = x.float()
    for _ in range(2):
        centred = centred - centred.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).contiguous()


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum is rounded before it is normalized."""
    check_rows("add_layer_norm", x, residual)
    total = (x + residual).contiguous()
    return layer_norm_ref(total, weight, bias, eps), total


def layer_norm_quantize_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm, then the rounding."""
    check_format("layer_norm_quantize", dtype)
    return quantize_rows_ref(layer_norm_ref(x, weight, bias, eps), dtype)


def add_layer_norm_quantize_ref(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The addition, then the norm, then the rounding."""
    check_format("add_layer_norm_quantize", dtype)
    y, total = add_layer_norm_ref(x, residual, weight, bias, eps)
    return *quantize_rows_ref(y, dtype), total


@jit
def _normed(x, mean, inverse, weight_ptr, bias_ptr, column, n, WEIGHT: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm of elements `x` in float32, given the mean in its two parts."""
    y = (x - mean[0] - mean[1]) * inverse
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    return y


@jit
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    sum_ptr,
    m,
    n,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kind = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        sums += load_sum(x_ptr, residual_ptr, column, (row < m) & (column < n), ADD)
    rough = tl.sum(sums, 1, keep_dims=True) / n  # [ROWS, 1]

    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        x = load_sum(x_ptr, residual_ptr, column, (row < m) & (column < n), ADD)
        centred = tl.where(column < n, x - rough, 0.0)
        sums += centred
        squares += centred * centred
    mean = (rough, tl.sum(sums, 1, keep_dims=True) / n)
    variance = tl.sum(squares, 1, keep_dims=True) / n - mean[1] * mean[1]
    variance = tl.where(variance < 0, 0.0, variance)  # a constant row's may be; NaN stays
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))

    if QUANTIZE != "none":
        sizes = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, bound(n) if WIDE else 1, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            x = load_sum(x_ptr, residual_ptr, column, (row < m) & (column < n), ADD)
            y = rounded(_normed(x, mean, inverse, weight_ptr, bias_ptr, column, n, WEIGHT, BIAS), kind)
            sizes = tl.maximum(sizes, tl.where(column < n, magnitude(y), 0))
        scale = row_scale(tl.max(sizes, 1, keep_dims=True), QUANTIZE)

    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < m) & (column < n)
        x = load_sum(x_ptr, residual_ptr, column, inside, ADD)
        y = rounded(_normed(x, mean, inverse, weight_ptr, bias_ptr, column, n, WEIGHT, BIAS), kind)
        if ADD:
            tl.store(sum_ptr + row * n + column, rounded(x, kind), mask=inside)
        if QUANTIZE != "none":
            y = elements(y, scale, QUANTIZE)
        tl.store(out_ptr + row * n + column, y, mask=inside)
    if QUANTIZE != "none":
        tl.store(scale_ptr + row, scale, mask=row < m)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y or q, scale, sum)`; what was not asked for is empty."""
    check_rows("layer_norm", x, residual, weight=weight, bias=bias)
    out, scale = quantized_fake(x, dtype) if dtype else (x.new_empty(x.shape), x.new_empty(0))
    total = x.new_empty(x.shape if residual is not None else 0)
    n = x.shape[-1]
    m = x.numel() // n
    if m:
        rows = as_rows(x)
        others = rows if residual is None else as_rows(residual)
        gain, shift = (rows if t is None else t.contiguous() for t in (weight, bias))
        size = rows_for(n)
        _layer_norm_kernel[(triton.cdiv(m, size.rows),)](
            rows, others, gain, shift, as_bytes(out), scale, total, m, n, rows.stride(0), others.stride(0), eps,
            ADD=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
            QUANTIZE=rounding_of(x, dtype), **size.constants, num_warps=size.warps,
        )  # fmt: skip
    return out, scale, total


def _layer_norm_cuda(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, weight, bias, eps)[0]


def _add_layer_norm_cuda(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y, _, total = _launch(x, residual, weight, bias, eps)
    return y, total


def _layer_norm_quantize_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_format("layer_norm_quantize", dtype)
    return _launch(x, None, weight, bias, eps, dtype)[:2]


def _add_layer_norm_quantize_cuda(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    check_format("add_layer_norm_quantize", dtype)
    return _launch(x, residual, weight, bias, eps, dtype)


layer_norm = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    layer_norm_ref,
    lambda x, *_: x.new_empty(x.shape),
    cuda=_layer_norm_cuda,
)
add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    add_layer_norm_ref,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    cuda=_add_layer_norm_cuda,
)
layer_norm_quantize = define(
    "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    layer_norm_quantize_ref,
    lambda x, *rest: quantized_fake(x, rest[-1]),
    cuda=_layer_norm_quantize_cuda,
)
add_layer_norm_quantize = define(
    "add_layer_norm_quantize(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    add_layer_norm_quantize_ref,
    lambda x, *rest: (*quantized_fake(x, rest[-1]), x.new_empty(x.shape)),
    cuda=_add_layer_norm_quantize_cuda,
)


def _shipped() -> tuple[Shipped, ...]:
    """Each size with the most that a launch asks of it, and the other roundings at the size of most models."""
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    numbers = {"m": "i32", "n": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    return tuple(
        Shipped(
            _layer_norm_kernel,
            f"add, {rounding}, {'wide' if size.wide else size.block}",
            pointers | {"out_ptr": out, "scale_ptr": "*fp32", "sum_ptr": "*bf16"} | numbers,
            {"ADD": True, "WEIGHT": True, "BIAS": True, "QUANTIZE": rounding, **size.constants},
            num_warps=size.warps,
            unaligned=("m",),
            expects=("load128", "no-atomics"),
            registers=128,
            targets=targets,
        )
        for size, rounding, out, targets in row_builds()
    )


SHIPPED = _shipped()
