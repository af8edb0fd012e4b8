"""Tiny random Hugging Face models saved to folders, with a byte-level tokenizer beside them.

Made in milliseconds, the same on every call for the same arguments, and without touching the caller's RNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

SPECIAL = ("<s>", "</s>", "<pad>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and three special tokens: 259 entries, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def llama(
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 320,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention (heads of 16, two query heads a key-value head), in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=dtype,
    )
    return _seeded(LlamaForCausalLM, config, seed).to(dtype)


def tiny_llama(
    path: Path,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 320,
    seed: int = 0,
    shard: str = "1GB",
) -> Path:
    """Save `llama(...)` and its tokenizer to `path`; a small `shard` ("60KB") splits the weights under an index."""
    model = llama(tied=tied, dtype=dtype, hidden=hidden, layers=layers, vocab=vocab, seed=seed)
    return _save(model, path, shard)


def tiny_gpt2(path: Path, *, dtype: torch.dtype = torch.float32, hidden: int = 64, layers: int = 2) -> Path:
    """Save a random GPT-2, whose linear layers are transformers' transposed `Conv1D`."""
    config = GPT2Config(
        vocab_size=320, n_embd=hidden, n_layer=layers, n_head=hidden // 16, n_positions=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, dtype=dtype,
    )  # fmt: skip
    return _save(_seeded(GPT2LMHeadModel, config, 0).to(dtype), path, "1GB")


def _seeded(kind: type[Any], config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def _save(model: PreTrainedModel, path: Path, shard: str) -> Path:
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path, max_shard_size=shard)
        byte_tokenizer().save_pretrained(path)
    finally:
        if bars:
            logging.enable_progress_bar()
    return path
