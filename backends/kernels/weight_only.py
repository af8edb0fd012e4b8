"""Triton kernels of the linears whose weight alone is quantized: 4 bits, 8 bits, or plain bfloat16.

`y = x Ŵᵀ + b` for `x [M, K]` with few rows, bound by the bytes of the weight. Layouts are those of `w4a16_linear`,
`w8a16_linear` and `bf16_linear`, one stored form for every device. Which implementation runs is `gpu_kernel`'s answer:

    gemv, split-k    A program multiplies BLOCK_N weight rows by all M rows of x on the tensor cores, weights as the
                     left operand, so that M is padded to 8 and not to 16. Programs that share an output each take a
                     run of K blocks and leave float32 partial sums, which a second kernel adds in order: no atomics.
    decode+matmul    The weight is decoded once to the type of `x`, and cuBLAS multiplies.

Four bits. A 32-bit word of the stored order holds weights 4j..4j+3 of a block of 32 in its low nibbles and 16+4j.. in
its high ones. A shift and one `lop3` with 0x000f000f and 0x43004300 leave two bfloat16 values, 128 + (q + 8), in the
order (4j, 4j+2); x is permuted to match, in registers. (float16 uses 64 + (q + 8): 0x00f000f0, 0x54005400.) For up to
16 rows the offset stays in, and comes off each block's sum as 136 Σx, with Σx from a product with ones; for more rows
it is subtracted from the weights, exactly. Zero points come off the sum either way: weights are never rounded here.

Arithmetic: products exact, float32 accumulation on the tensor cores within a block of at most 128, then
`scale · (sum - (offset + zero) Σx)` is added in float32. With the offset folded, the error is that of a float32 sum
whose terms are as large as `|x| (|q + 8| + 128)`, and an x that is finite but beyond 1e34 may overflow. decode+matmul
rounds each decoded weight to the type of `x` once, and takes any group that divides K.

For up to 8 rows of symmetric int4 in groups of 128, the main loop for sm_90 is 2.1 instructions a weight (counted by
a test), of the 3.5 that an H200 can issue while it reads half a byte; the same for int8 are 3.5 of 7.

Fewest bytes: the weight, its scales and zero points, once. Splitting K adds `8 M N splits` bytes of partial sums.
Triton 3.6 drops the eviction hints below from loads that it pipelines (`cp.async`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels.gpu import INTERPRETED, Shipped, bound, jit, tl, triton
from optimizer.backends.kernels.rounding import rounded
from optimizer.backends.kernels.weight_only_tiles import (
    DEFAULT_SMS,
    NIBBLES,
    Tile,
    blocks_per_split,
    gpu_kernel,
    tile_for,
)
from optimizer.errors import UsageError


@jit
def _decode_word(w, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """One nibble of each half of a word, as two floating-point numbers still in one register."""
    v = w << -SHIFT if SHIFT < 0 else w >> SHIFT
    if INTERPRETED:  # it knows no PTX
        return (v & MASK) | MAGIC
    return tl.inline_asm_elementwise(ASM, "=r,r", [v], tl.int32, True, 1)


@jit
def _unpack_pairs(even, odd, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two `[R, W]` of packed pairs to `[R, 4 W]`: word, then even or odd, then half. Moves no register."""
    v = tl.join(even, odd)
    low = v.to(tl.int16).to(half, bitcast=True)
    high = (v >> 16).to(tl.int16).to(half, bitcast=True)
    return tl.join(low, high).reshape(even.shape[0], 4 * even.shape[1])


@jit
def _product(w, x, acc):  # type: ignore[no-untyped-def]
    """`acc + w x`, accumulated in float32."""
    if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
    return tl.dot(w, x, acc)


