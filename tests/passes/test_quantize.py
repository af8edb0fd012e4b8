"""Which layers are quantized, which are not and why, and what happens to a model that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context, transaction, view
from optimizer.passes.quantize import Quantize
from optimizer.passes.quantize_block import relative_error
from optimizer.quant.formats import Format
from optimizer.quant.rtn import quantize_rtn
from tests.backends.decoder_models import llama, qwen2

TOKENS = torch.tensor([[5, 6, 7, 8]])


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def run(model: Any, **options: Any) -> Any:
    work = Quantize(**options)
    work.check(model, Context())
    return work.run(model, Context())


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 64, "symmetric": False}]
)
def test_the_model_computes_with_the_rounded_weights(options: dict[str, Any]) -> None:
    # The reference is the same model with plain linears, whose weights were rounded by hand.
    model, expected = qwen2(), qwen2()
    format = Quantize(**options).format
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = quantize_rtn(module.weight, format).dequantize()
    report = run(model, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, atol=1e-3, rtol=1e-4)
    assert report.matched == report.expected == 14
    assert len(quantized(model)) == 14


def test_the_report_adds_up() -> None:
    model = llama()
    originals = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    seen: list[tuple[str, int, int]] = []
    report = Quantize(bits=4, group_size=32).run(model, Context(progress=lambda *event: seen.append(event)))
    assert [change.name for change in report.layers] == quantized(model)
    for change in report.layers:
        n, k = originals[change.name].shape
        assert change.shape == (n, k)
        assert change.format == "int4-g32"
        assert change.bytes_before == n * k * 4
        assert change.bytes_after == n * k // 2 + n * (k // 32) * 4
        exact = originals[change.name].double()
        lost = exact - quantize_rtn(originals[change.name], Format(4, True, 32)).dequantize(torch.float64)
        assert change.weight_error == pytest.approx(float(lost.norm() / exact.norm()), rel=1e-4)
    assert report.bytes_before == sum(c.bytes_before for c in report.layers)
    assert report.bytes_after == sum(c.bytes_after for c in report.layers)
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("lm_head", "named in ignore")]
    assert [done for _, done, _ in seen] == [4, 7, 11, 14]


def test_targets_and_ignore_choose_and_every_other_layer_has_a_reason() -> None:
    model = llama()
    report = run(
        model, targets=[r"re:.*self_attn\..*", "down_proj"], ignore=["lm_head", "model.layers.0.self_attn.q_proj"]
    )
    assert quantized(model) == [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        if (layer, name) != (0, "self_attn.q_proj")
    ]
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert len(reasons) + report.matched == 15
    assert reasons["model.layers.0.self_attn.q_proj"] == "named in ignore"
    assert reasons["model.layers.1.mlp.up_proj"] == "not among the targets"


def test_the_head_is_quantized_when_asked_and_a_tied_embedding_stays() -> None:
    model = llama(tie_word_embeddings=True)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    run(model, ignore=[])
    assert "lm_head" in quantized(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert bool(torch.isfinite(model(TOKENS).logits).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_porj"]}, r"quantize\.targets: 'q_porj' matches no layer.*q_proj"),
        ({"ignore": ["lm_haed"]}, r"quantize\.ignore: 'lm_haed' matches no layer.*lm_head"),
        ({"ignore": ["re:("]}, r"quantize\.ignore: .*regular expression"),
        ({"targets": ["LayerNorm"]}, "matches no layer"),
    ],
)
def test_patterns_that_match_nothing_are_refused_before_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(**options).check(llama(), Context())


def test_groups_that_do_not_fill_a_row_name_the_layers_and_the_way_out() -> None:
    with pytest.raises(
        RecipeError,
        match=r"group size 128 does not divide .* of 12 layers: model\.layers\.0\.self_attn\.q_proj \(K = 64\).*…",
    ) as error:
        Quantize(bits=4, group_size=128).check(llama(), Context())
    assert "Use group_size 64 or group_size -1" in str(error.value)
    Quantize(bits=4, group_size=128, targets=["down_proj"]).check(llama(), Context())  # K = 128 there
    odd = nn.ModuleDict({"fc": nn.Linear(33, 4)})
    with pytest.raises(RecipeError, match=r"1 layers: fc \(K = 33\)\. Use group_size -1"):
        Quantize(bits=4, group_size=32).check(odd, Context())


def test_groups_fill_what_each_device_of_a_tensor_parallel_server_holds() -> None:
    Quantize(bits=4, group_size=64, tensor_parallel=2, targets=["down_proj", "q_proj"]).check(llama(), Context())
    with pytest.raises(RecipeError, match=r"on 4 devices each holds K / 4 .* groups of 64 .*down_proj \(K = 128\)"):
        Quantize(bits=4, group_size=64, tensor_parallel=4, targets=["down_proj", "q_proj"]).check(llama(), Context())
    with pytest.raises(RecipeError, match="counts devices, at least 1"):
        Quantize(tensor_parallel=0)


def test_groups_of_activations_fill_the_input_too() -> None:
    with pytest.raises(RecipeError, match=r"group size 128 does not divide .*\(K = 64\)"):
        Quantize(weights="fp8-block", activations="fp8-group").check(llama(), Context())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_model_is_restored(bad: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN or infinite"), transaction(model):
        run(model)
    assert not quantized(model)
    assert dict(model.named_modules()) == before


def test_a_model_seen_through_a_view_is_untouched() -> None:
    model = llama()
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    expected = model(TOKENS).logits
    run(view(model), bits=4)
    assert not quantized(model)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, expected)


def test_nothing_to_quantize_is_an_error_unless_it_is_optional() -> None:
    with pytest.raises(ModelError, match="Identity has no linear layer"):
        Quantize().check(nn.Identity(), Context())
    with pytest.raises(PassError, match="matched none of 15 linear layers"):
        run(llama(), ignore=["Linear"])
    report = run(llama(), ignore=["Linear"], required=False)
    assert report.matched == 0
    assert {skip.reason for skip in report.skipped} == {"named in ignore"}


def test_relative_error_of_nothing_lost_is_zero() -> None:
    zeros = torch.zeros(2, 32)
    assert relative_error(zeros, quantize_rtn(zeros, Format())) == 0
