"""Renders a comparison as one HTML page that filters and sorts, and as Markdown.

Everything is in the HTML itself, so the page reads without its script; the one script (`page.js`, also that of the
history page) filters, sorts, lists documents and shows tooltips. The content security policy allows exactly that
script, by its hash, and nothing else: no network, no other script, no eval. Documents and answers come as JSON in a
block that does not run, and enter the page as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from optimizer import compare_charts as charts
from optimizer import report_units as units
from optimizer.compare_charts import Axis, Point
from optimizer.compare_report import Comparison, LayerError, MetricEntry, Score, pareto
from optimizer.report import speedup
from optimizer.report_charts import PALETTE
from optimizer.report_html import GLOSSARY, _environment
from optimizer.report_units import clean

_EXPERT = re.compile(r"\.\d+\.")
HEADLINE_TASKS = 6  # tasks with a column of the result and charts of their own; every task has its rows further down


def render_html(comparison: Comparison) -> str:
    """The comparison as one self-contained page, light and dark."""
    context = _context(comparison) | page_parts(_data(comparison))
    html: str = _environment(autoescape=True).get_template("compare.html.jinja").render(context)
    return html


def render_markdown(comparison: Comparison) -> str:
    """The summary as GitHub-flavoured Markdown."""
    text: str = _environment(autoescape=False).get_template("compare.md.jinja").render(_context(comparison))
    return re.sub(r"\n{3,}", "\n\n", text)


def page_parts(data: Any) -> dict[str, Any]:
    """What an interactive page needs: the report's stylesheet, the script, its hash, and data as inert JSON."""
    script = page_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    report = _environment(autoescape=True).get_template("report.html.jinja")
    style = "".join(report.blocks["style"](report.new_context({"palette": PALETTE})))
    return {
        "style": style,
        "script": script,
        "script_hash": f"sha256-{digest}",
        "data": inert_json(data),
        "variant_palette": charts.VARIANT_PALETTE,
    }


