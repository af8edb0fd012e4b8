"""Siblings are merged wherever they can be, exactly; where they cannot, the report says what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer.backends.linear import MergedSlice, QuantizedLinear, linear_layers, stored_scheme, stored_weight
from optimizer.errors import PassError
from optimizer.passes.base import Context, transaction
from optimizer.passes.merge_linears import MergeLinears
from optimizer.quant.activations import static_scale
from optimizer.quant.formats import ACTIVATIONS, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format, Scheme
from optimizer.quant.rtn import quantize_rtn
from optimizer.quant.weight import QuantizedWeight
from tests.backends.decoder_models import llama, mistral, qwen2

TOKENS = torch.tensor([[5, 6, 7, 8]])


def merge(model: Any, **options: Any) -> Any:
    work = MergeLinears(**options)
    work.check(model, Context())
    return work.run(model, Context())


def quantize(
    model: Any, scheme: Scheme | None = None, *, input_max: float = 8.0, tensor_max: float | None = None
) -> Any:
    """Every linear layer but the head rounded to nearest."""
    weight = scheme.weight if scheme else Format(4, False, 32)
    activation = scheme.activation if scheme else None
    scale = static_scale(input_max, activation) if activation and not activation.dynamic else None
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            stored = quantize_rtn(linear.weight, weight, tensor_max=tensor_max)
            model.set_submodule(name, QuantizedLinear(stored, linear.bias, activation, scale))
    return model


@pytest.mark.parametrize("make", [llama, qwen2, mistral])
@pytest.mark.parametrize("layers", [1, 3])
def test_two_sites_a_layer(make: Any, layers: int) -> None:
    model = make(num_hidden_layers=layers)
    report = merge(model)
    assert report.matched == report.expected == 2 * layers
    assert not report.skipped
    assert sum(isinstance(module, MergedSlice) for module in model.modules()) == 5 * layers
    assert len([m for m in model.modules() if type(m) is nn.Linear]) == 4 * layers + 1  # two merged, o, down; the head


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Format(4, False, 32)),
        Scheme(Format(8, False, 32)),
        Scheme(Format(), ACTIVATIONS["int8"]),
        Scheme(Format(), ACTIVATIONS["llm-int8"]),
        Scheme(Format(), ACTIVATIONS["int8-static"]),
    ],
    ids=lambda scheme: scheme.name,
)
def test_quantized_logits_stay_bit_for_bit(make: Any, scheme: Scheme) -> None:
    model = quantize(make(), scheme)
    with torch.no_grad():
        expected = model(TOKENS).logits
        merge(model)
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(FP8_CHANNEL, ACTIVATIONS["fp8"]),
        Scheme(FP8_TENSOR, ACTIVATIONS["fp8-static"]),
        Scheme(NVFP4, ACTIVATIONS["nvfp4"]),
        Scheme(MXFP4),
    ],
    ids=lambda scheme: scheme.name,
)
def test_layers_under_one_tensor_scale_merge_and_keep_their_scheme(scheme: Scheme) -> None:
    model = quantize(llama(), scheme, tensor_max=1.0)
    before = {name: stored_weight(layer) for name, layer in linear_layers(model).items()}
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert merge(model).matched == 4
        # BLAS may block a wider matrix in another order, and an input that moves by that may be rounded elsewhere.
        assert float((model(TOKENS).logits - expected).norm() / expected.norm()) < 0.02
    for name, layer in linear_layers(model).items():
        if name == "lm_head":
            continue
        assert stored_scheme(layer) == scheme
        weight, got = before[name], stored_weight(layer)
        assert isinstance(weight, QuantizedWeight)
        assert isinstance(got, QuantizedWeight)
        assert got.scale.dtype == weight.scale.dtype
        assert torch.equal(got.dequantize(), weight.dequantize())
        if scheme.activation is not None and not scheme.activation.dynamic:
            assert torch.equal(layer.input_scale, static_scale(8.0, scheme.activation))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(FP8_TENSOR), "tensor scales differ"),
        (Scheme(NVFP4), "tensor scales differ"),
        (Scheme(FP8_BLOCK), "rows [64, 32, 32] do not fill blocks of 128"),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else None,
)
def test_weights_that_cannot_be_stacked_are_skipped_with_the_reason(scheme: Scheme, reason: str) -> None:
    model = quantize(llama(num_hidden_layers=1), scheme)
    report = merge(model, required=False)
    assert report.expected == 2
    assert report.matched == (1 if scheme.weight == FP8_BLOCK else 0)  # gate and up have 128 rows each
    assert report.skipped[0].name == "model.layers.0.self_attn.q_proj"
    assert report.skipped[0].reason == reason
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    if not report.matched:
        with pytest.raises(PassError, match=f"none of 2 sites .*{reason}"):
            merge(model)


def test_inputs_rounded_differently_are_not_shared() -> None:
    model = quantize(llama(num_hidden_layers=1), Scheme(Format(), ACTIVATIONS["int8-static"]))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    other = static_scale(4.0, ACTIVATIONS["int8-static"])
    attention.k_proj = QuantizedLinear(attention.k_proj.stored_weight(), None, ACTIVATIONS["int8-static"], other)
    mlp.up_proj = QuantizedLinear(mlp.up_proj.stored_weight(), None, ACTIVATIONS["int8"])
    reasons = {skip.name: skip.reason for skip in merge(model, required=False).skipped}
    assert reasons["model.layers.0.self_attn.q_proj"].startswith("input scales differ: [0.0627")
    assert "int8-channel × int8-token with" in reasons["model.layers.0.mlp.gate_proj"]


def test_scales_of_different_types_are_not_promoted() -> None:
    model = quantize(llama(num_hidden_layers=1))
    mlp = model.model.layers[0].mlp
    weight = quantize_rtn(mlp.up_proj.stored_weight().dequantize(), Format(4, False, 32), torch.bfloat16)
    mlp.up_proj = QuantizedLinear(weight)
    (skip,) = merge(model).skipped
    assert skip.reason.startswith("formats differ: ['int4-g32-asym with scales in torch.float32'")


@pytest.mark.parametrize("make", [llama, qwen2])
def test_dense_logits_stay(make: Any) -> None:
    model = make()
    with torch.no_grad():
        expected = model(TOKENS).logits
        merge(model)
        # BLAS may block a wider matrix in another order: float32 rounding of logits up to 40 over two layers.
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-3, rtol=1e-4)


def test_checkpoint_names_weights_and_biases_are_what_they_were() -> None:
    model = quantize(qwen2())
    before = {name: (stored_weight(layer), layer.bias) for name, layer in linear_layers(model).items()}
    merge(model)
    after = linear_layers(model)
    assert list(after) == list(before)
    for name, (weight, bias) in before.items():
        got = stored_weight(after[name])
        if isinstance(weight, QuantizedWeight):
            assert isinstance(got, QuantizedWeight)
            assert torch.equal(got.q, weight.q)
            assert torch.equal(got.dequantize(), weight.dequantize())
        assert (after[name].bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(after[name].bias, bias)  # type: ignore[arg-type]


def test_what_differs_is_skipped_with_the_difference() -> None:
    model = llama()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj = QuantizedLinear(quantize_rtn(attention.k_proj.weight, Format()))
    mlp.gate_proj = QuantizedLinear(quantize_rtn(mlp.gate_proj.weight, Format(4)))
    mlp.up_proj = QuantizedLinear(quantize_rtn(mlp.up_proj.weight, Format(4, True, 32)))
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.ones(128))
    with torch.no_grad():
        expected = model(TOKENS).logits
        report = merge(model)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-3, rtol=1e-4)
    assert (report.matched, report.expected) == (1, 4)
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons["model.layers.0.self_attn.q_proj"].startswith(
        "kinds differ: ['Linear', 'QuantizedLinear', 'Linear']"
    )
    assert "formats differ" in reasons["model.layers.0.mlp.gate_proj"]
    assert reasons["model.layers.1.mlp.gate_proj"] == "bias differ: [False, True]"
    assert not isinstance(model.model.layers[1].mlp.up_proj, MergedSlice)


def test_an_incomplete_set_is_no_site() -> None:
    model = llama()
    model.model.layers[0].self_attn.v_proj = nn.Identity()
    assert merge(model).expected == 3


def test_merging_twice_finds_nothing_left() -> None:
    model = llama()
    merge(model)
    with pytest.raises(PassError, match="merged none of 0 sites in LlamaForCausalLM"):
        merge(model)
    assert merge(model, required=False).matched == 0


def test_no_site_is_an_error_that_names_the_first_reason() -> None:
    model = nn.ModuleDict({"gate_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 4, bias=False)})
    with pytest.raises(PassError, match=r"none of 1 sites .*gate_proj: bias differ.*required: false"):
        merge(model)


def test_a_failure_half_way_is_undone() -> None:
    model = llama()
    before = dict(model.named_modules())

    def stop(_name: str, done: int, _total: int) -> None:
        if done == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), transaction(model):
        MergeLinears().run(model, Context(progress=stop))
    assert dict(model.named_modules()) == before


def test_the_weights_given_are_not_written_to() -> None:
    model = qwen2()
    kept = {name: (t, t.detach().clone()) for name, t in model.named_parameters()}
    merge(model)
    assert all(torch.equal(t, copy) for t, copy in kept.values())


def test_layers_that_serve_int8_inputs_do_so_merged() -> None:
    model = quantize(llama(), Scheme(Format(8)))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if layers[0].serve_int8(32):
        pytest.skip("no compiled kernels")
    apart = quantize(llama(), Scheme(Format(8)))
    for layer in [*layers, *(m for m in apart.modules() if isinstance(m, QuantizedLinear))]:
        layer.serve_int8(32)
    merge(model)
    merged = {layer.group.linear.kernel for layer in linear_layers(model).values() if isinstance(layer, MergedSlice)}
    assert merged == {layers[0].kernel}
    assert torch.equal(model(TOKENS).logits, apart(TOKENS).logits)
