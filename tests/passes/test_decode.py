"""The decode pass chooses the runner, its context, and nothing that changes what the model computes."""

from __future__ import annotations

import pytest
import torch

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.linear import DenseLinear
from optimizer.backends.runner import EagerRunner
from optimizer.errors import RecipeError
from optimizer.passes.base import Context
from optimizer.passes.decode import Decode
from tests.backends.decoder_models import llama, prompts


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
