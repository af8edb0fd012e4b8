"""Linear modules: exact storage, bytes by hand, and merged layers that can never hand out a stale product."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from optimizer.backends.kernels.build import CpuKernels, cpu_kernels
from optimizer.backends.linear import (
    DenseLinear,
    MergedLinear,
    MergedSlice,
    QuantizedLinear,
    kernel_name,
    layer_kernel,
    linear_layers,
    stored_scheme,
    stored_weight,
    weight_bytes,
)
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements, quantize_activation, static_scale
from optimizer.quant.formats import (
    ACTIVATIONS,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    MXFP4,
    NVFP4,
    ActivationFormat,
    Format,
    Scheme,
)
from optimizer.quant.rtn import quantize_rtn
from optimizer.quant.weight import QuantizedWeight, concatenate

SCHEMES = {
    "w8a8": Scheme(Format(), ACTIVATIONS["int8"]),
    "w8a8-static": Scheme(Format(), ACTIVATIONS["int8-static"]),
    "w8a8-tensor": Scheme(Format(granularity="tensor"), ACTIVATIONS["int8"]),
    "w8a8-block": Scheme(Format(granularity="block"), ACTIVATIONS["int8"]),
    "w4a8": Scheme(Format(4, False, 32), ACTIVATIONS["int8"]),
    "llm-int8": Scheme(Format(), ACTIVATIONS["llm-int8"]),
    "fp8": Scheme(FP8_CHANNEL, ACTIVATIONS["fp8"]),
    "fp8-static": Scheme(FP8_TENSOR, ACTIVATIONS["fp8-static"]),
    "fp8-block": Scheme(FP8_BLOCK, ACTIVATIONS["fp8-group"]),
    "fp8-weight": Scheme(FP8_CHANNEL),
    "nvfp4": Scheme(NVFP4, ACTIVATIONS["nvfp4"]),
    "nvfp4-weight": Scheme(NVFP4),
    "mxfp4": Scheme(MXFP4),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def scheme_layer(
    scheme: Scheme, n: int = 7, k: int = 128, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """A layer of the scheme on random weights; a static input scale is that of inputs up to 4."""
    activation = scheme.activation
    scale = None if activation is None or activation.dynamic else static_scale(4.0, activation)
    return QuantizedLinear(quantize_rtn(random(n, k).to(dtype), scheme.weight), bias, activation, scale)


def exact_product(layer: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `layer(x)` stands for in float64, and how far float32 accumulation may be from it."""
    weight = layer.stored_weight().dequantize(torch.float64)
    seen = x if layer.activation is None else quantize_activation(x, layer.activation, layer.input_scale)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    sums = seen.double().abs() @ weight.abs().t() + abs(bias)
    if layer.format.kind == "int":  # the kernels subtract zero points and offsets after summing
        steps, _ = layer.stored_weight().grid.columns(*weight.shape)
        sums = sums + seen.double().abs() @ (steps * 2 ** (layer.format.bits + 1)).double().t()
    return seen.double() @ weight.t() + bias, (x.shape[-1] + 16) * 2.0**-24 * sums


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(
    sizes: tuple[int, ...] = (16, 8, 8), k: int = 64, bias: bool = True
) -> tuple[list[MergedSlice], list[QuantizedLinear]]:
    """The slices of a merged 4-bit layer, and the separate layers it was made of."""
    weights = [quantize_rtn(random(n, k, seed=i), Format(4, False, 32)) for i, n in enumerate(sizes)]
    biases = [random(n, seed=9 + i) if bias else None for i, n in enumerate(sizes)]
    together = torch.cat([b for b in biases if b is not None]) if bias else None
    group = MergedLinear(QuantizedLinear(concatenate(weights), together), list(sizes))
    separate = [QuantizedLinear(w, b) for w, b in zip(weights, biases, strict=True)]
    return [MergedSlice(group, index) for index in range(len(sizes))], separate


