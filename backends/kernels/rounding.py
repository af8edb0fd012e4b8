"""Rows of activations in Triton: how many a program takes, how they are loaded, and their rounding to 8 bits per token.

The rounding is that of `optimizer.quant.activations`, bit for bit: `s = m / 127.5` (int8) or `m / 448` (fp8 e4m3), `m`
being the largest magnitude of the row; `q = y / s`, rounded to the nearest, ties to even, and clamped. A scale of 0 is
2⁻²³ and one of a row that is not finite is NaN, over elements of 0. Both divisions are IEEE's, not the approximate one.

The kernels walk a row in `range(0, bound(n) if WIDE else 1, BLOCK)`, once for each pass they make over it. Where a row
fits a block these are one iteration each: the compiler merges their loads, and the row stays in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import INTERPRETED, jit, tl
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements
from optimizer.quant.formats import ACTIVATIONS, ActivationFormat

FORMATS: dict[torch.dtype, ActivationFormat] = {
    torch.int8: ACTIVATIONS["int8"],
    torch.float8_e4m3fn: ACTIVATIONS["fp8"],
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rows:
    """The constants of a kernel that takes `ROWS` rows a program, `BLOCK` columns at a time."""

    block: int
    rows: int = 1
    warps: int = 4
    wide: bool = False

    @property
    def constants(self) -> dict[str, int | bool]:
        """As the kernels name them."""
        return {"WIDE": self.wide, "ROWS": self.rows, "BLOCK": self.block}


SIZES = (Rows(256, rows=8), Rows(1024), Rows(4096, warps=8), Rows(16384, warps=16), Rows(4096, warps=16, wide=True))
"""Rows in registers up to 16,384 columns; wider ones are read once for each pass. Narrow rows are the heads' norms."""


def rows_for(n: int) -> Rows:
    """The entry of `SIZES` for rows of `n` columns."""
    return next((size for size in SIZES if n <= size.block and not size.wide), SIZES[-1])


def row_builds() -> list[tuple[Rows, str, str, tuple[int, ...]]]:
    """What a `*_quantize` kernel ships: size, QUANTIZE, type of the output and targets.

    Every size rounding to int8, then the other roundings at the size of most models.
    """
    return [
        *((size, "int8", "*i8", (80, 90, 100)) for size in SIZES),
        (SIZES[2], "none", "*bf16", (80, 90, 100)),
        (SIZES[2], "fp8", "*u8", (90, 100)),
        (SIZES[2], "fp8-bits", "*u8", (80,)),
    ]


def as_rows(x: Tensor) -> Tensor:
    """`x [..., N]` as `[M, N]` with adjacent columns; copied only where its strides do not allow that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_rows(op: str, x: Tensor, other: Tensor | None = None, **vectors: Tensor | None) -> None:
    """`UsageError` unless `x [..., N]` is of a type in `FLOATS`, `other` is like it, and the vectors are floats [N]."""
    if x.dtype not in FLOATS or not x.dim() or not x.shape[-1]:
        raise UsageError(
            f"{op}: x is {x.dtype} {list(x.shape)}, and must be float32, bfloat16 or float16 with 1 column or more."
        )
    if other is not None and (other.dtype, other.shape, other.device) != (x.dtype, x.shape, x.device):
        raise UsageError(
            f"{op}: the second input is {other.dtype} {list(other.shape)} on {other.device}, and must be as x: "
            f"{x.dtype} {list(x.shape)} on {x.device}."
        )
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[-1:] or not vector.is_floating_point() or vector.device != x.device:
            raise UsageError(
                f"{op}: {name} is {vector.dtype} {list(vector.shape)} on {vector.device}, and must be floats "
                f"[{x.shape[-1]}] on {x.device}."
            )


def check_format(op: str, dtype: torch.dtype) -> None:
    """`UsageError` unless rows can be quantized to `dtype`."""
    if dtype not in FORMATS:
        raise UsageError(f"{op}: cannot quantize to {dtype}. Use torch.int8 or torch.float8_e4m3fn.")


def quantize_rows_ref(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The specification: `y [..., N]` as elements of `dtype`, and scales `[..., 1]` float32."""
    q, scale, _ = activation_elements(y, FORMATS[dtype])
    return q, scale


def quantized_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Elements and scales for `x`, uninitialized."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def rounding_of(x: Tensor, dtype: torch.dtype | None) -> str:
    """The kernels' QUANTIZE: "none", "int8", "fp8", or "fp8-bits" on devices that cannot convert to e4m3."""
    if dtype != torch.float8_e4m3fn:
        return "none" if dtype is None else "int8"
    return "fp8" if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9) else "fp8-bits"


def as_bytes(q: Tensor) -> Tensor:
    """e4m3 as the bytes that the kernels write."""
    return q.view(torch.uint8) if q.dtype == torch.float8_e4m3fn else q


@jit
def rounded(x, kind):  # type: ignore[no-untyped-def]
    """Float32 `x` as `kind`, to the nearest with ties to even: Triton's interpreter truncates to bfloat16 instead."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(kind)


@jit
def load_sum(x_ptr, residual_ptr, column, inside, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a row, or of its sum with the residual rounded to their type, as float32; 0 outside."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + column, mask=inside, other=0.0)
        x = rounded(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
    return x.to(tl.float32)


@jit
def magnitude(y):  # type: ignore[no-untyped-def]
    """|y| as the bits of a float32: integers in the same order, with infinity and then NaN above all numbers."""
    return y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def row_scale(largest, QUANTIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 scale of rows whose largest magnitude has these bits."""
    half_range: tl.constexpr = 127.5 if QUANTIZE == "int8" else 448.0
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), half_range)
    scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    return tl.where(largest < 0x7F800000, scale, float("nan"))


@jit
def elements(y, scale, QUANTIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`y / scale` as int8, or as the bytes of e4m3."""
    steps = tl.div_rn(y.to(tl.float32), scale)
    steps = tl.where(steps == steps, steps, 0.0)
    low: tl.constexpr = -128.0 if QUANTIZE == "int8" else -448.0
    high: tl.constexpr = 127.0 if QUANTIZE == "int8" else 448.0
    steps = tl.minimum(tl.maximum(steps, low), high)
    if QUANTIZE == "int8":
        # 1.5 · 2²³ has a last place of 1: adding it rounds to an integer, ties to even.
        q = ((steps + 12582912.0) - 12582912.0).to(tl.int8)
    elif QUANTIZE == "fp8":
        q = steps.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = steps.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # 20 bits of the mantissa are rounded away, and the exponent's bias goes from 127 to 7. Below 2⁻⁶ the step is
        # 2⁻⁹, the last place of 2¹⁴.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (tl.abs(steps) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, subnormal, normal)
        q = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return q
