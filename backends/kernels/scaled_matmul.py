"""The product of two 8-bit matrices under scales: what `fp8_linear` and `int8_linear` launch on a GPU.

`y[m, n] = Σ_k a[m, k] b[n, k] · a_scale · b_scale + bias[n]`

    a        [M, K] int8 or float8_e4m3fn, rows contiguous; b [N, K] of the same type
    a_scale  float32 a row [M, 1], 128 values of a row [M, K / 128], or the tensor (a view with strides 0)
    b_scale  float32 a row [N, 1], the tensor, or 128 × 128 values [⌈N / 128⌉, ⌈K / 128⌉]
    bias     [N], any float type; addend [M, N] float32, added to the sum under `a_scale` alone (LLM.int8's outliers)

int8 accumulates in int32, exactly for K < 2^17. e4m3 accumulates in float32; the tensor cores of Hopper keep some 14
bits of a running sum (arXiv:2412.19437, 3.3.2), so their sums are added in float32 every 128 columns, which is also
where block scales apply. Rounded once, to the type of y. A NaN scale spoils what it scales.

One kernel computes a tile of y at a time, `GROUP` tiles down before one across so that L2 serves both operands, with as
many programs as processors. Few tiles over a long K are split along K: float32 or int32 partial sums, which a second
kernel adds in order. One row is a GEMV: a program sums `BLOCK_N` rows of b, 16 bytes a load (`evict_first`; the tiles'
asynchronous copies carry no such hint). Moves at least K (M + N) bytes and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl
from optimizer.backends.kernels.rounding import rounded
from optimizer.backends.kernels.scaled_operands import Operands
from optimizer.quant.formats import BLOCK

GROUP = 8
"""Tiles of y down a column before the next column; not yet measured."""

FEW_ROWS = 16
"""Rows of y up to which the weight is what moves, and one tile holds them all."""

SPLIT_COLUMNS = 1024
"""The fewest columns of K that are worth a split, where partial sums cost a second launch; not yet measured."""

_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class Tile:
    """`m` × `n` values of y for a program, 128 columns of K at a time; `resident` programs share a processor.

    `rows` are the most that it is chosen for.
    """

    rows: float
    m: int
    n: int
    warps: int
    stages: int
    resident: int
    registers: int


TILES = (
    Tile(FEW_ROWS, 16, 32, 4, 8, 4, 128),
    Tile(64, 64, 64, 4, 5, 2, 192),
    Tile(float("inf"), 128, 128, 8, 4, 1, 255),
)
"""By rows of y; not yet measured."""

_GEMV = {"BLOCK_N": 4, "COLUMNS": 2048}
_GEMV_WARPS = 4
_COMBINE = {"COLUMNS": 1024}
_COMBINE_WARPS = 4


@jit
def _scaled_matmul_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    y_ptr,
    partial_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    addend_ptr,
    M,
    N,
    K,
    splits,
    split_columns,
    a_stride,
    b_stride,
    a_scale_stride,
    a_scale_block,
    b_scale_stride,
    b_scale_block,
    B_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    kind: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    split = tl.program_id(1)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, K)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(bound(tl.program_id(0)), bound(tiles_m * tiles_n), bound(tl.num_programs(0))):
        first_m = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first_m, GROUP)
        within = tile % (GROUP * tiles_n)
        first_n = within // height * BLOCK_N
        m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
        a_row = a_ptr + m.to(tl.int64)[:, None] * a_stride
        b_row = b_ptr + n.to(tl.int64)[None, :] * b_stride
        a_scale_row = a_scale_ptr + m.to(tl.int64) * a_scale_stride
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
        for start in range(bound(begin), bound(end), STEP):
            k = start + tl.arange(0, STEP)
            a = tl.load(a_row + k[None, :], mask=(m < M)[:, None] & (k < end)[None, :], other=0.0)
            b = tl.load(b_row + k[:, None], mask=(k < end)[:, None] & (n < N)[None, :], other=0.0)
            if BLOCKS:
                factor = tl.load(a_scale_row + start // STEP * a_scale_block, mask=m < M, other=0.0)
                if B_ROWS > 1:
                    factor *= tl.load(b_scale_ptr + first_n // B_ROWS * b_scale_stride + start // STEP * b_scale_block)
                total += tl.dot(a, b) * factor[:, None]
            elif kind == tl.int32:
                total = tl.dot(a, b, total, out_dtype=tl.int32)
            else:
                total = tl.dot(a, b, total, max_num_imprecise_acc=STEP)
        inside = (m < M)[:, None] & (n < N)[None, :]
        place = m.to(tl.int64)[:, None] * N + n[None, :]
        if splits > 1:
            tl.store(partial_ptr + split.to(tl.int64) * M * N + place, total, mask=inside)
        else:
            y = total.to(tl.float32)
            if not BLOCKS:
                y *= tl.load(a_scale_row, mask=m < M, other=0.0)[:, None]
            if addend_ptr is not None:
                y += tl.load(addend_ptr + place, mask=inside, other=0.0)
            if B_ROWS == 1:
                y *= tl.load(b_scale_ptr + n * b_scale_stride, mask=n < N, other=0.0)[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            tl.store(y_ptr + place, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@jit
def _gemv_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    y_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    addend_ptr,
    N,
    K,
    b_stride,
    a_scale_block,
    b_scale_stride,
    b_scale_block,
    B_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row = a_ptr + (n * 0)[:, None]  # read in the layout of b, so no thread waits for another
    a_scale_row = a_scale_ptr + (n * 0)[:, None]
    b_scale_row = b_scale_ptr + (n // B_ROWS)[:, None] * b_scale_stride
    b_row = b_ptr + n.to(tl.int64)[:, None] * b_stride
    total = tl.zeros((BLOCK_N, COLUMNS // STEP), dtype=kind)
    for start in range(0, bound(K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        inside = (n < N)[:, None] & (k < K)[None, :]
        a = tl.load(a_row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_last")
        b = tl.load(b_row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        part = tl.sum(tl.reshape(b.to(kind) * a.to(kind), (BLOCK_N, COLUMNS // STEP, STEP)), axis=2)
        if BLOCKS:
            block = start // STEP + tl.arange(0, COLUMNS // STEP)
            inside = (n < N)[:, None] & (block * STEP < K)[None, :]
            part *= tl.load(a_scale_row + block[None, :] * a_scale_block, mask=inside, other=0.0)
            if B_ROWS > 1:
                part *= tl.load(b_scale_row + block[None, :] * b_scale_block, mask=inside, other=0.0)
        total += part
    y = tl.sum(total, axis=1).to(tl.float32)
    if not BLOCKS:
        y *= tl.load(a_scale_ptr)
    if addend_ptr is not None:
        y += tl.load(addend_ptr + n, mask=n < N, other=0.0)
    if B_ROWS == 1:
        y *= tl.load(b_scale_ptr + n * b_scale_stride, mask=n < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, rounded(y, y_ptr.dtype.element_ty), mask=n < N)


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    y_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    addend_ptr,
    N,
    splits,
    a_scale_stride,
    b_scale_stride,
    B_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < N
    place = row * N + n
    total = tl.load(partial_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
    for _ in range(1, bound(splits)):
        partial_ptr += tl.num_programs(0).to(tl.int64) * N
        total += tl.load(partial_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
    y = total.to(tl.float32)
    if not BLOCKS:
        y *= tl.load(a_scale_ptr + row * a_scale_stride)
    if addend_ptr is not None:
        y += tl.load(addend_ptr + place, mask=inside, other=0.0)
    if B_ROWS == 1:
        y *= tl.load(b_scale_ptr + n * b_scale_stride, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, rounded(y, y_ptr.dtype.element_ty), mask=inside)


def kernel_for(rows: int) -> str:
    """Which kernel `multiply` launches: `gemv`, `few_rows` or `gemm`."""
    return "gemv" if rows == 1 else "few_rows" if rows <= FEW_ROWS else "gemm"


def schedule(rows: int, n: int, k: int, processors: int) -> tuple[Tile, int, int]:
    """The tile for y `[rows, n]`, how many programs share its tiles, and how many columns of K a split takes.

    K is split where its tiles leave processors idle, into pieces of at least `SPLIT_COLUMNS`.
    """
    tile = next(tile for tile in TILES if rows <= tile.rows)
    tiles = -(-rows // tile.m) * -(-n // tile.n)
    splits = max(1, min(processors // tiles, k // SPLIT_COLUMNS))
    columns = -(-k // (BLOCK * splits)) * BLOCK
    return tile, min(tiles, processors * tile.resident), columns


def multiply(op: Operands, dtype: torch.dtype, addend: Tensor | None = None, processors: int | None = None) -> Tensor:
    """Launch the kernel for `op`: y of type `dtype` in its shape. `addend [M, N]` is contiguous float32."""
    (rows, k), n = op.a.shape, len(op.b)
    y = op.a.new_empty((rows, n), dtype=dtype)
    if not y.numel():
        return y.view(op.shape)
    block_strides = tuple(s.stride(1) if s.shape[1] > 1 else 0 for s in (op.a_scale, op.b_scale))
    scaling: dict[str, Any] = {"B_ROWS": op.b_rows, "BLOCKS": op.blocks}
    if kernel_for(rows) == "gemv":
        _gemv_kernel[(-(-n // _GEMV["BLOCK_N"]),)](
            op.a, op.b, y, op.a_scale, op.b_scale, op.bias, addend, n, k, op.b.stride(0), block_strides[0],
            op.b_scale.stride(0), block_strides[1], **scaling, STEP=BLOCK, **_GEMV, num_warps=_GEMV_WARPS,
        )  # fmt: skip
        return y.view(op.shape)
    tile, programs, columns = schedule(rows, n, k, processors or _processors(op.a.device))
    splits = max(1, -(-k // columns)) if columns else 1
    partial = None
    if splits > 1:
        sums = torch.int32 if op.a.dtype == torch.int8 else torch.float32
        partial = op.a.new_empty((splits, rows, n), dtype=sums)
    _scaled_matmul_kernel[(programs, splits)](
        op.a, op.b, y, partial, op.a_scale, op.b_scale, op.bias, addend, rows, n, k, splits, columns, op.a.stride(0),
        op.b.stride(0), op.a_scale.stride(0), block_strides[0], op.b_scale.stride(0), block_strides[1],
        **scaling, **_tile_constants(tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y.view(op.shape) if partial is None else combine(partial, op, dtype, addend)


def combine(partial: Tensor, op: Operands, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """y from sums `partial [splits, M, N]` (int32 or float32), where scales are not by blocks still to be scaled."""
    splits, rows, n = partial.shape
    y = partial.new_empty(op.shape, dtype=dtype)
    if y.numel():
        _combine_kernel[(rows, -(-n // _COMBINE["COLUMNS"]))](
            partial, y, op.a_scale, op.b_scale, op.bias, addend, n, splits, op.a_scale.stride(0), op.b_scale.stride(0),
            B_ROWS=op.b_rows, BLOCKS=op.blocks, **_COMBINE, num_warps=_COMBINE_WARPS,
        )  # fmt: skip
    return y


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _tile_constants(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "STEP": BLOCK, "GROUP": GROUP}


# Scales by blocks for the inputs alone are the third build's code with a load less.
_SCALINGS: tuple[tuple[str, bool], ...] = (("i8", False), ("fp8e4nv", False), ("fp8e4nv", True))
_FLOATS = {"y_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
_ODD = ("M", "splits", "a_scale_stride", "a_scale_block", "b_scale_stride", "b_scale_block")


def _shipped(
    kernel: Any, label: str, elements: str, blocks: bool, arguments: str, constants: dict[str, Any], **rest: Any
) -> Shipped:
    types = dict.fromkeys(("a_ptr", "b_ptr"), f"*{elements}") | _FLOATS
    types["partial_ptr"] = "*i32" if elements == "i8" else "*fp32"
    return Shipped(
        kernel,
        f"{'int8' if elements == 'i8' else 'fp8'} {label}" + (", blocks" if blocks else ""),
        {name: types.get(name, "i32") for name in arguments.split()},
        {"addend_ptr": None, "B_ROWS": BLOCK if blocks else 1, "BLOCKS": blocks, **constants},
        unaligned=_ODD,
        targets=(80, 90, 100) if elements == "i8" else (90, 100),  # sm_80 has no e4m3
        **rest,
    )


SHIPPED = (
    *(
        _shipped(
            _scaled_matmul_kernel, f"{tile.m} × {tile.n}", elements, blocks,
            "a_ptr b_ptr y_ptr partial_ptr a_scale_ptr b_scale_ptr bias_ptr M N K splits split_columns a_stride "
            "b_stride a_scale_stride a_scale_block b_scale_stride b_scale_block",
            _tile_constants(tile), num_warps=tile.warps, num_stages=tile.stages, registers=tile.registers,
            # 16 rows of e4m3 are multiplied as float16, exactly: Hopper's own e4m3 product takes 64.
            expects=("load128", "mma-int8" if elements == "i8" else "mma-fp8" if tile.m >= 64 else "mma", "no-atomics"),
        )
        for elements, blocks in _SCALINGS
        for tile in TILES
    ),
    *(
        _shipped(
            _gemv_kernel, "row", elements, blocks,
            "a_ptr b_ptr y_ptr a_scale_ptr b_scale_ptr bias_ptr N K b_stride a_scale_block b_scale_stride "
            "b_scale_block",
            {"STEP": BLOCK, **_GEMV}, num_warps=_GEMV_WARPS, registers=64,
            expects=("load128", "evict_first", "evict_last", "no-atomics"),
        )
        for elements, blocks in _SCALINGS
    ),
    *(
        _shipped(
            _combine_kernel, "sums", elements, False,
            "partial_ptr y_ptr a_scale_ptr b_scale_ptr bias_ptr N splits a_scale_stride b_scale_stride",
            _COMBINE, num_warps=_COMBINE_WARPS, registers=64, expects=("load128", "store128", "no-atomics"),
        )
        for elements in ("i8", "fp8e4nv")
    ),
)  # fmt: skip
