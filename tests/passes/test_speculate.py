"""The speculate pass: the same tokens in fewer steps, measured costs, and options that go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.backends.draft_model import DraftModel
from optimizer.backends.drafting import PromptLookup
from optimizer.backends.paged_runner import PagedRunner
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context
from optimizer.passes.decode import Decode
from optimizer.passes.registry import build_pass
from optimizer.passes.speculate import Speculate
from tests.backends.decoder_models import llama, prompts


def made(model: Any, **options: Any) -> PagedRunner:
    ctx = Context()
    Decode(cache="paged", block_size=8, compile=False).run(model, ctx)
    work = Speculate(**options)
    work.check(model, ctx)
    report = work.run(model, ctx)
    assert report.matched == report.expected == 1
    runner = ctx.make_runner(model, None)
    assert isinstance(runner, PagedRunner)
    assert runner.cache.bytes_in_use == 0  # what was measured leaves nothing behind
    return runner


@pytest.mark.parametrize(
    "options", [{}, {"branches": 3}, {"drafter": "early-exit", "exit_layer": 1, "drafts": 3}], ids=str
)
def test_tokens_stay_those_of_the_model(options: dict[str, Any]) -> None:
    tokens, _ = prompts(1, 40)
    expected = llama().generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=None)
    runner = made(llama(), **options)
    seen: list[int] = []
    assert torch.equal(runner.generate(tokens, max_new_tokens=50, on_token=lambda t: seen.extend(t.tolist())), expected)
    assert seen == expected[0, 40:].tolist()
    assert runner.speculation is not None
    assert runner.speculation.policy is not None
    assert runner.speculation.policy.stats.steps > 0
    costs = runner.speculation.policy.costs
    assert set(costs.verify_seconds) == {1, runner.speculation.drafts + 1}
    assert (costs.draft_seconds > 0) == ("exit_layer" in options)


def test_drafters_are_what_was_asked_for(tmp_path: Path) -> None:
    assert isinstance(made(llama()).speculation.drafter(), PromptLookup)  # type: ignore[union-attr]
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "draft")
    runner = made(llama(), drafter="model", draft_model=str(tmp_path / "draft"))
    drafter = runner.speculation.drafter()  # type: ignore[union-attr]
    assert isinstance(drafter, DraftModel)
    assert len(drafter.runner.layout.layers) == 1
    llama(vocab_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="vocabulary of 64, the target one of 128"):
        made(llama(), drafter="model", draft_model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "medusa"}, "'medusa'. Use one of lookup"),
        ({"drafts": 0}, "drafts is 0"),
        ({"drafts": 16}, "drafts is 16"),
        ({"ngram": 0}, "ngram is 0"),
        ({"drafter": "model"}, "draft_model names the folder"),
        ({"draft_model": "x"}, "draft_model names the folder"),
        ({"drafter": "early-exit"}, "exit_layer says"),
        ({"drafter": "early-exit", "exit_layer": 2}, "the model has 2 layers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Speculate(**options).check(llama(), Context())


def test_a_runner_without_a_paged_cache_is_refused_with_the_remedy() -> None:
    model, ctx = llama(), Context()
    Decode(compile=False).run(model, ctx)
    build_pass("speculate", {}).run(model, ctx)
    with pytest.raises(PassError, match="cache: paged"):
        ctx.make_runner(model, None)
