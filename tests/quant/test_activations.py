"""Rounded activations against compressed-tensors bit for bit, integer arithmetic, and values no calibration saw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.activations import activation_elements, check_activation, quantize_activation, static_scale
from optimizer.quant.formats import ACTIVATIONS, ActivationFormat

FORMATS = ACTIVATIONS | {
    "int8-tensor": ActivationFormat(granularity="tensor"),
    "fp8-tensor": ActivationFormat(kind="float", granularity="tensor"),
    "int8-group": ActivationFormat(granularity="group", group_size=32),
}
WITHOUT_OUTLIERS = [f for f in FORMATS.values() if f.outlier_threshold is None]  # what compressed-tensors has
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
NVFP4 = ACTIVATIONS["nvfp4"]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values with tokens of very different size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 1, x.shape[-2]).unsqueeze(1) if x.ndim > 1 else x


def scale_for(x: Tensor, format: ActivationFormat) -> Tensor | None:
    """A static scale that the largest magnitude of `x` fits, where the format has one."""
    return None if format.dynamic else static_scale(x.abs().max(), format)


def rounded(x: Tensor, format: ActivationFormat) -> Tensor:
    return quantize_activation(x, format, scale_for(x, format))


def theirs(x: Tensor, format: ActivationFormat, scale: Tensor | None) -> Tensor:
    """The same by compressed-tensors."""
    options: dict[str, Any] = {"num_bits": format.bits, "type": format.kind, "symmetric": True}
    if format.bits == 4:
        options |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": torch.float8_e4m3fn}
    else:
        options |= {"strategy": str(format.granularity), "dynamic": format.dynamic}
    if format.granularity == "group":
        options["group_size"] = format.group_size
    args, module = QuantizationArgs(**options), torch.nn.Module()
    if format.bits == 4:
        local, zero = compute_dynamic_scales_and_zp(x, args, module, global_scale=scale)
        return fake_quantize(x, local, zero, args, global_scale=scale)
    if format.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, module)
        return fake_quantize(x, scale, zero, args)
    assert scale is not None
    return fake_quantize(x, scale, torch.zeros_like(scale), args)


@pytest.mark.parametrize("format", WITHOUT_OUTLIERS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(2, 3, 256), (1, 1, 128), (2, 64, 384)], ids=str)
def test_values_are_those_of_compressed_tensors_bit_for_bit(format: ActivationFormat, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    x[..., :5] = 0
    scale = scale_for(x, format)
    assert torch.equal(quantize_activation(x, format, scale), theirs(x, format, scale))
    if scale is not None:  # what calibration did not see saturates alike
        assert torch.equal(quantize_activation(3 * x, format, scale), theirs(3 * x, format, scale))


def test_the_static_nvfp4_scale_is_that_of_compressed_tensors() -> None:
    for absmax in (1e-3, 0.7, 6.0, 448.0, 12345.6):
        given_max = torch.tensor(absmax)
        assert torch.equal(static_scale(given_max, NVFP4), generate_gparam(-given_max, given_max))


def test_groups_below_the_smallest_nvfp4_scale_become_zeros_as_in_compressed_tensors() -> None:
    x = torch.logspace(-9, 0, 64).view(1, 64, 1) * torch.linspace(-1, 1, 16)
    scale = static_scale(1.0, NVFP4)
    got = quantize_activation(x, NVFP4, scale)
    assert torch.equal(got, theirs(x, NVFP4, scale))
    assert not got[0, 0].any()
    assert got[0, -1].any()


@pytest.mark.parametrize(
    ("name", "absmax", "expected"),
    [("int8-static", 2.55, 0.02), ("fp8-static", 896.0, 2.0), ("nvfp4", 2688.0, 1.0), ("nvfp4", 1.0, 2688.0)],
)
def test_static_scales_by_hand(name: str, absmax: float, expected: float) -> None:
    scale = static_scale(absmax, ACTIVATIONS[name])
    assert (scale.shape, scale.dtype) == ((1,), torch.float32)
    assert float(scale) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(scale, static_scale(torch.tensor([absmax]), ACTIVATIONS[name]))


@pytest.mark.parametrize("name", ["int8-static", "fp8-static", "nvfp4"])
def test_a_layer_that_calibration_never_reached_has_a_usable_scale(name: str) -> None:
    for absmax in (0.0, 1e-45):
        scale = static_scale(absmax, ACTIVATIONS[name])
        assert bool((scale > 0).all() & scale.isfinite().all())
        assert quantize_activation(random(2, 32), ACTIVATIONS[name], scale).isfinite().all()


@pytest.mark.parametrize("absmax", [math.nan, math.inf, -1.0])
def test_a_calibration_that_went_wrong_is_refused(absmax: float) -> None:
    with pytest.raises(ModelError, match="one finite number"):
        static_scale(absmax, ACTIVATIONS["int8-static"])


def test_the_worked_example_of_the_docstring() -> None:
    x = torch.tensor([[2.55, -1.0, 0.01]])
    q, scale, outliers = activation_elements(x, ACTIVATIONS["int8"])
    assert (q.tolist(), q.dtype, outliers) == ([[127, -50, 0]], torch.int8, None)
    assert float(scale) == pytest.approx(0.02)
    torch.testing.assert_close(quantize_activation(x, ACTIVATIONS["int8"]), torch.tensor([[2.54, -1.0, 0.0]]))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_integer_elements_multiply_exactly(granularity: Any) -> None:
    x, w = random(5, 64), torch.randint(-128, 128, (7, 64), generator=torch.Generator().manual_seed(1))
    format = ActivationFormat(granularity=granularity)
    q, scale, _ = activation_elements(x, format)
    integer = q.to(torch.int32) @ w.to(torch.int32).t()
    product = quantize_activation(x, format).double() @ w.double().t()
    # Each q s is rounded to float32: 64 terms of at most 127 s · 128, half a unit of 2^-24 each.
    bound = 64 * 127 * 128 * 2.0**-24 * float(scale.max())
    assert float((integer.double() * scale.double() - product).abs().max()) <= bound


def e4m3_table() -> Tensor:
    """Every finite value of e4m3: sign, exponent (4, bias 7), mantissa (3); 1111 111 is NaN."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append((mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(values + [-v for v in values], dtype=torch.float64)


