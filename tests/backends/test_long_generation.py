"""512 greedy tokens, batch 1 and ragged 8, against transformers; and what an 8-bit cache moves logits by over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind
from tests.passes.small_architectures import GPT2, LLAMA_LIKE, OF_ITS_OWN, build, tokens

# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

LONG = {"max_position_embeddings": 1024}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
MODELS: dict[str, Any] = {
    "llama": lambda: build(hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA_LIKE | LONG),
    "qwen3": lambda: build(hf.Qwen3ForCausalLM, hf.Qwen3Config, LLAMA_LIKE | OF_ITS_OWN | LONG),
    "gemma3": lambda: build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, LLAMA_LIKE | OF_ITS_OWN | LONG | HYBRID),
    "gemma2": lambda: build(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, LLAMA_LIKE | OF_ITS_OWN | LONG | HYBRID | {"attn_logit_softcapping": 5.0}
    ),
    "gpt2": lambda: build(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2 | {"n_positions": 1024}),
}
NEW = 512

BOUNDS: dict[KvKind, float] = {"int8": 0.02, "fp8": 0.08}
"""Of the relative error of logits. Rounding to int8 with the largest of D = 16 values at 127 moves a value by
1 / (254 √3) of that largest, about 2 of its deviations: 0.5 % rms. e4m3 has 3 bits behind the point: 2⁻⁴ / √3 of a
value at most, 2.5 % rms over a binade. Two layers, keys and values: both times √4; and as much again for what one
layer's error does to the next."""


def generated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_greedy_tokens_are_transformers_own(name: str, compile: bool) -> None:
    model = MODELS[name]()
    runner = PagedRunner(view(model), compile=compile, options=PagedOptions(block_size=16, chunk=64))
    if name == "gemma3":
        assert runner.layout.windows == (0, 48)
    ids = tokens(8, 32)
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : 3 * row] = 0
    for rows in (slice(0, 1), slice(0, 8)):
        expected = generated(model, ids[rows], mask[rows])
        assert torch.equal(runner.generate(ids[rows], mask[rows], max_new_tokens=NEW), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", BOUNDS)
def test_an_8_bit_cache_stays_within_its_bound(name: str, kind: KvKind) -> None:
    model = MODELS[name]()
    text = generated(model, tokens(1, 32), torch.ones(1, 32, dtype=torch.long))
    with torch.no_grad():
        exact = model(text, use_cache=False).logits[0, 31:]
    runner = PagedRunner(view(model), compile=False, options=PagedOptions(kind, block_size=16))
    logits = [runner.prefill(text[:, :32])[0]]
    logits += [runner.decode(text[:, i])[0] for i in range(32, text.shape[1])]
    error = (torch.stack(logits) - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.mean()) < BOUNDS[kind]
    assert float(error.mean()) > BOUNDS[kind] / 100  # it was rounded
