"""Products with a stored int8 weight that the graph decodes first: `w8a16_linear`, which decodes it in registers.

Where the scales are applied depends on who wrote the model. To the weight, one for each channel or group, with or
without a zero point: `x @ ((q - zero) * scale).T`. Or, as torchao and gpt-fast do for one scale a channel, to the
product: `(x @ q.T) * scale + bias`. Four-bit weights that were unpacked to int8 are the same.

The op multiplies by weights that were never rounded to 16 bits, so it is nearer to the real value than either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from optimizer.backends.fusion import FLOATS, Anchor, Fusion, not_float, value
from optimizer.backends.kernels.w8a16_linear import w8a16_linear

ATEN = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
VIEWS = (ATEN.reshape.default, ATEN.view.default)
DECODING = (*VIEWS, ATEN.permute.default, CONVERT, ATEN.mul.Tensor, ATEN.sub.Tensor)
"""Operators between a stored weight and the product."""

BLOCK = 32
"""K and the group are multiples of this in the compiled kernels."""

Decode = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _stored(node: Any) -> bool:
    """Whether `node` is computed from an int8 input of the graph by decoding alone."""
    if not isinstance(node, Node):
        return False
    if node.op in ("placeholder", "get_attr"):
        return getattr(node.meta.get("val"), "dtype", None) == torch.int8
    return node.target in DECODING and any(map(_stored, node.args))


def _is_decoded_product(node: Node) -> bool:
    """`mm` or `addmm` by a stored weight; an unscaled one is a site where the product is scaled."""
    if node.target not in (ATEN.mm.default, ATEN.addmm.default) or not _stored(node.args[-1]):
        return False
    weight: Any = node.args[-1]
    while isinstance(weight, Node) and weight.target in (*VIEWS, ATEN.permute.default, CONVERT):
        weight = weight.args[0]
    users = [user for first in node.users for user in (first.users if first.target in VIEWS else [first])]
    return weight.op == "call_function" or any(user.target is ATEN.mul.Tensor for user in users)


ANCHOR = Anchor("product with a decoded weight", _is_decoded_product)


def _guard(of_product: bool) -> Callable[[Mapping[str, Any]], str]:
    def guard(nodes: Mapping[str, Any]) -> str:
        return _not_stored(nodes["data"]) or _not_per_channel(nodes, of_product) or _not_for_kernel(nodes)

    return guard


def _not_stored(node: Any) -> str:
    """A reason where `node` is not a weight as `w8a16_linear` has it: an activation is made anew in every step."""
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return "the integers are computed in the graph, not a stored weight"
    data = value(node)
    if data.dtype != torch.int8 or data.dim() != 2 or not data.is_contiguous():
        return f"the kernel takes contiguous [N, K] int8, not {list(data.shape)} {data.dtype} with {data.stride()}"
    return ""


def _not_per_channel(nodes: Mapping[str, Any], of_product: bool) -> str:
    """A reason where a scale is not `[N, 1]` or `[N, G, 1]` of a weight, or `[N]` of a product, or a zero is not so.

    Another shape would be broadcast: over the input channels, or as one scale for each row of x.
    """
    rows = value(nodes["data"]).shape[0]
    for name in ("scale", "zero") if "zero" in nodes else ("scale",):
        tensor = value(nodes[name])
        if not isinstance(tensor, Tensor) or tensor.dtype not in (*FLOATS, torch.int8, torch.uint8):
            return f"{name} is {nodes[name]}, not a tensor that float32 holds"
        shape = list(tensor.shape)
        if shape not in ([rows], [1, rows]) if of_product else (shape[:1], shape[-1:]) != ([rows], [1]):
            return f"{name} is {shape}, not one value for each of {rows} channels or their groups"
        if tensor.shape != value(nodes["scale"]).shape:
            return f"zero is {shape}, the scale {list(value(nodes['scale']).shape)}"
    return ""


def _not_for_kernel(nodes: Mapping[str, Any]) -> str:
    """A reason where the compiled kernels do not take the sizes or the types."""
    x, (rows, k) = value(nodes["x"]), value(nodes["data"]).shape
    group = k // (value(nodes["scale"]).numel() // rows)
    if k % BLOCK or group % BLOCK:
        return f"K is {k} and the group {group}: no multiples of {BLOCK}, so only the reference would serve"
    bias = value(nodes["bias"]) if "bias" in nodes else None
    if bias is not None and (not isinstance(bias, Tensor) or list(bias.shape) != [rows] or bias.dtype != x.dtype):
        return f"the bias is {nodes['bias']}, not [{rows}] {x.dtype}"
    return not_float(x)


def _by_channel(data: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale`, `zero [N, 1]`."""
    q = data.to(dtype)
    return (q if zero is None else q - zero) * scale


