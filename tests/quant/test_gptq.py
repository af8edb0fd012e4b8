"""GPTQ against its paper's equations in float64, against round-to-nearest, and where it has to fall back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format
from optimizer.quant.gptq import GPTQ, quantize_gptq
from optimizer.quant.gram import Gram, output_error
from optimizer.quant.rtn import fit_grid, quantize_rtn
from optimizer.quant.weight import E2M1, Grid

FORMATS = [
    Format(4), Format(4, True, 32), Format(4, False, 64), Format(4, granularity="tensor"),
    Format(4, granularity="block"),
    Format(8), Format(8, False), Format(8, False, 32), FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, NVFP4, MXFP4,
]  # fmt: skip
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
K = 192  # three halves of a block, so blocks at the end are cut short


def problem(n: int = 24, k: int = K, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Gram]:
    """A weight, and correlated inputs of channels with very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k).unsqueeze(1)
    x = torch.randn(tokens, k, generator=generator) @ mix * torch.exp(0.7 * torch.randn(k, generator=generator))
    gram = Gram(k)
    gram.update(x)
    return torch.randn(n, k, generator=generator) * 0.02, gram


def points(format: Format) -> Tensor:
    """Every element of a format, float64."""
    if format.kind == "int":
        return torch.arange(format.q_min, format.q_max + 1, dtype=torch.float64)
    if format.bits == 4:
        return torch.tensor(sorted({sign * value for value in E2M1 for sign in (-1, 1)}), dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[codes.isfinite()].unique()


def paper(weight: Tensor, H: Tensor, format: Format, config: GPTQ) -> tuple[Tensor, Tensor, Tensor]:
    """`Ŵ` by the equations of arXiv:2210.17323 in float64: no blocks, no factor, one elimination a column.

    Each step rounds a column q, moves the rest by `-(w_q - ŵ_q) / [H⁻¹]_qq · H⁻¹_q:`, and removes q from `H⁻¹`. With
    it, the steps, and how near each rounded number was to a tie, in steps.
    """
    n, k = weight.shape
    left = weight.double().clone()
    damped = H.double() + config.damp * H.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    importance, table = H.diagonal(), points(format)
    order = torch.argsort(importance, descending=True, stable=True) if config.act_order else torch.arange(k)
    refit = format.granularity == "group" and not config.act_order

    def columns(grid: Grid, width: int) -> tuple[Tensor, Tensor]:
        step, zero = grid.columns(n, width)
        return step.double(), zero.double()

    step, zero = columns(fit_grid(weight, format, clip=config.clip, importance=importance), k)
    step, zero = step.clone(), zero.clone()
    result, margin = torch.zeros_like(left), torch.zeros_like(left)
    for q in order.tolist():
        if refit and q % format.group_size == 0:
            group = slice(q, q + format.group_size)
            now, largest = left[:, group].float(), None
            if format.scale == "e4m3":
                largest = float(weight.abs().amax())
                now = now.clamp(-largest, largest)
            grid = fit_grid(now, format, clip=config.clip, importance=importance[group], tensor_max=largest)
            step[:, group], zero[:, group] = columns(grid, format.group_size)
        scaled = left[:, q] / step[:, q] + zero[:, q]
        near = (scaled.unsqueeze(1) - table).abs().topk(2, largest=False)
        margin[:, q] = near.values[:, 1] - near.values[:, 0]
        result[:, q] = (table[near.indices[:, 0]] - zero[:, q]) * step[:, q]
        pull = inverse[q] / inverse[q, q]
        left -= (left[:, q] - result[:, q]).unsqueeze(1) * pull
        inverse -= inverse[:, q].unsqueeze(1) * pull
    return result, step, margin


def test_the_worked_example_of_the_docstring() -> None:
    weight, H = torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    got = quantize_gptq(weight, H, Format(4))
    assert got.weight.q.tolist() == [[7, 3]]
    assert quantize_rtn(weight, Format(4)).q.tolist() == [[7, 2]]
    energy = float((weight @ H @ weight.T).item())
    assert got.error * energy == pytest.approx(0.002, rel=1e-4)
    assert got.rtn_error * energy == pytest.approx(0.038, rel=1e-4)
    assert (got.method, got.damp, got.notes) == ("gptq", 0.01, ())


@every_format
@pytest.mark.parametrize("act_order", [True, False])
def test_it_is_what_the_equations_of_the_paper_give(format: Format, act_order: bool) -> None:
    weight, gram = problem()
    # The largest magnitude of a group is positive: -7.5 steps is a tie (-7 or -8), while 7.5 and 8 both end at 7.
    weight = torch.expm1(50 * weight) / 50
    config = GPTQ(act_order=act_order)
    got = quantize_gptq(weight, gram, format, config)
    expected, step, margin = paper(weight, gram.H, format, config)
    # The same element, on a scale that float32 found to within a few units in its last places.
    same = (got.weight.dequantize().double() - expected).abs() <= 0.01 * step
    # A row may differ only after float32 decided a tie another way: rounding is not continuous there.
    differ = ~same.all(1)
    assert float(differ.double().mean()) <= 0.2
    assert bool((margin[differ].amin(1) < 1e-3).all())
    assert got.method == "gptq"


@every_format
@pytest.mark.parametrize("config", [GPTQ(), GPTQ(act_order=False), GPTQ(clip="mse")], ids=str)
def test_it_loses_less_than_half_of_what_round_to_nearest_does(format: Format, config: GPTQ) -> None:
    weight, gram = problem()
    got = quantize_gptq(weight, gram, format, config)
    assert got.method == "gptq"
    assert got.error < 0.5 * got.rtn_error
    assert got.error == pytest.approx(output_error(weight, got.weight, gram), rel=1e-6)
    assert got.rtn_error == pytest.approx(output_error(weight, quantize_rtn(weight, format), gram), rel=1e-6)


@every_format
def test_its_elements_and_scales_are_stored_as_those_of_round_to_nearest(format: Format) -> None:
    weight, gram = problem()
    got = quantize_gptq(weight.bfloat16(), gram, format).weight
    plain = quantize_rtn(weight.bfloat16(), format)
    for ours, theirs in ((got.q, plain.q), (got.scale, plain.scale), (got.zero, plain.zero)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.dtype, ours.shape, ours.is_contiguous()) == (theirs.dtype, theirs.shape, True)
    # Static groups: the scales are those of the weight as it was.
    assert torch.equal(got.scale.view(torch.uint8), plain.scale.view(torch.uint8))


@every_format
def test_uncorrelated_inputs_leave_nothing_to_gain(format: Format) -> None:
    weight, _ = problem()
    got = quantize_gptq(weight, torch.diag(torch.logspace(-1, 1, K)), format)
    assert torch.equal(got.weight.dequantize(), quantize_rtn(weight, format).dequantize())


def test_nvfp4_keeps_its_tensor_scale_when_groups_are_fitted_late() -> None:
    weight, gram = problem()
    weight[0, 0] = 0.5
    got = quantize_gptq(weight, gram, NVFP4, GPTQ(act_order=False))
    plain = quantize_rtn(weight, NVFP4)
    assert got.weight.global_scale is not None
    assert plain.global_scale is not None
    assert torch.equal(got.weight.global_scale, plain.global_scale)
    assert not torch.equal(got.weight.scale.float(), plain.scale.float())
    shared = quantize_gptq(weight, gram, NVFP4, tensor_max=5.0)
    assert torch.equal(shared.weight.global_scale, torch.tensor([448 * 6 / 5.0]))  # type: ignore[arg-type]


def test_a_shared_tensor_scale_reaches_the_given_magnitude() -> None:
    weight, gram = problem()
    got = quantize_gptq(weight, gram, FP8_TENSOR, tensor_max=4.48)
    assert got.weight.scale.item() == pytest.approx(0.01)


def test_a_channel_that_never_spoke_is_rounded_to_nearest_and_hurts_no_other() -> None:
    weight, gram = problem()
    silent = torch.zeros(K, dtype=torch.bool)
    silent[[0, 5, 6, K - 1]] = True
    H = gram.H.masked_fill(silent | silent.unsqueeze(1), 0)
    for config in (GPTQ(), GPTQ(act_order=False)):
        got = quantize_gptq(weight, H, Format(4), config)
        assert got.method == "gptq"
        assert torch.equal(got.weight.q[:, silent], quantize_rtn(weight, Format(4)).q[:, silent])
        alone = quantize_gptq(weight[:, ~silent], H[~silent][:, ~silent] * 1.0, Format(8), replace(config, damp=1e-6))
        whole = quantize_gptq(weight, H, Format(8), replace(config, damp=1e-6))
        assert alone.error == pytest.approx(whole.error, rel=0.2)


def test_a_rank_deficient_gram_needs_no_fallback() -> None:
    weight, gram = problem(tokens=3)
    got = quantize_gptq(weight, gram, Format(4, True, 32))
    assert (got.method, got.notes) == ("gptq", ())
    assert got.error < 0.2 * got.rtn_error


def test_damping_grows_until_a_factor_exists_and_the_result_says_so() -> None:
    weight, _ = problem(k=2)
    got = quantize_gptq(weight, torch.tensor([[1.0, 1.05], [1.05, 1.0]]), Format(4))
    assert got.damp == pytest.approx(0.1)
    assert [note.split(" with ")[0] for note in got.notes[:2]] == [
        "no Cholesky factor in float32", "no Cholesky factor in float64",
    ]  # fmt: skip


def test_without_any_factor_only_the_diagonal_is_used() -> None:
    weight, _ = problem(k=2)
    got = quantize_gptq(weight, torch.tensor([[1.0, 9.0], [9.0, 1.0]]), Format(4), GPTQ(clip="mse"))
    assert got.method in ("diagonal", "rtn")
    assert "only the diagonal of the Gram matrix is used" in got.notes
    assert len(got.notes) >= 7
    assert got.damp == 0


def test_float64_is_tried_where_float32_has_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.cholesky_ex

    def fails_in_float32(a: Tensor) -> Any:
        lower, info = real(a)
        return lower, info + (a.dtype == torch.float32)

    weight, gram = problem()
    expected = quantize_gptq(weight, gram, Format(8))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_in_float32)
    got = quantize_gptq(weight, gram, Format(8))
    assert got.notes == ("no Cholesky factor in float32 with damping 0.01",)
    assert got.error == pytest.approx(expected.error, rel=0.05)


