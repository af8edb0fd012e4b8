"""Falcon's attention over a paged cache: its class in transformers looks no attention up, so ours takes its place.

`query_key_value` makes for each group of heads its queries, a key and a value, side by side: `[H_kv, H / H_kv + 2, D]`.
Falcon-7B is one group, Falcon-40B several, and the first models had a group a head. Only what each group has is cached,
where transformers repeats keys and values for every query head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizer.backends.paged_cache import attention_forward
from optimizer.errors import ModelError


class PagedFalconAttention(nn.Module):
    """`FalconAttention` with the same linears, whose `layer_past` is a `View` (or what probes the model)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config, self.layer_idx, self.training = attention.config, attention.layer_idx, attention.training
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        own = not (attention.new_decoder_architecture or attention.multi_query)
        self.kv_heads = self.heads if own else attention.num_kv_heads
        self.num_key_value_groups = self.heads // self.kv_heads

    def forward(
        self, hidden_states: Tensor, layer_past: Any, position_embeddings: tuple[Tensor, Tensor], **_options: Any
    ) -> tuple[Tensor, None]:
        """`hidden_states [B, S, H D]` to the same shape."""
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        groups = self.query_key_value(hidden_states).unflatten(
            -1, (self.kv_heads, self.num_key_value_groups + 2, self.head_dim)
        )
        query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        key, value = layer_past.update(key, value.transpose(1, 2), self.layer_idx)
        attended, _ = attention_forward(self, query, key, value, None, kv_cache=layer_past)
        return self.dense(attended.flatten(2)), None


def replace_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Put ours in the place of Falcon's attention, in a model that has it; the modules that it replaced, by name.

    Raises `ModelError` for a model that adds a bias to scores by their distance.
    """
    own = {name: module for name, module in model.named_modules() if type(module).__name__ == "FalconAttention"}
    if own and model.config.alibi:  # type: ignore[union-attr]
        raise ModelError(f"{type(model).__name__} attends with alibi, which no kernel over blocks computes")
    for name, module in own.items():
        model.set_submodule(name, PagedFalconAttention(module))
    return own
