"""Linear layer on 8-bit integers that leaves the large columns of its input alone (LLM.int8, arXiv:2208.07339).

`y[m, n] = (q_scale[m] Σ_k q[m, k] data[n, k] + Σ_o x[m, o] data[n, o]) scale[n] + bias[n]`

    x        [..., K] float32, bfloat16 or float16
    data     [N, K] int8, with scale [N, 1] float32
    bias     [N], any float type

`o` runs over the outliers: columns with some |x[..., o]| > threshold, over all rows of the call. The others are rounded
to int8 with a scale a token, which outliers do not enter. Their elements times data are summed in int32; x times data,
in x's own type, which holds every int8 exactly, in float32. Rounded once to the type of x. On a GPU K < 2^17. Moves at
least N K bytes of weights; an outlier reads a sector of 32 bytes a weight.

How many outliers there are is never asked on the host: one kernel marks them, one lists them and their number, and the
kernel that multiplies them takes that number for its loop. It writes its sums [M, N] for the int8 product to add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels import int8_linear, quantize_rows
from optimizer.backends.kernels.gpu import INTERPRETED, Shipped, bound, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import float32_linear
from optimizer.backends.kernels.rounding import as_rows, check_rows
from optimizer.backends.kernels.scaled_matmul import FEW_ROWS
from optimizer.backends.kernels.scaled_operands import operands
from optimizer.quant.activations import quantize_activation
from optimizer.quant.formats import ActivationFormat


@dataclass(frozen=True)
class Tile:
    """`m` × `n` sums for a program, `outliers` columns at a time, chosen for up to `rows`."""

    rows: float
    m: int
    n: int
    outliers: int


TILES = (Tile(FEW_ROWS, 16, 32, 16), Tile(float("inf"), 64, 64, 16))
"""By rows of y; not yet measured."""

_MARK = {"ROWS": 32, "COLUMNS": 128}
_LIST = {"COLUMNS": 1024}
_WARPS = 4


def llm_int8_linear_ref(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """The specification: x rounded but for its outliers, times the decoded weight in float32."""
    check_rows("llm_int8_linear", x)
    rounded = quantize_activation(x.contiguous(), ActivationFormat(outlier_threshold=threshold))
    return float32_linear(rounded, data.float() * scale, bias).to(x.dtype)


@jit
def _mark_kernel(  # type: ignore[no-untyped-def]
    x_ptr, marked_ptr, M, K, x_stride, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
    outlier = tl.max((tl.abs(x.to(tl.float32)) > threshold).to(tl.int32), axis=0)
    # Programs that find the same column write the same 1.
    tl.store(marked_ptr + k, outlier.to(tl.int8), mask=(k < K) & (outlier != 0))


@jit
def _list_kernel(  # type: ignore[no-untyped-def]
    marked_ptr, columns_ptr, count_ptr, K, COLUMNS: tl.constexpr
):
    count = tl.zeros((), dtype=tl.int32)
    for start in range(0, bound(K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        marked = tl.load(marked_ptr + k, mask=k < K, other=0).to(tl.int32)
        tl.store(columns_ptr + count + tl.cumsum(marked, axis=0) - 1, k, mask=marked != 0)
        count += tl.sum(marked, axis=0)
    tl.store(count_ptr, count)


@jit
def _outliers_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    data_ptr,
    columns_ptr,
    count_ptr,
    sums_ptr,
    M,
    N,
    x_stride,
    data_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    data_row = data_ptr + n.to(tl.int64)[None, :] * data_stride
    count = tl.load(count_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, bound(count), OUTLIERS):
        o = start + tl.arange(0, OUTLIERS)
        k = tl.load(columns_ptr + o, mask=o < count, other=0)
        x = tl.load(x_row + k[None, :], mask=(m < M)[:, None] & (o < count)[None, :], other=0.0)
        data = tl.load(data_row + k[:, None], mask=(o < count)[:, None] & (n < N)[None, :], other=0)
        if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
            x = x.to(tl.float32)
        total = tl.dot(x, data.to(x.dtype), total, input_precision="ieee")
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(sums_ptr + place, total, mask=(m < M)[:, None] & (n < N)[None, :])


def _llm_int8_linear_cuda(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    check_rows("llm_int8_linear", x)
    rows = as_rows(x)
    (m, k), n = rows.shape, len(data)
    marked = torch.zeros(k, dtype=torch.int8, device=x.device)
    if m:
        grid = (-(-m // _MARK["ROWS"]), -(-k // _MARK["COLUMNS"]))
        _mark_kernel[grid](rows, marked, m, k, rows.stride(0), threshold, **_MARK, num_warps=_WARPS)
    q, q_scale = quantize_rows.launch(rows, -1, torch.int8, skip=marked)
    op = operands(q, q_scale, data, scale, bias, x.dtype, torch.int8)
    if not m * n:
        return x.new_empty((*x.shape[:-1], n))
    columns = torch.empty(k, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    _list_kernel[(1,)](marked, columns, count, k, **_LIST, num_warps=_WARPS)
    sums = torch.empty(m, n, dtype=torch.float32, device=x.device)
    tile = next(tile for tile in TILES if m <= tile.rows)
    _outliers_kernel[(-(-m // tile.m), -(-n // tile.n))](
        rows, op.b, columns, count, sums, m, n, rows.stride(0), op.b.stride(0), **_constants(tile), num_warps=_WARPS
    )
    return int8_linear.launch(op, x.dtype, sums).view(*x.shape[:-1], n)


def _constants(tile: Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "OUTLIERS": tile.outliers}


def _fake(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], data.shape[0]))


llm_int8_linear = define(
    "llm_int8_linear(Tensor x, Tensor data, Tensor scale, Tensor? bias, float threshold) -> Tensor",
    llm_int8_linear_ref,
    _fake,
    cuda=_llm_int8_linear_cuda,
)

SHIPPED = (
    Shipped(
        _mark_kernel,
        "mark",
        {"x_ptr": "*bf16", "marked_ptr": "*i8", "M": "i32", "K": "i32", "x_stride": "i32", "threshold": "fp32"},
        _MARK,
        num_warps=_WARPS,
        unaligned=("M",),
        expects=("load128", "no-atomics"),
        registers=64,
    ),
    Shipped(
        _list_kernel,
        "list",
        {"marked_ptr": "*i8", "columns_ptr": "*i32", "count_ptr": "*i32", "K": "i32"},
        _LIST,
        num_warps=_WARPS,
        expects=("no-atomics",),
        registers=64,
    ),
    *(
        Shipped(
            _outliers_kernel,
            f"outliers {tile.m} × {tile.n}",
            {"x_ptr": "*bf16", "data_ptr": "*i8", "columns_ptr": "*i32", "count_ptr": "*i32", "sums_ptr": "*fp32"}
            | dict.fromkeys(("M", "N", "x_stride", "data_stride"), "i32"),
            _constants(tile),
            num_warps=_WARPS,
            unaligned=("M",),
            expects=("mma", "no-atomics"),
            registers=128,
        )
        for tile in TILES
    ),
)
