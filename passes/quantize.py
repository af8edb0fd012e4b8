"""Quantize linear layers: by rounding alone, or calibrated block by block with AWQ, GPTQ and SmoothQuant.

Calibration walks the decoder's blocks. For each: one pass of the calibration tokens gathers a Gram matrix for each
distinct input; AWQ or SmoothQuant fold scales where that is exact; each layer is quantized; and the block, as it is
now, produces the inputs of the next, so that later layers see and can mend the errors of earlier ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context, LayerChange, PassReport, Skip, stopwatch, view
from optimizer.passes.blocks import BlockInputs, block_names, first_inputs, tail_inputs
from optimizer.passes.calibration import Calibration
from optimizer.passes.linearize import linearize
from optimizer.passes.match import check_patterns, matches
from optimizer.quant.formats import ACTIVATIONS, FLOATS, Format, Scheme
from optimizer.quant.gptq import GPTQ
from optimizer.quant.gram import Gram
from optimizer.quant.rtn import Clip

Method = Literal["rtn", "awq", "gptq"]

ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "dense", "dense_4h_to_h", "w2")
"""Layers whose input features are what tensor parallelism splits (Megatron-LM, arXiv:1909.08053); others split rows."""

PROBE_TOKENS = 32
"""Tokens of the run that finds and verifies where scales can be folded."""


@dataclass(frozen=True)
class Quantize:
    """Replace each targeted linear layer by a `QuantizedLinear`.

    `weights` is `int`, of `bits` in groups of `group_size` (-1: a scale a row), or a float format of `FLOATS`.
    `activations` names one of `ACTIVATIONS`, or `none`. `method` finds the integers: `rtn` rounds, with ranges
    `clip`ped at their maximum or by search (`mse`); `awq` scales channels by their activations first; `gptq` spreads
    each column's error over the later ones, largest activations first (`act_order`), with `damp` on the Hessian.
    `smooth` moves activation outliers into the weights (SmoothQuant), with a fixed `alpha` or the best for each site.
    An expert that no calibration token reached is an error, unless `unrouted: rtn` rounds it. `tensor_parallel` is how
    many devices a server will split the layers over: groups must fill each one's share.

    `targets` and `ignore` hold layer names, classes or `re:` patterns; a GPT-2 `Conv1D` and each expert of a fused bank
    count as a `Linear`. The head is ignored by default: it decides every token, and where it is tied it is also the
    embedding.
    """

    name: ClassVar[str] = "quantize"
    stored: ClassVar[bool] = True
    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    weights: str = "int"
    activations: str = "none"
    method: str = "rtn"
    clip: Clip = "max"
    smooth: bool = False
    alpha: float | None = None
    act_order: bool = True
    damp: float = 0.01
    unrouted: str = "error"
    tensor_parallel: int = 1
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ("lm_head",)
    required: bool = True
    scheme: Scheme = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choices = {
            "weights": ("int", *FLOATS),
            "activations": ("none", *ACTIVATIONS),
            "method": get_args(Method),
            "clip": get_args(Clip),
            "unrouted": ("error", "rtn"),
        }
        for option, valid in choices.items():
            if (value := getattr(self, option)) not in valid:
                raise RecipeError(f"quantize.{option} is {value!r}. Use one of {', '.join(valid)}.")
        if self.alpha is not None and not (self.smooth and 0 <= self.alpha <= 1):
            raise RecipeError(f"quantize.alpha is {self.alpha}; it is the strength of smooth: true, between 0 and 1.")
        if self.smooth and self.method == "awq":
            raise RecipeError("quantize: smooth and method awq both choose the channels' scales. Use one of them.")
        if self.smooth and self.activations == "none":
            raise RecipeError("quantize.smooth serves rounded activations. Name them in quantize.activations.")
        if self.weights != "int" and (self.bits, self.group_size, self.symmetric) != (8, -1, True):
            raise RecipeError(f"quantize.weights {self.weights} fixes bits, group_size and symmetric. Leave them out.")
        weight = FLOATS.get(self.weights) or Format(self.bits, self.symmetric, self.group_size)
        activation = ACTIVATIONS.get(self.activations)
        if activation is not None and not weight.symmetric:
            raise RecipeError("quantize: activations are rounded for symmetric weights only. Use symmetric: true.")
        if self.tensor_parallel < 1:
            raise RecipeError(f"quantize.tensor_parallel is {self.tensor_parallel}; it counts devices, at least 1.")
        GPTQ(damp=self.damp, act_order=self.act_order)  # validates
        object.__setattr__(self, "scheme", Scheme(weight, activation))

    @property
    def format(self) -> Format:
        """The weights' format."""
        return self.scheme.weight

    @property
    def calibrates(self) -> bool:
        """Whether this needs calibration data."""
        static = self.scheme.activation is not None and not self.scheme.activation.dynamic
        return self.method != "rtn" or self.smooth or static

    def check(self, model: nn.Module, ctx: Context) -> None:
        """Every pattern names a layer, some layer is chosen, groups fill each, and calibration data is there."""
        linears = {name: m for name, m in _linearized(model).named_modules() if isinstance(m, nn.Linear)}
        if not linears:
            raise ModelError(f"{type(model).__name__} has no linear layer to quantize.")
        check_patterns(linears, [p for p in self.targets if p != "Linear"], "quantize.targets")
        check_patterns(linears, [p for p in self.ignore if p != "lm_head"], "quantize.ignore")
        layers, _ = self.layers(model)
        if not layers and self.required:
            raise PassError(
                f"quantize matched none of {len(linears)} linear layers of {type(model).__name__}. "
                "Loosen targets or ignore."
            )
        self._check_groups(layers)
        if self.calibrates and layers:
            block_names(model)
            if ctx.calibration is None:
                raise RecipeError(
                    f"quantize with {self._needs()} needs calibration data. Pass calibration= (text, token ids or a "
                    "datasets object)."
                )

    def _needs(self) -> str:
        return f"method {self.method}" if self.method != "rtn" else "smooth" if self.smooth else self.activations

    def _check_groups(self, layers: Mapping[str, nn.Linear]) -> None:
        """Groups of weights and inputs fill each layer's input, on each of `tensor_parallel` devices."""
        ranks = {n: self.tensor_parallel if n.rpartition(".")[2] in ROW_PARALLEL else 1 for n in layers}
        inputs = self.scheme.activation.group_size if self.scheme.activation else -1
        g = math.lcm(max(1, self.format.group_size), max(1, inputs))
        uneven = [(n, m.in_features) for n, m in layers.items() if g > 1 and m.in_features % (g * ranks[n])]
        if not uneven:
            return
        if all(k % g == 0 for _, k in uneven):
            names = ", ".join(f"{name} (K = {k})" for name, k in uneven[:5]) + (", …" if len(uneven) > 5 else "")
            raise RecipeError(
                f"on {self.tensor_parallel} devices each holds K / {self.tensor_parallel} input features of these "
                f"layers, which groups of {g} do not fill: {names}. Use smaller groups, or a smaller tensor_parallel."
            )
        names = ", ".join(f"{name} (K = {k})" for name, k in uneven[:5]) + (", …" if len(uneven) > 5 else "")
        usable = [s for s in (128, 64, 32) if all(k % s == 0 for _, k in uneven)]
        other = f"Use {f'group_size {usable[0]} or ' if usable else ''}group_size -1 (one scale a row), or name"
        raise RecipeError(
            f"group size {g} does not divide the input features of {len(uneven)} layers: {names}. "
            f"{other if self.weights == 'int' and inputs < 1 else 'Name'} them in quantize.ignore."
        )

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Quantize block by block, or layer by layer where nothing is calibrated."""
        changes: list[LayerChange] = []
        skipped: list[Skip] = []
        notes: list[str] = []
        with stopwatch() as seconds, torch.no_grad():
            linearize(model)
            chosen, left = self.layers(model)
            skipped += left
            for part in self.parts(model, ctx, chosen):
                changes += part.changes
                skipped += part.skipped
                notes += part.notes
                ctx.progress(f"quantize {self.scheme.name}", len(changes), len(chosen))
        return quantization_report(self.name, chosen, skipped, changes, notes, seconds())

    def parts(self, model: Any, ctx: Context, chosen: Mapping[str, nn.Linear]) -> Iterator[Part]:
        """Quantize the chosen layers of a model in memory, a part (a block, then the rest) at a time."""
        from optimizer.passes.quantize_block import quantize_block, quantize_layers

        if not self.calibrates:
            for _, names in groupby(chosen, key=lambda name: name.rpartition(".")[0]):  # siblings may share a scale
                yield quantize_layers(self, model, list(names), {}, ctx)
            return
        assert ctx.calibration is not None
        blocks = block_names(model)
        inputs, probe = start(model, ctx)
        yield Part(notes=[f"calibrated on {ctx.calibration}"])
        for index, block in enumerate(blocks):
            inside = {name: linear for name, linear in chosen.items() if name.startswith(f"{block}.")}
            yield quantize_block(self, model, block, index, inside, inputs, probe, ctx)
            inputs.advance(model.get_submodule(block), index)
        inside_blocks = tuple(f"{block}." for block in blocks)
        rest = {name: linear for name, linear in chosen.items() if not name.startswith(inside_blocks)}
        if rest:
            yield quantize_rest(self, model, rest, inputs, ctx)

    def layers(self, model: nn.Module) -> tuple[dict[str, nn.Linear], list[Skip]]:
        """The layers to quantize by name, and every other matrix with the reason why it is left."""
        chosen: dict[str, nn.Linear] = {}
        skipped: list[Skip] = []
        for name, module in _linearized(model).named_modules():
            if isinstance(module, nn.Linear):
                if matches(name, module, self.ignore):
                    skipped.append(Skip(name, "named in ignore"))
                elif matches(name, module, self.targets):
                    chosen[name] = module
                else:
                    skipped.append(Skip(name, "not among the targets"))
        return chosen, skipped + list(_other_matrices(_linearized(model)))


def quantization_report(
    name: str,
    chosen: Mapping[str, Any],
    skipped: Sequence[Skip],
    changes: Sequence[LayerChange],
    notes: Sequence[str],
    seconds: float,
) -> PassReport:
    """What a pass did to the `chosen` layers, in their order; notes that differ only in the block become one."""
    order = {layer: index for index, layer in enumerate(chosen)}
    counts = Counter(re.sub(r"\.\d+\.", ".*.", note, count=1) for note in notes)
    return PassReport(
        name,
        len(changes),
        len(chosen),
        tuple(skipped),
        tuple(sorted(changes, key=lambda change: order[change.name])),
        tuple(f"{note} ({count}×)" if count > 1 else note for note, count in counts.items()),
        seconds,
        sum(change.bytes_before for change in changes),
        sum(change.bytes_after for change in changes),
    )


@dataclass
class Part:
    """What was done to one part of a model."""

    changes: list[LayerChange] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def start(model: Any, ctx: Context) -> tuple[BlockInputs, BlockInputs]:
    """The inputs of the first block: of all calibration data, and of a few tokens to probe folds with."""
    assert ctx.calibration is not None
    probe = Calibration((ctx.calibration.rows[0][:PROBE_TOKENS],))
    return first_inputs(model, ctx.calibration), first_inputs(model, probe)


def quantize_rest(
    step: Quantize, model: Any, names: Mapping[str, nn.Linear], inputs: BlockInputs, ctx: Context
) -> Part:
    """Quantize layers outside the blocks: the head on what reaches it, any other by rounding."""
    from optimizer.passes.quantize_block import quantize_layers

    head = model.get_output_embeddings()
    grams = {name: Gram(m.in_features) for name, m in names.items() if model.get_submodule(name) is head}
    for x in tail_inputs(model, inputs, head) if grams else ():
        for gram in grams.values():
            gram.update(x)
    return quantize_layers(step, model, names, grams, ctx)


def _linearized(model: nn.Module) -> nn.Module:
    """The model as a pass sees it after `linearize`, without changing it."""
    seen = view(model)
    linearize(seen)
    return seen  # type: ignore[no-any-return]


def _other_matrices(model: nn.Module) -> Iterator[Skip]:
    """Modules that multiply by a weight but are no `nn.Linear`, such as a router."""
    ours = (nn.Linear, nn.Embedding, QuantizedLinear)
    for name, module in model.named_modules():
        shapes = [list(p.shape) for p in module.parameters(recurse=False) if p.ndim >= 2]
        if shapes and not isinstance(module, ours):
            yield Skip(name, f"{type(module).__name__} with weights {shapes} is not an nn.Linear")