E2M1_TABLE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


@pytest.mark.parametrize("name", ["fp8", "fp8-static", "fp8-group", "nvfp4"])
def test_no_other_float_is_nearer(name: str) -> None:
    format, x = ACTIVATIONS[name], random(4, 128)
    scale = scale_for(x, format)
    q, steps, _ = activation_elements(x, format, scale)
    table = e4m3_table() if format.bits == 8 else torch.cat([E2M1_TABLE, -E2M1_TABLE])
    wide = steps.double() if format.bits == 8 else steps.double() / scale.double()  # type: ignore[union-attr]
    step = wide.repeat_interleave(128 // wide.shape[-1], -1)
    value = table[q.long()] if format.bits == 4 else q.double()
    best = (x.double() / step - table.view(-1, 1, 1)).abs().amin(0)
    # Where two are equally near, the float32 quotient may pick either: it is off by 2^-24 of itself.
    assert bool(((x.double() / step - value).abs() <= best + 2.0**-22 * (x.double() / step).abs()).all())


@every_format
def test_zeros_stay_zeros_and_do_not_disturb_their_neighbours(format: ActivationFormat) -> None:
    x = random(4, 128)
    x[1] = 0
    got = rounded(x, format)
    assert not got[1].any()
    assert torch.equal(got[1].isfinite(), torch.ones(128, dtype=torch.bool))
    assert got[3].any()
    assert not quantize_activation(torch.zeros(2, 3, 128), format, scale_for(x, format)).any()


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_becomes_a_number(format: ActivationFormat, bad: float) -> None:
    x = random(3, 256) / 10  # below any outlier threshold
    x[1, 17] = bad
    got = quantize_activation(x, format, scale_for(torch.ones(1), format))
    outlier = format.outlier_threshold is not None and math.isinf(bad)
    if outlier:
        assert float(got[1, 17]) == bad  # left as it is, so the product shows it
    elif format.granularity == "group":
        own = slice(17 // format.group_size * format.group_size, (17 // format.group_size + 1) * format.group_size)
        assert got[1, own].isnan().all()
        assert int(got.isnan().sum()) == format.group_size
    else:
        assert got[1].isnan().all()
    whole = format.granularity == "tensor" and format.dynamic
    assert got[[0, 2]].isnan().all() if whole else got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["int8-static", "fp8-static"])
def test_static_scales_saturate(name: str) -> None:
    format, x = ACTIVATIONS[name], torch.tensor([[1e30, -1e30, 0.5]])
    got = quantize_activation(x, format, static_scale(1.0, format))
    largest, least = (127 / 127.5, -128 / 127.5) if format.kind == "int" else (1.0, -1.0)
    torch.testing.assert_close(got[0, :2], torch.tensor([largest, least]))
    assert abs(float(got[0, 2]) - 0.5) < 0.02


@every_format
@pytest.mark.parametrize("size", [1e-38, 1e-45, 1e37])
def test_sizes_at_the_ends_of_float32(format: ActivationFormat, size: float) -> None:
    x = torch.linspace(-size, size, 128).view(1, 128)
    got = rounded(x, format)
    assert got.isfinite().all()
    # Half a step of the coarsest grid: e2m1 has 2 between 4 and 6, and its scale is off by up to 1/16.
    assert bool(((got - x).abs() <= x.abs().max() * 0.25 + 1e-38).all())


@every_format
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 2, 3, 128), (0, 128), (2, 0, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape_and_type_gives_float32_of_that_shape(
    format: ActivationFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = None if format.dynamic else static_scale(4.5, format)
    got = quantize_activation(x, format, scale)
    assert (got.shape, got.dtype) == (x.shape, torch.float32)
    assert torch.equal(got, quantize_activation(x.float(), format, scale))
    if x.numel():
        assert float((got - x.float()).norm() / x.float().norm()) < (0.2 if format.bits == 4 else 0.05)


@every_format
def test_the_input_is_unchanged_and_may_be_strided(format: ActivationFormat) -> None:
    x = random(128, 6).t()
    before = x.clone()
    assert torch.equal(rounded(x, format), rounded(x.contiguous(), format))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-group", "int8-static", "fp8-static", "nvfp4"])
def test_tokens_are_rounded_alone(name: str) -> None:
    format, x = ACTIVATIONS[name], random(5, 256)
    scale = scale_for(x, format)
    alone = torch.cat([quantize_activation(x[i : i + 1], format, scale) for i in range(5)])
    assert torch.equal(quantize_activation(x, format, scale), alone)


def test_outlier_columns_are_left_and_not_counted() -> None:
    x = random(4, 64).clamp(-5, 5)
    x[2, 7], x[0, 30], x[1, 31] = 60.0, -6.5, 6.0  # 6.0 is not larger than the threshold
    got = quantize_activation(x, ACTIVATIONS["llm-int8"])
    q, scale, outliers = activation_elements(x, ACTIVATIONS["llm-int8"])
    assert outliers is not None
    assert outliers.nonzero().flatten().tolist() == [7, 30]
    assert torch.equal(got[:, outliers], x[:, outliers])
    assert not q[:, outliers].any()
    without = quantize_activation(x.masked_fill(outliers, 0), ACTIVATIONS["int8"])
    assert torch.equal(got[:, ~outliers], without[:, ~outliers])
    torch.testing.assert_close(scale.flatten(), x[:, ~outliers].abs().amax(1) / 127.5)


def test_an_outlier_costs_the_others_nothing_and_would_cost_them_much() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 500
    rest = [k for k in range(64) if k != 3]

    def error(name: str) -> float:
        return float((quantize_activation(x, ACTIVATIONS[name]) - x)[:, rest].norm())

    assert error("llm-int8") < error("int8") / 20


@pytest.mark.parametrize(
    ("format", "k", "scale", "message"),
    [
        (ACTIVATIONS["int8"], 64, torch.ones(1), "takes its scales from each input and no static one"),
        (ACTIVATIONS["fp8-static"], 64, None, "needs a static scale"),
        (ACTIVATIONS["fp8-static"], 64, torch.ones(2), r"one static scale, got \[2\]"),
        (ACTIVATIONS["nvfp4"], 40, torch.ones(1), "groups do not divide 40"),
        (ACTIVATIONS["fp8-group"], 192, None, "groups do not divide 192"),
        (ActivationFormat(4), 64, None, "cannot be int4-token"),
        (ActivationFormat(4, "float", "group", group_size=16), 64, None, "cannot be fp4-g16"),
        (ActivationFormat(4, "float", "token", dynamic=False), 64, torch.ones(1), "cannot be fp4-token"),
        (ActivationFormat(3), 64, None, "cannot be int3"),
        (ActivationFormat(granularity="group"), 64, None, "cannot be"),
        (ActivationFormat(group_size=32), 64, None, "cannot be"),
        (ActivationFormat(dynamic=False), 64, torch.ones(1), "granularity is tensor"),
    ],
    ids=lambda value: value.name if isinstance(value, ActivationFormat) else None,
)
def test_formats_that_cannot_be_are_refused(
    format: ActivationFormat, k: int, scale: Tensor | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_activation(format, k, scale)
    with pytest.raises(UsageError, match=message):
        quantize_activation(torch.ones(2, k), format, scale)


def test_a_dynamic_format_has_no_static_scale() -> None:
    with pytest.raises(UsageError, match="int8-token takes its scales from each input"):
        static_scale(1.0, ACTIVATIONS["int8"])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16),
    st.sampled_from(["int8", "fp8", "nvfp4"]),
)
def test_rounding_is_odd_bounded_and_keeps_order(values: list[float], name: str) -> None:
    format, x = ACTIVATIONS[name], torch.tensor([values])
    scale = scale_for(x, format)
    got = quantize_activation(x, format, scale)
    assert got.isfinite().all()
    order = x[0].argsort()
    assert bool((got[0, order].diff() >= 0).all())
    if name != "int8":  # whose grid reaches one further below zero than above
        assert torch.equal(quantize_activation(-x, format, scale), -got)
    assert bool((got * x >= 0).all())


@every_format
def test_it_compiles_whole_and_gives_the_same(format: ActivationFormat) -> None:
    torch._dynamo.reset()
    x = random(3, 128)
    x[1, 5] = 50.0
    scale = scale_for(x, format)
    compiled = torch.compile(quantize_activation, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, format, scale), quantize_activation(x, format, scale))
