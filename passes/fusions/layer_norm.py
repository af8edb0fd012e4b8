"""LayerNorm, with the residual addition before it where there is one: `layer_norm`, `add_layer_norm`.

The patterns are `torch.nn.functional.layer_norm` itself, which Inductor decomposes: with weight and bias, with a weight
alone, and with neither (OLMo).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_a_row, not_float, not_same, value
from optimizer.backends.kernels.layer_norm import add_layer_norm, layer_norm
from optimizer.passes.fusions.rms_norm import EPS

Inputs = Callable[[torch.dtype], tuple[Tensor, ...]]

REMOVES = ("aten.var_mean.correction", "aten.rsqrt.default")


def _is_layer_norm(node: Node) -> bool:
    """`rsqrt(var + eps)` of `var_mean`."""
    if node.target is not torch.ops.aten.rsqrt.default:
        return False
    chain: Any = node
    for _ in range(3):  # the sum, the item, var_mean
        chain = chain.args[0] if isinstance(chain, Node) and chain.args else None
    return isinstance(chain, Node) and chain.target is torch.ops.aten.var_mean.correction


ANCHOR = Anchor("layer norm", _is_layer_norm)


def _guard(nodes: Mapping[str, Any]) -> str:
    x = value(nodes["x"])
    rows = (not_a_row(name, nodes[name], x) for name in ("weight", "bias") if name in nodes)
    return first_reason([not_float(x), *rows])


def _guard_sum(nodes: Mapping[str, Any]) -> str:
    x, residual = value(nodes["x"]), value(nodes["residual"])
    return not_same("the residual", residual, x) or _guard(nodes)


def _inputs(rows: int, vectors: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        matrices = (torch.empty(2, 3, 8, dtype=dtype) for _ in range(rows))
        return *matrices, *(torch.empty(8, dtype=dtype) for _ in range(vectors))

    return make


def _both(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _both_fused(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]


def _weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def _weight_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return layer_norm(x, weight, None, eps)  # type: ignore[no-any-return]


def _neither(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def _neither_fused(x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, None, None, eps)  # type: ignore[no-any-return]


def _sum_both(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _both(total, weight, bias, eps), total


def _sum_both_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = add_layer_norm(x, residual, weight, bias, eps)
    return normed, total


def _sum_weight(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _weight(total, weight, eps), total


def _sum_weight_fused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = add_layer_norm(x, residual, weight, None, eps)
    return normed, total


def _sum_neither(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _neither(total, eps), total


def _sum_neither_fused(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = add_layer_norm(x, residual, None, None, eps)
    return normed, total


def _flat_both(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """OPT normalizes the sum of its attention as a list of tokens."""
    total = (x + residual).reshape(-1, x.shape[-1])
    return _both(total, weight, bias, eps), total


def _flat_both_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = add_layer_norm(x, residual, weight, bias, eps)
    return normed.reshape(-1, x.shape[-1]), total.reshape(-1, x.shape[-1])


ROWS: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any], Inputs], ...] = (
    ("add_layer_norm", "weight and bias", _sum_both, _sum_both_fused, _inputs(2, 2)),
    ("add_layer_norm", "flattened", _flat_both, _flat_both_fused, _inputs(2, 2)),
    ("add_layer_norm", "weight", _sum_weight, _sum_weight_fused, _inputs(2, 1)),
    ("add_layer_norm", "neither", _sum_neither, _sum_neither_fused, _inputs(2, 0)),
    ("layer_norm", "weight and bias", _both, _both_fused, _inputs(1, 2)),
    ("layer_norm", "weight", _weight, _weight_fused, _inputs(1, 1)),
    ("layer_norm", "neither", _neither, _neither_fused, _inputs(1, 0)),
)

FUSIONS = tuple(
    Fusion(
        name, variant, pattern, replacement, inputs, ANCHOR,
        _guard_sum if name == "add_layer_norm" else _guard, REMOVES, EPS,
    )
    for name, variant, pattern, replacement, inputs in ROWS
)  # fmt: skip
