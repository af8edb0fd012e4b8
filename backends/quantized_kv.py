"""Attention over keys and values rounded as an 8-bit cache would hold them: its quality, exactly, and not its savings.

The model's cache stays in its own type. Before each attention all keys and values are rounded per head and token
(`optimizer.quant.kv`), which gives the numbers of a cache that was rounded as it was written: an entry is rounded by
itself, always from the original. The prompt's own attention sees rounded entries too. So quality can be measured
before there is a kernel that reads 8 bits, but no byte is saved yet, and rounding the whole buffer makes steps slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.decode_attention import attention_forward
from optimizer.quant.kv import KvKind, check_kv_kind, round_kv

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def register(kind: KvKind) -> str:
    """Make attention over an 8-bit cache known to transformers, once; returns its name, such as `optimizer-int8-kv`.

    Single tokens on a CPU go to `decode_attention` where it is compiled, everything else to transformers' SDPA.
    Raises `UsageError` for another kind.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    check_kv_kind(kind)
    name = f"optimizer-{kind}-kv"
    attend: Attention = attention_forward if cpu_kernels().loaded else sdpa_attention_forward
    AttentionInterface.register(name, partial(_rounded_attention, kind, attend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def _rounded_attention(
    kind: KvKind,
    attend: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface; `query [B, H, S, D]`, `key` and `value [B, H_kv, L, D]`."""
    return attend(module, query, round_kv(key, kind), round_kv(value, kind), attention_mask, **options)
