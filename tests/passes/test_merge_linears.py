"""Siblings are merged wherever they can be, exactly; where they cannot, the report says what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer.backends.linear import MergedSlice, QuantizedLinear, linear_layers, stored_weight
from optimizer.errors import PassError
from optimizer.passes.base import Context, transaction
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.quantize import Quantize
from optimizer.quant.formats import Format
from optimizer.quant.rtn import QuantizedWeight, quantize_rtn
from tests.backends.decoder_models import llama, mistral, qwen2

TOKENS = torch.tensor([[5, 6, 7, 8]])


def merge(model: Any, **options: Any) -> Any:
    work = MergeLinears(**options)
    work.check(model, Context())
    return work.run(model, Context())


def quantize(model: Any, **options: Any) -> Any:
    Quantize(**{"bits": 4, "group_size": 32, "symmetric": False} | options).run(model, Context())
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
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_logits_stay_bit_for_bit(make: Any, bits: int) -> None:
    model = quantize(make(), bits=bits)
    with torch.no_grad():
        expected = model(TOKENS).logits
        merge(model)
        assert torch.equal(model(TOKENS).logits, expected)


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
