"""Small random models of the architectures that folding must know, with every norm and bias made its own.

Hidden size 64, two layers, a vocabulary of 320, float32. Made in milliseconds, the same on every call, and without
touching the caller's RNG. Norm weights, biases and matrices are all redrawn, so that a vector multiplied in the wrong
place shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

HIDDEN, LAYERS, VOCAB, HEADS, HEAD_DIM = 64, 2, 320, 4, 16

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""What the configurations of the Llama family have in common: two query heads for each key-value head."""

OF_ITS_OWN = {"head_dim": HEAD_DIM}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}

GPT2 = {
    "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 2 * HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FALCON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "ffn_hidden_size": 2 * HIDDEN, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
NEOX = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip


def build(model: type[Any], config: type[Any], options: dict[str, Any], seed: int = 0) -> Any:
    """A model in eval mode with every parameter redrawn: matrices with unit gain, vectors moved by 0.3 N(0, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model(config(**options)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
                else:
                    parameter.copy_(torch.randn_like(parameter) / HIDDEN**0.5)
    return made


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: build(hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA_LIKE),
    "mistral": lambda: build(hf.MistralForCausalLM, hf.MistralConfig, LLAMA_LIKE),
    "qwen2": lambda: build(hf.Qwen2ForCausalLM, hf.Qwen2Config, LLAMA_LIKE),
    "qwen3": lambda: build(hf.Qwen3ForCausalLM, hf.Qwen3Config, LLAMA_LIKE | OF_ITS_OWN),
    "gemma2": lambda: build(hf.Gemma2ForCausalLM, hf.Gemma2Config, LLAMA_LIKE | OF_ITS_OWN),
    "gemma3": lambda: build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, LLAMA_LIKE | OF_ITS_OWN),
    "phi3": lambda: build(hf.Phi3ForCausalLM, hf.Phi3Config, LLAMA_LIKE),
    "gpt2": lambda: build(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "opt": lambda: build(hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "falcon": lambda: build(hf.FalconForCausalLM, hf.FalconConfig, FALCON),
    "gpt_neox": lambda: build(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, NEOX),
    "mixtral": lambda: build(hf.MixtralForCausalLM, hf.MixtralConfig, LLAMA_LIKE | EXPERTS),
    "qwen3_moe": lambda: build(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, LLAMA_LIKE | OF_ITS_OWN | QWEN_EXPERTS),
}
"""Builders by model type."""


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by name, in order."""
    stack = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    return {f"{stack}.{index}": block for index, block in enumerate(model.get_submodule(stack))}  # type: ignore[arg-type]


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Random tokens `[batch, length]`."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Logits `[B, S, V]` without a cache."""
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


def block_inputs(model: nn.Module, ids: Tensor | None = None) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments each decoder layer is called with on `ids`."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = (args, kwargs)

        return hook

    blocks = decoder_blocks(model)
    handles = [block.register_forward_pre_hook(keep(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen
