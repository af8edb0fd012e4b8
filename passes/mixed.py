"""Mixed precision: the cheapest mix of formats whose measured quality stays above a floor.

Every layer is quantized in every format of `choices` on the activations of the unquantized model, so each result can be
put beside any other. A layer's options then differ in the error of its output and in measured milliseconds, and
`sensitivity.choose_mix` finds the fastest mix within an error budget. What a budget does to the model is not guessed:
the perplexity of the very model that would be shipped is measured on calibration rows that were held out, and the
largest budget that keeps it within `quality` is found by bisection.

Layers that are served merged (Q, K, V; gate, up) get one format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimizer.backends.linear import DenseLinear, QuantizedLinear
from optimizer.errors import DataError, RecipeError
from optimizer.passes.base import Context, LayerChange, PassReport, stopwatch, view
from optimizer.passes.blocks import block_names, calibration_dtype, first_inputs, in_float32
from optimizer.passes.calibration import Calibration
from optimizer.passes.linearize import linearize
from optimizer.passes.merge_linears import sibling_units
from optimizer.passes.quantize import Quantize, quantization_report
from optimizer.passes.quantize_block import observe, quantize_layers
from optimizer.quant.rtn import Clip
from optimizer.quant.sensitivity import LayerOption, choose_mix
from optimizer.quant.weight import concatenate, stackable

CHOICES: dict[str, dict[str, Any]] = {
    "int4-g32": {"bits": 4, "group_size": 32},
    "int4-g64": {"bits": 4, "group_size": 64},
    "int4-g128": {"bits": 4, "group_size": 128},
    "int8": {},
    "fp8": {"weights": "fp8"},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
}
"""Weight formats by the name that a recipe gives them, as options of `quantize`."""

PLAIN = "as it is"
TRIALS = 6
"""Budgets that the bisection measures between the cheapest mix and none."""


@dataclass(frozen=True)
class Mixed:
    """Quantize each layer in the cheapest of `choices`, or not at all, so that quality holds.

    `quality` is the largest perplexity allowed, as a multiple of the unquantized model's, on the share `held_out` of
    the calibration rows. `method` is `rtn` or `gptq`; `targets`, `ignore` and the rest are those of `quantize`.
    """

    name: ClassVar[str] = "mixed"
    stored: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    choices: Sequence[str] = ("int4-g128", "int8")
    quality: float = 1.01
    held_out: float = 0.25
    method: str = "gptq"
    clip: Clip = "mse"
    unrouted: str = "error"
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ("lm_head",)
    required: bool = True
    steps: Mapping[str, Quantize] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for choice in self.choices:
            if choice not in CHOICES:
                raise RecipeError(f"mixed.choices: {choice!r} is no format. Use some of {', '.join(CHOICES)}.")
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise RecipeError(f"mixed.choices {list(self.choices)} must be one format or more, each once.")
        if not self.quality >= 1 or not 0 < self.held_out < 1:
            raise RecipeError(
                f"mixed.quality is {self.quality} and held_out {self.held_out}; the first is a multiple of the "
                "unquantized perplexity, at least 1, the second a share of the rows between 0 and 1."
            )
        if self.method not in ("rtn", "gptq"):
            raise RecipeError(f"mixed.method is {self.method!r}. Use rtn or gptq: awq changes what layers share.")
        shared: dict[str, Any] = {
            "method": self.method, "clip": self.clip, "unrouted": self.unrouted, "targets": self.targets,
            "ignore": self.ignore, "required": self.required,
        }  # fmt: skip
        object.__setattr__(self, "steps", {choice: Quantize(**shared, **CHOICES[choice]) for choice in self.choices})

    def check(self, model: nn.Module, ctx: Context) -> None:
        """As `quantize` for each choice, and there must be rows to fit and rows to hold out."""
        for step in self.steps.values():
            step.check(model, ctx)
        if ctx.calibration is None or len(ctx.calibration.rows) < 2:
            raise DataError("mixed needs at least two rows of calibration data: some to fit, some to measure.")

    def layers(self, model: nn.Module) -> Any:
        """What `quantize` would choose and skip."""
        return next(iter(self.steps.values())).layers(model)

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Quantize every layer every way, measure, choose, and replace what is worth it."""
        assert ctx.calibration is not None
        with stopwatch() as seconds, torch.no_grad():
            linearize(model)
            chosen, skipped = self.layers(model)
            rows = ctx.calibration.rows
            held = rows[:: max(2, round(1 / self.held_out))]
            fit = Calibration(tuple(r for r in rows if not any(r is h for h in held)), ctx.calibration.source)
            candidates = self._candidates(model, list(chosen), fit, ctx)
            units = sibling_units(list(chosen))
            options = {unit: _options(model, members, candidates, ctx) for unit, members in units.items()}
            mix, ratio = self._search(model, options, units, candidates, Calibration(held), ctx)
            changes = _apply(model, mix, units, candidates)
        used = Counter(change.format for change in changes)
        if left := len(chosen) - len(changes):
            used[PLAIN] = left
        notes = [
            f"calibrated on {fit}",
            ", ".join(f"{count} layers {name}" for name, count in used.items()),
            f"held-out perplexity ×{ratio:.4f}; at most ×{self.quality:g} was asked for",
            f"chosen by {'measured milliseconds' if ctx.time else 'bytes, since nothing here measures time'}",
        ]
        return quantization_report(self.name, chosen, skipped, changes, notes, seconds())

    def _candidates(self, model: Any, names: list[str], fit: Calibration, ctx: Context) -> Candidates:
        """Every layer in every format, each judged on the inputs that the unquantized model gives it."""
        inputs = first_inputs(model, fit)
        found: Candidates = {name: {} for name in names}
        for index, path in enumerate(block_names(model)):
            block = model.get_submodule(path)
            inside = {name: model.get_submodule(name) for name in names if name.startswith(f"{path}.")}
            grams = observe(block, inside, inputs, index)
            for choice, step in self.steps.items():
                scratch = view(model)
                part = quantize_layers(step, scratch, inside, grams, ctx)
                for change in part.changes:
                    found[change.name][choice] = (scratch.get_submodule(change.name), change)
            inputs.advance(block, index)
            ctx.progress("try formats", index + 1, len(block_names(model)))
        return {name: tried for name, tried in found.items() if tried}  # the head is outside the blocks

    def _search(
        self,
        model: Any,
        options: Mapping[str, Sequence[LayerOption]],
        units: Units,
        candidates: Candidates,
        held: Calibration,
        ctx: Context,
    ) -> tuple[dict[str, LayerOption], float]:
        """The cheapest mix whose held-out perplexity ratio is at most `quality`, and that ratio."""
        before = _loss(model, held)

        def ratio_of(mix: Mapping[str, LayerOption]) -> float:
            copy = view(model)
            _apply(copy, mix, units, candidates)
            return float((_loss(copy, held) - before).exp())

        quantity: Any = "milliseconds" if ctx.time else "bytes"
        low, high = 0.0, sum(max(option.error for option in each) for each in options.values())
        best = choose_mix(options, low, minimize=quantity), 1.0
        for trial in range(TRIALS + 1):
            budget = high if trial == 0 else (low + high) / 2
            mix = choose_mix(options, budget, minimize=quantity)
            ratio = ratio_of(mix)
            ctx.progress("measure mixes", trial + 1, TRIALS + 1)
            if ratio <= self.quality:
                best, low = (mix, ratio), budget
                if trial == 0:
                    break
            else:
                high = budget
        return best