def as_bits(t: Tensor) -> Tensor:
    """8-bit floats as bytes, since `torch.equal` does not take all of them."""
    return t.view(torch.uint8) if t.itemsize == 1 else t


def assert_same(got: QuantizedWeight | Tensor, expected: QuantizedWeight) -> None:
    assert isinstance(got, QuantizedWeight)
    for ours, theirs in ((got.q, expected.q), (got.scale, expected.scale)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(as_bits(ours), as_bits(theirs))
    assert got.scale.dtype == expected.scale.dtype
    assert got.format == expected.format
    assert (got.global_scale is None) == (expected.global_scale is None)
    if got.global_scale is not None and expected.global_scale is not None:
        assert torch.equal(got.global_scale, expected.global_scale)
    assert (got.zero is None) == (expected.zero is None)
    if got.zero is not None and expected.zero is not None:
        assert torch.equal(got.zero, expected.zero)
        assert got.zero.dtype == expected.zero.dtype


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "k", "dtype"),
    list(product((4, 8), (True, False), (32, -1), (64, 96), (torch.bfloat16, torch.float16, torch.float32)))
    + [
        (bits, symmetric, -1, k, torch.bfloat16) for bits in (4, 8) for symmetric in (True, False) for k in (1, 33, 100)
    ],
)
def test_a_stored_weight_comes_back_exactly(bits: int, symmetric: bool, group: int, k: int, dtype: torch.dtype) -> None:
    weight = quantize_rtn(random(5, k).to(dtype), Format(bits, symmetric, group))
    layer = QuantizedLinear(weight)
    assert_same(layer.stored_weight(), weight)
    assert_same(stored_weight(copy.deepcopy(layer)), weight)


