"""Numbers as people read them: significant digits, units, and words for what is missing.

One place decides how a time, a size, a rate or a ratio is written, so the terminal, Markdown and HTML agree.
`None` is "not measured"; NaN and infinities were measured, and are shown as what they are.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

MISSING = "not measured"
NONE = "–"


@dataclass(frozen=True)
class Unit:
    """A ladder of `(scale, suffix)` rungs, smallest first; formats to `digits` significant digits.

    >>> SECONDS.format(0.01234), BYTES.format(4.1e9), RATIO.format(2.5), SECONDS.format(None)
    ('12.3 ms', '4.10 GB', '2.50×', 'not measured')
    """

    rungs: tuple[tuple[float, str], ...]
    digits: int = 3
    whole: bool = False  # a value on the lowest rung is a count and has no decimals

    def format(self, value: float | None, *, like: float | None = None) -> str:
        """`value` with its unit, on the rung that suits `like` (by default the value itself)."""
        if value is None:
            return MISSING
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        scale, suffix = self._rung(value if like is None else like)
        if math.isinf(value / scale):  # only beyond 1e299, where no unit helps
            return f"{value:.{self.digits - 1}e}"
        return _digits(value / scale, self.digits, whole=self.whole and scale == self.rungs[0][0]) + suffix

    def pair(self, before: float | None, after: float | None) -> tuple[str, str]:
        """Both values on one rung, that of the smaller, so that they can be compared at a glance.

        More than a thousandfold apart, each keeps its own.
        """
        sizes = [abs(v) for v in (before, after) if v is not None and math.isfinite(v) and v != 0]
        like = min(sizes) if sizes and max(sizes) < 1000 * min(sizes) else None
        return self.format(before, like=like), self.format(after, like=like)

    def _rung(self, value: float) -> tuple[float, str]:
        size = float(f"{abs(value):.{self.digits}g}") if math.isfinite(value) else 0.0  # 999.7 ms is 1.00 s
        if size == 0:
            return min(self.rungs, key=lambda rung: abs(math.log10(rung[0])))
        return next((rung for rung in reversed(self.rungs) if size >= rung[0] * (1 - 1e-12)), self.rungs[0])


def _digits(value: float, digits: int, *, whole: bool = False) -> str:
    """`value`, finite, to `digits` significant digits; very large and very small ones as `1.00e−6`."""
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    plain = f"{value:,.{0 if whole else max(0, digits - 1 - exponent)}f}"
    return (plain if -4 <= exponent < 7 else f"{mantissa}e{exponent}").replace("-", "−")


def _ladder(suffix: str, prefixes: str, start: int) -> tuple[tuple[float, str], ...]:
    return tuple((10.0 ** (3 * (start + i)), f" {p.strip()}{suffix}") for i, p in enumerate(prefixes))


SECONDS = Unit(((1e-9, " ns"), (1e-6, " µs"), (1e-3, " ms"), (1.0, " s")))
BYTES = Unit(_ladder("B", " kMGTP", 0), whole=True)
BYTES_PER_SECOND = Unit(_ladder("B/s", " kMGTP", 0))
FLOPS = Unit(_ladder("FLOP/s", " kMGTP", 0))
TOKENS_PER_SECOND = Unit(((1.0, " tok/s"),))
INTENSITY = Unit(((1.0, " FLOP/B"),))
RATIO = Unit(((1.0, "×"),))
PERCENT = Unit(((0.01, " %"),))
NUMBER = Unit(((1.0, ""),), digits=4)
COUNT = Unit(((1.0, ""), (1e6, " M"), (1e9, " B"), (1e12, " T")), whole=True)


def interval(unit: Unit, value: float | None, low: float | None, high: float | None) -> str:
    """`2.41× [2.35, 2.47]`: the ends on the rung and with the decimals of the value; the value alone without them."""
    text = unit.format(value)
    if value is None or (low is None and high is None):
        return text
    scale, suffix = unit._rung(value)
    number = text.removesuffix(suffix)
    decimals = len(number.partition(".")[2])
    # A zero has no decimals to take over: its ends would all be 0.
    fixed = value != 0 and number.replace(",", "").lstrip("−").replace(".", "").isdigit()
    return f"{text} [{', '.join(_end(unit, end, scale, decimals if fixed else None) for end in (low, high))}]"


def _end(unit: Unit, end: float | None, scale: float, decimals: int | None) -> str:
    if end is None:
        return NONE
    if decimals is None or not math.isfinite(end) or abs(end / scale) >= 1e7:
        return unit.format(end)
    return f"{end / scale:,.{decimals}f}".replace("-", "−")


_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def clean(text: str) -> str:
    """`text` without control and bidirectional-override characters, which could hide or reorder what is shown."""
    return "".join(
        " " if c in "\n\r\t" else "\ufffd" if unicodedata.category(c) == "Cc" or c in _BIDIRECTIONAL else c
        for c in text
    )
