"""A runner for the tests of this folder: a tiny Llama with random weights, and a tokenizer of the same shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimizer.evals.reference.build_tasks import read_modules

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens that, like the reference tokenizer, joins a colon with the newline after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([read_modules()["textwrap"]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


def small_model(seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that the choice among tokens is far from uniform."""
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class SmallRunner:
    """The `Runner` protocol by whole forwards, without a cache: slow, and hard to get wrong."""

    def __init__(
        self, model: LlamaForCausalLM, max_context: int = 512, damage: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.model, self.max_context, self.damage = model, max_context, damage
        self.device, self.vocab_size = torch.device("cpu"), model.config.vocab_size
        self.shapes: list[tuple[int, ...]] = []
        self.steps = 0
        self.ready = 0

    def reset(self, batch: int) -> None:
        self.ready = batch

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        return logits if self.damage is None else self.damage(logits)

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, all_logits: bool = False) -> Tensor:
        assert self.ready == len(tokens), "prefill without a reset for this batch"
        assert tokens.shape[1] <= self.max_context
        self.shapes.append((*tokens.shape, int(all_logits)))
        self.tokens, self.mask = tokens, torch.ones_like(tokens) if mask is None else mask
        logits = self._forward(self.tokens, self.mask)
        return logits if all_logits else logits[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        self.steps += 1
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)
        return self._forward(self.tokens, self.mask)[:, -1]

    def generate(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        on_token: Callable[[Tensor], None] | None = None,
        **_: Any,
    ) -> Tensor:
        self.reset(len(tokens))
        logits = self.prefill(tokens, mask)
        for step in range(max_new_tokens):
            chosen = logits.argmax(-1)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            if on_token:
                on_token(chosen)
            if step + 1 < max_new_tokens:
                logits = self.decode(chosen)
        return tokens

    def bytes_per_step(self, batch: int, context: int) -> int:
        return batch + context