@cache
def page_script() -> str:
    """The text of the script, which may not hold what would end its element."""
    return (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


def inert_json(data: Any) -> str:
    """JSON that no text in it can turn into markup: `<`, `>`, `&` and line separators are escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(comparison: Comparison) -> dict[str, Any]:
    """The documents, as the script lists them."""
    index = {variant.name: i for i, variant in enumerate(comparison.variants)}
    return {
        "variants": [clean(name) for name in index],
        "documents": [
            {
                "task": clean(document.task),
                "id": clean(document.document.partition(":")[0]),
                "context": _shown(document.context),
                "gold": None if document.gold is None else _shown(document.gold),
                "answers": [[index[a.variant], _shown(a.text), a.right, a.differs] for a in document.answers],
            }
            for document in comparison.documents
        ],
    }


def _shown(text: str) -> str:
    """Text of a document: as `clean`, but lines stay lines."""
    return "\n".join(clean(line) for line in text.split("\n"))


def _context(comparison: Comparison) -> dict[str, Any]:
    quality = {m.label: kept_quality(m) for m in comparison.headlines()[:HEADLINE_TASKS]}
    return {
        "c": comparison,
        "tasks": list(dict.fromkeys(metric.task for metric in comparison.quality)),
        "index": {variant.name: i for i, variant in enumerate(comparison.variants)},
        "kept": quality,
        "more_tasks": max(0, len(comparison.headlines()) - HEADLINE_TASKS),
        "ratio_text": _ratio_text,
        "interval_text": lambda kept: units.interval(units.NUMBER, *kept),
        "front": front_of(comparison),
        "pareto_charts": lambda: _pareto_charts(comparison),
        "roofline_chart": lambda: _roofline(comparison),
        "heat": _heat(comparison),
        "heat_share": heat_share,
        "speedup": speedup,
        "glossary": GLOSSARY,
    }


def kept_quality(metric: MetricEntry) -> dict[str, tuple[float, float | None, float | None]]:
    """Each variant's quality relative to the first, more is better: the ratio, or one over it where less is better."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for index, score in enumerate(metric.scores):
        if index == 0:
            found[score.variant] = (1.0, None, None)
        elif score.ratio is not None:
            low, high = score.ratio_low, score.ratio_high
            if metric.higher_is_better:
                found[score.variant] = (score.ratio, low, high)
            else:
                found[score.variant] = (
                    _inverse(score.ratio),
                    None if high is None else _inverse(high),
                    None if low is None else _inverse(low),
                )
    return found


def _inverse(ratio: float) -> float:
    """One over a ratio of quality, which is never negative: an end that is unbounded below is taken as 0."""
    if math.isnan(ratio):
        return ratio
    return math.inf if ratio <= 0 else 1 / ratio


AXES = (
    ("decode_tokens_per_second", Axis("decode, tokens per second →", units.TOKENS_PER_SECOND, least=0.0)),
    ("stored_bytes", Axis("← size on disk", units.BYTES, least=0.0, sense=-1)),
    ("memory_bytes", Axis("← memory: weights, keys and values", units.BYTES, least=0.0, sense=-1)),
    ("cost_per_million_tokens", Axis("← cost per million tokens", units.NUMBER, least=0.0, sense=-1)),
)
"""What quality is weighed against: the field of `VariantEntry`, its axis, and whether more of it is better."""


def front_of(comparison: Comparison) -> dict[str, set[str]]:
    """By the label of each headline metric, the variants that none beats on both its quality and decode speed."""
    field, axis = AXES[0]
    return {m.label: pareto(_benefits(comparison, m, field, axis.sense)) for m in comparison.headlines()}


def _benefits(comparison: Comparison, metric: MetricEntry, field: str, sense: int) -> dict[str, tuple[float, float]]:
    values = {v.name: getattr(v, field) for v in comparison.variants}
    quality = kept_quality(metric)
    return {
        name: (sense * value, quality[name][0])
        for name, value in values.items()
        if value is not None and name in quality
    }


def _pareto_charts(comparison: Comparison) -> list[tuple[MetricEntry, list[str]]]:
    """For each task, quality against every axis that was measured."""
    found = []
    for metric in comparison.headlines()[:HEADLINE_TASKS]:
        quality = kept_quality(metric)
        drawn = []
        for field, axis in AXES:
            points = []
            for i, variant in enumerate(comparison.variants):
                value = getattr(variant, field)
                if value is None or variant.name not in quality:
                    continue
                kept, low, high = quality[variant.name]
                text = units.interval(units.NUMBER, kept, low, high)
                tip = f"{variant.name}: {axis.unit.format(value)}, quality {text} of {comparison.baseline.name}"
                points.append(Point(i, value, kept, tip, clean(variant.name)[:26], low, high))
            y = Axis("quality kept", units.NUMBER)
            drawn.append(charts.scatter(points, axis, y, f"{metric.label} against {axis.title}", front=True))
        found.append((metric, [svg for svg in drawn if svg]))
    return [(metric, svgs) for metric, svgs in found if svgs]


def _roofline(comparison: Comparison) -> str:
    """Prefill and decode of every variant that ran here."""
    points = [
        Point(
            i, p.intensity, p.achieved_flops,
            f"{variant.name}, {p.phase}: {units.FLOPS.format(p.achieved_flops)} of "
            f"{units.FLOPS.format(p.attainable_flops)} attainable at {units.INTENSITY.format(p.intensity)}",
            square=p.phase == "prefill",
        )
        for i, variant in enumerate(comparison.variants)
        for p in variant.roofline
    ]  # fmt: skip
    ceilings = comparison.ceilings
    memory = max(ceilings.read_bandwidth, key=lambda p: p.working_set_bytes, default=None)
    peaks = sorted(ceilings.matmul_flops_per_second.items(), key=lambda item: -item[1])[:2]
    x = Axis("FLOP per byte", units.Unit(((1.0, ""),)), log=True)
    y = Axis("FLOP/s", units.Unit(units._ladder("", " kMGTP", 0)), log=True)
    return charts.roofline(points, peaks, memory.bytes_per_second if memory else 0.0, x, y, "Roofline of all variants")


def _ratio_text(score: Score) -> str:
    if score.ratio is None:
        return units.NONE
    return units.interval(units.NUMBER, score.ratio, score.ratio_low, score.ratio_high)


def _heat(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """By variant: rows (blocks), columns (projections), cells; `identical` where every weight is the first's.

    Experts of one projection share a cell, which shows the worst of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for variant in comparison.variants[1:]:
        layers = [layer for layer in comparison.layers if layer.variant == variant.name]
        if layers:
            rows = sorted({layer.layer for layer in layers}, key=lambda n: (n is None, n))
            cells: dict[tuple[int | None, str], LayerError] = {}
            for layer in layers:
                key = layer.layer, _EXPERT.sub(".*.", layer.projection)
                cells[key] = max(cells.get(key, layer), layer, key=_worst)
            rest = [layer for layer in layers if layer.layer is None]
            found[variant.name] = {
                "rows": [n for n in rows if n is not None],
                "columns": list(dict.fromkeys(column for row, column in cells if row is not None)),
                "cells": cells,
                "rest": rest,
                "identical": all(layer.weight_error == 0 for layer in layers),
                "worst": max(layers, key=_worst),
            }
    return found


def _worst(layer: LayerError) -> float:
    value = layer.weight_error if layer.output_error is None else layer.output_error
    return math.inf if math.isnan(value) else value


def heat_share(value: float | None, comparison: Comparison) -> int:
    """How dark a cell is, 0 to 100: the square root of its share of the largest error of all variants."""
    errors = [
        e for layer in comparison.layers for e in (layer.weight_error, layer.output_error) if e and charts.finite(e)
    ]
    if value is None or not value > 0 or not errors:
        return 100 if value is not None and math.isnan(value) else 0
    return round(100 * min(1.0, math.sqrt(value / max(errors))))
