"""A model's own linears as the operation of a sweep over working sets: as many of them as make one up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.evals.memory_probe import Operation

PROBED_LAYERS = 64
"""Linears that the sweep runs at most."""


def linears_of(model: nn.Module) -> list[nn.Module]:
    """The model's linears, quantized or not, that take one tensor and can be run by themselves."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return [m for m in found if _bytes_of(m) > 0][:PROBED_LAYERS]


def _bytes_of(module: nn.Module) -> int:
    stored = getattr(module, "weight_bytes", None)
    return int(stored) if stored else sum(p.nbytes for p in module.parameters(recurse=False))


def linears_at(model: nn.Module | None, tokens: int, device: torch.device) -> Callable[[int], Operation]:
    """The model's own linears on `tokens` rows, as many of them as make up a working set."""
    layers: list[Any] = [] if model is None else linears_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if model is not None else None

    def operation_at(size: int) -> Operation:
        chosen: list[tuple[Any, Tensor]] = []
        held = 0
        for layer in layers:
            if chosen and held + _bytes_of(layer) > size:
                break
            chosen.append((layer, torch.randn(1, tokens, layer.in_features, dtype=dtype, device=device)))
            held += _bytes_of(layer)

        def run() -> None:
            with torch.no_grad():
                for layer, x in chosen:
                    layer(x)

        return Operation(run, held, held)

    return operation_at