def test_no_calibration_means_round_to_nearest() -> None:
    weight, _ = problem()
    got = quantize_gptq(weight, Gram(K), Format(4))
    assert got.method == "rtn"
    assert "no calibration token" in got.notes[0]
    assert torch.equal(got.weight.q, quantize_rtn(weight, Format(4)).q)


def test_round_to_nearest_is_kept_where_it_is_better() -> None:
    # Greedy rounding can lose: some of these small problems are such, and none may end worse.
    kept = 0
    for seed in range(60):
        weight, gram = problem(n=1, k=3, seed=seed, tokens=4)
        got = quantize_gptq(weight, gram, Format(4))
        assert got.error <= got.rtn_error
        if got.method == "rtn":
            kept += 1
            assert torch.equal(got.weight.q, quantize_rtn(weight, Format(4)).q)
            assert "round-to-nearest, which is kept" in got.notes[-1]
    assert 0 < kept < 60


def test_the_same_problem_in_other_units_has_the_same_elements() -> None:
    weight, gram = problem()
    expected = quantize_gptq(weight, gram, Format(4, False, 32)).weight.q
    assert torch.equal(quantize_gptq(weight * 2.0**40, gram, Format(4, False, 32)).weight.q, expected)
    assert torch.equal(quantize_gptq(weight, gram.H * 2.0**60, Format(4, False, 32)).weight.q, expected)


def test_options_and_problems_that_make_no_sense_are_refused() -> None:
    weight, gram = problem()
    for damp in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(UsageError, match="damp"):
            GPTQ(damp=damp)
    with pytest.raises(UsageError, match="clip"):
        GPTQ(clip="min")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Gram matrix"):
        quantize_gptq(weight[:, :64], gram, Format(4))
    with pytest.raises(ModelError, match="Gram matrix"):
        quantize_gptq(weight, torch.full((K, K), torch.nan), Format(4))
    with pytest.raises(UsageError, match="128 does not divide"):
        quantize_gptq(weight, gram, Format(4, True, 128))
