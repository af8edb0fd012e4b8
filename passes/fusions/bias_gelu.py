"""The bias and the GELU after the first product of a GPT-style feed-forward layer: `bias_gelu`.

`addmm` becomes a plain product: the bias moves behind it, into the kernel that reads the result anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_a_row, not_float, value
from optimizer.backends.kernels.bias_gelu import bias_gelu
from optimizer.passes.fusions.gated import GELU, gelu_new, through_casts

VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)
DEPTH = 6
"""Steps from the `tanh` or `erf` of a GELU back to its input, casts not counted."""


def _is_bias_gelu(node: Node) -> bool:
    """The `tanh` or `erf` of a GELU whose input is a product with a bias."""
    if node.target not in GELU:
        return False
    source: Any = node
    for _ in range(DEPTH):
        source = through_casts(source.args[0]) if isinstance(source, Node) and source.args else None
        if isinstance(source, Node) and source.target in VIEWS:
            product = source.args[0]
            return isinstance(product, Node) and product.target is torch.ops.aten.addmm.default
    return False


ANCHOR = Anchor("bias and gelu", _is_bias_gelu)


def _guard(nodes: Mapping[str, Any]) -> str:
    x, weight, bias = value(nodes["x"]), value(nodes["weight"]), value(nodes["bias"])
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        return f"types differ: x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}"
    return first_reason([not_float(x), not_a_row("bias", nodes["bias"], bias)])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`nn.Linear`, weight `[N, K]`."""
    return F.linear(x, weight, bias)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """transformers' `Conv1D`, weight `[K, N]`."""
    flat = x.view(-1, x.size(-1))
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[-1])


def _exact(x: Tensor) -> Tensor:
    return F.gelu(x)


def _tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(2, 3, 8, dtype=dtype), torch.empty(8, 8, dtype=dtype), torch.empty(8, dtype=dtype)


def _row(
    variant: str, product: Callable[[Tensor, Tensor, Tensor | None], Tensor], act: Callable[[Tensor], Tensor]
) -> Fusion:
    approximate = "none" if act is _exact else "tanh"

    def pattern(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return act(product(x, weight, bias))

    def replacement(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(product(x, weight, None), bias, approximate)  # type: ignore[no-any-return]

    removed = "aten.erf.default" if act is _exact else "aten.tanh.default"
    return Fusion("bias_gelu", variant, pattern, replacement, _inputs, ANCHOR, _guard, ("aten.addmm.default", removed))


FUSIONS = tuple(
    _row(f"{layer}, {name}", product, act)
    for layer, product in (("Linear", _linear), ("Conv1D", _conv1d))
    for name, act in (("exact", _exact), ("tanh", _tanh), ("tanh spelled out", gelu_new))
)
