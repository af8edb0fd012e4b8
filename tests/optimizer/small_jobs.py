"""Small recipes, a machine whose ceilings are known, and jobs that take a second: shared by the tests of the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from optimizer import pipeline
from optimizer.evals.ceilings import Ceilings
from optimizer.passes import registry
from optimizer.passes.base import Context, PassReport
from optimizer.recipe import Recipe

CEILINGS = Ceilings(
    device="a machine made up", cores=2, isa="AVX2", read_bandwidth={1 << 20: 1e11, 1 << 30: 1e10},
    copy_bandwidth=1e10, matmul_flops={"float32": 1e11, "bfloat16": 1e11}, launch_seconds=1e-5,
    measured_at="2026-01-01T00:00:00+00:00", torch_version="2",
)  # fmt: skip

PERPLEXITY = "quality.reference_perplexity.byte_perplexity.ratio"
RECOVERY = "quality.reference_next_line.acc_norm.recovery"
EASY = ({"metric": PERPLEXITY, "at_most": 1.05}, {"metric": "weights.ratio", "at_most": 0.9})
PASSES = ({"name": "quantize", "bits": 8}, {"name": "merge_linears"}, {"name": "decode", "compile": False})


def recipe(
    *floors: dict[str, Any], passes: Any = PASSES, tasks: Any = None, sequential: bool = False, **workload: Any
) -> Recipe:
    """A recipe of a few evaluated documents and a few generated tokens."""
    return Recipe.from_dict(
        {
            "name": "small",
            "workload": {"batch": 1, "prompt": 8, "output": 4, "repeats": 3} | workload,
            "evaluation": {"tasks": tasks or {"reference_perplexity": 2}, "sequential": sequential},
            "passes": list(passes),
            "floors": list(floors or EASY),
        }
    )


def without_measuring_the_machine(patch: Any) -> None:
    """Take `CEILINGS` instead of three seconds of measuring, which has tests of its own."""
    patch.setattr(pipeline, "measure_ceilings", lambda *_, **__: CEILINGS)


@dataclass(frozen=True)
class Ruin:
    """A pass that destroys the model: every weight of its layers becomes the same number."""

    name: ClassVar[str] = "ruin"
    stored: ClassVar[bool] = True
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None: ...

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
        for name in linears:
            old: Any = model.get_submodule(name)
            new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
            with torch.no_grad():
                new.weight.fill_(3.0)
            model.set_submodule(name, new)
        return PassReport(self.name, len(linears), len(linears))


@dataclass(frozen=True)
class Break:
    """A pass that changes the model and then fails."""

    name: ClassVar[str] = "break"
    stored: ClassVar[bool] = True
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None: ...

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        Ruin().run(model, ctx)
        raise RuntimeError("this pass fails halfway")


def with_ruinous_passes(patch: Any) -> None:
    """Let recipes name `ruin` and `break`."""
    for kind in (Ruin, Break):
        patch.setitem(registry.PASSES, kind.name, kind)
