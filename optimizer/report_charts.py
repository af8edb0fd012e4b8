"""The charts of the report as static SVG: roofline, speed, and the forest plot of quality.

Drawn with Altair and vl-convert, then made to fit an HTML page: every mark carries a native `<title>` tooltip, no
ids, fonts or scripts remain, and each colour is a light value of `PALETTE`, which a stylesheet can replace through
attribute selectors (`svg [fill="#0b5cad"]`) in dark mode. A chart without data is "".
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from optimizer import report_units as units
from optimizer.report import QualityEntry, Report, RooflinePoint, SpeedCell
from optimizer.report_units import clean

# name: (light, dark). The light values are drawn into the SVGs, so they must differ from one another.
PALETTE = {
    "page": ("#fdfdfc", "#101316"),
    "panel": ("#f4f5f6", "#181c20"),
    "ink": ("#1a1e23", "#e5e8eb"),
    "muted": ("#57606b", "#9ba5b0"),
    "line": ("#d8dce1", "#2c3239"),
    "baseline": ("#6e7783", "#8b95a1"),
    "optimized": ("#0b5cad", "#5aa9f8"),
    "pass": ("#0b6b3f", "#4cc38a"),
    "fail": ("#b42318", "#ff8b80"),
    "warn": ("#8a4b00", "#f2b63c"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
VARIANT_COLOURS = {"baseline": LIGHT["baseline"], "optimized": LIGHT["optimized"]}
PHASE_SHAPES = {"prefill": "square", "decode": "circle"}
WIDE, NARROW = 640, 280  # plot widths in px, without axis labels


def both_widths(draw: Callable[[Report, int], str], report: Report) -> list[tuple[str, str]]:
    """`draw` for a desktop and for a phone, as `(class name, svg)`; empty where there is nothing to draw."""
    drawn = [("wide", draw(report, WIDE)), ("narrow", draw(report, NARROW))]
    return [(name, svg) for name, svg in drawn if svg]


def _drawable(*values: float | None) -> bool:
    """Whether each value has a place on a logarithmic axis; what lies beyond 1e±30 is no measurement."""
    return all(value is not None and 1e-30 < value < 1e30 for value in values)


def roofline_chart(report: Report, width: int) -> str:
    """Measured points under the measured roofs, log-log; "" where either is missing.

    The slopes are the read bandwidth of the largest working set (memory) and the fastest one (cache); a dashed line
    joins baseline and optimized of one phase, and a point's distance to the roof is what is left to gain.
    """
    import altair as alt

    points = [p for p in report.roofline if _drawable(p.intensity, p.achieved_flops)]
    peaks = {name: rate for name, rate in report.ceilings.matmul_flops_per_second.items() if _drawable(rate)}
    bandwidths = [p for p in report.ceilings.read_bandwidth if _drawable(p.bytes_per_second)]
    if not points or not peaks or not bandwidths:
        return ""
    memory = max(bandwidths, key=lambda p: p.working_set_bytes)
    slopes = [("memory", memory.bytes_per_second)]
    fastest = max(p.bytes_per_second for p in bandwidths)
    if fastest > 1.3 * memory.bytes_per_second:
        slopes.append(("cache", fastest))

    top, ridge = max(peaks.values()), max(peaks.values()) / memory.bytes_per_second
    x = _decades([p.intensity for p in points] + [ridge], room=2.5)
    y = _decades([p.achieved_flops for p in points] + [top], room=2.0)
    peaks = {name: rate for name, rate in peaks.items() if rate >= y[0]}  # a roof below every point: in the table only
    height = 380 if width == WIDE else 300
    axes = {
        "x": alt.X("x:Q", title="Arithmetic intensity, FLOP per byte").scale(type="log", domain=x, nice=False),
        "y": alt.Y("y:Q", title="FLOP/s").scale(type="log", domain=y, nice=False),
    }
    ticks = alt.Axis(values=[10.0**e for e in range(-3, 19)], format="~s")
    axes = {name: channel.axis(ticks) for name, channel in axes.items()}
    tilt = -math.degrees(math.atan2(height / math.log(y[1] / y[0]), width / math.log(x[1] / x[0])))
    layers = [*_roofs(alt, axes, peaks, slopes, x, y, tilt), *_journeys(alt, axes, points), _dots(alt, axes, points)]
    chart = alt.layer(*layers).properties(width=width, height=height)
    return _svg(chart, f"Roofline of {report.model.name}: {len(points)} measured points under the measured ceilings")


def _decades(values: Sequence[float], room: float) -> list[float]:
    return [min(values) / room, max(values) * room]


def _roofs(
    alt: Any,
    axes: dict[str, Any],
    peaks: dict[str, float],
    slopes: list[tuple[str, float]],
    x: list[float],
    y: list[float],
    tilt: float,
) -> list[Any]:
    """A flat line for each peak, from where memory bandwidth reaches it; a slope for each bandwidth; their labels."""
    top, bandwidth = max(peaks.values()), slopes[0][1]
    layers = []
    for name, rate in peaks.items():
        text = f"{clean(name)[:24]} {units.FLOPS.format(rate)}"
        ends = [{"x": v, "y": rate, "tip": f"Peak, {text}"} for v in (max(x[0], rate / bandwidth), x[1])]
        layers.append(_line(alt, axes, ends, []))
        layers.append(_text(alt, axes, {"x": x[1], "y": rate, "text": text}, align="right", dy=-6))
    for name, rate in slopes:
        text = f"{name} {units.BYTES_PER_SECOND.format(rate)}"
        start = max(x[0], y[0] / rate)
        ends = [{"x": v, "y": v * rate, "tip": f"Read bandwidth, {text}"} for v in (start, top / rate)]
        layers.append(_line(alt, axes, ends, [] if name == "memory" else [2, 3]))
        place = start * (x[1] / x[0]) ** 0.03
        layers.append(
            _text(alt, axes, {"x": place, "y": place * rate, "text": text}, align="left", dy=-7, angle=tilt % 360)
        )
    return layers


def _line(alt: Any, axes: dict[str, Any], ends: list[dict[str, Any]], dash: list[int]) -> Any:
    mark = alt.Chart(alt.Data(values=ends)).mark_line(color=LIGHT["muted"], strokeWidth=1.5, strokeDash=dash)
    return mark.encode(**axes, description="tip:N")


def _text(alt: Any, axes: dict[str, Any], value: dict[str, Any], **mark: Any) -> Any:
    chart = alt.Chart(alt.Data(values=[value])).mark_text(color=LIGHT["muted"], fontSize=11, **mark)
    return chart.encode(**axes, text="text:N", description=alt.value(""))


def _journeys(alt: Any, axes: dict[str, Any], points: list[RooflinePoint]) -> list[Any]:
    """A thin line from the baseline to the optimized point of each label and phase that has both."""
    ends: dict[tuple[str, str], dict[str, RooflinePoint]] = {}
    for point in points:
        ends.setdefault((point.label, point.phase), {})[point.variant] = point
    pairs = [(p["baseline"], p["optimized"]) for p in ends.values() if len(p) == 2]
    rows = [{"x": a.intensity, "y": a.achieved_flops, "x2": b.intensity, "y2": b.achieved_flops} for a, b in pairs]
    if not rows:
        return []
    rule = alt.Chart(alt.Data(values=rows)).mark_rule(color=LIGHT["optimized"], opacity=0.75, strokeDash=[3, 3])
    return [rule.encode(**axes, x2="x2:Q", y2="y2:Q", description=alt.value(""))]


def _dots(alt: Any, axes: dict[str, Any], points: list[RooflinePoint]) -> Any:
    rows = [
        {
            "x": p.intensity,
            "y": p.achieved_flops,
            "variant": p.variant,
            "phase": p.phase,
            "tip": f"{clean(p.label)}, {p.phase}, {p.variant}: {units.FLOPS.format(p.achieved_flops)} of "
            f"{units.FLOPS.format(p.attainable_flops)} attainable at {units.INTENSITY.format(p.intensity)}",
        }
        for p in points
    ]
    dots = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=110, opacity=1, stroke=LIGHT["page"])
    return dots.encode(
        **axes,
        color=_by_variant(alt),
        shape=alt.Shape("phase:N", legend=None).scale(domain=[*PHASE_SHAPES], range=[*PHASE_SHAPES.values()]),
        description="tip:N",
    )


def _by_variant(alt: Any) -> Any:
    return alt.Color("variant:N", legend=None).scale(domain=[*VARIANT_COLOURS], range=[*VARIANT_COLOURS.values()])


@dataclass(frozen=True)
class Panel:
    """One speed panel: `read(cell, variant)` gives the value and, for a time, its p95."""

    title: str
    unit: units.Unit
    read: Callable[[SpeedCell, str], tuple[float, float | None]]


def _time(name: str) -> Callable[[SpeedCell, str], tuple[float, float | None]]:
    def read(cell: SpeedCell, variant: str) -> tuple[float, float | None]:
        times = getattr(getattr(cell, variant), name)
        return times.p50, times.p95

    return read


PANELS = (
    Panel("TTFT, p50 (line to p95), less is better", units.SECONDS, _time("ttft_seconds")),
    Panel("TPOT, p50 (line to p95), less is better", units.SECONDS, _time("tpot_seconds")),
    Panel(
        "Throughput, more is better",
        units.TOKENS_PER_SECOND,
        lambda cell, variant: (getattr(cell, variant).tokens_per_second, None),
    ),
)


def speed_chart(cells: Sequence[SpeedCell], panel: Panel) -> str:
    """Bars for each workload, baseline above optimized, labelled with their values; "" where nothing is finite."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for cell in cells:
        values = {variant: panel.read(cell, variant) for variant in VARIANT_COLOURS}
        texts = panel.unit.pair(*(value for value, _ in values.values()))
        for (variant, (value, p95)), text in zip(values.items(), texts, strict=True):
            if _drawable(value):
                end = max(value, p95) if p95 is not None and _drawable(p95) else value
                tip = f"{cell.label}, {variant}: {text}" + (f", p95 {panel.unit.format(p95)}" if p95 else "")
                row = {"cell": cell.label, "variant": variant, "x": value, "end": end, "text": text, "tip": tip}
                rows.append(row)
    if not rows:
        return ""
    y = alt.Y("cell:N", title=None, sort=None).axis(ticks=False, domain=False, labelPadding=6)
    offset = alt.YOffset("variant:N", sort=[*VARIANT_COLOURS]).scale(paddingInner=0.12)
    longest = max(row["end"] for row in rows)
    x = alt.X("x:Q", axis=None).scale(domain=[0, longest * 1.45])
    base = alt.Chart(alt.Data(values=rows)).encode(y=y, yOffset=offset)
    bars = base.mark_bar(height={"band": 1}).encode(x=x, color=_by_variant(alt), description="tip:N")
    spread = base.mark_rule(color=LIGHT["ink"]).encode(x=x, x2="end:Q", description=alt.value(""))
    text = base.mark_text(align="left", dx=5, color=LIGHT["ink"], fontSize=11)
    text = text.encode(x="end:Q", text="text:N", description=alt.value(""))
    chart = alt.layer(bars, spread, text).properties(width=240, height=alt.Step(19))
    return _svg(chart.properties(title=panel.title), panel.title, labels=[row["cell"] for row in rows])


