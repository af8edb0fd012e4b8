"""Inputs of a layer rounded to 8 bits, with a scale for each row or group of it: what the 8-bit products multiply.

`q = round(x / s)`, `s = max |x| / 127.5` (int8, clamped) or `max |x| / 448` (e4m3, saturating), ties to even.

    x      [..., K] float32, bfloat16 or float16, rows contiguous
    q      [..., K] int8 or float8_e4m3fn;  scale [..., K / group] float32 (group -1: the whole row)

Rounds to the bit as `optimizer.quant.activations.activation_elements` does on a CPU: a zero scale becomes the float32
epsilon, and a value that is not finite makes the scale of its group NaN and leaves q undefined there. Computed in
float32. Moves at least K (bytes of x + 1) a row.

A program takes a few rows or groups, which stay in registers up to 16,384 values and are else read twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import (
    SIZES,
    Rows,
    as_bytes,
    as_rows,
    check_format,
    check_rows,
    elements,
    magnitude,
    rounding_of,
    row_scale,
)
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements
from optimizer.quant.formats import ActivationFormat

GROUPS = Rows(128, rows=16)
"""Sixteen groups of up to 128 values a program; not yet measured."""


def quantize_rows_ref(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The specification."""
    _check(x, group, dtype)
    kind: Any = "int" if dtype == torch.int8 else "float"
    granularity: Any = "token" if group == -1 else "group"
    q, scale, _ = activation_elements(x, ActivationFormat(8, kind, granularity, group_size=group))
    return q, scale


def _check(x: Tensor, group: int, dtype: torch.dtype) -> None:
    check_format("quantize_rows", dtype)
    check_rows("quantize_rows", x)
    if group != -1 and (group < 1 or x.shape[-1] % group):
        raise UsageError(f"groups of {group} do not divide {x.shape[-1]} features. Use -1 for one scale a row.")


@jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    q_ptr,
    scale_ptr,
    skip_ptr,
    segments,
    K,
    group,
    x_stride,
    QUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1], rows or groups of them
    groups = K // group
    row = segment // groups
    first = segment % groups * group
    largest = tl.zeros((ROWS, 1), dtype=tl.int32)
    for start in range(0, bound(group) if WIDE else 1, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        inside = (segment < segments) & (k < group)
        size = magnitude(tl.load(x_ptr + row * x_stride + first + k, mask=inside, other=0.0))
        if skip_ptr is not None:
            size = tl.where(tl.load(skip_ptr + first + k, mask=inside, other=0) != 0, 0, size)
        largest = tl.maximum(largest, tl.max(size, axis=1)[:, None])
    scale = row_scale(largest, QUANTIZE)
    tl.store(scale_ptr + segment, scale, mask=segment < segments)
    for start in range(0, bound(group) if WIDE else 1, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        inside = (segment < segments) & (k < group)
        x = tl.load(x_ptr + row * x_stride + first + k, mask=inside, other=0.0)
        if skip_ptr is not None:
            x = tl.where(tl.load(skip_ptr + first + k, mask=inside, other=0) != 0, 0.0, x)
        tl.store(q_ptr + row * K + first + k, elements(x, scale, QUANTIZE), mask=inside)


def _quantize_rows_cuda(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(x, group, dtype)
    return launch(x, group, dtype)


def launch(x: Tensor, group: int, dtype: torch.dtype, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kernel; columns in which `skip [K]` bool is True count as zeros."""
    k = x.shape[-1]
    group = k if group == -1 else group
    q = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], k // group), dtype=torch.float32)
    if not x.numel():
        return q, scale
    rows = as_rows(x)
    size = _size(group)
    _quantize_rows_kernel[(-(-scale.numel() // size.rows),)](
        rows, as_bytes(q), scale, skip, scale.numel(), k, group, rows.stride(0), QUANTIZE=rounding_of(x, dtype),
        **size.constants, num_warps=size.warps,
    )  # fmt: skip
    return q, scale


def _size(group: int) -> Rows:
    return next((size for size in (GROUPS, *SIZES) if group <= size.block and not size.wide), SIZES[-1])


def _fake(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = 1 if group == -1 else x.shape[-1] // group
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


quantize_rows = define(
    "quantize_rows(Tensor x, int group, ScalarType dtype) -> (Tensor, Tensor)",
    quantize_rows_ref,
    _fake,
    cuda=_quantize_rows_cuda,
)

_COMMON = (GROUPS, SIZES[2])
_BUILDS: tuple[tuple[Rows, str, str, tuple[int, ...]], ...] = (
    *((size, "int8", "*i8", (80, 90, 100)) for size in (GROUPS, *SIZES)),
    *((size, "fp8", "*u8", (90, 100)) for size in _COMMON),
    *((size, "fp8-bits", "*u8", (80,)) for size in _COMMON),
)

SHIPPED = tuple(
    Shipped(
        _quantize_rows_kernel,
        f"{rounding} {size.rows} × {size.block}" + (", wide" if size.wide else ""),
        {"x_ptr": "*bf16", "q_ptr": elements_type, "scale_ptr": "*fp32"}
        | dict.fromkeys(("segments", "K", "group", "x_stride"), "i32"),
        {"skip_ptr": None, "QUANTIZE": rounding, **size.constants},
        num_warps=size.warps,
        unaligned=("segments",),
        expects=("load128", "no-atomics"),
        registers=128,
        targets=targets,
    )
    for size, rounding, elements_type, targets in _BUILDS
)
