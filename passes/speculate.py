"""Guess several tokens a step and verify them together: the same tokens, in fewer steps where guesses are good.

`drafter: lookup` guesses what followed the last tokens where they stood before (code, summaries, answers that quote);
in several places with `branches`, which makes a tree. `early-exit` decodes with the first
`exit_layer` layers of the model itself; `model` with a smaller model of the same tokenizer from the folder
`draft_model`. How many are verified, and whether any, follows the acceptance so far and the measured seconds of a step;
the report says what came of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from optimizer.backends.draft_model import DraftModel, early_exit
from optimizer.backends.drafting import PromptLookup, Proposer
from optimizer.backends.kv_layout import FEW_TOKENS
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.runner import BaseRunner
from optimizer.backends.speculation import Speculation, SpeculationPolicy, StepCosts
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context, PassReport, view

DRAFTERS = ("lookup", "early-exit", "model")
TRIALS = 15


@dataclass(frozen=True)
class Speculate:
    """Have the paged runner that `decode` made verify at most `drafts` guesses a step, up to `max_batch` rows."""

    name: ClassVar[str] = "speculate"
    stored: ClassVar[bool] = False
    drafter: str = "lookup"
    drafts: int = 4
    ngram: int = 3
    branches: int = 1
    exit_layer: int | None = None
    draft_model: str | None = None
    max_batch: int = 8
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None:
        """The options must go together."""
        del ctx
        if self.drafter not in DRAFTERS:
            raise RecipeError(f"speculate.drafter is {self.drafter!r}. Use one of {', '.join(DRAFTERS)}.")
        if not 1 <= self.drafts < FEW_TOKENS:
            raise RecipeError(f"speculate.drafts is {self.drafts}. Use 1 to {FEW_TOKENS - 1}.")
        for name in ("ngram", "branches", "max_batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"speculate.{name} is {getattr(self, name)}. Use at least 1.")
        if (self.drafter == "model") != (self.draft_model is not None):
            raise RecipeError("speculate: draft_model names the folder of `drafter: model`, and goes with it alone.")
        if (self.drafter == "early-exit") != (self.exit_layer is not None):
            raise RecipeError("speculate: exit_layer says after which layer `drafter: early-exit` leaves: give both.")
        total = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
        if self.exit_layer is not None and not 1 <= self.exit_layer < total:
            raise RecipeError(
                f"speculate.exit_layer is {self.exit_layer}; the model has {total} layers: 1 to {total - 1}."
            )

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Wrap the runner that the pipeline will build."""
        del model
        ctx.make_runner = partial(_speculating, make=ctx.make_runner, settings=self)
        return PassReport(self.name, 1, 1, notes=(f"up to {self.drafts} guesses a step by {self.drafter}",))


def _speculating(
    model: nn.Module, tokenizer: Any, *, make: Callable[[nn.Module, Any], BaseRunner], settings: Speculate
) -> BaseRunner:
    runner = make(model, tokenizer)
    if not isinstance(runner, PagedRunner):
        raise PassError(
            f"speculate needs the paged cache, and {type(runner).__name__} has none. Put it after "
            "`decode: {cache: paged}`, on a model that can use it."
        )
    drafter, seconds, draft = _drafter(runner, settings)
    costs = StepCosts({1: _seconds(runner, 1), settings.drafts + 1: _seconds(runner, settings.drafts + 1)}, seconds)
    runner.speculation = Speculation(drafter, settings.drafts, SpeculationPolicy(costs, settings.max_batch), draft)
    return runner


def _drafter(runner: PagedRunner, settings: Speculate) -> tuple[Callable[[], Proposer], float, PagedRunner | None]:
    """What makes a proposer for each request, the seconds that one of its guesses takes, and the model it runs."""
    if settings.drafter == "lookup":
        return partial(PromptLookup, settings.ngram, 1, settings.branches), 0.0, None
    if settings.exit_layer is not None:
        small = early_exit(view(runner.model), settings.exit_layer)
    else:
        small = _load(str(settings.draft_model), runner)
    options = PagedOptions(block_size=runner.options.block_size, cache_tokens=runner.options.cache_tokens)
    draft = PagedRunner(small, max_context=runner.max_context, compile=runner.compile, options=options)
    return partial(DraftModel, draft), _seconds(draft, 1), draft


def _load(folder: str, runner: PagedRunner) -> Any:
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(folder, dtype=runner.dtype, use_safetensors=True)
    vocabulary = small.config.get_text_config().vocab_size
    if vocabulary != runner.vocab_size:
        raise ModelError(
            f"the draft model in {folder} has a vocabulary of {vocabulary}, the target one of {runner.vocab_size}. "
            "Use a model with the same tokenizer."
        )
    return small.to(runner.device).eval()


def _seconds(runner: PagedRunner, tokens: int) -> float:
    """The median of a step of so many tokens in one row, after the first, which compiles."""
    step = runner.step(1, tokens)
    row = runner.cache.open([])
    try:
        samples = []
        for _ in range(TRIALS + 1):
            step.bind([row], [[0] * tokens])
            step.reserve([tokens])
            _synchronize(runner)
            began = time.perf_counter()
            step()
            _synchronize(runner)
            samples.append(time.perf_counter() - began)
        return statistics.median(samples[1:])
    finally:
        runner.cache.close(row)


def _synchronize(runner: PagedRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