@pytest.mark.parametrize(("bits", "k"), [(4, 64), (8, 64), (4, 33), (8, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_module_computes_with_its_dequantized_weight(bits: int, k: int, symmetric: bool) -> None:
    weight, bias, x = (
        quantize_rtn(random(7, k), Format(bits, symmetric, -1)),
        random(7, seed=2),
        random(2, 3, k, seed=3),
    )
    got = QuantizedLinear(weight, bias)(x)
    expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    # (K + 16) u of sums whose terms are at most |x| times 2^b steps (kernels/linear_cases.py has the sharp form).
    error = (k + 16) * 2.0**-24 * float((x.abs().sum(-1).max() * weight.scale.max() * 2**bits * 2) + bias.abs().max())
    assert float((got - expected).abs().max()) <= error


def test_weight_bytes_by_hand() -> None:
    weight = random(6, 128)
    counts = {
        (4, True, 32): 6 * 64 + 6 * 4 * 4,  # half a byte a weight, a float32 scale a group
        (4, False, 32): 6 * 64 + 2 * 6 * 4 * 4,  # and a float32 zero point
        (8, True, -1): 6 * 128 + 6 * 4,
        (8, False, 64): 6 * 128 + 2 * 6 * 2 * 4,
    }
    for (bits, symmetric, group), expected in counts.items():
        assert QuantizedLinear(quantize_rtn(weight, Format(bits, symmetric, group))).weight_bytes == expected
    assert QuantizedLinear(quantize_rtn(random(6, 100), Format(4))).weight_bytes == 6 * 100 + 6 * 4  # not packed


def test_4_bit_floats_take_half_a_byte_and_scales_one() -> None:
    weight = random(6, 128)
    counts = {
        NVFP4: 6 * 64 + 6 * 8 + 4,  # a scale of one byte for 16 weights, one float32 for the tensor
        MXFP4: 6 * 64 + 6 * 4,
        FP8_CHANNEL: 6 * 128 + 6 * 4,  # kernels take a float32 a row, whatever is stored
        FP8_TENSOR: 6 * 128 + 6 * 4,
        FP8_BLOCK: 6 * 128 + 6 * 4,
    }
    for format, expected in counts.items():
        layer = QuantizedLinear(quantize_rtn(weight.bfloat16(), format))
        assert layer.weight_bytes == weight_bytes(layer) == expected


def test_the_kernel_of_every_scheme_is_named_after_what_runs() -> None:
    w8, w4 = (kernel_name(f"w{bits}a16", torch.device("cpu")) for bits in (8, 4))
    through, plain = w8.replace("w8a16[", "[w8a16 "), w8.removeprefix("w8a16")
    integers = w4.replace("w4a16[", "[int8 ") if cpu_kernels().loaded else "[reference]"
    expected = {
        "w8a8": "w8a8_linear" + integers,
        "w8a8-static": "w8a8_linear" + through,
        "w8a8-tensor": "w8a8_linear[reference]",
        "w8a8-block": "w8a8_linear[reference]",
        "w4a8": "w4a8_linear" + integers,
        "llm-int8": "w8a8_linear" + through,
        "fp8": "fp8_linear" + through,
        "fp8-static": "fp8_linear" + through,
        "fp8-block": "fp8_linear" + through,
        "fp8-weight": "fp8_w8a16_linear" + plain,
        "nvfp4": "nvfp4_linear" + through.replace("w8", "w4"),
        "nvfp4-weight": "nvfp4_w4a16_linear" + plain,
        "mxfp4": "mxfp4_w4a16_linear" + plain,
    }
    assert {name: scheme_layer(scheme).kernel for name, scheme in SCHEMES.items()} == expected
    odd = QuantizedLinear(quantize_rtn(random(4, 33), Format()), activation=ACTIVATIONS["int8"])
    assert odd.kernel == "w8a8_linear[reference]"
    assert "int8-channel × int8-token" in repr(odd)


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_of_every_scheme_comes_back_exactly(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize_rtn(random(130, 160 if scheme.activation != ACTIVATIONS["fp8-group"] else 256).to(dtype),
                          scheme.weight)  # fmt: skip
    scale = None if scheme.activation is None or scheme.activation.dynamic else torch.tensor([0.5])
    layer = QuantizedLinear(weight, None, scheme.activation, scale)
    assert_same(layer.stored_weight(), weight)
    assert_same(stored_weight(copy.deepcopy(layer)), weight)
    assert layer.scheme == stored_scheme(layer) == scheme


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_every_scheme_computes_what_it_stands_for(scheme: Scheme, dtype: torch.dtype, rows: int) -> None:
    """One row and many, which go to different kernels."""
    layer = scheme_layer(scheme, n=19, bias=random(19, seed=2).to(dtype))
    x = random(rows, 128, seed=3)
    x[0, 5] = 9.0
    x = x.to(dtype)
    product, error = exact_product(layer, x)
    got = layer(x)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    if scheme.activation is None and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        error = error + 2.0**-8 * (x.double().abs() @ layer.stored_weight().dequantize(torch.float64).abs().t())
    assert bool(((got.double() - product).abs() <= error + unit * (product.abs() + error) + 2.0**-24).all())


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "llm-int8"])
@pytest.mark.parametrize("k", [64, 100])
def test_w8a8_is_a_product_of_integers(name: str, k: int) -> None:
    layer = scheme_layer(SCHEMES[name], k=k)
    x = random(4, k, seed=5)
    x[1, 8] = 20.0
    activation, weight = layer.activation, layer.stored_weight()
    assert activation is not None
    q, scale, outliers = activation_elements(x, activation, layer.input_scale)
    integers = q.to(torch.int32) @ weight.q.to(torch.int32).t()
    expected = integers.double() * scale.double() * weight.scale.double().t()
    if outliers is not None:
        assert outliers.tolist().index(True) == 8
        kept = (x * outliers).double()
        expected = expected + kept @ weight.dequantize(torch.float64).t()
    # q s is rounded to float32 before the product, which then accumulates K terms in float32.
    error = (k + 32) * 2.0**-24 * (x.double().abs().clamp(max=20) @ weight.dequantize(torch.float64).abs().t() + 1)
    assert bool(((layer(x).double() - expected).abs() <= error).all())


def test_rounded_inputs_are_not_rounded_again_to_16_bits() -> None:
    """In bfloat16 the values q s would lose bits that the integer product keeps."""
    layer, x = scheme_layer(SCHEMES["w8a8"], n=64), random(8, 128, seed=3).bfloat16()
    activation = layer.activation
    assert activation is not None
    seen = quantize_activation(x, activation)
    assert not torch.equal(seen.bfloat16().float(), seen)
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


@every_scheme
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128), (2, 0, 128)], ids=str)
def test_every_scheme_takes_inputs_of_any_shape(scheme: Scheme, shape: tuple[int, ...]) -> None:
    layer = scheme_layer(scheme)
    x = random(*shape)
    got = layer(x)
    assert got.shape == (*shape[:-1], 7)
    if scheme.activation is None or scheme.activation.granularity != "tensor":
        flat = layer(x.reshape(-1, 128))
        torch.testing.assert_close(got.reshape(-1, 7), flat, rtol=1e-5, atol=1e-5)


