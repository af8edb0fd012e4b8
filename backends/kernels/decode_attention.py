"""Attention of one new token over a static key-value cache, for a CPU.

`out[b, h] = softmax(q[b, h] · K[b, h / G]ᵀ · scale + mask[b]) V[b, h / G]`, `G = H / H_kv` query heads a KV head.

    q     [B, H, 1, D]     float32, bfloat16 or float16
    k, v  [B, H_kv, S, D]  the type of q: the whole static buffer
    mask  [B, 1, 1, S]     bool, True where a position may be seen

Returns `[B, H, 1, D]`. A row that sees nothing is 0. Accumulates in float32. Positions that are masked out are not
read, so at least `2 B H_kv L D` elements move for `L` visible positions, whatever the capacity `S`. The query heads
of a group share each key and value that is read; expanding the cache to H heads, as `repeat_kv` does under
`torch.compile`, writes and reads it G times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.library import define


def decode_attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The specification, in float32."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.float() @ keys.mT * scale).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    # A position that is hidden must not count even where it holds NaN, which 0 · NaN would let through.
    return (weights @ torch.where(mask.mT, values, 0.0)).to(q.dtype)


def _fake(q: Tensor, *_: Tensor | float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


decode_attention = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor", decode_attention_ref, _fake
)

NAME = "optimizer"
"""The name under which transformers knows this attention."""


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: our op for one new token on a CPU, its own SDPA for everything else."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    single = query.shape[2] == 1 and query.device.type == "cpu" and attention_mask is not None
    plain = not any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if not (single and plain and query.shape[-1] == value.shape[-1] and query.shape[-1] % 16 == 0):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    assert attention_mask is not None
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    mask = mask.expand(query.shape[0], 1, 1, key.shape[2])
    return decode_attention(query, key, value, mask, scale).transpose(1, 2), None


def register() -> str:
    """Make the attention known to transformers, once; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME
