"""AWQ: scales and clipping against outputs computed from the tokens themselves, and the promise never to be worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.awq import AWQ, quantize_awq, search_clip, search_scale
from optimizer.quant.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format
from optimizer.quant.gram import Gram, trace_error
from optimizer.quant.rtn import SHRINK, fit_grid, quantize_rtn

FORMATS = [
    Format(4), Format(4, True, 32), Format(4, False, 64), Format(4, granularity="tensor"),
    Format(4, granularity="block"), Format(8, False), FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, NVFP4, MXFP4,
]  # fmt: skip
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
K = 192


def problem(n: int = 40, outliers: float = 20.0, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """Tokens with a few large channels, as after the norms of a trained model, and a heavy-tailed weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, K, generator=generator)
    x[:, ::37] *= outliers
    gram = Gram(K)
    gram.update(x)
    weight = torch.randn(n, K, generator=generator) * torch.randn(n, K, generator=generator).abs() * 0.05
    return x, weight, gram


def lost(x: Tensor, weight: Tensor, restored: Tensor) -> float:
    """Squared error of the outputs, from the tokens."""
    return float((x.double() @ (weight.double() - restored.double()).T).square().sum())


def scaled_loss(x: Tensor, weights: list[Tensor], scale: Tensor, format: Format) -> float:
    return sum(lost(x, w, quantize_rtn(w * scale, format).dequantize() / scale) for w in weights)


def test_the_worked_example_of_the_docstring() -> None:
    x, weight, format = torch.tensor([[1.0, 16.0], [1.0, -16.0]]), torch.tensor([[1.5, 0.1]]), Format(4)
    gram = Gram(2)
    gram.update(x)
    assert search_scale([weight], gram, format, AWQ(grid=2)).tolist() == [0.5, 2.0]
    for scale, error in (([1.0, 1.0], 5.14), ([0.5, 2.0], 0.02), ([0.25, 4.0], 0.0228)):
        assert scaled_loss(x, [weight], torch.tensor(scale), format) == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("format", [Format(4, True, 32), Format(4, False, 64), Format(4)], ids=lambda f: f.name)
def test_a_scale_saves_a_quarter_where_channels_are_large(format: Format) -> None:
    x, weight, gram = problem()
    weights = [weight, weight.flip(0)[:8] * 0.3]
    scale = search_scale(weights, gram, format)
    assert scaled_loss(x, weights, scale, format) < 0.75 * scaled_loss(x, weights, torch.ones(K), format)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-5)
    assert bool((scale[::37] > scale.median()).all())


@every_format
@pytest.mark.parametrize("outliers", [1.0, 300.0])
def test_a_scale_never_does_harm(format: Format, outliers: float) -> None:
    x, weight, gram = problem(outliers=outliers)
    for rows in (512, 3):  # the second compares on a poor sample
        scale = search_scale([weight], gram, format, AWQ(grid=8, rows=rows))
        assert scaled_loss(x, [weight], scale, format) <= scaled_loss(x, [weight], torch.ones(K), format)


def test_the_search_takes_the_best_of_its_grid() -> None:
    x, weight, gram = problem()
    format, size = Format(4, True, 32), weight.abs().mean(0).double()
    found = [scaled_loss(x, [weight], torch.ones(K), format)]
    for i in range(1, 6):
        for raw in (gram.absmean.double() ** (i / 5), gram.absmean.double() ** (i / 5) / size ** (1 - i / 5)):
            found.append(scaled_loss(x, [weight], (raw / (raw.max() * raw.min()).sqrt()).float(), format))
    best = scaled_loss(x, [weight], search_scale([weight], gram, format, AWQ(grid=5)), format)
    assert best == pytest.approx(min(found), rel=1e-4)


def test_a_scale_can_be_shared_by_channels() -> None:
    x, weight, gram = problem()

    def shared(s: Tensor) -> Tensor:
        return s.view(3, -1).amax(0).repeat(3)

    scale = search_scale([weight], gram, Format(4, True, 32), reduce=shared)
    assert torch.equal(scale, shared(scale))
    assert scale.unique().numel() > 1
    assert scaled_loss(x, [weight], scale, Format(4, True, 32)) < scaled_loss(
        x, [weight], torch.ones(K), Format(4, True, 32)
    )
    with pytest.raises(UsageError, match="positive"):
        search_scale([weight], gram, Format(4), reduce=lambda s: s * 0)


def test_a_silent_channel_keeps_its_scale() -> None:
    x, weight, _ = problem()
    x[:, 3] = 0
    gram = Gram(K)
    gram.update(x)
    scale = search_scale([weight], gram, Format(4, True, 32))
    assert scale[3] == 1
    assert scale.unique().numel() > 1
    assert search_scale([weight], Gram(K), Format(4)).tolist() == [1.0] * K


