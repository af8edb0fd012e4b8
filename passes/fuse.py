"""Fuse operators by Inductor patterns: as a pass of a recipe, and as `torch.compile(model, backend="optimizer")`.

The pass traces the decode step once without generating code, compares the matches of every fusion with what the
architecture must give, and then has the runner compile with the fusions. Only inference graphs are rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from optimizer.backends.fusion import FusionLedger, GraphRecord
from optimizer.backends.runner import BaseRunner, StepRunner
from optimizer.errors import PassError, RecipeError, UsageError
from optimizer.passes.base import Context, PassReport, Skip, stopwatch

if TYPE_CHECKING:
    from optimizer.backends.inductor import FusionPass

DEVICES = ("cpu", "cuda")

_LEDGER = FusionLedger()


@dataclass(frozen=True)
class Fuse:
    """Rewrite the decode step that the `decode` pass compiles: put it after that one.

    A fusion is applied where its op has a kernel: on CUDA, unless `devices` names others. `strict` makes it an error
    that a fusion matches more or less often than the architecture has sites, or that a site is matched by none. With
    neither `strict` nor `required` nothing is traced on a device where no op has a kernel.
    """

    name: ClassVar[str] = "fuse"
    stored: ClassVar[bool] = False
    devices: Sequence[str] = ()
    strict: bool = True
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None:
        """The devices must be ones that there are ops for."""
        del model, ctx
        for device in self.devices:
            if device not in DEVICES:
                raise RecipeError(f"fuse.devices: {device!r} is unknown. Use some of {', '.join(DEVICES)}.")

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Count the matches, judge them, and set the runner that compiles with them."""
        from optimizer.passes.fusions import FUSIONS
        from optimizer.passes.fusions.expected import expected

        device = next(model.parameters()).device.type
        useful = self.devices or {name for fusion in FUSIONS for name in fusion.devices}
        if not (self.strict or self.required or device in useful):
            return PassReport(self.name, 0, notes=(f"left to Inductor: no op has a kernel of its own on {device}",))
        with stopwatch() as seconds:
            make = ctx.make_runner
            found, writes = self._trace(model, ctx, make)
            counts, note = expected(model, writes)
            self._judge(model, found, counts)
            if found.applied():
                ctx.make_runner = partial(_fused_runner, make=make, devices=tuple(self.devices))
        matched = found.matched()
        skipped = tuple(Skip(place, reason) for place, reason in _left(found))
        notes = [*_notes(found, counts), *([note] if note else [])]
        total = sum(counts.values()) if counts and not note else None
        return PassReport(self.name, matched.total(), total, skipped, notes=tuple(notes), seconds=seconds())

    def _trace(
        self, model: nn.Module, ctx: Context, make: Callable[[nn.Module, Any], BaseRunner]
    ) -> tuple[GraphRecord, bool]:
        """What the fusions do to one decode step, from tracing it without generating code.

        And whether `rope` is in it, applied, with `kv_write` after it.
        """
        from optimizer.backends.inductor import FusedCompiler

        runner = make(model, ctx.tokenizer)
        if not isinstance(runner, StepRunner) or not runner.compile:
            raise PassError(
                f"fuse rewrites the step that `decode` compiles, and {type(runner).__name__} compiles none. "
                "Put fuse after decode, and leave decode.compile true."
            )
        compiler = FusedCompiler(_fusion_pass(tuple(self.devices), FusionLedger()), trace_only=True)
        runner.backend = compiler
        runner.warm_up(ctx.batch)
        (record,) = compiler.fusion.ledger.graphs
        return record, runner.writes_by_op and record.applied()["rope"] > 0

    def _judge(self, model: Any, found: GraphRecord, counts: Mapping[str, int]) -> None:
        """`PassError` where the matches are not those that the model must give."""
        from optimizer.backends.inductor import raise_on_miss

        matched = found.matched()
        missing = [name for name, count in counts.items() if count and not matched[name]]
        wrong = [name for name, count in counts.items() if matched[name] != count]
        blamed = wrong if self.strict else missing if self.required else []
        if blamed:
            lines = ", ".join(f"{name} {matched[name]} times instead of {counts[name]}" for name in blamed)
            why = "".join(f" {place}: {reason}." for place, reason in _left(found)[:5])
            kind = model.config.get_text_config().model_type
            raise PassError(f"fuse matched {lines} in {kind}.{why} Set strict and required to false to go on.")
        if self.strict:
            raise_on_miss([found])
        if self.required and not matched:
            raise PassError(f"fuse matched nothing in {type(model).__name__}. Set required: false to go on without it.")


def backend(
    module: Any, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """`torch.compile(model, backend="optimizer")`: Inductor with the fusions, found through its entry point.

    Takes Inductor's `mode` and `options`; two more are ours: `optimizer.strict` raises on a site that no fusion
    matched, `optimizer.devices` applies fusions on other devices than CUDA. `ledger()` tells what was done.
    """
    from optimizer.backends.inductor import FusedCompiler

    theirs = dict(options or {})
    strict = theirs.pop("optimizer.strict", False)
    devices = tuple(theirs.pop("optimizer.devices", ()))
    unknown = [name for name in theirs if name.startswith("optimizer.")] + [d for d in devices if d not in DEVICES]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)}: unknown. The options are optimizer.strict and optimizer.devices, a list of "
            f"{' or '.join(DEVICES)}."
        )
    return FusedCompiler(_backend_pass(devices), strict=strict)(module, inputs, mode=mode, options=theirs)


def ledger() -> FusionLedger:
    """What the backend did to each graph it compiled in this process, in order."""
    return _LEDGER


@cache
def _backend_pass(devices: tuple[str, ...]) -> FusionPass:
    return _fusion_pass(devices, _LEDGER)


def _fusion_pass(devices: tuple[str, ...], record: FusionLedger) -> FusionPass:
    from optimizer.backends.inductor import FusionPass
    from optimizer.passes.fusions import FUSIONS

    return FusionPass(FUSIONS, devices, record)


def _fused_runner(
    model: nn.Module, tokenizer: Any, *, make: Callable[[nn.Module, Any], BaseRunner], devices: tuple[str, ...]
) -> BaseRunner:
    """The runner of `make`, compiling with the fusions; its `backend.fusion.ledger` says what was done."""
    from optimizer.backends.inductor import FusedCompiler

    runner = make(model, tokenizer)
    assert isinstance(runner, StepRunner)
    runner.backend = FusedCompiler(_fusion_pass(devices, FusionLedger()))
    return runner


def _left(found: GraphRecord) -> list[tuple[str, str]]:
    """Each place that was not fused though it looks as if it should have been, and why."""
    left = [(miss.where or miss.node, f"{miss.anchor}: {miss.reason}") for miss in found.misses]
    return left + [(site.where or site.node, f"{site.fusion}: {site.reason}") for site in found.refused()]


def _notes(found: GraphRecord, counts: Mapping[str, int]) -> list[str]:
    """One line a fusion: how often it matched, of how many, and what became of the matches."""
    matched, applied = found.matched(), found.applied()
    lines = []
    for name in dict.fromkeys([*(n for n, count in counts.items() if count), *matched]):
        of = f" of {counts[name]}" if name in counts else ""
        left = dict.fromkeys(site.reason for site in found.sites if site.fusion == name and site.left)
        lines.append("; ".join([f"{name} matched {matched[name]}{of}, applied {applied[name]}", *left]))
    return lines
