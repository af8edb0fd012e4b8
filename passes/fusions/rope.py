"""Rotary position embedding of query and key in one launch: `rope`.

The pattern is the rotation of the two halves of a head (Llama, Falcon, Gemma, Qwen), or of its first dimensions with
the rest put back behind them (GPT-NeoX, Phi), after cosine and sine were given a dimension for the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_float, not_same, value
from optimizer.backends.kernels.rope import rope


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _pattern(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(first, cos, sin), _rotated(second, cos, sin)


def _rotated_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    return torch.cat([_rotated(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def _pattern_part(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated_part(first, cos, sin), _rotated_part(second, cos, sin)


def _replacement(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the two is the query does not show in the graph but for its heads, of which it has at least as many."""
    cos, sin = (table.squeeze(1) for table in (cos, sin))
    if first.shape[1] < second.shape[1]:
        key, query = rope(second, first, cos, sin)
        return query, key
    query, key = rope(first, second, cos, sin)
    return query, key


def _is_rotation(node: Node) -> bool:
    """`cat((-x[half:], x[:half]))`."""
    if node.target is not torch.ops.aten.cat.default or not isinstance(node.args[0], list | tuple):
        return False
    parts = node.args[0]
    first = parts[0]
    return len(parts) == 2 and isinstance(first, Node) and first.target is torch.ops.aten.neg.default


ANCHOR = Anchor("rotation", _is_rotation)


def _guard(nodes: Mapping[str, Any]) -> str:
    if any(len(nodes[name].users) != 2 for name in ("cos", "sin")):
        return "more than one pair shares the tables, so which query belongs to which key does not show"
    first, second, cos, sin = (value(nodes[name]) for name in ("first", "second", "cos", "sin"))
    if first.dim() != 4 or cos.dim() != 4 or cos.shape[1] != 1:
        return f"not [B, H, S, D] with tables [B, 1, S, D]: {list(first.shape)} and {list(cos.shape)}"
    if second.dim() != 4 or any(first.shape[i] != second.shape[i] for i in (0, 2, 3)):
        return f"query and key differ in more than heads: {list(first.shape)} and {list(second.shape)}"
    if not (cos.shape[-1] <= first.shape[-1] and cos.shape[-1] % 2 == 0):
        return f"tables of {cos.shape[-1]} dimensions for a head of {first.shape[-1]}"
    if cos.shape[0] not in (1, first.shape[0]) or cos.shape[2] != first.shape[2]:
        return f"the tables {list(cos.shape)} are not for {list(first.shape)}"
    return first_reason([not_float(first), not_same("key", second[:, :1], first[:, :1]), not_same("sin", sin, cos)])


def _inputs(size: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        heads = [torch.empty(2, n, 3, 8, dtype=dtype) for n in (4, 2)]
        return *heads, *(torch.empty(2, 1, 3, size, dtype=dtype) for _ in range(2))

    return make


REMOVES = ("aten.neg.default", "aten.cat.default")

FUSIONS = (
    Fusion("rope", "part of a head", _pattern_part, _replacement, _inputs(4), ANCHOR, _guard, REMOVES),
    Fusion("rope", "halves", _pattern, _replacement, _inputs(8), ANCHOR, _guard, REMOVES),
)
