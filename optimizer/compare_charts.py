"""The charts of a comparison, and of a history, as SVG written by hand: points, steps and roofs with tooltips.

Unlike the report's charts these are filtered by a script, so each mark says which variant it shows (`data-variant`) and
carries its tooltip as `<title>`, which works without a script too. Colours are the CSS variables `--v0` to `--v7` that
the page defines for light and dark. Widths are those of a phone: panels stand side by side where there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from optimizer.report_units import Unit, clean

WIDTH, HEIGHT = 320, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 20, 38
COLOURS = 8

# name: (light, dark); the first is the baseline's grey. Each has a contrast of at least 4.5 with its page colour.
VARIANT_PALETTE = {
    "v0": ("#5f6873", "#9aa4af"),
    "v1": ("#0b5cad", "#5aa9f8"),
    "v2": ("#a34a00", "#f2a54a"),
    "v3": ("#0b6b3f", "#4cc38a"),
    "v4": ("#8222a0", "#d08ff0"),
    "v5": ("#b42318", "#ff8b80"),
    "v6": ("#00687a", "#4fc3d9"),
    "v7": ("#6b5d00", "#d9c94a"),
}


@dataclass(frozen=True)
class Point:
    """A mark: where it is, whose, its tooltip; `low` and `high` are the ends of a vertical interval."""

    variant: int
    x: float
    y: float
    tip: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    square: bool = False


@dataclass(frozen=True)
class Axis:
    """Title and unit of one axis, linear from `least` unless `log`; `sense` +1 where more is better, −1 where less."""

    title: str
    unit: Unit
    log: bool = False
    least: float | None = None
    sense: int = 1


@dataclass(frozen=True)
class Scale:
    """Data to pixels, and the ticks in between."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside is drawn at the edge."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        share = min((at - low) / (high - low), 1.0)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers: powers of ten, or about five steps of 1, 2 or 5."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, (last - first + 1) // 5)
            return [10.0**power for power in range(first, last + 1, step)]
        span = self.high - self.low
        size = 10 ** math.floor(math.log10(span / 4))
        step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= 5)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def finite(*values: float | None) -> bool:
    """Whether each value has a place on an axis."""
    return all(value is not None and math.isfinite(value) and abs(value) < 1e30 for value in values)


def _scale(values: Sequence[float], axis: Axis, start: float, stop: float) -> Scale:
    low, high = min(values), max(values)
    if axis.log:
        return Scale(low / 2, high * 2, start, stop, True)
    low = min(low, axis.least) if axis.least is not None else low
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low if axis.least is not None else low - room, high + room, start, stop, False)


def scatter(points: Sequence[Point], x: Axis, y: Axis, title: str, *, front: bool = False, extra: str = "") -> str:
    """Points with intervals; with `front`, the steps of the Pareto front, which the page redraws as it filters.

    "" where no point has a place. `extra` is drawn beneath, in pixels.
    """
    drawn = [p for p in points if finite(p.x, p.y) and (not x.log or p.x > 0) and (not y.log or p.y > 0)]
    if not drawn:
        return ""
    ends = [v for p in drawn for v in (p.low, p.high) if v is not None and math.isfinite(v)]
    across = _scale([p.x for p in drawn], x, LEFT, WIDTH - RIGHT)
    up = _scale([*(p.y for p in drawn), *ends], y, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, x, y), extra]
    if front:
        parts.append(f'<path class="front" data-across="{x.sense}" fill="none"/>')
    parts += _labels(drawn, across, up)
    parts += [_mark(p, across, up) for p in drawn]
    return _svg("".join(parts), title)


def lines(series: Sequence[Sequence[Point]], x: Axis, y: Axis, title: str, ticks: Callable[[float], str]) -> str:
    """Series of points joined by lines, in the order of x; "" without a point."""
    drawn = [sorted((p for p in row if finite(p.x, p.y)), key=lambda p: p.x) for row in series]
    every = [p for row in drawn for p in row]
    if not every:
        return ""
    across = _scale([p.x for p in every], x, LEFT, WIDTH - RIGHT)
    up = _scale([p.y for p in every], y, HEIGHT - BOTTOM, TOP)
    parts = _axes(across, up, x, y, ticks)
    for row in drawn:
        if len(row) > 1:
            path = " ".join(f"{'M' if i == 0 else 'L'}{across(p.x)} {up(p.y)}" for i, p in enumerate(row))
            owner = row[0].variant
            parts.append(f'<path class="line v{owner % COLOURS}" data-variant="{owner}" fill="none" d="{path}"/>')
        parts += [_mark(p, across, up) for p in row]
    return _svg("".join(parts), title)