def forest_chart(report: Report, width: int) -> str:
    """Quality ratios with their intervals, the line of no change at 1, and each row's floor; "" without quality."""
    import altair as alt

    floors = {floor.metric: floor.threshold for floor in report.floors}
    rows: list[dict[str, Any]] = []
    for entry in report.quality:
        if not math.isfinite(entry.ratio):
            continue
        low, high = (end if end is not None and math.isfinite(end) else entry.ratio for end in _ends(entry))
        tip = f"{clean(entry.label)}: {units.interval(units.NUMBER, entry.ratio, *_ends(entry))}"
        row = {"label": clean(entry.label), "x": entry.ratio, "low": low, "high": high, "tip": tip}
        threshold = next((floors[name] for name in entry.floor_names if name in floors), None)
        rows.append(row | {"floor": threshold, "floor_tip": f"Floor: {units.NUMBER.format(threshold)}"})
    if not rows:
        return ""
    spots = [row[name] for row in rows for name in ("low", "high", "x", "floor") if row[name] is not None] + [1.0]
    room = 0.08 * (max(spots) - min(spots)) or 0.01
    x = alt.X("x:Q", title="optimized ÷ baseline").scale(domain=[min(spots) - room, max(spots) + room], nice=False)
    x = x.axis(tickCount=max(3, width // 90))
    beside = width == WIDE  # on a phone the labels stand above their rows instead
    place = {"labelPadding": 8} if beside else {"labelPadding": 0, "labelAlign": "left", "labelOffset": -15}
    axis = alt.Axis(ticks=False, domain=False, labelLimit=280, **place)
    y = alt.Y("label:N", title=None, sort=None, axis=axis)
    base = alt.Chart(alt.Data(values=rows)).encode(y=y)
    one = alt.Chart(alt.Data(values=[{"x": 1.0}])).mark_rule(color=LIGHT["muted"]).encode(x=x)
    spans = base.mark_rule(color=LIGHT["optimized"], strokeWidth=2)
    spans = spans.encode(x="low:Q", x2="high:Q", description="tip:N")
    dots = base.mark_point(filled=True, size=75, opacity=1, color=LIGHT["optimized"]).encode(x=x, description="tip:N")
    limits = base.transform_filter("isValid(datum.floor)").mark_tick(color=LIGHT["fail"], thickness=2.5, size=22)
    limits = limits.encode(x="floor:Q", description="floor_tip:N")
    plot = alt.layer(one, spans, limits, dots).properties(width=width, height=alt.Step(36 if beside else 48))
    title = "Quality of the optimized model relative to the baseline, with intervals and floors"
    return _svg(plot, title, labels=[row["label"] for row in rows if beside])


def _ends(entry: QualityEntry) -> tuple[float | None, float | None]:
    return entry.ratio_low, entry.ratio_high


def _svg(chart: Any, title: str, labels: Sequence[str] = ()) -> str:
    """Draw, and make the SVG fit an HTML page: native tooltips, no fonts, namespaces or needless decimals.

    The reader's system font may be a fifth wider than the one measured here, so `labels` get that much more room.
    """
    room = 4 + 0.2 * 6 * max((len(label) for label in labels), default=0)
    configured = chart.configure(
        background="transparent", font="sans-serif", padding={"left": min(room, 60), "right": 8, "top": 4, "bottom": 4}
    )
    configured = configured.configure_view(stroke=None).configure_title(
        anchor="start", fontSize=12, fontWeight=600, color=LIGHT["ink"], offset=8
    )
    configured = configured.configure_axis(
        gridColor=LIGHT["line"],
        domainColor=LIGHT["muted"],
        tickColor=LIGHT["muted"],
        labelColor=LIGHT["ink"],
        titleColor=LIGHT["muted"],
        titleFontWeight="normal",
        titleFontSize=12,
        labelFontSize=11,
    )
    drawn = io.StringIO()
    configured.save(drawn, format="svg")
    root = ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn.getvalue(), count=2))
    for parent in list(root.iter()):
        for child in list(parent):
            empty = child.tag == "path" and (not child.get("d") or child.get("display") == "none")
            if empty or (child.get("class") == "background" and "d" in child.attrib):
                parent.remove(child)
    for element in root.iter():
        tip = element.get("aria-label")
        if tip and "mark" not in element.get("class", "") and "axis" not in element.get("aria-roledescription", ""):
            ElementTree.SubElement(element, "title").text = tip
        for name in [name for name in element.attrib if name.startswith("aria-") or name in _NEEDLESS]:
            del element.attrib[name]
        for name in ("d", "transform"):
            if name in element.attrib:
                element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[name]))
    root.set("role", "img")
    root.set("aria-label", clean(title))
    return ElementTree.tostring(root, encoding="unicode")


_NEEDLESS = {"role", "class", "font-family", "version", "pointer-events", "stroke-miterlimit"}