@every_scheme
def test_zeros_give_the_bias_and_nan_stays_nan(scheme: Scheme) -> None:
    layer = scheme_layer(scheme, bias=random(7, seed=2))
    x = random(3, 128, seed=3)
    x[0] = 0
    assert torch.equal(layer(x)[0], layer.bias)
    for bad in (float("nan"), float("inf")):
        x[1, 3] = bad
        got = layer(x)
        assert not got[1].isfinite().any()
        assert got[2].isfinite().all()
    assert layer(torch.full((1, 128), 1e30)).isfinite().all()


@every_scheme
def test_every_scheme_compiles_whole(scheme: Scheme) -> None:
    torch._dynamo.reset()
    layer = scheme_layer(scheme, bias=random(7, seed=2))
    x = random(2, 3, 128, seed=3).bfloat16()
    x[0, 0, 7] = 30.0
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's import
@every_scheme
def test_every_scheme_compiles_with_inductor(scheme: Scheme) -> None:
    torch._dynamo.reset()
    layer, x = scheme_layer(scheme, bias=random(7, seed=2)), random(2, 3, 128, seed=3)
    got = torch.compile(layer, fullgraph=True, options={"cpp_wrapper": True})(x)
    product, error = exact_product(layer, x)
    assert bool(((got.double() - product).abs() <= error + 2.0**-23 * (product.abs() + error)).all())


def test_a_large_weight_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer.backends.kernels import decoded_linear

    for name in ("fp8", "fp8-block", "fp8-static", "nvfp4", "mxfp4", "w8a8-block"):
        layer = scheme_layer(SCHEMES[name], n=300, k=256, bias=random(300, seed=2))
        x = random(2, 256, seed=3)
        monkeypatch.setattr(decoded_linear, "DECODED_AT_ONCE", 8 << 20)
        whole = layer(x)
        monkeypatch.setattr(decoded_linear, "DECODED_AT_ONCE", 1)
        torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-4)  # BLAS may sum in another order


