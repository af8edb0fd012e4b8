"""Rounding of rows to 8 bits in Triton equals `quant.activations`, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import jit, tl
from optimizer.backends.kernels.rounding import (
    FORMATS,
    SIZES,
    as_bytes,
    as_rows,
    elements,
    magnitude,
    rounded,
    rounding_of,
    row_scale,
    rows_for,
)
from optimizer.quant.activations import activation_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = tuple(FORMATS)


@jit
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, n, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + column, mask=column < n, other=0.0)
    scale = row_scale(tl.max(magnitude(x), 0), QUANTIZE)
    tl.store(q_ptr + row * n + column, elements(x, scale, QUANTIZE), mask=column < n)
    tl.store(scale_ptr + row, scale)


@jit
def _round_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < n, other=0.0)
    tl.store(out_ptr + column, rounded(x, out_ptr.dtype.element_ty), mask=column < n)


def quantize(x: Tensor, dtype: torch.dtype, rounding: str | None = None) -> tuple[Tensor, Tensor]:
    x = x.to(DEVICE)
    q = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    scale = torch.empty(len(x), 1, device=DEVICE)
    how = rounding or rounding_of(x, dtype)
    _quantize_kernel[(len(x),)](x, as_bytes(q), scale, x.shape[1], QUANTIZE=how, BLOCK=4096)
    return q.cpu(), scale.cpu()


def check(x: Tensor, dtype: torch.dtype) -> None:
    """Elements must have the same bits, the sign of zeros included; so must scales, but for which NaN they are."""
    wanted, steps, _ = activation_elements(x, FORMATS[dtype])
    for rounding in sorted({rounding_of(x.to(DEVICE), dtype), "int8" if dtype == torch.int8 else "fp8-bits"}):
        q, scale = quantize(x, dtype, rounding)
        assert torch.equal(scale.nan_to_num(-1), steps.nan_to_num(-1))
        assert torch.equal(as_bytes(q), as_bytes(wanted))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_rows_over_many_decades(dtype: torch.dtype, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3001, generator=generator) * torch.logspace(-6, 4, 6).unsqueeze(1)
    x[1:3] *= torch.logspace(-6, 0, 3001)  # every binade of e4m3, its subnormal numbers and what rounds to 0
    check(x.to(kind), dtype)


def test_every_tie_and_every_element_of_e4m3() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([halves.nextafter(torch.tensor(math.inf)), halves.nextafter(torch.tensor(-math.inf))])
    row = torch.cat([codes, halves, near])  # the largest is 448: the scale is 1
    check(torch.cat([row, -row]).unsqueeze(0), torch.float8_e4m3fn)


def test_every_tie_of_int8() -> None:
    row = torch.arange(-255, 256) / 2  # the largest is 127.5: the scale is 1, and 127.5 is clamped, not rounded to 128
    check(row.unsqueeze(0), torch.int8)
    assert quantize(row.unsqueeze(0), torch.int8)[0].unique().tolist() == list(range(-128, 128))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_zeros_and_the_smallest_and_largest_numbers(dtype: torch.dtype) -> None:
    tiny = torch.tensor([[0.0, -0.0], [1e-45, 0], [3e-43, -1e-43], [1e-38, 3e-39], [3.4e38, -1e38]])
    check(tiny, dtype)
    assert quantize(tiny, dtype)[1][0] == torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, which interprets the kernel, says so
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_a_nan_scale(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(3, 40)
    x[1, 17] = bad
    check(x, dtype)
    assert quantize(x, dtype)[1].isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_rounding_to_nearest_even(kind: torch.dtype) -> None:
    ties = (torch.arange(-300, 300) + 0.5) * 2**-3  # nine and ten bits: ties of bfloat16, none of float16
    x = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)), ties, torch.tensor([0.0, 6e4, 1e-7])])
    x = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])]).to(DEVICE)
    out = torch.empty_like(x, dtype=kind)
    _round_kernel[(1,)](x, out, len(x), BLOCK=4096)
    assert torch.equal(out.nan_to_num(12345.0), x.to(kind).nan_to_num(12345.0))


@pytest.mark.parametrize(("n", "block"), [(1, 256), (256, 256), (257, 1024), (16384, 16384), (16385, 4096)])
def test_a_row_stays_in_registers_up_to_16384_columns(n: int, block: int) -> None:
    assert (rows_for(n).block, rows_for(n).wide) == (block, n > 16384)
    assert rows_for(n) in SIZES


def test_rows_are_copied_only_where_strides_demand_it() -> None:
    x = torch.arange(48.0).view(2, 3, 8)
    for view in (x, x[..., 2:6], x[:, 1:2], x[:1].expand(4, 3, 8)[:, 0]):
        assert as_rows(view).data_ptr() == view.data_ptr()
        assert torch.equal(as_rows(view), view.reshape(-1, view.shape[-1]))
    for view in (x.mT, x[..., ::2], x.transpose(0, 1)):
        assert torch.equal(as_rows(view), view.reshape(-1, view.shape[-1]))
        assert as_rows(view).stride(1) == 1