Candidates = dict[str, dict[str, tuple[QuantizedLinear, LayerChange]]]
"""Layer → format → its module and what was done to it."""

Units = Mapping[str, Sequence[str]]
"""Layers that must share a format, under the name of the first."""


def _options(model: Any, members: Sequence[str], candidates: Candidates, ctx: Context) -> list[LayerOption]:
    """What a unit can be: left alone, or in one of the formats. Its error is the sum of its layers' lost energies."""
    plain = [model.get_submodule(name) for name in members]
    dense = sum(layer.weight.numel() * layer.weight.element_size() for layer in plain)
    tried = candidates.get(members[0], {})
    layers: dict[str, list[Any]] = {PLAIN: plain} | {c: [candidates[name][c][0] for name in members] for c in tried}
    seconds = dict.fromkeys(layers, 0.0)
    if ctx.time is not None:
        x = torch.randn(ctx.batch, plain[0].in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(plain[0].weight.device, plain[0].weight.dtype)
        seconds = ctx.time({name: _call(_merged(group), x) for name, group in layers.items()})
    options = [LayerOption(PLAIN, None, 0.0, seconds[PLAIN] * 1e3, dense)]
    for choice in tried:
        changes = [candidates[name][choice][1] for name in members]
        error = sum((change.output_error or 0.0) ** 2 for change in changes)
        size = sum(change.bytes_after for change in changes)
        options.append(LayerOption(choice, layers[choice][0].scheme, error, seconds[choice] * 1e3, size))
    return options


def _call(layers: Sequence[nn.Module], x: Tensor) -> Any:
    return lambda: [layer(x) for layer in layers]


def _merged(layers: Sequence[Any]) -> list[nn.Module]:
    """The layers as they are served: one product where they can be merged."""
    if len(layers) == 1:
        return list(layers)
    if isinstance(layers[0], nn.Linear):
        with torch.device("meta"):
            merged = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
        merged.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        return [DenseLinear(merged) if DenseLinear.suits(merged) else merged]
    weights = [layer.stored_weight() for layer in layers]
    return list(layers) if stackable(weights) else [QuantizedLinear(concatenate(weights))]


def _apply(model: Any, mix: Mapping[str, LayerOption], units: Units, candidates: Candidates) -> list[LayerChange]:
    """Put the chosen modules in place; returns what was done to each layer that was quantized."""
    changes = []
    for unit, option in mix.items():
        for name in units[unit] if option.name != PLAIN else ():
            module, change = candidates[name][option.name]
            model.set_submodule(name, module)
            changes.append(change)
    return changes


def _loss(model: Any, data: Calibration) -> Tensor:
    """Mean negative log-likelihood (nats) of the rows' tokens after the first, in the arithmetic of calibration."""
    seen = in_float32(model) if calibration_dtype(model) == torch.float32 else model
    device = model.get_input_embeddings().weight.device
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data.batches():
        tokens = batch.to(device)
        logits = seen(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        total -= picked.sum(dtype=torch.float64).cpu()
        count += picked.numel()
    return total / count
