"""The decode pass chooses the runner, its context, and changes what the model computes only where asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.kernels.build import CpuKernels, cpu_kernels
from optimizer.backends.kernels.dynamic_int8_linear import input_format
from optimizer.backends.linear import DenseLinear, QuantizedLinear, layer_kernel, linear_layers, stored_scheme
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.runner import EagerRunner
from optimizer.errors import ModelError, RecipeError
from optimizer.passes.base import Context, PassReport
from optimizer.passes.decode import Decode
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.quantize import Quantize
from optimizer.quant.activations import quantize_activation
from tests.backends.decoder_models import llama, prompts
from tests.passes.small_architectures import ARCHITECTURES, FALCON, build


@pytest.mark.parametrize(("option", "expected"), [(None, 1024), (200, 200), (1024, 1024)])
def test_the_context_is_the_option_or_all_the_model_has(option: int | None, expected: int) -> None:
    model, ctx = llama(), Context()
    work = Decode(max_context=option, compile=False)
    work.check(model, ctx)
    assert ctx.make_runner is EagerRunner
    report = work.run(model, ctx)
    runner = ctx.make_runner(model, None)
    assert isinstance(runner, CompiledRunner)
    assert runner.max_context == expected
    assert not runner.compile
    assert report.matched == report.expected == 1


@pytest.mark.parametrize("context", [-5, 0, 1, 1025])
def test_a_context_without_positions_is_refused(context: int) -> None:
    with pytest.raises(RecipeError, match=rf"max_context is {context}; the model has positions for 2 to 1024"):
        Decode(max_context=context).check(llama(), Context())


def test_tokens_stay_those_of_the_eager_model() -> None:
    tokens, mask = prompts(3, 12, ragged=True)
    expected = EagerRunner(llama()).generate(tokens, mask, max_new_tokens=60)
    model, ctx = llama(), Context()
    Decode(compile=False).run(model, ctx)
    assert torch.equal(ctx.make_runner(model, None).generate(tokens, mask, max_new_tokens=60), expected)


def test_dense_bfloat16_layers_move_to_our_kernel_only_where_it_suits() -> None:
    model = llama().bfloat16()
    suited = sum(DenseLinear.suits(module) for module in model.modules() if type(module) is torch.nn.Linear)
    report = Decode(compile=False).run(model, Context())
    assert sum(isinstance(module, DenseLinear) for module in model.modules()) == suited
    assert (f"{suited} dense layers run on bf16_linear" in report.notes) == bool(suited)
    exact = llama()
    Decode(compile=False).run(exact, Context())
    assert not any(isinstance(module, DenseLinear) for module in exact.modules())


def quantized(*passes: Any) -> Any:
    """A small model after these passes."""
    model, ctx = llama(), Context()
    for step in passes:
        step.check(model, ctx)
        step.run(model, ctx)
    return model


def served(report: PassReport) -> list[str]:
    return [note for note in report.notes if "int8" in note]


@pytest.mark.skipif(not cpu_kernels().loaded, reason="int8 inputs need compiled kernels")
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_inputs_serve_every_weight_only_integer_layer(bits: int) -> None:
    model = quantized(Quantize(bits=bits, group_size=32), MergeLinears())
    layers = {name: layer for name, layer in linear_layers(model).items() if name != "lm_head"}
    before = {name: (layer_kernel(layer), stored_scheme(layer)) for name, layer in layers.items()}
    tokens, _ = prompts(2, 12)
    ctx = Context()
    exact = EagerRunner(model).prefill(tokens).clone()
    report = Decode(compile=False, int8_inputs=True).run(model, ctx)
    assert served(report) == [
        f"{len(layers)} weight-only integer layers round their inputs to int8 in groups of 32 values of a token; "
        "what is stored stays"
    ]
    assert not report.skipped
    for name, layer in layers.items():
        kernel, scheme = before[name]
        assert layer_kernel(layer) == kernel.replace("[", "[int8 ")
        assert stored_scheme(layer) == scheme
    seen: list[tuple[QuantizedLinear, torch.Tensor, torch.Tensor]] = []
    products = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for product in products:
        product.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    got = ctx.make_runner(model, None).prefill(tokens)
    assert not torch.equal(got, exact)
    assert len(seen) == len(products)
    for product, x, y in seen:
        expected = quantize_activation(x, input_format(32)) @ product.stored_weight().dequantize().t()
        # Both are float32 sums of K ≤ 256 terms; rounding the inputs changes 0.5 % of them and more.
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


def test_without_the_option_nothing_is_rounded() -> None:
    model = quantized(Quantize(bits=4, group_size=32))
    report = Decode(compile=False).run(model, Context())
    assert not served(report)
    assert all("int8" not in layer_kernel(layer) for layer in linear_layers(model).values())


def test_int8_inputs_that_serve_no_layer_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Decode(compile=False, int8_inputs=True).run(llama(), Context())
    assert served(report) == ["int8_inputs did nothing: no layer has integer weights and inputs in 16 bits"]
    model = quantized(Quantize(bits=4, group_size=32))
    monkeypatch.setattr("optimizer.backends.linear.cpu_kernels", lambda: CpuKernels(False, "AVX2", "no C++ compiler"))
    report = Decode(compile=False, int8_inputs=True).run(model, Context())
    assert served(report) == ["int8_inputs did nothing: no C++ compiler"]
    assert {skip.name for skip in report.skipped} == set(linear_layers(model)) - {"lm_head"}
    assert {skip.reason for skip in report.skipped} == {"no C++ compiler"}


def test_a_paged_cache_is_served_where_the_model_can_and_gives_the_same_tokens() -> None:
    tokens, mask = prompts(3, 12, ragged=True)
    expected = EagerRunner(llama()).generate(tokens, mask, max_new_tokens=60)
    model, ctx = llama(), Context()
    work = Decode(cache="paged", block_size=8, chunk=16, compile=False)
    work.check(model, ctx)
    report = work.run(model, ctx)
    runner = ctx.make_runner(model, None)
    assert isinstance(runner, PagedRunner)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=60), expected)
    assert report.notes == ("attention reads blocks: float32, 512 bytes a token, all tokens seen",)


def test_recent_tokens_are_reported_and_counted() -> None:
    model, ctx = llama(), Context()
    report = Decode(cache="paged", kv="int8", recent=16, max_batch=4, compile=False).run(model, ctx)
    runner = ctx.make_runner(model, None)
    assert isinstance(runner, PagedRunner)
    # 2 layers of 2 heads of 16: an int8 each and a scale of 4 bytes, for keys and for values.
    assert report.notes == ("attention reads blocks: int8, 160 bytes a token, all tokens seen, the last 16 in float32",)
    assert runner.cache.storage.layers[0].recent[0].shape == (4, 2, 32, 16)


def test_a_model_that_cannot_be_paged_stays_static_and_the_report_says_why() -> None:
    def alibi() -> Any:
        return build(hf.FalconForCausalLM, hf.FalconConfig, FALCON | {"alibi": True})

    model, ctx = alibi(), Context()
    report = Decode(cache="paged", compile=False).run(model, ctx)
    assert isinstance(ctx.make_runner(model, None), CompiledRunner)
    assert [(skip.name, "alibi" in skip.reason) for skip in report.skipped] == [("cache", True)]
    with pytest.raises(ModelError, match="alibi"):  # an 8-bit cache was asked for: static would not be one
        Decode(cache="paged", kv="int8", compile=False).run(alibi(), Context())


@pytest.mark.parametrize("name", ["gemma2", "falcon"])
def test_models_that_attend_in_a_way_of_their_own_are_paged(name: str) -> None:
    model, ctx = ARCHITECTURES[name](), Context()
    tokens = prompts(2, 20)[0]
    expected = EagerRunner(ARCHITECTURES[name]()).generate(tokens, max_new_tokens=20)
    Decode(cache="paged", block_size=8, compile=False).run(model, ctx)
    runner = ctx.make_runner(model, None)
    assert isinstance(runner, PagedRunner)
    assert torch.equal(runner.generate(tokens, max_new_tokens=20), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "ring"}, "'ring'. Use static or paged"),
        ({"kv": "int8"}, "Add `cache: paged`"),
        ({"window": 64}, "Add `cache: paged`"),
        ({"cache": "paged", "kv": "int4"}, "int4"),
        ({"cache": "paged", "sinks": 4}, "beside a window"),
        ({"cache": "paged", "block_size": 0}, "block_size 0"),
        ({"capture": "ahead"}, "Add `cache: paged`"),
        ({"cache": "paged", "capture": "never"}, "lazy or ahead"),
        ({"cache": "paged", "recent": 64}, "beside kv int8 or fp8"),
        ({"cache": "paged", "kv": "fp8", "recent": 8}, "16 or more"),
    ],
)
def test_cache_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Decode(**options).check(llama(), Context())
