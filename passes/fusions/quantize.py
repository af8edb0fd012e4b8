"""The rounding to 8 bits of what a fused norm or gated activation has just computed, in the same launch.

These match our own ops, which the fusions before have put in the graph: `quantize_rows` with one scale a row, after
`rms_norm`, `add_rms_norm`, `layer_norm`, `add_layer_norm`, `silu_mul` or `gelu_mul` whose result nothing else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optimizer.backends.fusion import Anchor, Fusion, not_float, value
from optimizer.backends.kernels.gated import gelu_mul, gelu_mul_quantize, silu_mul, silu_mul_quantize
from optimizer.backends.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_quantize,
    layer_norm,
    layer_norm_quantize,
)
from optimizer.backends.kernels.quantize_rows import quantize_rows
from optimizer.backends.kernels.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize

PRODUCERS = (rms_norm, add_rms_norm, layer_norm, add_layer_norm, silu_mul, gelu_mul)
EPS, OFFSET = ("eps", 1.2345e-4), ("offset", 0.54321)
FORMATS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
ROW = -1
"""The group of `quantize_rows` that is a whole row."""


def _is_rounding(node: Node) -> bool:
    """`quantize_rows` of rows that one of our ops made, for it alone."""
    if node.target is not quantize_rows or node.args[1] != ROW:
        return False
    rows = node.args[0]
    if not isinstance(rows, Node) or len(rows.users) > 1:
        return False
    maker = rows.args[0] if getattr(rows.target, "__name__", "") == "getitem" else rows
    return isinstance(maker, Node) and maker.target in PRODUCERS


ANCHOR = Anchor("rounding of rows", _is_rounding)


def _guard(nodes: Mapping[str, Any]) -> str:
    return not_float(value(next(iter(nodes.values()))))


def _inputs(matrices: int, vectors: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = (torch.empty(2, 3, 16, dtype=dtype) for _ in range(matrices))
        return *rows, *(torch.empty(16, dtype=dtype) for _ in range(vectors))

    return make


def _rms_norm(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows(rms_norm(x, weight, eps, offset), ROW, format)
        return q, scale

    def replacement(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        q, scale = rms_norm_quantize(x, weight, eps, offset, format)
        return q, scale

    return pattern, replacement


def _add_rms_norm(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, total = add_rms_norm(x, residual, weight, eps, offset)
        q, scale = quantize_rows(normed, ROW, format)
        return q, scale, total

    def replacement(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, total = add_rms_norm_quantize(x, residual, weight, eps, offset, format)
        return q, scale, total

    return pattern, replacement


def _layer_norm(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows(layer_norm(x, weight, bias, eps), ROW, format)
        return q, scale

    def replacement(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, scale = layer_norm_quantize(x, weight, bias, eps, format)
        return q, scale

    return pattern, replacement


def _add_layer_norm(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, total = add_layer_norm(x, residual, weight, bias, eps)
        q, scale = quantize_rows(normed, ROW, format)
        return q, scale, total

    def replacement(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, total = add_layer_norm_quantize(x, residual, weight, bias, eps, format)
        return q, scale, total

    return pattern, replacement


def _silu_mul(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows(silu_mul(gate, up), ROW, format)
        return q, scale

    def replacement(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = silu_mul_quantize(gate, up, format)
        return q, scale

    return pattern, replacement


def _gelu_mul(format: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def pattern(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows(gelu_mul(gate, up, "tanh"), ROW, format)
        return q, scale

    def replacement(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = gelu_mul_quantize(gate, up, "tanh", format)
        return q, scale

    return pattern, replacement


ROWS = (
    ("add_rms_norm_quantize", _add_rms_norm, _inputs(2, 1), (EPS, OFFSET), add_rms_norm),
    ("rms_norm_quantize", _rms_norm, _inputs(1, 1), (EPS, OFFSET), rms_norm),
    ("add_layer_norm_quantize", _add_layer_norm, _inputs(2, 2), (EPS,), add_layer_norm),
    ("layer_norm_quantize", _layer_norm, _inputs(1, 2), (EPS,), layer_norm),
    ("silu_mul_quantize", _silu_mul, _inputs(2, 0), (), silu_mul),
    ("gelu_mul_quantize", _gelu_mul, _inputs(2, 0), (), gelu_mul),
)
"""Name, pattern and replacement for a format, example inputs, numbers, and the op that disappears."""

FUSIONS = tuple(
    Fusion(
        name, label, *functions(format), inputs, ANCHOR, _guard, ("optimizer.quantize_rows.default", str(op)), numbers,
        dtypes=(torch.bfloat16,),  # ops look the same in every type
    )
    for name, functions, inputs, numbers, op in ROWS
    for label, format in FORMATS.items()
)  # fmt: skip
