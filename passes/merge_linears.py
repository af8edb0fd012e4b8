"""Merge sibling linears that read one input (Q, K, V; gate, up) into one product: fewer launches, longer rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from optimizer.backends.linear import DenseLinear, MergedLinear, MergedSlice, QuantizedLinear
from optimizer.errors import PassError
from optimizer.passes.base import Context, PassReport, Skip, stopwatch
from optimizer.quant.weight import concatenate, stackable

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT
    ("gate_proj", "up_proj"),  # the gated MLP of the same
    ("w1", "w3"),  # Mixtral's experts before they were fused
)
"""Names of layers under one parent that take the same input. A wrong guess costs time, not correctness: a merged
slice that is given another input computes its own rows."""


def sibling_units(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers that are served as one product and so share a format, under the name of the first; others alone."""
    known = set(names)
    units: dict[str, list[str]] = {}
    for name in names:
        parent, dot, last = name.rpartition(".")
        group = next((g for g in SIBLINGS if last in g and all(f"{parent}{dot}{m}" in known for m in g)), (last,))
        units.setdefault(f"{parent}{dot}{group[0]}", []).append(name)
    return units


@dataclass(frozen=True)
class MergeLinears:
    """Replace each complete set of siblings by slices of one `MergedLinear`. Exact: rows do not interact."""

    name: ClassVar[str] = "merge_linears"
    stored: ClassVar[bool] = False
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None:
        """Nothing can be wrong before the sites are looked at."""

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Merge every site; layers of different kinds, formats, scales or biases are skipped with the reason."""
        sites = [
            (f"{path}.{names[0]}".removeprefix("."), parent, names)
            for path, parent in list(model.named_modules())
            for names in SIBLINGS
            if all(isinstance(getattr(parent, name, None), nn.Linear | QuantizedLinear) for name in names)
        ]
        skipped: list[Skip] = []
        merged = 0
        with stopwatch() as seconds, torch.no_grad():
            for done, (path, parent, names) in enumerate(sites):
                layers = [getattr(parent, name) for name in names]
                reason = self._difference(layers)
                if reason:
                    skipped.append(Skip(path, reason))
                    continue
                group = MergedLinear(_stack(layers), [layer.out_features for layer in layers])
                for index, name in enumerate(names):
                    setattr(parent, name, MergedSlice(group, index))
                merged += 1
                ctx.progress("merge_linears", done + 1, len(sites))
        if self.required and not merged:
            raise PassError(
                f"merge_linears merged none of {len(sites)} sites in {type(model).__name__}"
                + (f" ({skipped[0].name}: {skipped[0].reason})" if skipped else "")
                + ". Set required: false to go on without it."
            )
        return PassReport(self.name, merged, len(sites), tuple(skipped), seconds=seconds())

    @staticmethod
    def _difference(layers: list[nn.Linear | QuantizedLinear]) -> str:
        """Why these layers cannot be one product; empty when they can."""
        aspects: dict[str, list[object]] = {
            "kinds": [type(layer).__name__ for layer in layers],
            "input features": [layer.in_features for layer in layers],
            "bias": [layer.bias is not None for layer in layers],
            "formats": [_format(layer) for layer in layers],
            "input scales": [_input_scale(layer) for layer in layers],
            "groups of int8 inputs": [getattr(layer, "int8_group", None) for layer in layers],
        }
        differing = [f"{what} differ: {values}" for what, values in aspects.items() if len(set(values)) > 1]
        if differing or not isinstance(layers[0], QuantizedLinear):
            return "; ".join(differing)
        return stackable([layer.stored_weight() for layer in layers])  # type: ignore[operator]


def _format(layer: nn.Linear | QuantizedLinear) -> str:
    """What the weight is stored and the input rounded in."""
    if isinstance(layer, QuantizedLinear):
        return f"{layer.scheme.name} with scales in {layer.scale_dtype}"
    return str(layer.weight.dtype)


def _input_scale(layer: nn.Linear | QuantizedLinear) -> float | None:
    """The static scale of the input: layers share a product only where they round it alike."""
    scale = layer.input_scale if isinstance(layer, QuantizedLinear) else None
    return None if scale is None else float(scale)


def _stack(layers: list[nn.Linear | QuantizedLinear]) -> nn.Module:
    """One layer with the rows of all."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    first = layers[0]
    if isinstance(first, QuantizedLinear):
        stacked = concatenate([layer.stored_weight() for layer in layers])  # type: ignore[operator]
        merged = QuantizedLinear(stacked, bias, first.activation, first.input_scale)
        if first.int8_group is not None and first.activation is None:  # `decode` had chosen int8 inputs
            merged.serve_int8(first.int8_group)
        return merged
    weight = torch.cat([layer.weight for layer in layers])  # type: ignore[misc]
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return DenseLinear(linear) if DenseLinear.suits(linear) else linear
