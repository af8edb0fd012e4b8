"""What a package compiles, run without compiling it: the logits of every token, padded and windowed, beside PyTorch's.

Packages themselves are tested in `test_aot_package.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MixtralConfig, MixtralForCausalLM

from optimizer.backends.aot_export import _Step, export_package
from optimizer.backends.aot_package import load_package
from optimizer.backends.runner import EagerRunner
from optimizer.errors import ModelError
from tests.backends.decoder_models import SIZES, _seeded, llama, mistral, prompts, qwen2

CONTEXT, PROMPT, STEPS = 48, 24, 6


def gemma3() -> Any:
    """A layer that sees the last 8 tokens, and one that sees all."""
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, layer_types=kinds)
    return _seeded(Gemma3ForCausalLM, config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen2": qwen2,
    "mistral, window shorter than the prompt": lambda: mistral(8),
    "mistral, window longer than all": lambda: mistral(512),
    "gemma 3": gemma3,
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_step_computes_what_the_model_does(name: str) -> None:
    model = MODELS[name]()
    config = model.config
    tokens, mask = prompts(2, PROMPT + STEPS, ragged=True)
    # The longest text that a window hides: the whole prompt at once, and every later token.
    eager = EagerRunner(model)
    expected = [eager.prefill(tokens[:, :PROMPT], mask[:, :PROMPT], all_logits=True)]
    expected += [eager.decode(tokens[:, PROMPT + step])[:, None] for step in range(STEPS)]
    shape = (2, config.num_key_value_heads, CONTEXT, getattr(config, "head_dim", None) or 16)
    keys, values = ([torch.full(shape, 7.0) for _ in range(config.num_hidden_layers)] for _ in range(2))
    step = _Step(model, all_logits=True)
    padding = PROMPT - mask[:, :PROMPT].sum(-1)
    found = [step(tokens[:, :PROMPT], torch.tensor([0]), padding, keys, values)]
    for index in range(PROMPT, PROMPT + STEPS):
        found.append(step(tokens[:, index : index + 1], torch.tensor([index]), padding, keys, values))
    real = mask.bool()
    ours, theirs = torch.cat(found, 1)[real], torch.cat(expected, 1)[real]
    # float32 sums of 64 terms in another order, over logits of up to some 50, through two layers.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 64 * 2**-24 * 50)


def test_a_window_hides_what_lies_before_it() -> None:
    """The test above would not see a window that is ignored if the model did not depend on it."""
    tokens, _ = prompts(1, PROMPT)
    narrow, wide = (EagerRunner(mistral(window)).prefill(tokens) for window in (8, 512))
    assert (narrow - wide).abs().max() > 0.1


def test_what_a_package_does_not_hold_is_named(tmp_path: Path) -> None:
    experts = _seeded(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ModelError, match=r"MixtralForCausalLM routes tokens to experts.*Serve it with `decode`"):
        export_package(experts, tmp_path / "p")
    other = llama()
    other.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="LlamaForCausalLM has layers of linear_attention"):
        export_package(other, tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # two compilations each
@pytest.mark.parametrize("name", ["mistral, window shorter than the prompt", "gemma 3"])
def test_windows_compiled(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    export_package(model, tmp_path / "p", batch=2, context=CONTEXT, scoring=False)
    runner = load_package(tmp_path / "p")
    tokens, mask = prompts(2, PROMPT, ragged=True)
    expected = EagerRunner(model).generate(tokens, mask, max_new_tokens=STEPS)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=STEPS), expected)