def test_a_scale_that_leaves_the_type_is_not_chosen() -> None:
    _, weight, gram = problem(outliers=1e4)
    weight = weight / weight.abs().max() * 65504 * 7.5
    scale = search_scale([weight], gram, Format(4), scale_dtype=torch.float16)
    quantize_rtn(weight * scale, Format(4), torch.float16)
    with pytest.raises(ModelError, match="float16"):
        search_scale([weight * 2], gram, Format(4), scale_dtype=torch.float16)


@every_format
def test_the_clip_of_each_scale_is_the_best_share_there_is(format: Format) -> None:
    """By brute force: every share for every scale, with the error of the group's columns alone."""
    x, weight, gram = problem(n=150)
    grid = search_clip(weight, gram, format)
    width = {"group": format.group_size, "block": 128}.get(format.granularity, K)
    height = {"tensor": 150, "block": 128}.get(format.granularity, 1)
    largest = float(weight.abs().max()) if format.scale == "e4m3" else None

    def group_loss(candidate: Tensor) -> Tensor:
        delta = (weight - candidate).double()
        columns = range(0, K, width)
        per_row = torch.stack(
            [(x[:, c : c + width].double() @ delta[:, c : c + width].T).square().sum(0) for c in columns], 1
        )
        return torch.stack([part.sum(0) for part in per_row.split(height)])

    tried = []
    for share in SHRINK:
        small = fit_grid(weight * share, format, tensor_max=largest)
        tried.append(group_loss(small.decode(small.encode(weight))))
    best = torch.stack(tried).amin(0)
    torch.testing.assert_close(group_loss(grid.decode(grid.encode(weight))), best, rtol=1e-3, atol=0)
    assert grid.scale.shape == format.scale_shape(150, K)


@every_format
def test_clipping_never_does_harm_and_helps_four_bits(format: Format) -> None:
    x, weight, gram = problem()
    got, plain = quantize_awq(weight, gram, format), quantize_rtn(weight, format)
    assert got.q.dtype == plain.q.dtype
    assert got.scale.dtype == plain.scale.dtype
    share = lost(x, weight, got.dequantize()) / lost(x, weight, plain.dequantize())
    assert share <= 1
    if format.bits == 4 and format.scale == "float":
        assert share < 0.9
    unclipped = quantize_awq(weight, gram, format, AWQ(clip=False))
    assert torch.equal(unclipped.dequantize(), plain.dequantize())


def test_clipping_that_ignores_what_groups_do_together_is_undone() -> None:
    # All channels carry one signal, so the sum of a row's errors is what counts, and groups must not err alike.
    worse = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        gram = Gram(64)
        gram.update(torch.randn(100, 1, generator=generator) + 0.01 * torch.randn(100, 64, generator=generator))
        weight = torch.randn(1, 64, generator=generator)
        grid = search_clip(weight, gram, Format(4, True, 32))
        clipped = trace_error(weight - grid.decode(grid.encode(weight)), gram.H)
        plain = trace_error(weight - quantize_rtn(weight, Format(4, True, 32)).dequantize(), gram.H)
        got = trace_error(weight - quantize_awq(weight, gram, Format(4, True, 32)).dequantize(), gram.H)
        assert got == pytest.approx(min(clipped, plain))
        worse += clipped > plain
    assert worse > 0


def test_merged_layers_share_the_tensor_scale_they_are_given() -> None:
    _, weight, gram = problem()
    got = quantize_awq(weight, gram, NVFP4, tensor_max=7.0)
    assert torch.equal(got.global_scale, torch.tensor([448 * 6 / 7.0]))  # type: ignore[arg-type]
    assert quantize_awq(weight, gram, FP8_TENSOR, tensor_max=4.48).scale.item() == pytest.approx(0.01)


def test_options_and_problems_that_make_no_sense_are_refused() -> None:
    _, weight, gram = problem()
    for options in ({"grid": 0}, {"rows": 0}):
        with pytest.raises(UsageError, match="Invalid grid"):
            AWQ(**options)
    with pytest.raises(UsageError, match="do not share"):
        search_scale([weight, weight[:, :32]], gram, Format(4))
    with pytest.raises(UsageError, match="does not divide"):
        search_scale([weight], gram, Format(4, True, 128))
    with pytest.raises(UsageError, match="Gram matrix"):
        quantize_awq(weight[:, :32], gram, Format(4))
    with pytest.raises(ModelError, match="NaN"):
        search_scale([weight * torch.nan], gram, Format(4))