def _by_group(data: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale`, `zero [N, G, 1]`."""
    q = data.to(dtype).view(data.shape[0], scale.shape[1], -1)
    return ((q if zero is None else q - zero) * scale).view(data.shape)


def _by_group_viewed_first(data: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    q = data.view(data.shape[0], scale.shape[1], -1).to(dtype)
    return ((q if zero is None else q - zero) * scale).view(data.shape)


def _linear(x: Tensor, data: Tensor) -> Tensor:
    return F.linear(x, data.to(x.dtype))


def _turned_first(x: Tensor, data: Tensor) -> Tensor:
    """torchao: the integers are transposed, then converted."""
    return x @ data.t().to(x.dtype)


def _fused(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    def matrix(t: Tensor) -> Tensor:
        return t.float().reshape(data.shape[0], -1).contiguous()

    return w8a16_linear(x, data, matrix(scale), None if zero is None else matrix(zero), bias)  # type: ignore[no-any-return]


def _arguments(run: Callable[..., Tensor], zero: bool, bias: bool) -> Callable[..., Tensor]:
    """`run` of five arguments as a function of those that there are: a pattern is known by its parameters."""
    if zero and bias:
        return lambda x, data, scale, zero, bias: run(x, data, scale, zero, bias)
    if zero:
        return lambda x, data, scale, zero: run(x, data, scale, zero, None)
    if bias:
        return lambda x, data, scale, bias: run(x, data, scale, None, bias)
    return lambda x, data, scale: run(x, data, scale, None, None)


def _row(
    variant: str, run: Callable[..., Tensor], x: tuple[int, ...], scale: tuple[int, ...], zero: bool, bias: bool
) -> Fusion:
    of_product = len(scale) == 1

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        integers = torch.empty(32, 64, dtype=torch.int8)
        scales = [torch.empty(scale, dtype=dtype) for _ in range(1 + zero)]
        return torch.empty(*x, 64, dtype=dtype), integers, *scales, *[torch.empty(32, dtype=dtype)] * bias

    label = variant + ", zero" * zero + ", bias" * bias
    removes = ("aten.addmm.default" if bias and not of_product else "aten.mm.default", "aten.mul.Tensor")
    return Fusion(
        "dequantize_matmul", label, _arguments(run, zero, bias), _arguments(_fused, zero, bias), inputs, ANCHOR,
        _guard(of_product), removes, dtypes=(torch.bfloat16,),  # types are no part of these patterns
    )  # fmt: skip


def _scaled_weight(variant: str, decode: Decode, scale: tuple[int, ...], wide: bool, zero: bool, bias: bool) -> Fusion:
    """Two dimensions serve three: the views around the product stay."""

    def run(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = decode(data, scale, zero, torch.float32).to(x.dtype) if wide else decode(data, scale, zero, x.dtype)
        return F.linear(x, weight, bias)

    return _row(variant + ", in float32" * wide, run, (6,), scale, zero, bias)


def _scaled_product(variant: str, multiply: Callable[[Tensor, Tensor], Tensor], form: str, bias: bool) -> Fusion:
    def run(x: Tensor, data: Tensor, scale: Tensor, _zero: Tensor | None, bias: Tensor | None) -> Tensor:
        if form == "flattened":
            y = multiply(x.reshape(-1, x.shape[-1]), data) * scale
            y = y.reshape(*x.shape[:-1], data.shape[0])
        else:
            y = multiply(x, data) * scale
        return y if bias is None else y + bias

    return _row(f"{variant}, {form}", run, (6,) if form == "matrix" else (2, 3), (32,), zero=False, bias=bias)


FUSIONS = (
    *(
        _scaled_weight(variant, decode, scale, wide, zero, bias)
        for variant, decode, scale in (
            ("channels", _by_channel, (32, 1)),
            ("groups", _by_group, (32, 2, 1)),
            ("groups, viewed first", _by_group_viewed_first, (32, 2, 1)),
        )
        for wide in (False, True)
        for zero in (False, True)
        for bias in (False, True)
    ),
    *(
        _scaled_product(variant, multiply, form, bias)
        for variant, multiply in (("scaled product", _linear), ("scaled product, transposed first", _turned_first))
        for form, bias in (("flattened", True), ("rows", True), ("matrix", True), ("rows", False), ("matrix", False))
    ),
)