@pytest.mark.parametrize(
    ("weight", "activation", "scale", "message"),
    [
        (Format(), None, torch.ones(1), "without an activation format"),
        (Format(), ACTIVATIONS["int8"], torch.ones(1), "takes its scales from each input"),
        (Format(), ACTIVATIONS["int8-static"], None, "needs a static scale"),
        (Format(), ACTIVATIONS["int8-static"], torch.zeros(1), "positive finite"),
        (NVFP4, ACTIVATIONS["nvfp4"], torch.tensor([float("nan")]), "positive finite"),
        (FP8_BLOCK, ACTIVATIONS["fp8-group"], None, "groups do not divide 96"),
        (Format(), ActivationFormat(4), None, "cannot be int4-token"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_before_it_runs(
    weight: Format, activation: ActivationFormat | None, scale: Tensor | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizedLinear(quantize_rtn(random(4, 96), weight), None, activation, scale)


def test_what_is_stored_beside_a_weight_is_its_scheme() -> None:
    group = MergedLinear(scheme_layer(SCHEMES["fp8-static"]), [3, 4])
    part = MergedSlice(group, 1)
    assert stored_scheme(part) == SCHEMES["fp8-static"]
    assert part.activation == ACTIVATIONS["fp8-static"]
    assert torch.equal(part.input_scale, static_scale(4.0, ACTIVATIONS["fp8-static"]))  # type: ignore[arg-type]
    assert stored_scheme(nn.Linear(2, 2)) is None
    plain = MergedSlice(MergedLinear(nn.Linear(2, 2), [1, 1]), 0)
    assert (stored_scheme(plain), plain.activation, plain.input_scale) == (None, None, None)
    with pytest.raises(UsageError, match="LayerNorm is not a linear layer"):
        stored_scheme(nn.LayerNorm(2))


@every_scheme
def test_slices_of_every_scheme_equal_separate_layers(scheme: Scheme) -> None:
    sizes, together = (128, 128, 40), scheme_layer(scheme, n=296)
    group = MergedLinear(together, list(sizes))
    x = random(3, 128, seed=3)
    whole = together.stored_weight()
    for index in range(3):
        part = MergedSlice(group, index)
        alone = QuantizedLinear(whole.rows(*part.bounds), None, together.activation, together.input_scale)
        assert_same(part.stored_weight(), alone.stored_weight())
        torch.testing.assert_close(part(x), alone(x), rtol=1e-5, atol=1e-5)  # BLAS may sum in another order


def test_the_kernel_is_named_after_what_runs() -> None:
    blocked, odd = (
        QuantizedLinear(quantize_rtn(random(4, 64), Format(4))),
        QuantizedLinear(quantize_rtn(random(4, 33), Format(4))),
    )
    assert blocked.kernel == kernel_name("w4a16_linear", torch.device("cpu"))
    assert odd.kernel == "w4a16_linear[reference]"
    assert layer_kernel(nn.Linear(2, 2)) == "aten::linear"
    assert kernel_name("op", torch.device("meta")) == "op[reference]"
    assert "int4-channel" in repr(blocked)


needs_kernels = pytest.mark.skipif(not cpu_kernels().loaded, reason="without compiled kernels inputs stay in 16 bits")


@needs_kernels
@pytest.mark.parametrize(
    "format", [Format(4, group_size=128), Format(4, False, 32), Format(), Format(8, False, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_int8_inputs_compute_what_the_rounded_input_stands_for(format: Format, dtype: torch.dtype, rows: int) -> None:
    layer = scheme_layer(Scheme(format), n=19, bias=random(19, seed=2).to(dtype))
    x = random(rows, 128, seed=3).to(dtype)
    x[0, 5] = 9.0
    before = layer(x)
    assert layer.serve_int8(32) == ""
    seen = quantize_activation(x, ActivationFormat(granularity="group", group_size=32))
    product, error = exact_product(layer, seen)
    got, unit = layer(x), torch.finfo(dtype).eps / 2
    assert got.dtype == dtype
    assert bool(((got.double() - product).abs() <= error + unit * (product.abs() + error) + 2.0**-24).all())
    assert not torch.equal(got, before)


@needs_kernels
def test_int8_inputs_change_how_a_layer_runs_and_not_what_it_is() -> None:
    layer = scheme_layer(Scheme(Format(4, group_size=128)), n=19)
    weight, size, name = layer.stored_weight(), layer.weight_bytes, layer.kernel
    assert layer.serve_int8(32) == layer.serve_int8(32) == ""
    assert layer.kernel == name.replace("[", "[int8 ")
    assert layer.scheme == Scheme(Format(4, group_size=128))
    assert layer.weight_bytes == size
    assert_same(layer.stored_weight(), weight)
    copied = copy.deepcopy(layer)
    x = random(2, 128)
    assert torch.equal(copied(x), layer(x))
    assert "int8" in repr(copied)
    group = MergedLinear(layer, [12, 7])
    first, second = MergedSlice(group, 0), MergedSlice(group, 1)
    assert torch.equal(torch.cat([first(x), second(x)], -1), layer(x))
    assert first.kernel == layer.kernel
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_layers_that_cannot_take_int8_inputs_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = QuantizedLinear(quantize_rtn(random(4, 33), Format(4)))
    floats = QuantizedLinear(quantize_rtn(random(4, 128), MXFP4))
    parts = torch.empty(4, 128, dtype=torch.int8, device="meta"), torch.empty(4, 1, device="meta")
    meta = QuantizedLinear(QuantizedWeight(*parts, None, Format()))
    rounded = scheme_layer(SCHEMES["w8a8"])
    plain = QuantizedLinear(quantize_rtn(random(4, 96), Format()))
    reasons = {odd: "33 input features", floats: "mxfp4", meta: "on meta", rounded: "int8-token already"}
    for layer, reason in reasons.items():
        kernel = layer.kernel
        assert reason in layer.serve_int8(32)
        assert layer.kernel == kernel
    if cpu_kernels().loaded:
        assert "groups of 64 do not divide 96" in plain.serve_int8(64)
    monkeypatch.setattr("optimizer.backends.linear.cpu_kernels", lambda: CpuKernels(False, "AVX2", "no C++ compiler"))
    assert plain.serve_int8(32) == "no C++ compiler"
    assert plain.int8_group is None
    without = scheme_layer(SCHEMES["w8a8"])
    assert without.kernel == "w8a8_linear[reference]"
    x = random(3, 128)
    torch.testing.assert_close(without(x), rounded(x), rtol=1e-5, atol=1e-5)


def test_a_trainable_bias_brings_no_graph_into_the_module() -> None:
    linear = nn.Linear(64, 4)
    layer = QuantizedLinear(quantize_rtn(linear.weight, Format()), linear.bias)
    out = layer(random(2, 64))
    assert not out.requires_grad
    assert layer.bias is not None
    assert layer.bias.data_ptr() == linear.bias.data_ptr()


def test_a_dense_layer_shares_its_weight_and_computes_the_same() -> None:
    linear = nn.Linear(64, 5, dtype=torch.bfloat16)
    layer = DenseLinear(linear)
    x = random(3, 64).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-5)  # one rounding to bfloat16
    assert layer.stored_weight() is linear.weight
    assert layer.weight_bytes == 64 * 5 * 2
    assert sorted(name for name, _ in layer.named_parameters()) == ["bias", "weight"]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("features", [64, 1024])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33])
def test_a_dense_layer_is_as_exact_whatever_multiplies(
    native: bool, features: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    linear = nn.Linear(features, 48, dtype=torch.bfloat16)
    layer = DenseLinear(linear)
    x = random(rows, features).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    with torch.no_grad():
        got = layer(x)
    # One rounding to bfloat16, of a float32 sum whose error grows with its terms.
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=features * 2.0**-22)


def test_which_layers_suit_the_dense_kernel() -> None:
    assert not DenseLinear.suits(nn.Linear(64, 4))  # float32
    assert not DenseLinear.suits(nn.Linear(63, 4, dtype=torch.bfloat16))
    assert not DenseLinear.suits(nn.Linear(64, 4, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("rows", [1, 3, 15])
def test_slices_equal_separate_layers_bit_for_bit(rows: int) -> None:
    slices, separate = merged()
    x = random(rows, 64)
    for part, alone in zip(slices, separate, strict=True):
        assert torch.equal(part(x), alone(x))
        assert (part.in_features, part.out_features) == (64, alone.out_features)


def test_one_input_is_multiplied_once_and_then_forgotten() -> None:
    slices, _ = merged()
    group, calls = slices[0].group, []
    group.linear.register_forward_hook(lambda *_: calls.append(1))
    x = random(2, 64)
    alive = weakref.ref(x)
    for part in slices:
        part(x)
    assert len(calls) == 1
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 1), (2, 2, 0), (1, 1, 1)], ids=str)
def test_any_order_of_calls_with_any_inputs_is_right(order: tuple[int, ...]) -> None:
    slices, separate = merged()
    for inputs in product(range(2), repeat=3):
        xs = [random(2, 64, seed=50), random(2, 64, seed=51)]
        for index, which in zip(order, inputs, strict=True):
            assert torch.equal(slices[index](xs[which]), separate[index](xs[which]))


def test_a_new_input_at_an_old_address_is_not_taken_for_the_old_one() -> None:
    slices, separate = merged()
    for seed in range(20):
        # Nothing but the memo keeps the previous input alive, so without it Python would reuse id and storage.
        assert torch.equal(slices[0](random(2, 64, seed=seed)), separate[0](random(2, 64, seed=seed)))


def test_an_input_written_to_between_slices_is_seen() -> None:
    slices, separate = merged()
    x = random(2, 64)
    slices[0](x)
    x.mul_(2)
    assert torch.equal(slices[1](x), separate[1](x))
    x[0, 0] = 7
    assert torch.equal(slices[2](x), separate[2](x))


def test_slices_run_in_inference_mode_where_tensors_have_no_version() -> None:
    slices, separate = merged()
    with torch.inference_mode():
        x = random(2, 64)
        for part, alone in zip(slices, separate, strict=True):
            assert torch.equal(part(x), alone(x))


def test_slices_compile_whole_into_one_product() -> None:
    slices, separate = merged()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def attention(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in slices)

    torch._dynamo.reset()
    x = random(2, 64)
    got = torch.compile(attention, backend=keep, fullgraph=True)(x)
    for part, alone in zip(got, separate, strict=True):
        assert torch.equal(part, alone(x))
    ops = [node for node in graphs[0].graph.nodes if node.target is torch.ops.optimizer.w4a16_linear.default]
    assert len(ops) == 1
    assert slices[0].group.memo is None


@pytest.mark.parametrize("bias", [True, False])
def test_slices_store_their_own_rows_exactly(bias: bool) -> None:
    slices, separate = merged(bias=bias)
    for part, alone in zip(slices, separate, strict=True):
        assert_same(stored_weight(part), alone.stored_weight())
        assert part.kernel == alone.kernel
        if alone.bias is None:
            assert part.bias is None
        else:
            assert torch.equal(part.bias, alone.bias)  # type: ignore[arg-type]


def test_slices_of_a_dense_layer_store_views_of_it() -> None:
    linear = nn.Linear(8, 6)
    group = MergedLinear(linear, [2, 4])
    second = MergedSlice(group, 1)
    weight = second.stored_weight()
    assert isinstance(weight, Tensor)
    assert weight.data_ptr() == linear.weight[2:].data_ptr()
    assert torch.equal(weight, linear.weight[2:])


def test_layers_are_named_as_in_the_checkpoint() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.q, self.k, self.v), _ = merged()
            self.group = nn.ModuleList([nn.Linear(4, 4)])  # the model's own, and no part of a merge
            self.norm = nn.LayerNorm(4)
            self.again = self.group[0]

    model = nn.ModuleDict({"block": Block(), "head": nn.Linear(4, 2)})
    assert list(linear_layers(model)) == ["block.q", "block.k", "block.v", "block.group.0", "block.again", "head"]


def test_shared_weights_are_counted_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    assert weight_bytes(model) == 2 * 160
    model["head"].weight = model["table"].weight  # type: ignore[assignment]
    assert weight_bytes(model) == 160
    slices, separate = merged(bias=False)
    assert weight_bytes(nn.ModuleList(slices)) == sum(layer.weight_bytes for layer in separate)


def test_what_is_not_linear_has_no_stored_weight() -> None:
    with pytest.raises(UsageError, match="LayerNorm is not a linear layer"):
        stored_weight(nn.LayerNorm(4))
