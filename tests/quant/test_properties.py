"""What every algorithm promises for any weight and any Gram: a finite result or a typed error, and nothing else.

Inputs stay as they were to the bit, the random state of torch is not touched, and the same call has the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant import awq, smoothquant
from optimizer.quant.formats import ACTIVATIONS, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format, Scheme
from optimizer.quant.gptq import GPTQ, quantize_gptq
from optimizer.quant.gram import Gram, output_error
from optimizer.quant.rtn import quantize_rtn
from optimizer.quant.weight import QuantizedWeight

FORMATS = [
    Format(4), Format(4, True, 32), Format(4, False, 32), Format(8, False), Format(8, granularity="tensor"),
    FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, NVFP4, MXFP4,
]  # fmt: skip
SCHEMES = [Scheme(format, activation) for format in FORMATS[:8] for activation in (ACTIVATIONS["int8"], None)]
SCHEMES += [Scheme(NVFP4, ACTIVATIONS["nvfp4"]), Scheme(FP8_CHANNEL, ACTIVATIONS["fp8-static"])]
SCHEMES += [Scheme(Format(8), ACTIVATIONS["llm-int8"])]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda w: w,
    "zero": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, -0.7),
    "zero columns": lambda w: w * (torch.arange(w.shape[1]) % 3 > 0),
    "zero rows": lambda w: w * (torch.arange(len(w)) % 2 > 0).unsqueeze(1),
    "one spike": lambda w: w.index_fill(1, torch.tensor([1]), 1e4),
    "tiny": lambda w: w * 1e-41,
    "small": lambda w: w * 1e-20,
    "large": lambda w: w * 1e6,  # its scales leave float16
    "huge": lambda w: w * 3e37,
    "nan": lambda w: w.index_fill(1, torch.tensor([0]), torch.nan),
    "inf": lambda w: w.index_fill(1, torch.tensor([0]), -torch.inf),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "none": lambda x: x[:0],
    "zero": torch.zeros_like,
    "rank one": lambda x: x[:1].repeat(5, 1),
    "few tokens": lambda x: x[:3],
    "silent channels": lambda x: x * (torch.arange(x.shape[1]) % 4 > 0),
    "one channel": lambda x: x * (torch.arange(x.shape[1]) == 2),
    "equal channels": lambda x: x[:, :1].expand_as(x),
    "outliers": lambda x: x * (1 + 1e6 * (torch.arange(x.shape[1]) == 1)),
    "tiny": lambda x: x * 1e-25,  # its squares are 0 in float32
    "huge": lambda x: x * 1e17,
}


@dataclass(frozen=True)
class Case:
    """What goes into an algorithm."""

    weight: Tensor
    gram: Gram
    scale_dtype: torch.dtype

    def snapshot(self) -> list[Tensor]:
        gram = self.gram
        tensors = (self.weight, gram.H, gram.abs_sum, gram.low, gram.high, torch.get_rng_state())
        return [tensor.clone().contiguous().view(torch.uint8) for tensor in tensors]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, k = draw(st.sampled_from([(1, 32), (1, 64), (3, 32), (5, 96), (2, 160), (130, 32)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    weight = WEIGHTS[draw(st.sampled_from(sorted(WEIGHTS)))](torch.randn(rows, k, generator=generator))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    gram = Gram(k)
    gram.update(INPUTS[draw(st.sampled_from(sorted(INPUTS)))](torch.randn(70, k, generator=generator)))
    return Case(weight.to(dtype), gram, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


fuzz = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def assert_sound(case: Case, run: Callable[[], object]) -> object:
    """Run twice: one result, finite, from inputs that stay; None where a typed error was raised with good reason."""
    before, refused, first = case.snapshot(), "", None
    try:
        first = run()
    except ModelError as error:
        refused = str(error)
    if refused:
        assert any(reason in refused for reason in ("NaN or infinite", "does not fit", "too large"))
    else:
        assert bool(case.weight.isfinite().all())
        second = run()
        for a, b in zip(tensors(first), tensors(second), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert bool(a.float().isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(before, case.snapshot(), strict=True))
    return first


def tensors(result: object) -> list[Tensor]:
    """Every tensor of a result."""
    if isinstance(result, Tensor):
        return [result.contiguous()]
    if isinstance(result, QuantizedWeight):
        parts = (result.q, result.scale, result.zero, result.global_scale, result.dequantize())
        return [part.contiguous() for part in parts if part is not None]
    return tensors(result.scale if isinstance(result, smoothquant.SmoothResult) else result.weight)  # type: ignore[attr-defined]


def assert_no_worse(case: Case, format: Format, got: QuantizedWeight) -> None:
    plain = quantize_rtn(case.weight, format, case.scale_dtype)
    ours, theirs = (output_error(case.weight, w, case.gram) for w in (got, plain))
    assert ours <= theirs * (1 + 1e-6)


@fuzz
@given(cases(), st.sampled_from(FORMATS), st.booleans(), st.sampled_from(["max", "mse"]), st.sampled_from([1e-4, 0.01]))
def test_gptq(case: Case, format: Format, act_order: bool, clip: str, damp: float) -> None:
    config = GPTQ(damp=damp, act_order=act_order, clip=clip)  # type: ignore[arg-type]
    got = assert_sound(case, lambda: quantize_gptq(case.weight, case.gram, format, config, case.scale_dtype))
    if got is not None:
        assert 0 <= got.error <= got.rtn_error  # type: ignore[attr-defined]
        assert got.error == pytest.approx(output_error(case.weight, got.weight, case.gram), rel=1e-6)  # type: ignore[attr-defined]
        assert got.weight.scale.shape == format.scale_shape(*case.weight.shape)  # type: ignore[attr-defined]


@fuzz
@given(cases(), st.sampled_from(FORMATS))
def test_awq_clip(case: Case, format: Format) -> None:
    got = assert_sound(case, lambda: awq.quantize_awq(case.weight, case.gram, format, scale_dtype=case.scale_dtype))
    if isinstance(got, QuantizedWeight):
        assert_no_worse(case, format, got)


@fuzz
@given(cases(), st.sampled_from(FORMATS))
def test_awq_scale(case: Case, format: Format) -> None:
    weights = [case.weight, case.weight[:1]]
    config = awq.AWQ(grid=4)
    scale = assert_sound(
        case, lambda: awq.search_scale(weights, case.gram, format, config, scale_dtype=case.scale_dtype)
    )
    if isinstance(scale, Tensor):
        assert scale.shape == (case.weight.shape[1],)
        assert bool((scale > 0).all())


@fuzz
@given(cases(), st.sampled_from(SCHEMES), st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_smoothquant(case: Case, scheme: Scheme, alpha: float | None) -> None:
    weights, config = [case.weight, case.weight[:1]], smoothquant.SmoothQuant(alpha)
    got = assert_sound(case, lambda: smoothquant.search_scale(weights, case.gram, scheme, config))
    if isinstance(got, smoothquant.SmoothResult):
        assert bool((got.scale > 0).all())
        assert 0 <= got.error < math.inf
        assert 0 <= got.plain_error < math.inf
        if alpha is None:
            assert got.error <= got.plain_error


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_a_transposed_weight_is_quantized_as_its_copy(format: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(64, 5, generator=generator).T, Gram(64)
    gram.update(torch.randn(70, 64, generator=generator))
    for run in (
        lambda w: quantize_rtn(w, format),
        lambda w: quantize_gptq(w, gram, format),
        lambda w: awq.quantize_awq(w, gram, format),
    ):
        for ours, expected in zip(tensors(run(weight)), tensors(run(weight.contiguous())), strict=True):
            assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("format", [Format(4, True, 64), NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("k", [8, 40])
def test_a_row_that_groups_do_not_fill_is_a_usage_error(format: Format, k: int) -> None:
    weight, gram = torch.ones(2, k), Gram(k)
    gram.update(torch.ones(3, k))
    for run in (
        lambda: quantize_gptq(weight, gram, format),
        lambda: awq.quantize_awq(weight, gram, format),
        lambda: awq.search_scale([weight], gram, format),
        lambda: smoothquant.search_scale([weight], gram, Scheme(format)),
    ):
        with pytest.raises(UsageError, match=rf"does not divide {k}"):
            run()


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_nothing_to_quantize_is_a_usage_error(format: Format) -> None:
    for weight in (torch.ones(0, 32), torch.ones(32), torch.ones(2, 32, dtype=torch.int8)):
        for run in (
            lambda w: quantize_gptq(w, Gram(32), format),
            lambda w: awq.quantize_awq(w, Gram(32), format),
            lambda w: awq.search_scale([w], Gram(32), format),
            lambda w: smoothquant.search_scale([w], Gram(32), Scheme(format)),
        ):
            with pytest.raises(UsageError, match=r"\[N, "):
                run(weight)
