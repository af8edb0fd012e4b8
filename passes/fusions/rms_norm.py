"""RMSNorm, with the residual addition before it where there is one: `rms_norm`, `add_rms_norm`.

Llama's norm rounds to the model's type and then multiplies by the weight; Gemma's multiplies by `1 + weight` in
float32 and rounds once. The ops round once for both, which is nearer to the real value. In float32 the spellings
differ in the order of the factors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_a_row, not_float, not_same, value
from optimizer.backends.kernels.rms_norm import add_rms_norm, rms_norm

EPS = (("eps", 1.2345e-4),)
"""An epsilon that no model has: in a match it takes the model's value."""

REMOVES = ("aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.rsqrt.default")


def _normalized(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama, Mistral, Qwen, Phi."""
    return weight * _normalized(x, eps).to(x.dtype)


def _weight_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalized(x, eps).to(x.dtype) * weight


def _rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """OLMo 2 and T5: in float32 to the end."""
    return (weight * _normalized(x, eps)).to(x.dtype)


def _one_plus_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma."""
    return (_normalized(x, eps) * (1.0 + weight.float())).type_as(x)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "weight first": (_weight_first, 0.0),
    "weight last": (_weight_last, 0.0),
    "rounded last": (_rounded_last, 0.0),
    "1 + weight": (_one_plus_weight, 1.0),
}
"""Pattern and offset of each spelling."""


def _is_rms(node: Node) -> bool:
    """`rsqrt(mean(x²) + eps)`."""
    if node.target is not torch.ops.aten.rsqrt.default:
        return False
    total = node.args[0]
    mean = total.args[0] if isinstance(total, Node) and total.args else None
    return isinstance(mean, Node) and mean.target is torch.ops.aten.mean.dim


ANCHOR = Anchor("rms norm", _is_rms)


def _guard(nodes: Mapping[str, Any]) -> str:
    x = value(nodes["x"])
    return first_reason([not_float(x), not_a_row("weight", nodes["weight"], x)])


def _guard_sum(nodes: Mapping[str, Any]) -> str:
    x, residual = value(nodes["x"]), value(nodes["residual"])
    return not_same("the residual", residual, x) or _guard(nodes)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(2, 3, 8, dtype=dtype), torch.empty(8, dtype=dtype)


def _inputs_sum(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(2, 3, 8, dtype=dtype), *_inputs(dtype)


def _alone(variant: str) -> Fusion:
    norm, offset = SPELLINGS[variant]

    def pattern(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x, weight, eps)

    def replacement(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps, offset)  # type: ignore[no-any-return]

    return Fusion("rms_norm", variant, pattern, replacement, _inputs, ANCHOR, _guard, REMOVES, EPS)


def _after_addition(variant: str) -> Fusion:
    norm, offset = SPELLINGS[variant]

    def pattern(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, weight, eps), total

    def replacement(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = add_rms_norm(x, residual, weight, eps, offset)
        return normed, total

    return Fusion("add_rms_norm", variant, pattern, replacement, _inputs_sum, ANCHOR, _guard_sum, REMOVES, EPS)


FUSIONS = (*map(_after_addition, SPELLINGS), *map(_alone, SPELLINGS))
