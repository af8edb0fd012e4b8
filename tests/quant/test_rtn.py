"""Round-to-nearest against its error bound, compressed-tensors' own grid, and hostile weights."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import ModelError, OptimizerError, UsageError
from optimizer.quant.formats import BLOCK, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format
from optimizer.quant.rtn import SHRINK, fit_grid, quantize_rtn
from optimizer.quant.weight import QuantizedWeight, concatenate, from_elements

FORMATS = [Format(bits, symmetric, group) for bits, symmetric, group in product((4, 8), (True, False), (32, 128, -1))]
FLOATS = [FP8_TENSOR, FP8_CHANNEL, Format(8, True, 128, kind="float"), FP8_BLOCK, NVFP4, MXFP4]
SEARCHED = [Format(4), Format(4, False, 32), Format(8, granularity="block"), *FLOATS]
every_float = pytest.mark.parametrize("format", FLOATS, ids=lambda f: f.name)
searched = pytest.mark.parametrize("format", SEARCHED, ids=lambda f: f.name)
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


def theirs(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scales and dequantized weight by compressed-tensors."""
    args: Any = QuantizationArgs(**format.as_compressed_tensors())
    n, k = weight.shape
    rows, groups = format.scale_shape(n, k)
    tiles = weight.reshape(rows, groups, -1)
    if format.granularity == "block":
        tiles = weight.reshape(rows, BLOCK, groups, BLOCK).transpose(1, 2).flatten(2)
    shared = generate_gparam(weight.amin(), weight.amax()) if format.scale == "e4m3" else None
    scale, zero = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args, global_scale=shared)
    scale = scale.float()
    whole = {"scale": scale, "zero_point": zero, "args": args, "global_scale": shared}
    q = quantize(weight, **whole, dtype=torch.float32)
    return scale, dequantize(q, **whole, dtype=torch.float32)


@every_float
def test_float_grids_are_those_of_compressed_tensors(format: Format) -> None:
    weight = random_weight(rows=128 if format.granularity == "block" else 7)
    ours = quantize_rtn(weight, format)
    if format.scale == "e8m0":  # whose scales compressed-tensors truncates to whole numbers; powers of two by hand
        largest = weight.reshape(7, -1, 32).abs().amax(-1).double()
        down = 2.0 ** torch.floor(torch.log2(largest))
        scale = torch.where(largest >= 1.75 * down, 2 * down, down) / 4
        assert torch.equal(ours.scale.double(), scale)
        return
    scale, dequantized = theirs(weight, format)
    assert torch.equal(ours.scale.float(), scale)
    assert torch.equal(ours.dequantize(), dequantized)


@every_float
def test_float_weights_come_in_their_stored_types(format: Format) -> None:
    got = quantize_rtn(random_weight(dtype=torch.bfloat16), format)
    assert got.q.dtype == (torch.uint8 if format.bits == 4 else torch.float8_e4m3fn)
    assert (
        got.scale.dtype
        == {"float": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}[format.scale]
    )
    assert got.scale.shape == format.scale_shape(7, 256)
    assert (got.global_scale is not None) == (format.scale == "e4m3")
    assert got.zero is None


@searched
def test_any_size_of_weight_is_kept_in_its_range(format: Format) -> None:
    for size in (1e-30, 1.0, 1e30):
        weight = random_weight(rows=3) * size
        got = quantize_rtn(weight, format).dequantize()
        assert got.isfinite().all()
        assert float((got / size - weight / size).norm() / (weight / size).norm()) < 0.25
    assert not quantize_rtn(torch.zeros(3, 256), format).dequantize().any()


def test_a_large_tensor_maximum_is_the_one_scale() -> None:
    weight = random_weight()
    for format in (FP8_TENSOR, NVFP4):
        alone, shared = quantize_rtn(weight, format), quantize_rtn(weight, format, tensor_max=50.0)
        other = quantize_rtn(weight / 2, format, tensor_max=50.0)
        one = [w.scale if format is FP8_TENSOR else w.global_scale for w in (alone, shared, other)]
        assert all(isinstance(s, Tensor) for s in one)
        assert torch.equal(one[1], one[2])  # type: ignore[arg-type]
        assert not torch.equal(one[0], one[1])  # type: ignore[arg-type]
    assert float(quantize_rtn(weight, FP8_TENSOR, tensor_max=448.0).scale) == 1.0
    assert float(quantize_rtn(weight, NVFP4, tensor_max=6.0).global_scale) == 448.0  # type: ignore[arg-type]