def roofline(
    points: Sequence[Point], peaks: Sequence[tuple[str, float]], bandwidth: float, x: Axis, y: Axis, title: str
) -> str:
    """Points under the roof min(peak, bandwidth × intensity) of each peak; "" without points or roof."""
    drawn = [p for p in points if finite(p.x, p.y) and p.x > 0 and p.y > 0]
    if not drawn or not peaks or not bandwidth > 0:
        return ""
    top = max(rate for _, rate in peaks)
    across = _scale([*(p.x for p in drawn), top / bandwidth], x, LEFT, WIDTH - RIGHT)
    up = _scale([*(p.y for p in drawn), top], y, HEIGHT - BOTTOM, TOP)
    parts = _axes(across, up, x, y)
    for name, rate in peaks:
        start = max(across.low, up.low / bandwidth)
        knee = min(max(rate / bandwidth, start), across.high)
        corner = [(start, start * bandwidth), (knee, min(rate, knee * bandwidth)), (across.high, rate)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{across(a)} {up(b)}" for i, (a, b) in enumerate(corner))
        text = f"{clean(name)[:24]} {y.unit.format(rate)}"
        parts.append(f'<path class="roof-line" d="{path}" fill="none"><title>{escape(text)}</title></path>')
        parts.append(
            f'<text class="axis" x="{WIDTH - RIGHT}" y="{up(rate) - 4}" text-anchor="end">{escape(text)}</text>'
        )
    parts += [_mark(p, across, up) for p in drawn]
    return _svg("".join(parts), title)


def _axes(across: Scale, up: Scale, x: Axis, y: Axis, ticks: Callable[[float], str] | None = None) -> list[str]:
    """Grid, tick labels on one rung each, and titles."""
    parts = []
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        text = escape(_tick(y, value, up))
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{text}</text>')
    for value in across.ticks() if ticks is None else _spread(across):
        at = across(value)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
        text = escape(_tick(x, value, across) if ticks is None else ticks(value))
        parts.append(f'<text class="axis" x="{at}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<text class="axis-title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
    )
    parts.append(f'<text class="axis-title" x="0" y="10">{escape(y.title)}</text>')
    return parts


def _spread(scale: Scale) -> list[float]:
    """Places for labels where round numbers mean nothing, as on an axis of time."""
    return [scale.low + (scale.high - scale.low) * share for share in (0.12, 0.5, 0.88)]


def _tick(axis: Axis, value: float, scale: Scale) -> str:
    """A tick's text, without needless decimals."""
    most = max(abs(scale.high), abs(scale.low))
    ticks = [] if scale.log else scale.ticks()
    unit = axis.unit
    if len(ticks) > 1:  # digits enough to tell neighbours apart: 0.9998 and 1.0002 are not both 1
        unit = replace(unit, digits=max(unit.digits, math.ceil(math.log10(most / (ticks[1] - ticks[0])) + 1)))
    text = unit.format(value, like=value if scale.log else most)
    number, _, rest = text.partition(" ")
    suffix = ""
    while number and not (number[-1].isdigit()):
        number, suffix = number[:-1], number[-1] + suffix
    if "." in number and "e" not in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number}{suffix}" + (f" {rest}" if rest else "")


def _labels(points: Sequence[Point], across: Scale, up: Scale) -> list[str]:
    """Names beside their points: right, left, above or below, wherever they cover no point and no other name."""
    dots = [(across(p.x), up(p.y)) for p in points]
    taken = [(x - 7, x + 7, y - 7, y + 7) for x, y in dots]
    texts = []
    for p, (x, y) in zip(points, dots, strict=True):
        if not p.label:
            continue
        width = 7.2 * len(p.label)
        shifts = [(dx, dy) for dy in (0, -14, 14, -27, 27, -40, 40) for dx in (9, -9 - width, -width / 2)]
        places = [(x + dx, x + dx + width, y + dy - 6, y + dy + 6) for dx, dy in shifts]
        free = [box for box in places if _inside(box) and not any(_overlap(box, other) for other in taken)]
        box = free[0] if free else next(filter(_inside, places), places[0])
        taken.append(box)
        name = f'class="name v{p.variant % COLOURS}" data-variant="{p.variant}"'
        texts.append(f'<text {name} x="{box[0]:.1f}" y="{box[2] + 10:.1f}">{escape(clean(p.label))}</text>')
    return texts


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= LEFT - 20 and box[1] <= WIDTH and box[2] >= 0 and box[3] <= HEIGHT - BOTTOM


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _mark(p: Point, across: Scale, up: Scale) -> str:
    """One point: its interval and its dot in one group, which the keyboard reaches."""
    x, y, parts = across(p.x), up(p.y), []
    if p.low is not None and p.high is not None:
        low, high = (v if math.isfinite(v) else edge for v, edge in ((p.low, up.low), (p.high, up.high)))
        parts.append(f'<path class="span" d="M{x} {up(low)}V{up(high)}M{x - 4} {up(low)}h8M{x - 4} {up(high)}h8"/>')
    shape = f'<rect class="dot" x="{x - 5}" y="{y - 5}" width="10" height="10"/>'
    parts.append(shape if p.square else f'<circle class="dot" cx="{x}" cy="{y}" r="5.5"/>')
    return (
        f'<g class="mark v{p.variant % COLOURS}" data-variant="{p.variant}" data-x="{x}" data-y="{y}" tabindex="0" '
        f'role="img"><title>{escape(clean(p.tip))}</title>{"".join(parts)}</g>'
    )


def _svg(body: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(clean(title))}">{body}</svg>'
