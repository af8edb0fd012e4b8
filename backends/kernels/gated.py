"""Gated activations: SwiGLU and GeGLU (Shazeer, arXiv:2002.05202), alone or with the rounding to 8 bits after them.

`y = act(gate) · up`: silu(g) = g · sigmoid(g); gelu(g) = g · (1 + erf(g / √2)) / 2, or g · sigmoid(2 √(2/π) (g +
0.044715 g³)), which is the tanh form without its cancellation.

    gate, up     [..., N] float32, bfloat16 or float16: often the halves of one merged [..., 2 N]
    y            [..., N] the type of gate
    q, scale     [..., N] int8 or e4m3 and [..., 1] float32: y, rounded to its type, then per token as
                 `quant.activations` rounds

Everything in between is float32. For M rows of b bytes an element `3 M N b` bytes move, or `2 M N b + M N` rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl, triton
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import (
    Rows,
    as_bytes,
    as_rows,
    check_format,
    check_rows,
    elements,
    magnitude,
    quantize_rows_ref,
    quantized_fake,
    rounded,
    rounding_of,
    row_builds,
    row_scale,
    rows_for,
)
from optimizer.errors import UsageError

COLUMNS = Rows(1024)
"""Without a scale to find, a row is cut into programs of this many columns."""
GELU = {"none": "gelu", "tanh": "gelu-tanh"}
"""The kernels' ACTIVATION for PyTorch's `approximate`."""


def check_approximate(op: str, approximate: str) -> None:
    """`UsageError` for what `torch.nn.functional.gelu` does not know."""
    if approximate not in GELU:
        raise UsageError(f"{op}: approximate is {approximate!r}. Use 'none' or 'tanh'.")


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification: in float32, rounded once."""
    check_rows("silu_mul", gate, up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype).contiguous()


def gelu_ref(x: Tensor, approximate: str) -> Tensor:
    """The specification of the activation, float32 to float32.

    The exact form is spelt out: `F.gelu` goes to oneDNN on processors with AVX-512, whose polynomial is off by up to
    3.7 · 2⁻²⁴ |x|, and by another amount in a vector that holds an infinity.
    """
    return F.gelu(x, approximate="tanh") if approximate == "tanh" else x * (1 + torch.erf(x * 0.5**0.5)) / 2


