"""What a call of the matrix library does to its own result, so that no kernel reads it again.

    mm_bias       `x @ w + bias` over rows: `addmm`. Inductor does so itself unless a view lies between the two.
    addmm_relu    `relu(addmm(bias, x, w))`: `_addmm_activation`, cuBLASLt's epilogue of bias and activation.
    addmm_gelu    the same for a GELU of a matrix; one of rows is `bias_gelu`'s.

`_addmm_activation` computes the tanh form of GELU on CUDA and the exact one on a CPU, so the other is refused. A sum
with a whole matrix is no epilogue of PyTorch's: `addmm` then copies that matrix into its result before it multiplies,
on CUDA and on a CPU, which is a kernel and the bytes of the addition that it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_a_row, not_float, value
from optimizer.passes.fusions.gated import GELU, gelu_new, through_casts

ATEN = torch.ops.aten
VIEWS = (ATEN.reshape.default, ATEN.view.default)
DEVICE_GELU = {"cuda": "tanh", "cpu": "none"}
"""Which GELU `_addmm_activation` computes."""
DEPTH = 6
"""Steps from the `tanh` or `erf` of a GELU back to its input, casts not counted."""


def _product(node: Any, target: Any, views: bool) -> bool:
    """Whether `node` is a product that nothing else reads, under a view where `views`."""
    if views:
        if not isinstance(node, Node) or node.target not in VIEWS or len(node.users) > 1:
            return False
        node = node.args[0]
    return isinstance(node, Node) and node.target is target and len(node.users) == 1


def _biased(node: Any, views: bool) -> bool:
    """An `addmm` of a vector."""
    if not _product(node, ATEN.addmm.default, views):
        return False
    return bool(value((node.args[0] if views else node).args[0]).dim() == 1)


def _is_bias(node: Node) -> bool:
    """A product under a view, plus a vector that is an input of the graph."""
    if node.target is not ATEN.add.Tensor or not _product(node.args[0], ATEN.mm.default, views=True):
        return False
    bias = node.args[1]
    return isinstance(bias, Node) and bias.op in ("placeholder", "get_attr") and value(bias).dim() == 1


def _is_relu(node: Node) -> bool:
    return node.target is ATEN.relu.default and any(_biased(node.args[0], views) for views in (False, True))


def _is_gelu(node: Node) -> bool:
    """The `tanh` or `erf` of a GELU of an `addmm`, which the GELU alone reads: two or four times."""
    source: Any = node if node.target in GELU else None
    for _ in range(DEPTH):
        source = through_casts(source.args[0]) if isinstance(source, Node) and source.args else None
        if isinstance(source, Node) and source.target is ATEN.addmm.default:
            return bool(value(source.args[0]).dim() == 1)
        if isinstance(source, Node) and source.target in VIEWS:
            return False  # those are the sites of `bias_gelu`
    return False


BIAS_ANCHOR = Anchor("product plus bias", _is_bias)
RELU_ANCHOR = Anchor("product with bias and relu", _is_relu)
GELU_ANCHOR = Anchor("matrix with bias and gelu", _is_gelu)


def _guard(nodes: Mapping[str, Any]) -> str:
    x, weight, bias = value(nodes["x"]), value(nodes["weight"]), value(nodes["bias"])
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        return f"types differ: x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}"
    return first_reason([not_float(x), not_a_row("bias", nodes["bias"], bias)])


def _guard_gelu(approximate: str) -> Callable[[Mapping[str, Any]], str]:
    def guard(nodes: Mapping[str, Any]) -> str:
        device = value(nodes["x"]).device.type
        if DEVICE_GELU.get(device) != approximate:
            return f"the epilogue on {device} is GELU with approximate={DEVICE_GELU.get(device)!r}"
        return _guard(nodes)

    return guard


def _plus_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x [..., K]`, weight `[K, N]`."""
    return x @ weight + bias


def _with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


def _relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(torch.addmm(bias, x, weight))


def _relu_fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.aten._addmm_activation.default(bias, x, weight)  # type: ignore[no-any-return]


def _relu_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`nn.Linear`, weight `[N, K]`."""
    return F.relu(F.linear(x, weight, bias))


def _relu_rows_fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat: Tensor = torch.ops.aten._addmm_activation.default(bias, x.reshape(-1, x.shape[-1]), weight.t())
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def _gelu_exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(torch.addmm(bias, x, weight))


def _gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


def _gelu_spelled_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu_new(torch.addmm(bias, x, weight))


def _gelu_fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.aten._addmm_activation.default(bias, x, weight, use_gelu=True)  # type: ignore[no-any-return]


def _inputs(*rows: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype) for shape in ((*rows, 8), (8, 8), (8,)))

    return make


ADDMM = "aten.addmm.default"
FUSIONS = (
    Fusion(
        "mm_bias", "rows", _plus_bias, _with_bias, _inputs(2, 3), BIAS_ANCHOR, _guard,
        ("aten.mm.default", "aten.add.Tensor"),
    ),
    Fusion(
        "addmm_relu", "matrix", _relu, _relu_fused, _inputs(6), RELU_ANCHOR, _guard, (ADDMM, "aten.relu.default")
    ),
    Fusion(
        "addmm_relu", "rows", _relu_rows, _relu_rows_fused, _inputs(2, 3), RELU_ANCHOR, _guard,
        (ADDMM, "aten.relu.default"),
    ),
    *(
        Fusion(
            "addmm_gelu", variant, pattern, _gelu_fused, _inputs(6), GELU_ANCHOR, _guard_gelu(approximate),
            (ADDMM, "aten.erf.default" if approximate == "none" else "aten.tanh.default"),
        )
        for variant, pattern, approximate in (
            ("exact", _gelu_exact, "none"),
            ("tanh", _gelu_tanh, "tanh"),
            ("tanh spelled out", _gelu_spelled_out, "tanh"),
        )
    ),
)  # fmt: skip
