"""`optimizer diagnose`: the diagnosis of a model or of the runner that a recipe makes of it, as data and for people."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import OutputError, UsageError
from optimizer.progress import Progress

if TYPE_CHECKING:
    from optimizer.backends.runner import BaseRunner
    from optimizer.evals.diagnose import Diagnosis, PhaseDiagnosis
    from optimizer.evals.interventions import Intervention
    from optimizer.evals.placement import Placed

Passes = Sequence[Mapping[str, Any]]

KERNELS, LAYERS = 12, 8
"""Rows that people are shown of each; JSON holds all."""

DISTURBED = 1.5
"""p90 over p10 of a step beyond which people are told that the machine was not quiet."""

TERM_WORDS = {
    "matmul": "matrix multiplies", "attention": "attention", "elementwise": "element-wise, norms, copies",
    "kv": "key-value cache upkeep", "communication": "communication", "launch": "launch and gaps",
    "host": "host, between steps", "unclassified": "not classified",
}  # fmt: skip


def analyse(
    runner: BaseRunner, *, batch: int, prompt: int, output: int, context: int | None, seconds: float,
    progress: Progress,
) -> Diagnosis:  # fmt: skip
    """Measure the machine, then diagnose the runner on the workload, repeating each part for at most `seconds`.

    Raises `UsageError` for a workload that its context does not hold.
    """
    from optimizer.evals.ceilings import measure_ceilings
    from optimizer.evals.diagnose import diagnose
    from optimizer.evals.timing import Workload

    if max(prompt + output, (context or 0) + output) > runner.max_context:
        raise UsageError(
            f"a prompt of {prompt}, {output} new tokens and a context of {context} do not fit the model's "
            f"{runner.max_context} positions. Shorten them."
        )
    with progress.phase("measure ceilings"):
        ceilings = measure_ceilings(runner.device, progress=lambda share: progress.update("probes", share, 1))
    return diagnose(
        runner, ceilings, Workload(batch, prompt, output), context=context, box_seconds=seconds, stage=progress.phase,
        progress=progress.update,
    )  # fmt: skip


def optimized_runner(
    model: str, recipe: str, *, batch: int, device: str, trust_remote_code: bool, progress: Progress
) -> BaseRunner:
    """The runner that a recipe makes of a model, without measuring or judging it."""
    from optimizer.calibration import load_calibration
    from optimizer.checkpoint import find_layout
    from optimizer.passes.base import Context
    from optimizer.pipeline import apply_passes, choose_device
    from optimizer.recipe import Recipe
    from optimizer.source import load_source

    chosen = Recipe.load(recipe)
    with progress.phase("load"):
        source = load_source(model, device=choose_device(device), trust_remote_code=trust_remote_code)
    passes, data = chosen.build_passes(), None
    if any(getattr(step, "calibrates", False) for step in passes):
        data = load_calibration(None, source.tokenizer, source.model.config, chosen.calibration)
    context = Context(
        tokenizer=source.tokenizer, batch=batch, progress=progress.update, calibration=data,
        scale_dtype=find_layout(chosen.layout).scale_dtype,
    )  # fmt: skip
    apply_passes(source.model, passes, context, progress)
    return context.make_runner(source.model, source.tokenizer)


def describe(found: Diagnosis, title: str, recipe: str | None = None) -> list[Any]:
    """The diagnosis for people: lines of text and rich tables. Passes that `recipe` has already are marked so."""
    ceilings, roofline = found.ceilings, found.roofline
    parts: list[Any] = [
        f"{title} on {ceilings.device}, {ceilings.cores} cores ({ceilings.isa}): {roofline.peak_flops / 1e9:,.0f} "
        f"GFLOP/s and {roofline.bandwidth / 1e9:.1f} GB/s measured, ridge {roofline.ridge:.1f} FLOP/byte"
    ]
    for phase in found.phases:
        parts += _phase(phase)
    parts += ["", "Where the bottleneck moves:", *(f"  {crossing.text}" for crossing in found.crossovers)]
    if not found.interventions:
        return [*parts, "", "Next: nothing in the table would gain 2 % here."]
    there = _passes_of(recipe)
    rows = [
        (str(rank), i.phase, i.name, f"{i.predicted_seconds * 1e3:.2f}", f"{i.predicted_gain:.2f}×", _passes(i, there))
        for rank, i in enumerate(found.interventions, 1)
    ]
    parts += ["", "Next, by what a whole request saves (each alone, predicted by Amdahl's law from the terms above):"]
    parts.append(_table(("", "phase", "do", "then ms", "gain", "recipe passes"), rows, right=(3, 4)))
    parts += [f"  {rank}: {i.why}" for rank, i in enumerate(found.interventions, 1)]
    return parts


def _phase(phase: PhaseDiagnosis) -> list[Any]:
    size = "prompt" if phase.phase == "prefill" else "context"
    step = phase.seconds
    parts: list[Any] = [
        "",
        f"{phase.phase}, batch {phase.batch}, {size} {phase.tokens_or_context:,}: {step * 1e3:.3f} ms, "
        f"floor {phase.floor_seconds * 1e3:.3f} ms ({phase.attained:.0%} of attainable), MFU {phase.mfu:.1%}, "
        f"MBU {phase.mbu:.1%}",
        f"  {phase.verdict.upper()}: {phase.why}",
        f"  (split of a profiled step of {phase.profiled_seconds * 1e3:.3f} ms, stretched to the unprofiled one)",
    ]
    terms = sorted(((t, s) for t, s in phase.terms.items() if s > 0), key=lambda item: -item[1])
    low, high = phase.spread
    if high > DISTURBED * low:
        parts.append(
            f"  DISTURBED: without a profiler it took {low * 1e3:.3f} to {high * 1e3:.3f} ms (p10 to p90), so "
            "something else uses this machine; repeat before acting on the shares below"
        )
    rows = [(TERM_WORDS[t], f"{s * 1e3:.3f}", f"{s / step:.0%}", "█" * round(30 * s / step)) for t, s in terms]
    parts.append(_table(("term", "ms", "share", ""), rows, right=(1, 2)))
    parts.append(_placed("kernel", phase.kernels[:KERNELS], step))
    if phase.layers:
        parts.append(_placed("layer", phase.layers[:LAYERS], step))
    hidden = len(phase.kernels) - KERNELS, len(phase.layers) - LAYERS
    more = [f"{n} more {what}" for n, what in zip(hidden, ("kernels", "layers"), strict=True) if n > 0]
    parts += [f"  {' and '.join(more)}: --json lists them"] if more else []
    parts += [f"  not classified: {', '.join(phase.unclassified)}"] if phase.unclassified else []
    return parts


def _placed(what: str, items: tuple[Placed, ...], step: float) -> Any:
    rows = [
        (
            item.name if len(item.name) <= 56 else f"{item.name[:53]}...", item.term, f"{item.calls:.0f}",
            f"{item.seconds * 1e6:.1f}", f"{item.seconds / step:.1%}", _number(item.flops), _number(item.bytes),
            "–" if item.bytes_per_second is None else f"{item.bytes_per_second / 1e9:.1f}",
            "–" if item.attainable is None else f"{item.attainable:.0%}", item.bound or "–",
        )
        for item in items
    ]  # fmt: skip
    headers = (what, "kind", "calls", "µs", "share", "FLOP", "bytes", "GB/s", "attainable", "bound")
    return _table(headers, rows, right=(2, 3, 4, 5, 6, 7, 8))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    size = next((s for s in ("G", "M", "k") if value >= {"G": 1e9, "M": 1e6, "k": 1e3}[s]), "")
    return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3, '': 1.0}[size]:.3g}{size}"


def _passes_of(recipe: str | None) -> list[dict[str, Any]]:
    """The passes of a recipe as they are written."""
    from optimizer.recipe import Recipe

    return [] if recipe is None else [dict(step) for step in Recipe.load(recipe).model_dump()["passes"]]


def carried_out(intervention: Intervention, there: Passes) -> bool:
    """Whether passes that do it, with these options, are there already."""
    steps = intervention.recipe_passes
    return bool(steps) and all(any(step.items() <= one.items() for one in there) for step in steps)


def _passes(intervention: Intervention, there: Passes) -> str:
    """Passes as a recipe would write them; those that are in it already are no news."""
    steps = intervention.recipe_passes
    if carried_out(intervention, there):
        return "in the recipe already"
    options = ((step["name"], ", ".join(f"{k}={v}" for k, v in step.items() if k != "name")) for step in steps)
    return " + ".join(f"{name}({text})" if text else name for name, text in options) or "none here"


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", no_wrap=index in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def show(parts: list[Any], width: int | None = None) -> None:
    """Print to stdout, ruled tables at the width of the terminal, or 140 columns where there is none."""
    from rich.console import Console

    console = Console(width=width or (None if sys.stdout.isatty() else 140), highlight=False, soft_wrap=False)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def save(parts: list[Any], out: Path, title: str) -> None:
    """Write the same as one page of HTML."""
    from rich.console import Console

    console = Console(record=True, width=150, file=io.StringIO(), highlight=False)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    page = console.export_html(inline_styles=True).replace("<head>", f"<head>\n<title>{html.escape(title)}</title>", 1)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}. Give another --out.") from error