def squared_errors(weight: Tensor, got: QuantizedWeight, importance: Tensor | None = None) -> Tensor:
    """The error under each scale in float64, blocks by loops."""
    error = (weight.double() - got.dequantize(torch.float64)) ** 2
    error = error if importance is None else error * importance.double()
    n, k = weight.shape
    rows, groups = got.format.scale_shape(n, k)
    if got.format.granularity == "block":
        return torch.tensor([[error[i * BLOCK :][:BLOCK, j * BLOCK :][:, :BLOCK].sum() for j in range(groups)]
                             for i in range(rows)])  # fmt: skip
    return error.reshape(rows, groups, -1).sum(-1)


@searched
@pytest.mark.parametrize("weighted", [False, True])
def test_the_clip_search_helps_every_scale_and_never_hurts(format: Format, weighted: bool) -> None:
    weight = random_weight(rows=130, k=256)  # ragged blocks
    importance = torch.logspace(-2, 2, 256) if weighted else None
    plain = squared_errors(weight, quantize_rtn(weight, format), importance)
    fitted = squared_errors(weight, quantize_rtn(weight, format, clip="mse", importance=importance), importance)
    assert bool((fitted <= plain * (1 + 1e-5)).all())
    if format.bits == 4:  # powers of two leave little to choose
        assert float(fitted.sum()) < float(plain.sum()) * (1 if format.scale == "e8m0" else 0.97)


def test_the_clip_search_finds_the_best_of_its_shares() -> None:
    weight = random_weight(rows=1, k=32)
    weight[0, 3] *= 6  # so that clipping pays
    format = Format(4, True, 32)
    largest, best = float(weight.abs().max()), (float("inf"), 0.0)
    for share in SHRINK:
        scale = share * largest / 7.5
        q = (weight.double() / scale).round().clamp(-8, 7)
        best = min(best, (float(((weight.double() - q * scale) ** 2).sum()), scale))
    got = fit_grid(weight, format, clip="mse")
    assert best[1] < largest / 7.5
    assert float(got.scale) == pytest.approx(best[1], rel=1e-6)


def test_importance_moves_the_clip_towards_the_columns_that_count() -> None:
    weight = torch.full((1, 32), 0.31)
    weight[0, 0] = 4.0
    spared = torch.ones(32)
    spared[0] = 1e6
    rest = torch.ones(32)
    rest[0] = 1e-6
    kept, cut = (
        quantize_rtn(weight, Format(4, True, 32), clip="mse", importance=i).dequantize() for i in (spared, rest)
    )
    assert abs(float(kept[0, 0]) - 4) < abs(float(cut[0, 0]) - 4)
    assert float((cut - weight)[0, 1:].norm()) < float((kept - weight)[0, 1:].norm())


@every_float
def test_float_elements_of_a_weight_that_is_on_its_grid_are_exact(format: Format) -> None:
    """e2m1 and e4m3 values times a power of two, with the largest magnitude present: nothing is lost."""
    table = from_elements(torch.arange(16, dtype=torch.uint8), NVFP4)
    weight = table.repeat(128, 16).roll(3, 1) * (448 / 6 if format.bits == 8 else 1) / 64
    if format.bits == 8:
        weight = (weight * 64).to(torch.float8_e4m3fn).float() / 64
        weight[:, ::8] = 7.0
    assert torch.equal(quantize_rtn(weight, format).dequantize(), weight)


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


@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("format", [*FORMATS, *FLOATS], ids=lambda f: f.name)
def test_rounding_few_rows_at_a_time_changes_no_bit(format: Format, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(k=256, rows=2 * BLOCK + 5)
    weight[-1] *= 9  # what a tensor's scale must reach lies in the last rows
    whole = quantize_rtn(weight, format, torch.float32, clip=clip)
    monkeypatch.setattr("optimizer.quant.rtn._CHUNK", 1)
    parts = quantize_rtn(weight, format, torch.float32, clip=clip)
    grid = fit_grid(weight, format, torch.float32, clip=clip)
    for found in (whole, parts):
        assert torch.equal(found.q.view(torch.uint8), grid.encode(weight).view(torch.uint8))
        assert torch.equal(found.scale.view(torch.uint8), grid.scale.view(torch.uint8))
        assert (found.zero is None) == (grid.zero is None)
        assert found.zero is None or torch.equal(found.zero, grid.zero)
        assert found.global_scale is None or torch.equal(found.global_scale, grid.global_scale)
