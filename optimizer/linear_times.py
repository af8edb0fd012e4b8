"""Seconds of a model's linear layers alone, as they are served: merged, unquantized and quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimizer.backends.linear import MergedSlice, linear_layers
from optimizer.evals.timing import Summary, time_interleaved

ROUNDS = 3
"""Turns that each variant gets, for a few samples of every call."""


@dataclass(frozen=True)
class Kind:
    """Layers of one name and shape, as they are served: plain products `[N, K]`, and those that stand in their place.

    Others than the `reported` are run too, so that a round touches all weights of the model.
    """

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, int]
    plain: tuple[nn.Module, ...]
    quantized: tuple[nn.Module, ...]
    reported: bool


@dataclass(frozen=True)
class KindSeconds:
    """Median seconds of all layers of a kind."""

    plain: float
    quantized: float


def served(model: nn.Module) -> dict[tuple[str, ...], nn.Module]:
    """The products that a step runs, each under the names of the layers it serves, in the model's order."""
    products: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in linear_layers(model).items():
        product = module.group.linear if isinstance(module, MergedSlice) else module
        products.setdefault(id(product), ([], product))[0].append(name)
    return {tuple(names): product for names, product in products.values()}


def kinds_of(
    plain: Mapping[tuple[str, ...], nn.Module], quantized: Mapping[tuple[str, ...], nn.Module], of: type[nn.Module]
) -> list[Kind]:
    """Products by name and shape, beside those that stand in their place; `of` is the class that is reported."""
    by_layer = {name: module for names, module in quantized.items() for name in names}
    groups: dict[tuple[str, tuple[int, int], bool], list[tuple[tuple[str, ...], nn.Module]]] = {}
    for names, module in plain.items():
        kind = " + ".join(name.rpartition(".")[2] for name in names)
        shape = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        reported = isinstance(by_layer.get(names[0]), of)
        groups.setdefault((kind, shape, reported), []).append((names, module))
    return [
        Kind(
            kind, tuple(name for names, _ in members for name in names), shape,
            tuple(module for _, module in members),
            tuple(dict.fromkeys(by_layer[name] for names, _ in members for name in names)),
            reported,
        )
        for (kind, shape, reported), members in groups.items()
    ]  # fmt: skip


def time_variants(
    variants: Mapping[str, Mapping[str, Callable[[], object]]], *, repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median seconds of each call of each variant, the variants taking turns for a few rounds of all their calls.

    So the caches hold what they hold while one model generates: its own weights, and of no other variant.
    """
    samples: dict[str, dict[str, list[float]]] = {
        name: {call: [] for call in calls} for name, calls in variants.items()
    }
    for _ in range(ROUNDS):
        for name, calls in variants.items():
            for call, seconds in time_interleaved(calls, repeats=repeats, warmup=1, device=device).items():
                samples[name][call] += seconds
    return {name: {call: Summary.of(s).median for call, s in calls.items()} for name, calls in samples.items()}


def time_kinds(
    kinds: Sequence[Kind], batch: int, tokens: int, *, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[KindSeconds]:
    """Each kind on random inputs `[batch, tokens, K]`, `repeats` samples a round."""
    generator = torch.Generator().manual_seed(0)
    features = sorted({kind.shape[1] for kind in kinds})
    inputs = {k: torch.randn(batch, tokens, k, generator=generator).to(device, dtype) for k in features}

    def call(modules: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
        return lambda: [module(x) for module in modules]

    variants = {
        "plain": {str(i): call(kind.plain, inputs[kind.shape[1]]) for i, kind in enumerate(kinds)},
        "quantized": {str(i): call(kind.quantized, inputs[kind.shape[1]]) for i, kind in enumerate(kinds)},
    }
    found = time_variants(variants, repeats=repeats, device=device)
    return [KindSeconds(found["plain"][str(i)], found["quantized"][str(i)]) for i in range(len(kinds))]
