"""Quantize the weights of linear layers: round-to-nearest, INT8 per channel or INT4 in groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context, LayerChange, PassReport, Skip, stopwatch
from optimizer.passes.match import check_patterns, matches
from optimizer.quant.formats import Format
from optimizer.quant.rtn import QuantizedWeight, quantize_rtn


@dataclass(frozen=True)
class Quantize:
    """Replace each targeted `nn.Linear` by a `QuantizedLinear`.

    `targets` and `ignore` hold layer names, classes or `re:` patterns. The head is ignored by default: it decides
    every token, and where it is tied it is also the embedding.
    """

    name: ClassVar[str] = "quantize"
    stored: ClassVar[bool] = True
    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ("lm_head",)
    required: bool = True
    format: Format = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", Format(self.bits, self.symmetric, self.group_size))

    def check(self, model: nn.Module, ctx: Context) -> None:
        """Every pattern names a layer, some layer is chosen, and the groups fill the input width of each that is."""
        del ctx
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if not linears:
            raise ModelError(f"{type(model).__name__} has no linear layer to quantize.")
        check_patterns(linears, [p for p in self.targets if p != "Linear"], "quantize.targets")
        check_patterns(linears, [p for p in self.ignore if p != "lm_head"], "quantize.ignore")
        chosen = self._chosen(model)
        if not chosen and self.required:
            others = list(_other_matrices(model))
            hint = (
                f"{len(others)} are of a kind it does not take, as {others[0].name}: {others[0].reason}"
                if others
                else ""
            )
            raise PassError(
                f"quantize matched none of {len(linears)} linear layers of {type(model).__name__}. "
                + (hint or "Loosen targets or ignore.")
            )
        g = self.format.group_size
        uneven = [(n, m.in_features) for n, m in chosen.items() if g > 0 and m.in_features % g]
        if uneven:
            names = ", ".join(f"{name} (K = {k})" for name, k in uneven[:5]) + (", …" if len(uneven) > 5 else "")
            usable = [s for s in (128, 64, 32) if all(k % s == 0 for _, k in uneven)]
            raise RecipeError(
                f"group size {g} does not divide the input features of {len(uneven)} layers: {names}. "
                f"Use {'group_size ' + str(usable[0]) + ' or ' if usable else ''}group_size -1 (one scale a row), "
                "or name them in quantize.ignore."
            )

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Quantize layer by layer; the original weight is released as soon as its replacement stands."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = self._chosen(model)
        changes = []
        with stopwatch() as seconds, torch.no_grad():
            for done, (name, linear) in enumerate(chosen.items()):
                changes.append(self._replace(model, name, linear))
                ctx.progress(f"quantize {self.format.name}", done + 1, len(chosen))
        skipped = tuple(
            Skip(name, self._reason(name, module)) for name, module in linears.items() if name not in chosen
        ) + tuple(_other_matrices(model))
        return PassReport(
            self.name, len(changes), len(chosen), skipped, tuple(changes), seconds=seconds(),
            bytes_before=sum(c.bytes_before for c in changes), bytes_after=sum(c.bytes_after for c in changes),
        )  # fmt: skip

    def _chosen(self, model: nn.Module) -> dict[str, nn.Linear]:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and matches(name, module, self.targets)
            and not matches(name, module, self.ignore)
        }

    def _reason(self, name: str, module: nn.Module) -> str:
        return "named in ignore" if matches(name, module, self.ignore) else "not among the targets"

    def _replace(self, model: nn.Module, name: str, linear: nn.Linear) -> LayerChange:
        try:
            weight = quantize_rtn(linear.weight, self.format)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        module = QuantizedLinear(weight, linear.bias)
        model.set_submodule(name, module)
        shape = (linear.out_features, linear.in_features)
        before = linear.weight.numel() * linear.weight.element_size()
        lost = relative_error(linear.weight, weight)
        return LayerChange(name, "linear", shape, self.format.name, before, module.weight_bytes, lost)


def _other_matrices(model: nn.Module) -> Iterator[Skip]:
    """Modules that multiply by a weight but are no `nn.Linear`: fused experts `[E, N, K]`, GPT-2's `Conv1D`, …"""
    ours = (nn.Linear, nn.Embedding, QuantizedLinear)
    for name, module in model.named_modules():
        shapes = [list(p.shape) for p in module.parameters(recurse=False) if p.ndim >= 2]
        if shapes and not isinstance(module, ours):
            yield Skip(name, f"{type(module).__name__} with weights {shapes} is not an nn.Linear")


def relative_error(weight: torch.Tensor, quantized: QuantizedWeight) -> float:
    """`‖W - Ŵ‖ / ‖W‖` in the Frobenius norm; 0 for a weight that is all zeros and stays so."""
    exact = weight.detach().float()
    lost = (exact - quantized.dequantize()).norm()
    return float(lost / exact.norm()) if lost else 0.0