def gelu_mul_ref(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """The specification: in float32, rounded once."""
    check_rows("gelu_mul", gate, up)
    check_approximate("gelu_mul", approximate)
    return (gelu_ref(gate.float(), approximate) * up.float()).to(gate.dtype).contiguous()


def silu_mul_quantize_ref(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product, then the rounding."""
    check_format("silu_mul_quantize", dtype)
    return quantize_rows_ref(silu_mul_ref(gate, up), dtype)


def gelu_mul_quantize_ref(gate: Tensor, up: Tensor, approximate: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product, then the rounding."""
    check_format("gelu_mul_quantize", dtype)
    return quantize_rows_ref(gelu_mul_ref(gate, up, approximate), dtype)


@jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu, gelu or gelu-tanh of float32 `x`."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        z = x
        if ACTIVATION == "gelu-tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        small = tl.exp(-tl.abs(z))  # at most 1: sigmoid overflows on neither side
        y = x * (tl.where(z < 0, small, 1.0) / (1.0 + small))
    return y


@jit
def _product(gate_ptr, up_ptr, column, inside, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of act(gate) · up in their own type; 0 outside."""
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return rounded(activate(gate.to(tl.float32), ACTIVATION) * up, gate.dtype)


@jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    m,
    n,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    gate_ptr += row * gate_stride
    up_ptr += row * up_stride
    if QUANTIZE != "none":
        sizes = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, bound(n) if WIDE else 1, BLOCK):
            column = start + columns
            y = _product(gate_ptr, up_ptr, column, (row < m) & (column < n), ACTIVATION)
            sizes = tl.maximum(sizes, magnitude(y))
        scale = row_scale(tl.max(sizes, 1, keep_dims=True), QUANTIZE)

    for start in range(0, bound(n) if WIDE else 1, BLOCK):
        column = start + columns
        inside = (row < m) & (column < n)
        y = _product(gate_ptr, up_ptr, column, inside, ACTIVATION)
        if QUANTIZE != "none":
            y = elements(y, scale, QUANTIZE)
        tl.store(out_ptr + row * n + column, y, mask=inside)
    if QUANTIZE != "none":
        tl.store(scale_ptr + row, scale, mask=row < m)


def _launch(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`(y or q, scale)`; the scale is not set unless a type to round to is given."""
    check_rows("silu_mul" if activation == "silu" else "gelu_mul", gate, up)
    out, scale = quantized_fake(gate, dtype) if dtype else (gate.new_empty(gate.shape), gate.new_empty(0))
    n = gate.shape[-1]
    m = gate.numel() // n
    if m:
        size = COLUMNS if dtype is None else rows_for(n)
        gates, ups = as_rows(gate), as_rows(up)
        _gated_kernel[(triton.cdiv(m, size.rows), 1 if dtype else triton.cdiv(n, size.block))](
            gates, ups, as_bytes(out), scale, m, n, gates.stride(0), ups.stride(0), ACTIVATION=activation,
            QUANTIZE=rounding_of(gate, dtype), **size.constants, num_warps=size.warps,
        )  # fmt: skip
    return out, scale


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    return _launch(gate, up, "silu")[0]


def _gelu_mul_cuda(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    check_approximate("gelu_mul", approximate)
    return _launch(gate, up, GELU[approximate])[0]


def _silu_mul_quantize_cuda(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_format("silu_mul_quantize", dtype)
    return _launch(gate, up, "silu", dtype)


def _gelu_mul_quantize_cuda(gate: Tensor, up: Tensor, approximate: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_approximate("gelu_mul_quantize", approximate)
    check_format("gelu_mul_quantize", dtype)
    return _launch(gate, up, GELU[approximate], dtype)


silu_mul = define(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    silu_mul_ref,
    lambda gate, *_: gate.new_empty(gate.shape),
    cuda=_silu_mul_cuda,
)
gelu_mul = define(
    "gelu_mul(Tensor gate, Tensor up, str approximate) -> Tensor",
    gelu_mul_ref,
    lambda gate, *_: gate.new_empty(gate.shape),
    cuda=_gelu_mul_cuda,
)
silu_mul_quantize = define(
    "silu_mul_quantize(Tensor gate, Tensor up, ScalarType dtype) -> (Tensor, Tensor)",
    silu_mul_quantize_ref,
    lambda gate, *rest: quantized_fake(gate, rest[-1]),
    cuda=_silu_mul_quantize_cuda,
)
gelu_mul_quantize = define(
    "gelu_mul_quantize(Tensor gate, Tensor up, str approximate, ScalarType dtype) -> (Tensor, Tensor)",
    gelu_mul_quantize_ref,
    lambda gate, *rest: quantized_fake(gate, rest[-1]),
    cuda=_gelu_mul_quantize_cuda,
)


def _shipped() -> tuple[Shipped, ...]:
    """Every activation alone, and each size that finds a scale, with the costliest of them."""
    builds: list[tuple[Rows, str, str, str, tuple[int, ...]]]
    builds = [(COLUMNS, name, "none", "*bf16", (80, 90, 100)) for name in ("silu", *GELU.values())]
    builds += [(size, "gelu", rounding, out, sms) for size, rounding, out, sms in row_builds() if rounding != "none"]
    pointers = {"gate_ptr": "*bf16", "up_ptr": "*bf16"}
    numbers = dict.fromkeys(("m", "n", "gate_stride", "up_stride"), "i32")
    return tuple(
        Shipped(
            _gated_kernel,
            f"{activation}, {rounding}, {'wide' if size.wide else size.block}",
            pointers | {"out_ptr": out, "scale_ptr": "*fp32"} | numbers,
            {"ACTIVATION": activation, "QUANTIZE": rounding, **size.constants},
            num_warps=size.warps,
            unaligned=("m",),
            expects=("load128", "no-atomics"),
            registers=128,
            targets=targets,
        )
        for size, activation, rounding, out, targets in builds
    )


SHIPPED = _shipped()