@jit
def _weight_only_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K32, stride_x, blocks_each,
    BITS: tl.constexpr, SHARED: tl.constexpr, ASYM: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    MASK: tl.constexpr, MAGIC: tl.constexpr, LEFT: tl.constexpr, OFFSET: tl.constexpr, ONES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`out [M, N]`, or partial sums `[splits, M, N]` where SPLIT; K is 32 K32. SHARED is the number of K blocks that
    share a scale, 0 where a row has one. Dots are `[BLOCK_N, k] x [k, BLOCK_M]`."""
    half: tl.constexpr = x_ptr.dtype.element_ty
    FOLD: tl.constexpr = BITS == 4 and BLOCK_M <= 16  # the offset is still in the product, and comes off the sum
    PER_32: tl.constexpr = 4 if BITS == 4 else 32  # stored elements a block of 32 weights
    WIDTH: tl.constexpr = BLOCK_K // 32 * PER_32
    part_of_k = tl.program_id(1)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.arange(0, BLOCK_M)
    in_n, in_m = rn < N, rm < M
    w_row = w_ptr + rn.to(tl.int64)[:, None] * (K32 * PER_32) + tl.arange(0, WIDTH)[None, :]
    x_row = x_ptr + rm.to(tl.int64)[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
    blocks = K32 // (BLOCK_K // 32)
    groups = blocks // SHARED if SHARED else 1
    start = part_of_k * blocks_each
    stop = tl.minimum(start + blocks_each, blocks)
    if BITS < 16:  # made as the weights are, so that both products take x in the same registers
        QUARTER: tl.constexpr = BLOCK_K // 8 if BITS == 4 else BLOCK_K // 4
        one = tl.full((BLOCK_N, QUARTER), ONES, tl.int32)
        ones = _unpack_pairs(one, one, half)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = nothing
    for block in tl.range(bound(start), bound(stop), num_stages=STAGES):
        w = tl.load(w_row + block * WIDTH, mask=in_n[:, None], other=0, eviction_policy="evict_first")
        x = tl.load(x_row + block * BLOCK_K, mask=in_m[:, None], other=0.0, eviction_policy="evict_last")
        if BITS == 4:
            # Weight 16 h + 4 j + 2 p + o of a block: word j, nibble h of byte 2 p + o. One product for each h.
            halves = x.reshape(BLOCK_M, BLOCK_K // 32, 2, 4, 2, 2).permute(0, 1, 3, 5, 4, 2)
            x_low, x_high = tl.split(halves.reshape(BLOCK_M, BLOCK_K // 2, 2))
            x_low, x_high = x_low.trans(1, 0), x_high.trans(1, 0)
            w_low = _unpack_pairs(
                _decode_word(w, 0 - LEFT, MASK, MAGIC, ASM), _decode_word(w, 8 - LEFT, MASK, MAGIC, ASM), half
            )
            w_high = _unpack_pairs(
                _decode_word(w, 4 - LEFT, MASK, MAGIC, ASM), _decode_word(w, 12 - LEFT, MASK, MAGIC, ASM), half
            )
            if INTERPRETED and not FOLD:
                w_low, w_high = (w_low.to(tl.float32) - OFFSET).to(half), (w_high.to(tl.float32) - OFFSET).to(half)
            part = _product(w_high, x_high, _product(w_low, x_low, nothing))
            if FOLD:
                sum_x = _product(ones, x_high, _product(ones, x_low, nothing))
        else:
            if INTERPRETED:  # it takes no integer to bfloat16
                w = w.to(tl.float32)
            part = _product(w.to(half), x.trans(1, 0), nothing)
            if ASYM and BLOCK_M <= 16:
                sum_x = _product(ones, x.trans(1, 0), nothing)
        if ASYM and BLOCK_M > 16:
            sum_x = tl.sum(x.to(tl.float32), 1)[None, :]
        if BITS == 16:
            acc += part
        else:
            column = block // SHARED if SHARED else 0
            if ASYM:
                zero = tl.load(zero_ptr + rn.to(tl.int64) * groups + column, mask=in_n, other=0.0)
                part -= (zero + OFFSET if FOLD else zero)[:, None] * sum_x
            elif FOLD:
                part -= OFFSET * sum_x
            acc += part * tl.load(scale_ptr + rn.to(tl.int64) * groups + column, mask=in_n, other=0.0)[:, None]
    place = rm.to(tl.int64)[None, :] * N + rn[:, None]
    inside = in_n[:, None] & in_m[None, :]
    if SPLIT:
        tl.store(out_ptr + part_of_k.to(tl.int64) * M * N + place, acc, mask=inside)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + place, rounded(acc, half), mask=inside)


@jit
def _sum_splits_kernel(partial_ptr, bias_ptr, out_ptr, size, N, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`partial [splits, M, N]` float32 to `out [M, N]`, added in order, rounded once; size is M N."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    acc = tl.zeros((BLOCK,), tl.float32)
    partial = partial_ptr + place
    for _ in range(bound(splits)):
        acc += tl.load(partial, mask=inside, other=0.0)
        partial += size
    if BIAS:
        acc += tl.load(bias_ptr + place % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


@jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    data_ptr, scale_ptr, zero_ptr, out_ptr, N, K, group,
    BITS: tl.constexpr, ASYM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`(q - zero) * scale` in float32, rounded to the type of `out [N, K]`."""
    STORED: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    rn = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rs = tl.program_id(1) * STORED + tl.arange(0, STORED)[None, :]
    rk = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row_bytes = K // 2 if BITS == 4 else K
    stored = tl.load(data_ptr + rn * row_bytes + rs, mask=(rn < N) & (rs < row_bytes), other=0)
    if BITS == 4:
        nibbles = tl.join(stored & 15, stored >> 4).reshape(BLOCK_N, BLOCK_K // 32, 16, 2)
        q = nibbles.permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K).to(tl.float32) - 8
    else:
        q = stored.to(tl.float32)
    inside = (rn < N) & (rk < K)
    column = rn * (K // group) + rk // group
    if ASYM:
        q -= tl.load(zero_ptr + column, mask=inside, other=0.0)
    q *= tl.load(scale_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + rn * K + rk, rounded(q, out_ptr.dtype.element_ty), mask=inside)


SUM_BLOCK, SUM_WARPS = 1024, 4
DECODE_N, DECODE_K, DECODE_WARPS = 4, 512, 4


def weight_only_cuda(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`x [..., K]` by the stored weight, as `gpu_kernel` says. Raises `UsageError` where operands do not fit."""
    n, k, groups = _check(x, data, scale, zero, bias, bits)
    rows = x.numel() // k if k else 0
    kernel = gpu_kernel(rows, n, k, groups, x.dtype, bits)
    if kernel == "none":
        return x.new_empty((*x.shape[:-1], n))
    if kernel == "decode+matmul":
        return F.linear(x, data.to(x.dtype) if scale is None else decode(data, scale, zero, bits, x.dtype), bias)
    out = _multiply(_aligned_rows(x.reshape(rows, k)), data, scale, zero, bias, n, groups, bits)
    return out.view(*x.shape[:-1], n)


def decode(data: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`, each rounded once."""
    n, k = data.shape[0], data.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=dtype, device=data.device)
    grid = (triton.cdiv(n, DECODE_N), triton.cdiv(k, DECODE_K))
    constants = {"BITS": bits, "ASYM": zero is not None, "BLOCK_N": DECODE_N, "BLOCK_K": DECODE_K}
    _decode_kernel[grid](
        data, scale, scale if zero is None else zero, out, n, k, k // scale.shape[1], **constants,
        num_warps=DECODE_WARPS,
    )  # fmt: skip
    return out


def _multiply(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    n: int, groups: int, bits: int,
) -> Tensor:  # fmt: skip
    """The fused kernel on `x [M, K]`, and the second one where K is split."""
    rows, k = x.shape
    tile = tile_for(rows, k // groups, bits)
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else DEFAULT_SMS
    each = blocks_per_split(rows, n, k, tile, bits, sms)
    splits = triton.cdiv(k // tile.block_k, each)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(rows, n)
    partial = out if splits == 1 else x.new_empty(splits, rows, n, dtype=torch.float32)
    words = _aligned(data).view(torch.int32) if bits == 4 else _aligned(data)
    constants = _constants(tile, bits, x.dtype, k, groups, zero is not None, splits > 1, bias is not None)
    unused = x  # a pointer for what the constants leave out
    _weight_only_kernel[triton.cdiv(n, tile.block_n), splits](
        x, words, unused if scale is None else scale, unused if zero is None else zero,
        unused if bias is None else bias, partial, rows, n, k // 32, k if rows == 1 else x.stride(0), each,
        **constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_splits_kernel[(triton.cdiv(rows * n, SUM_BLOCK),)](
            partial, unused if bias is None else bias, out, rows * n, n, splits,
            BIAS=bias is not None, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip
    return out


def _constants(
    tile: Tile, bits: int, dtype: torch.dtype, k: int, groups: int, asym: bool, split: bool, bias: bool
) -> dict[str, Any]:
    """The kernel's `tl.constexpr` arguments."""
    nibbles = NIBBLES[dtype]
    asm = nibbles.asm(exact=tile.block_m > 16) if bits == 4 else ""
    return {
        "BITS": bits, "SHARED": 0 if groups == 1 else k // groups // tile.block_k,
        "ASYM": asym, "SPLIT": split, "BIAS": bias,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "MASK": nibbles.mask, "MAGIC": nibbles.magic, "LEFT": nibbles.left, "OFFSET": nibbles.offset,
        "ONES": nibbles.ones, "ASM": asm,
    }  # fmt: skip


def _aligned(t: Tensor) -> Tensor:
    """`t`, or a copy where it does not start at a multiple of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _aligned_rows(x: Tensor) -> Tensor:
    """`x [M, K]` with rows that 16-byte loads can read: a copy where it has none."""
    rows_aligned = x.stride(1) == 1 and (x.shape[0] == 1 or x.stride(0) % 16 == 0)
    return _aligned(x if rows_aligned else x.contiguous())


def _check(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int
) -> tuple[int, int, int]:
    """N, K and the number of scales a row. Raises `UsageError` on what the kernels would misread."""
    stored = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dim() == 0:
        raise UsageError(f"x is {x.dtype} with {x.dim()} dimensions; give [..., K] float32, bfloat16 or float16.")
    if data.dtype != stored or data.dim() != 2 or not data.is_contiguous():
        raise UsageError(f"weights must be contiguous [N, K] {stored}, not {tuple(data.shape)} {data.dtype}.")
    n, k = data.shape[0], data.shape[1] * 2 if bits == 4 else data.shape[1]
    if x.shape[-1] != k or k == 0 or (bits == 4 and k % 32):
        raise UsageError(f"x has {x.shape[-1]} features, the weight {k}: give the same, for 4 bits a multiple of 32.")
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None and (t.dtype != torch.float32 or t.dim() != 2 or t.shape[0] != n or not t.is_contiguous()):
            raise UsageError(f"{name} must be contiguous [{n}, G] float32, not {tuple(t.shape)} {t.dtype}.")
    groups = 1 if scale is None else scale.shape[1]
    if groups == 0 or k % groups or (zero is not None and zero.shape[1] != groups):
        zeros = "no" if zero is None else zero.shape[1]
        raise UsageError(f"{k} weights a row, {groups} scales, {zeros} zeros: give as many zeros, and equal groups.")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise UsageError(f"bias must be [{n}] {x.dtype}, not {tuple(bias.shape)} {bias.dtype}.")
    return n, k, groups


def build(
    label: str, bits: int, rows: int, k: int = 4096, groups: int = 1, *,
    asym: bool = False, split: bool = True, dtype: torch.dtype = torch.bfloat16,
) -> Shipped:  # fmt: skip
    """The build that a launch on `rows` rows and `groups` scales a row uses, for the list of shipped ones."""
    tile = tile_for(rows, k // groups, bits)
    half = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    words = {4: "*i32", 8: "*i8", 16: "*bf16"}[bits]
    pointers = (half, words, "*fp32", "*fp32", half, "*fp32" if split else half)
    names = ("x_ptr", "w_ptr", "scale_ptr", "zero_ptr", "bias_ptr", "out_ptr")
    integers = dict.fromkeys(("M", "N", "K32", "stride_x", "blocks_each"), "i32")
    return Shipped(
        _weight_only_kernel, label, dict(zip(names, pointers, strict=True)) | integers,
        _constants(tile, bits, dtype, k, groups, asym, split, bias=False),
        num_warps=tile.warps, num_stages=tile.stages, unaligned=("M", "K32", "blocks_each"),
        expects=("load128", "mma", "no-atomics") + (("lop3",) if bits == 4 else ()),
    )  # fmt: skip


SHIPPED = (
    Shipped(
        _sum_splits_kernel,
        "sum of splits",
        {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32", "N": "i32", "splits": "i32"},
        {"BIAS": False, "BLOCK": SUM_BLOCK},
        num_warps=SUM_WARPS,
        unaligned=("splits",),
        expects=("load128", "no-atomics"),
        registers=64,
    ),
    *(
        Shipped(
            _decode_kernel,
            f"decode int{bits}",
            {"data_ptr": stored, "scale_ptr": "*fp32", "zero_ptr": "*fp32", "out_ptr": "*bf16"}
            | dict.fromkeys(("N", "K", "group"), "i32"),
            {"BITS": bits, "ASYM": False, "BLOCK_N": DECODE_N, "BLOCK_K": DECODE_K},
            num_warps=DECODE_WARPS,
            unaligned=("N",),
            expects=("store128",),
            registers=128,
        )
        for bits, stored in ((4, "*u8"), (8, "*i8"))
    ),
)
