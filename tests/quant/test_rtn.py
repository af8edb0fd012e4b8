"""Round-to-nearest against its error bound, compressed-tensors' own grid, and hostile weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import ModelError, OptimizerError, UsageError
from optimizer.quant.formats import Format
from optimizer.quant.rtn import QuantizedWeight, concatenate, quantize_rtn

FORMATS = [Format(bits, symmetric, group) for bits, symmetric, group in product((4, 8), (True, False), (32, 128, -1))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def random_weight(rows: int = 7, k: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different size, some off centre, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(1)
    return (weight + 0.5 * weight.abs().amax(1, keepdim=True) * (torch.arange(rows) % 2).unsqueeze(1)).to(dtype)


def step_sizes(weight: QuantizedWeight) -> Tensor:
    """The scale of each weight, `[N, K]` float64."""
    return weight.scale.double().repeat_interleave(weight.q.shape[1] // weight.scale.shape[1], dim=1)


def decoded(weight: QuantizedWeight) -> Tensor:
    """`(q - z) s` in float64, which is exact for these operands."""
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    group = weight.q.shape[1] // weight.scale.shape[1]
    return (weight.q.double() - zero.double().repeat_interleave(group, dim=1)) * step_sizes(weight)


def bound(weight: QuantizedWeight) -> Tensor:
    """The error the docstring allows each weight, with room for two float32 roundings of a number up to 2^b.

    Half a step, and where the stored scale was rounded down, the part of the range that it no longer reaches.
    """
    steps = 2**weight.format.bits - 1
    unit = torch.finfo(weight.scale.dtype).eps / 2
    return step_sizes(weight) * (0.5 + steps * unit / (1 - unit) + 2 * 2**weight.format.bits * 2.0**-24)


def test_the_worked_example_of_the_docstring() -> None:
    weight = torch.tensor([[-0.7, 0.1], [1.5, 0.4]])
    got = quantize_rtn(weight, Format(4, True, -1))
    assert got.q.tolist() == [[-8, 1], [7, 2]]
    torch.testing.assert_close(got.scale, torch.tensor([[0.0933], [0.2]]), atol=5e-5, rtol=0)
    torch.testing.assert_close(got.dequantize(), torch.tensor([[-0.7467, 0.0933], [1.4, 0.4]]), atol=5e-5, rtol=0)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight_is_within_its_bound(format: Format, dtype: torch.dtype) -> None:
    weight = random_weight(dtype=dtype)
    got = quantize_rtn(weight, format)
    assert got.scale.dtype == dtype
    assert got.q.dtype == torch.int8
    assert int(got.q.min()) >= format.q_min
    assert int(got.q.max()) <= format.q_max
    assert bool(((weight.double() - decoded(got)).abs() <= bound(got)).all())


@every_format
def test_no_other_integer_is_nearer(format: Format) -> None:
    weight = random_weight(rows=3, k=128)
    got = quantize_rtn(weight, format)
    zero = 0 if got.zero is None else got.zero.double().repeat_interleave(128 // got.scale.shape[1], dim=1)
    grid = torch.arange(format.q_min, format.q_max + 1).double().view(-1, 1, 1)
    best = ((grid - zero) * step_sizes(got) - weight.double()).abs().amin(0)
    error = (decoded(got) - weight.double()).abs()
    # Where two integers are equally near, float32 may pick either: they differ by its rounding of q, at most 2^b u.
    assert bool((error <= best + step_sizes(got) * 2**format.bits * 2.0**-23).all())


@every_format
def test_the_grid_is_the_one_compressed_tensors_makes(format: Format) -> None:
    weight = random_weight()
    grouped = weight.view(7, format.groups(256), -1)
    args = QuantizationArgs(**format.as_compressed_tensors())
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    theirs = quantize(weight, scale, zero, args, dtype=torch.int8)
    ours = quantize_rtn(weight, format)
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.q, theirs)
    if ours.zero is not None:
        assert torch.equal(ours.zero, zero.to(torch.int8))
    assert torch.equal(ours.dequantize(), dequantize(theirs, scale, zero, args, dtype=torch.float32))


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exact_zero_stays_one(format: Format, dtype: torch.dtype) -> None:
    weight = random_weight(dtype=dtype)
    weight[:, ::3] = 0
    weight[2] = 0
    got = quantize_rtn(weight, format).dequantize()
    assert not got[weight == 0].any()
    assert bool(torch.isfinite(got).all())


@every_format
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_of_zeros_only(format: Format, dtype: torch.dtype) -> None:
    got = quantize_rtn(torch.zeros(2, 128, dtype=dtype), format)
    assert not got.dequantize().any()
    assert bool((got.scale > 0).all())


@every_format
@pytest.mark.parametrize("value", [3.7, -3.7])
def test_a_constant_row_is_an_end_of_its_grid(format: Format, value: float) -> None:
    got = quantize_rtn(torch.full((1, 128), value), format)
    assert got.q.unique().numel() == 1
    assert bool(((value - decoded(got)).abs() <= bound(got)).all())


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_weights_neither_divide_by_zero_nor_grow(format: Format, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    weight = torch.linspace(-tiny / 2, tiny, 128).to(dtype).view(1, 128)
    got = quantize_rtn(weight, format)
    assert bool((got.scale >= tiny).all())
    assert bool(((weight.double() - decoded(got)).abs() <= bound(got)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = random_weight()
    weight[3, 17] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize_rtn(weight, Format())


def test_a_scale_too_large_for_its_type_is_refused_with_the_remedy() -> None:
    weight = torch.full((1, 32), 2e6)
    with pytest.raises(ModelError, match=r"float16.*torch\.float32"):
        quantize_rtn(weight, Format(4), scale_dtype=torch.float16)
    assert quantize_rtn(weight, Format(4), scale_dtype=torch.float32).scale.isfinite().all()


def test_a_range_too_wide_for_float32_is_refused_without_a_useless_remedy() -> None:
    weight = torch.tensor([[-3e38, 3e38]])
    with pytest.raises(ModelError, match="out of range"):
        quantize_rtn(weight, Format(8, symmetric=False))
    with pytest.raises(ModelError, match="out of range"):
        quantize_rtn(torch.full((1, 2), 1e300, dtype=torch.float64), Format(8))


def test_groups_that_do_not_fill_the_row() -> None:
    with pytest.raises(UsageError, match="64 does not divide 100"):
        quantize_rtn(torch.ones(2, 100), Format(4, True, 64))


@pytest.mark.parametrize(
    "weight",
    [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 8), torch.ones(8, 0), torch.ones(2, 2, dtype=torch.int8)],
    ids=lambda w: f"{list(w.shape)}-{w.dtype}",
)
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(UsageError, match=r"\[N, K\]"):
        quantize_rtn(weight, Format())


@every_format
def test_one_row_alone_is_that_row_of_the_whole(format: Format) -> None:
    weight = random_weight()
    whole, alone = quantize_rtn(weight, format).rows(4, 5), quantize_rtn(weight[4:5], format)
    assert torch.equal(whole.q, alone.q)
    assert torch.equal(whole.scale, alone.scale)
    assert torch.equal(whole.dequantize(), alone.dequantize())


@every_format
def test_concatenation_undoes_the_taking_of_rows(format: Format) -> None:
    whole = quantize_rtn(random_weight(), format)
    joined = concatenate([whole.rows(0, 3), whole.rows(3, 4), whole.rows(4, 7)])
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert (joined.zero is None) == format.symmetric


def test_the_input_is_unchanged_and_may_be_strided_and_trainable() -> None:
    base = torch.nn.Parameter(random_weight(k=7, rows=256))
    before = base.detach().clone()
    got = quantize_rtn(base.t(), Format(4, False, 32))
    assert torch.equal(base.detach(), before)
    assert not got.scale.requires_grad
    assert torch.equal(got.q, quantize_rtn(before.t().contiguous(), Format(4, False, 32)).q)


def test_dequantizing_rounds_once() -> None:
    got = quantize_rtn(random_weight(), Format(4, False, 32))
    assert torch.equal(got.dequantize(torch.bfloat16), got.dequantize().to(torch.bfloat16))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=32, max_size=32),
    st.sampled_from([*FORMATS[:2], Format(4, False, 32), Format(8, False, -1)]),
    st.sampled_from(DTYPES),
)
def test_any_floats_give_a_finite_weight_within_bounds_or_a_typed_error(
    values: list[float], format: Format, dtype: torch.dtype
) -> None:
    weight = torch.tensor(values).to(dtype).view(1, -1)
    if format.group_size == 128:
        weight = weight.repeat(1, 4)
    try:
        got = quantize_rtn(weight, format)
    except OptimizerError:
        # Refused: not finite, or a scale that overflows its type; both need an extreme value.
        assert not bool((weight.abs() < torch.finfo(torch.float16).max / 2).all())
        return
    assert bool(torch.isfinite(got.dequantize(torch.float64)).all())
    assert bool(((weight.double() - decoded(got)).abs() <= bound(got)).all())
