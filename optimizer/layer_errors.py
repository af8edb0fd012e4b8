"""How far each layer of one model is from the same layer of another: weights as they multiply, compared by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import linear_layers, stored_weight
from optimizer.backends.runner import BaseRunner
from optimizer.quant.weight import QuantizedWeight

_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Difference:
    """One layer's relative errors; `output` is None where no input reached the layer."""

    name: str
    weight: float
    output: float | None


def place(name: str) -> tuple[int | None, str]:
    """The block and the projection of a layer: `model.layers.3.mlp.up_proj` is (3, "mlp.up_proj")."""
    found = _INDEX.search(name)
    return (int(found[1]), name[found.end() :]) if found else (None, name)


def layer_differences(
    baseline: BaseRunner, others: Mapping[str, nn.Module], tokens: Tensor
) -> tuple[dict[str, list[Difference]], list[str]]:
    """Differences of each model's linear layers from the baseline's, and notes on what could not be compared.

    Weights are dequantized one layer at a time. The output error is over the inputs `X [T, K]` that reach the
    baseline's layer when it reads `tokens [B, S]`: ‖X(Ŵ−W)ᵀ‖ / ‖XWᵀ‖, without the rounding of inputs.
    """
    own = linear_layers(baseline.model)
    theirs = {variant: linear_layers(model) for variant, model in others.items()}
    found: dict[str, dict[str, Difference]] = {variant: {} for variant in others}
    notes = [
        note
        for variant, model in others.items()
        for note in _notes(variant, own, theirs[variant], baseline.model, model)
    ]

    def compare(name: str, x: Tensor | None) -> None:
        weight = _dense(own[name])
        reference = None if x is None else x @ weight.T  # [T, N]
        for variant, layers in theirs.items():
            other = _dense(layers[name]) if name in layers else None
            if other is None or other.shape != weight.shape or name in found[variant]:
                continue
            delta = other - weight
            output = None if x is None or reference is None else _relative(x @ delta.T, reference)
            found[variant][name] = Difference(name, _relative(delta, weight), output)

    def hook(name: str) -> Any:
        def seen(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            compare(name, inputs[0].detach().float().flatten(0, -2))

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in own.items()]
    try:
        baseline.reset(len(tokens))
        with torch.inference_mode():
            baseline.prefill(tokens)
            for name in own:  # a layer that no token reached, as a seldom-used expert
                compare(name, None)
    finally:
        for handle in handles:
            handle.remove()
    return {variant: [layers[name] for name in own if name in layers] for variant, layers in found.items()}, notes


def _dense(module: nn.Module) -> Tensor:
    weight = stored_weight(module)
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.detach().float()


def _relative(delta: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.vector_norm(whole))
    error = float(torch.linalg.vector_norm(delta))
    return error / size if size else (0.0 if error == 0 else float("inf"))


def _notes(
    variant: str, own: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module], baseline: nn.Module, model: nn.Module
) -> Sequence[str]:
    """What a reader must know before taking a difference for an error."""
    notes = []
    if missing := [name for name in own if name not in theirs]:
        notes.append(f"{variant}: {len(missing)} of {len(own)} layers have no counterpart, first {missing[0]}.")
    before, after = (_vectors(each) for each in (baseline, model))
    folded = [n for n, t in before.items() if n in after and t.shape == after[n].shape and not _close(t, after[n])]
    if folded:
        notes.append(
            f"{variant}: {len(folded)} norms differ as well, so scales or rotations were folded into the weights; "
            "what its layers show is a difference, and not an error."
        )
    return notes


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("norm.weight")}


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float().cpu(), b.float().cpu(), rtol=1e-3, atol=1e-5)
