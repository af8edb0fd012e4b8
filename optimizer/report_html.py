"""Renders a report as one HTML page and as Markdown.

The page is a single file with no script, no font and no request: a content security policy in its head forbids all
three, so a hostile model name can neither run nor load anything even if escaping were to fail. Charts are therefore
static SVG, drawn once with Altair and vl-convert: an inline Vega runtime would cost about 800 kB and need script.
What static SVG would lose is put back here: each mark carries a native `<title>` tooltip, dark mode recolours the
drawn palette through CSS attribute selectors (the SVG stays a complete light picture by itself), and wide charts are
drawn a second time for phones instead of being shrunk until nobody can read them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import report_units as units
from optimizer.report import LayerEntry, QualityEntry, Report, speedup
from optimizer.report_charts import PALETTE, PANELS, both_widths, forest_chart, roofline_chart, speed_chart
from optimizer.report_units import clean

if TYPE_CHECKING:
    from jinja2 import Environment

LAYER_ROWS = 600  # about 0.35 kB each; beyond this the page lists those with the largest errors and says so

GLOSSARY = (
    ("TTFT", "Time to first token: from the request to the first output token. Dominated by prefill."),
    ("TPOT", "Time per output token: the mean gap between later tokens of a request. Dominated by decode."),
    ("ITL", "Inter-token latency: every gap between two tokens of a request, one by one."),
    ("E2E", "End to end: from the request to its last token."),
    ("Goodput", "What was served to requests whose TTFT and TPOT both met the objective (SLO)."),
    ("MBU", "Model bandwidth utilization: the bytes a step must read / (its time × measured read bandwidth)."),
    ("MFU", "Model FLOPs utilization: the model's FLOPs / (time × measured peak FLOP/s)."),
    ("Recovery", "Quality of the optimized model / quality of the baseline, on the same samples, with an interval."),
    ("Loss", "How much worse the optimized model is, in the metric's unit, with a one-sided bound on either side."),
    ("Needed", "Items with which a model without loss passes a floor with the recipe's power, at the spread seen."),
    ("KL", "Kullback-Leibler divergence of the optimized model's next-token distribution from the baseline's."),
    ("Floor", "A limit that the recipe sets on a metric. The pessimistic end of its interval must hold."),
    ("Roofline", "The most FLOP/s a machine can reach at an intensity: min(peak, bandwidth × intensity)."),
    ("Intensity", "FLOPs done per byte moved. Left of the ridge, memory binds; right of it, arithmetic."),
    ("p50, p95, p99", "The time that 50, 95 or 99 % of the measurements stay within."),
    ("Weight error", "‖Ŵ − W‖ / ‖W‖ (Frobenius) of a layer's weight; output error is the same of its output."),
    ("Ledger", "How many steps ran compiled, replayed from a graph, or eager, and which kernel served each layer."),
    ("Ungated", "The quality and speed gate was off. Nothing is claimed about the optimized model."),
)


def render_html(report: Report) -> str:
    """The report as one self-contained HTML page, light and dark."""
    html: str = _environment(autoescape=True).get_template("report.html.jinja").render(_context(report))
    return html


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown. Names stand in code spans, prose is escaped."""
    text: str = _environment(autoescape=False).get_template("report.md.jinja").render(_context(report))
    return re.sub(r"\n{3,}", "\n\n", text)


def _context(report: Report) -> dict[str, Any]:
    ranked = sorted(report.layers, key=lambda layer: -_worst(layer))
    shown = report.layers if len(report.layers) <= LAYER_ROWS else ranked[:LAYER_ROWS]
    errors = [e for layer in shown for e in (layer.weight_error, layer.output_error) if e and math.isfinite(e)]
    return {
        "report": report,
        "rows": report.table(),
        "groups": _layer_groups(report.layers),
        "shown_layers": shown,
        "largest_error": max(errors, default=0.0),
        "largest_cost": max((cost.seconds for cost in report.costs), default=0.0),
        "glossary": GLOSSARY,
        "recipe_lines": json.dumps(report.recipe, indent=2, ensure_ascii=False).splitlines(),
        "palette": PALETTE,
        "bandwidths": sorted(report.ceilings.read_bandwidth, key=lambda point: point.working_set_bytes),
        "roofline_charts": lambda: both_widths(roofline_chart, report),
        "forest_charts": lambda: both_widths(forest_chart, report),
        "speed_charts": lambda: [svg for panel in PANELS if (svg := speed_chart(report.speed, panel))],
    }


def _worst(layer: LayerEntry) -> float:
    errors = [e for e in (layer.output_error, layer.weight_error) if e is not None]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors, default=-1.0)


@dataclass
class LayerGroup:
    """Layers that share kind, format and kernel; `worst` is the one with the largest error."""

    kind: str
    format: str
    kernel: str
    count: int
    bytes_before: int
    bytes_after: int
    worst: LayerEntry


def _layer_groups(layers: Iterable[LayerEntry]) -> list[LayerGroup]:
    groups: dict[tuple[str, str, str], LayerGroup] = {}
    for layer in layers:
        key = (layer.kind, layer.format, layer.kernel)
        group = groups.setdefault(key, LayerGroup(*key, count=0, bytes_before=0, bytes_after=0, worst=layer))
        group.count += 1
        group.bytes_before += layer.bytes_before
        group.bytes_after += layer.bytes_after
        group.worst = max(group.worst, layer, key=_worst)
    return list(groups.values())


@cache
def _environment(*, autoescape: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters |= {
        "seconds": units.SECONDS.format,
        "bytes": units.BYTES.format,
        "bandwidth": units.BYTES_PER_SECOND.format,
        "flops": units.FLOPS.format,
        "tokens_per_second": units.TOKENS_PER_SECOND.format,
        "intensity": units.INTENSITY.format,
        "ratio": units.RATIO.format,
        "percent": units.PERCENT.format,
        "number": units.NUMBER.format,
        "count": units.COUNT.format,
        "speedup": speedup,
        "loss": _loss,
        "samples": _samples,
        "spread": lambda entry: units.interval(units.NUMBER, entry.value, entry.low, entry.high),
        "share": _share,
        "code": _markdown_code,
        "prose": _markdown_prose,
    }
    environment.globals |= {"MISSING": units.MISSING, "NONE": units.NONE}
    return environment


def _loss(entry: QualityEntry) -> str:
    """How much worse, with its bounds."""
    if entry.loss is None:
        return units.NONE
    return units.interval(units.NUMBER, entry.loss, entry.loss_low, entry.loss_high)


def _samples(entry: QualityEntry) -> str:
    """How many, and of how many where the evaluation stopped early."""
    text, planned = units.COUNT.format(entry.samples), entry.samples_planned
    return text if planned is None or planned <= entry.samples else f"{text} of {units.COUNT.format(planned)}"


def _share(value: float | None, whole: float | None) -> float:
    """`value` in percent of `whole`, within 0 to 100: the width of a bar. 0 where there is none."""
    if value is None or not whole or not math.isfinite(value / whole):
        return 0.0
    return round(min(max(100 * value / whole, 0.0), 100.0), 1)


def _markdown_code(text: str) -> str:
    """A code span that no backtick in `text` can end; a pipe is escaped for the sake of tables."""
    text = clean(text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _markdown_prose(text: str) -> str:
    entities = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", entities)
