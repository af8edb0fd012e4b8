"""The Gram matrix against float64 sums over the stored tokens, and the errors that it judges weights by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimizer.errors import DataError, ModelError, UsageError
from optimizer.quant.formats import NVFP4, Format
from optimizer.quant.gram import (
    LARGEST_SCALE,
    Gram,
    check_scale,
    check_weights,
    foldable_scale,
    normalized_gram,
    output_error,
    sample_rows,
    trace_error,
)
from optimizer.quant.rtn import quantize_rtn


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-2, 1, shape[-1]) + 0.3


def gram_of(x: Tensor) -> Gram:
    gram = Gram(x.shape[-1])
    gram.update(x)
    return gram


def assert_statistics(gram: Gram, x: Tensor) -> None:
    """Those of `x [T, K]`; float32 sums of T terms differ from exact ones by less than T u of the absolute sum."""
    exact, unit = x.double(), len(x) * 2.0**-24
    assert bool(((gram.H - exact.T @ exact).abs() <= 2 * unit * (exact.abs().T @ exact.abs())).all())
    assert torch.equal(gram.absmax, x.abs().amax(0))
    torch.testing.assert_close(gram.absmean.double(), exact.abs().mean(0), rtol=2 * unit, atol=0)
    assert gram.range == (float(x.min()), float(x.max()))
    assert gram.tokens == len(x)


def test_the_worked_example_of_the_docstring() -> None:
    gram = gram_of(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert gram.H.tolist() == [[10, -1], [-1, 5]]
    assert gram.absmax.tolist() == [3, 2]
    assert gram.absmean.tolist() == [2, 1.5]
    assert gram.range == (-1, 3)
    assert trace_error(torch.tensor([[0.1, 0.0]]), gram.H) == pytest.approx(0.1)
    assert gram.scaled(torch.tensor([2.0, 1.0])).H.tolist() == [[2.5, -0.5], [-0.5, 5]]


def test_batches_of_any_shape_add_up_to_the_tokens() -> None:
    x = tokens(60, 24)
    gram = Gram(24)
    gram.update(x[:30].view(2, 3, 5, 24))
    gram.update(x[30])
    gram.update(x[31:31])
    gram.update(x[31:].T.contiguous().T)  # not contiguous
    assert_statistics(gram, x)


def test_padding_is_not_counted_whatever_it_holds() -> None:
    x = tokens(4, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 1, 0, 3]).unsqueeze(1)
    padded = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    gram = Gram(8)
    gram.update(padded, mask)
    assert_statistics(gram, x[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_low_precision_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = tokens(2000, 5).to(dtype)
    assert_statistics(gram_of(x), x.float())


def test_the_gram_keeps_nothing_of_its_input_and_changes_nothing_in_it() -> None:
    x = tokens(7, 4).requires_grad_()
    before = x.detach().clone()
    gram = gram_of(x)
    assert torch.equal(x.detach(), before)
    assert not gram.H.requires_grad
    with torch.no_grad():
        x.zero_()
    assert_statistics(gram, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused_and_add_nothing(bad: float) -> None:
    x = tokens(5, 4)
    gram, before = gram_of(x), gram_of(x)
    hurt = x.clone()
    hurt[2, 1] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        gram.update(hurt)
    assert torch.equal(gram.H, before.H)
    assert gram.tokens == before.tokens
    assert gram.range == before.range


def test_squares_that_leave_float32_are_refused() -> None:
    with pytest.raises(ModelError, match="too large"):
        gram_of(torch.full((1, 2), 2e19))
    with pytest.raises(ModelError, match="too large"):
        gram_of(torch.full((200, 2), 1.5e18))
    assert bool(gram_of(torch.full((100, 2), 1.5e18)).H.isfinite().all())


def test_what_is_no_activation_or_mask_is_refused() -> None:
    gram = Gram(4)
    for x in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.int32), torch.tensor(1.0)):
        with pytest.raises(UsageError, match=r"\[\.\.\., 4\]"):
            gram.update(x)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(UsageError, match="mask"):
            gram.update(torch.ones(2, 4), mask)
    with pytest.raises(UsageError, match="at least 1 channel"):
        Gram(0)
    with pytest.raises(DataError, match="no calibration token"):
        _ = gram.range
    assert not gram.absmax.any()
    assert not gram.absmean.any()


def test_a_scaled_gram_is_that_of_the_scaled_input() -> None:
    x = tokens(50, 6)
    s = torch.tensor([0.25, 2.0, 1.0, 8.0, 0.5, 4.0])  # powers of two: exact
    gram = gram_of(x)
    before = gram.H.clone()
    scaled, expected = gram.scaled(s), gram_of(x / s)
    torch.testing.assert_close(scaled.H, expected.H)
    torch.testing.assert_close(scaled.absmean, expected.absmean)
    assert torch.equal(scaled.absmax, expected.absmax)
    assert scaled.range == expected.range
    assert scaled.tokens == 50
    assert torch.equal(gram.H, before)


@pytest.mark.parametrize("s", [[1.0, 0.0], [1.0, -1.0], [1.0, torch.nan], [torch.inf, 1.0], [1.0]])
def test_what_is_no_scale_is_refused(s: list[float]) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        gram_of(tokens(3, 2)).scaled(torch.tensor(s))


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(ModelError, match="too large"):
        gram_of(torch.ones(1, 2)).scaled(torch.full((2,), 1e-30))


def test_merged_statistics_are_those_of_all_tokens() -> None:
    x = tokens(40, 6)
    gram = gram_of(x[:25])
    gram.merge(gram_of(x[25:]))
    gram.merge(Gram(6))
    assert_statistics(gram, x)
    with pytest.raises(UsageError, match="merged"):
        gram.merge(Gram(5))


@pytest.mark.parametrize("k", [1, 7, 513, 1100])
def test_half_of_the_matrix_gives_the_whole_trace(k: int) -> None:
    x, delta = tokens(2 * k, k), tokens(3, k, seed=1)
    exact = float((x.double() @ delta.double().T).square().sum())
    assert trace_error(delta, gram_of(x).H) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_the_output_error_has_no_unit(size: float) -> None:
    x, weight = tokens(300, 64), tokens(5, 64, seed=1)
    wrong = weight * 1.01
    lost = float(
        (x.double() @ (weight - wrong).double().T).square().sum() / (x.double() @ weight.double().T).square().sum()
    )
    gram = gram_of(x)
    assert output_error(weight * size, wrong * size, gram) == pytest.approx(lost, rel=1e-3)
    assert output_error(weight, wrong, gram.H * min(size, 1e30)) == pytest.approx(lost, rel=1e-3)


def test_the_output_error_of_a_quantized_weight_is_that_of_the_outputs() -> None:
    x, weight = tokens(300, 64), tokens(5, 64, seed=1)
    for format in (Format(4, False, 32), NVFP4):
        quantized = quantize_rtn(weight, format)
        y, got = x.double() @ weight.double().T, x.double() @ quantized.dequantize().double().T
        expected = float((y - got).square().sum() / y.square().sum())
        assert output_error(weight, quantized, gram_of(x)) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_an_output_that_is_zero() -> None:
    silent = torch.zeros(2, 2)
    weight, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    assert output_error(weight, other, silent) == 0
    assert output_error(torch.zeros(1, 2), torch.zeros(1, 2), torch.eye(2)) == 0
    assert output_error(torch.zeros(1, 2), other, torch.eye(2)) == math.inf


def test_a_gram_matrix_is_checked_and_normalized() -> None:
    H = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    before = H.clone()
    assert normalized_gram(H, 2, H.device).tolist() == [[1, 0.25], [0.25, 0.5]]
    assert torch.equal(H, before)
    assert not normalized_gram(torch.zeros(2, 2), 2, H.device).any()
    for bad in (torch.eye(3), torch.ones(2), torch.eye(2, dtype=torch.int32)):
        with pytest.raises(UsageError, match=r"\[2, 2\]"):
            normalized_gram(bad, 2, H.device)
    for bad in (-torch.eye(2), torch.full((2, 2), torch.nan), torch.diag(torch.tensor([1.0, torch.inf]))):
        with pytest.raises(ModelError, match="Gram matrix"):
            normalized_gram(bad, 2, H.device)


def test_a_foldable_scale_is_centred_bounded_and_leaves_dead_channels() -> None:
    raw = torch.tensor([4.0, 0.0, 1.0, 100.0], dtype=torch.float64)
    scale = foldable_scale(raw, raw > 0)
    torch.testing.assert_close(scale, torch.tensor([0.4, 1.0, 0.1, 10.0]))
    wide = foldable_scale(torch.tensor([1e-200, 1.0, 1e200], dtype=torch.float64), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(wide, torch.tensor([1 / LARGEST_SCALE, 1.0, LARGEST_SCALE]))
    assert foldable_scale(raw, raw > 1e9).tolist() == [1, 1, 1, 1]
    paired = foldable_scale(raw, raw > 0, lambda s: s.view(2, 2).amax(0).repeat(2))
    torch.testing.assert_close(paired, torch.tensor([0.4, 10.0, 0.4, 10.0]))
    with pytest.raises(UsageError, match="positive"):
        foldable_scale(raw, raw > 0, lambda s: s - 1)
    with pytest.raises(UsageError, match=r"\[4\]"):
        foldable_scale(raw, raw > 0, lambda s: s[:2])
    assert check_scale(scale, 4) is scale


def test_rows_are_sampled_evenly_and_weights_checked() -> None:
    weight = torch.arange(10.0).unsqueeze(1)
    assert sample_rows(weight, 4).flatten().tolist() == [0, 2, 5, 7]
    assert torch.equal(sample_rows(weight, 10), weight)
    with pytest.raises(UsageError, match="do not share"):
        check_weights([torch.ones(2, 3), torch.ones(2, 4)], 3)
    with pytest.raises(UsageError, match="do not share"):
        check_weights([], 3)
    with pytest.raises(ModelError, match="NaN"):
        check_weights([torch.full((1, 3), torch.nan)], 3)
