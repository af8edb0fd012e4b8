"""Tiny random decoders for the tests of runners and passes, the same on every call and with the RNG left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _seeded(kind: type[Any], config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Spread the logits, so that greedy sequences wander and a wrong key or mask changes them.
            if parameter.ndim == 2:
                parameter.mul_(6)
            elif parameter.ndim == 1 and not parameter.any():  # biases start at 0
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return model


def llama(**changes: Any) -> LlamaForCausalLM:
    """Grouped-query attention, no biases, untied head."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**SIZES | changes))


def mistral(window: int = 32, **changes: Any) -> MistralForCausalLM:
    """Every layer attends to the last `window` tokens only."""
    return _seeded(MistralForCausalLM, MistralConfig(**SIZES | {"sliding_window": window, "head_dim": 16} | changes))


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """Q, K and V have biases, and these are not zero; the other layers have none."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**SIZES | changes))


def prompts(batch: int, length: int, *, ragged: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens `[B, S]`, and a mask that pads row i by 3 i tokens on the left when `ragged`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    if ragged:
        for row in range(batch):
            mask[row, : 3 * row] = 0
    return tokens, mask
