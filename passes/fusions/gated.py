"""Gated activations: `silu_mul` (Llama, Qwen, Phi, experts) and `gelu_mul` (Gemma).

A model writes the activation before or after the other half, which is all that the variants differ in. Halves of one
merged product are taken as they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from optimizer.backends.fusion import Anchor, Fusion, not_float, not_same, value
from optimizer.backends.kernels.gated import gelu_mul, silu_mul

SIGMOID = (torch.ops.aten.exp.default, torch.ops.aten.sigmoid.default)
GELU = (torch.ops.aten.tanh.default, torch.ops.aten.erf.default)


def gelu_new(x: Tensor) -> Tensor:
    """The tanh form as transformers spells it out for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def through_casts(node: Any) -> Any:
    """The node whose value `node` holds in another type."""
    while isinstance(node, Node) and node.target is torch.ops.prims.convert_element_type.default:
        node = node.args[0]
    return node


def activation(node: Any, inner: tuple[Any, ...]) -> Node | None:
    """The `exp`, `tanh` or `erf` inside `node`, where that is `x / (1 + exp(-x))`, `x σ(x)` or `x (1 + tanh …) / 2`."""
    node = through_casts(node)
    if not isinstance(node, Node) or node.target not in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
        return None
    for side in map(through_casts, node.args):
        if isinstance(side, Node) and side.target is torch.ops.aten.add.Tensor and side.args[1] in (1, 1.0):
            side = side.args[0]
        if isinstance(side, Node) and side.target in inner:
            return side
    return None


def _is_gated(inner: tuple[Any, ...]) -> Callable[[Node], bool]:
    """`act(gate) · up`, up being no number."""

    def found(node: Node) -> bool:
        if node.target is not torch.ops.aten.mul.Tensor or not all(isinstance(side, Node) for side in node.args):
            return False
        # The halves of a GELU are themselves a product with the tanh inside: that is the activation, not the gating.
        return activation(node, inner) is None and any(activation(side, inner) for side in node.args)

    return found


SILU_ANCHOR = Anchor("gated silu", _is_gated(SIGMOID))
GELU_ANCHOR = Anchor("gated gelu", _is_gated(GELU))


def _guard(nodes: Mapping[str, Any]) -> str:
    gate, up = value(nodes["gate"]), value(nodes["up"])
    return not_float(gate) or not_same("up", up, gate)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(2, 3, 8, dtype=dtype), torch.empty(2, 3, 8, dtype=dtype)


def _silu(gate: Tensor) -> Tensor:
    return F.silu(gate)


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate)


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _fused_silu(gate: Tensor, up: Tensor) -> Tensor:
    return silu_mul(gate, up)  # type: ignore[no-any-return]


def _fused_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gelu_mul(gate, up, "none")  # type: ignore[no-any-return]


def _fused_gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return gelu_mul(gate, up, "tanh")  # type: ignore[no-any-return]


def _rows(
    name: str, label: str, act: Callable[[Tensor], Tensor], fused: Callable[..., Tensor], anchor: Anchor, removes: str
) -> tuple[Fusion, Fusion]:
    def first(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    def last(gate: Tensor, up: Tensor) -> Tensor:
        return up * act(gate)

    return (
        Fusion(name, f"{label}first", first, fused, _inputs, anchor, _guard, (removes,)),
        Fusion(name, f"{label}last", last, fused, _inputs, anchor, _guard, (removes,)),
    )


FUSIONS = (
    *_rows("silu_mul", "", _silu, _fused_silu, SILU_ANCHOR, "aten.exp.default"),
    *_rows("gelu_mul", "tanh, ", _gelu_tanh, _fused_gelu_tanh, GELU_ANCHOR, "aten.tanh.default"),
    *_rows("gelu_mul", "tanh spelled out, ", gelu_new, _fused_gelu_tanh, GELU_ANCHOR, "aten.tanh.default"),
    *_rows("gelu_mul", "exact, ", _gelu, _fused_gelu, GELU_ANCHOR, "aten.erf.default"),
)
