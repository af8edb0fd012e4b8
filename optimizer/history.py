"""The history of a folder of runs: every report and comparison under it, as rows to sort and trends to look at.

`optimizer run --out runs/NAME` and `optimizer compare --out runs/NAME` leave `report.json` and `compare.json`; nothing
else is needed to record a run. A file that cannot be read is listed with the reason and stops nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from optimizer import __version__
from optimizer import compare_charts as charts
from optimizer import report_units as units
from optimizer.compare_charts import Axis, Point
from optimizer.compare_report import Comparison
from optimizer.errors import ArtifactError, OptimizerError, UsageError
from optimizer.report import Report, _write_atomically

MOST_BYTES = 64 << 20  # a larger file is no report
READERS = ("report.json", "compare.json")


@dataclass(frozen=True)
class Run:
    """One optimized variant of one run; its series is that of `model` and `recipe`.

    `perplexity_ratio` is over the run's own baseline, per byte where that was measured; None was not measured.
    """

    path: str
    created: str
    model: str
    recipe: str
    verdict: str
    device: str
    decode_speedup: float | None
    ttft_seconds: float | None
    perplexity_ratio: float | None
    weights_bytes: int | None

    @property
    def series(self) -> str:
        """Recipe and model."""
        return f"{self.recipe} · {self.model}"


@dataclass(frozen=True)
class Unread:
    """A file that is no report that this version can read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class History:
    """Runs by time, oldest first, and what could not be read."""

    folder: str
    runs: tuple[Run, ...]
    unread: tuple[Unread, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def read_history(folder: Path) -> History:
    """Every run under `folder`; copies, as the report inside an artifact, count once.

    Raises `UsageError` where there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one that holds runs, such as runs/")
    runs: list[Run] = []
    unread: list[Unread] = []
    seen: set[bytes] = set()
    for path in sorted(p for name in READERS for p in folder.rglob(name)):
        shown = path.relative_to(folder).as_posix()
        try:
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                raise ArtifactError(f"it is no regular file of at most {MOST_BYTES} bytes")
            text = path.read_bytes()
            digest = hashlib.sha256(text).digest()
            if digest not in seen:
                seen.add(digest)
                runs += _runs(shown, text)
        except (OSError, OptimizerError, RecursionError) as error:
            unread.append(Unread(shown, str(error).splitlines()[0][:300] if str(error) else type(error).__name__))
    return History(str(folder), tuple(sorted(runs, key=lambda run: (run.created, run.path, run.recipe))), tuple(unread))


def _runs(path: str, text: bytes) -> Iterator[Run]:
    """The runs that one file tells of."""
    if path.rpartition("/")[2] == "compare.json":
        yield from _compared(path, Comparison.from_json(text))
        return
    report = Report.from_json(text)
    cell = report.speed[0] if report.speed else None
    perplexity = _perplexity({q.metric: q.ratio for q in reversed(report.quality)})
    yield Run(
        path, _utc(report.created), report.model.name, report.recipe_name, report.verdict, report.machine.device,
        cell.decode_speedup.value if cell else None, cell.optimized.ttft_seconds.p50 if cell else None, perplexity,
        report.memory.weights_bytes_after,
    )  # fmt: skip


def _compared(path: str, comparison: Comparison) -> Iterator[Run]:
    """Each variant but the first, which is the model they are compared with."""
    for variant in comparison.variants[1:]:
        ratios = {
            m.metric: s.ratio for m in reversed(comparison.quality) for s in m.scores if s.variant == variant.name
        }
        yield Run(
            path, _utc(comparison.created), comparison.baseline.name, variant.recipe or variant.name, "compared",
            comparison.machine.device if comparison.machine else units.NONE,
            variant.decode_speedup.value if variant.decode_speedup else None,
            variant.speed.ttft_seconds.p50 if variant.speed else None, _perplexity(ratios), variant.weights_bytes,
        )  # fmt: skip


def _perplexity(ratios: Mapping[str, float | None]) -> float | None:
    """The ratio of the first kind of perplexity that was measured."""
    found = (ratios[name] for name in ("byte_perplexity", "word_perplexity", "perplexity") if name in ratios)
    return next(found, None)


def _utc(created: str) -> str:
    """One spelling of a moment, so that text sorts by time."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        raise ArtifactError(f"created is {created!r:.60}, which is no time") from None


TRENDS = (
    ("decode_speedup", Axis("decode speed-up over the baseline", units.RATIO)),
    ("ttft_seconds", Axis("time to first token, p50", units.SECONDS)),
    ("perplexity_ratio", Axis("perplexity over the baseline's", units.NUMBER)),
    ("weights_bytes", Axis("weights in memory", units.BYTES)),
)
"""What the trend page draws over time, one panel each."""


def series_of(runs: Sequence[Run]) -> list[str]:
    """The series in the order in which they began."""
    return list(dict.fromkeys(run.series for run in runs))


def render_page(history: History) -> str:
    """The trend page: self-contained, filtered and sorted by the same script as a comparison."""
    from optimizer.compare_html import page_parts
    from optimizer.report_html import _environment

    names = series_of(history.runs)
    context = {
        "h": history,
        "names": names,
        "index": {name: i for i, name in enumerate(names)},
        "panels": _panels(history.runs, names),
        "product_version": __version__,
    }
    html: str = (
        _environment(autoescape=True)
        .get_template("history.html.jinja")
        .render(context | page_parts({"variants": [], "documents": []}))
    )
    return html


def _panels(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    by_name: Mapping[str, list[Run]] = {name: [run for run in runs if run.series == name] for name in names}
    drawn = []
    times = [datetime.fromisoformat(run.created) for run in runs]
    short = bool(times) and max(times) - min(times) < timedelta(days=3)
    for field, axis in TRENDS:
        rows = [
            [
                Point(
                    i, datetime.fromisoformat(run.created).timestamp(), float(value),
                    f"{run.series}, {run.created[:16].replace('T', ' ')}: {axis.unit.format(value)}",
                )
                for run in by_name[name]
                if (value := getattr(run, field)) is not None and math.isfinite(value)
            ]
            for i, name in enumerate(names)
        ]  # fmt: skip
        time = Axis("", units.NUMBER)
        drawn.append(charts.lines(rows, time, axis, axis.title, _clock if short else _date))
    return [svg for svg in drawn if svg]


def _date(seconds: float, form: str = "%Y-%m-%d") -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (OverflowError, ValueError, OSError):  # beyond the calendar, at the edge of an axis
        return ""


def _clock(seconds: float) -> str:
    return _date(seconds, "%d %b %H:%M")


def save_page(history: History, path: Path) -> Path:
    """Write the trend page atomically. Raises `UsageError` unless it ends in `.html`, `OutputError` if it cannot."""
    if path.suffix.lower() != ".html":
        raise UsageError(f"the trend page cannot be written to {path.name!r}; give a name that ends in .html")
    _write_atomically(path, render_page(history))
    return path


def describe(history: History) -> list[str]:
    """Lines for people: a row a run, then what could not be read."""
    rows: list[tuple[str, ...]] = [
        ("when", "model", "recipe", "verdict", "decode", "TTFT", "perplexity", "weights", "from")
    ]
    rows += [
        (
            run.created[:16].replace("T", " "), units.clean(run.model), units.clean(run.recipe), run.verdict,
            *(axis.unit.format(getattr(run, field)) for field, axis in TRENDS), units.clean(run.path),
        )
        for run in history.runs
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not history.runs:
        lines = [f"no run is recorded under {history.folder}: optimizer run --out {history.folder}/NAME records one"]
    return lines + [f"not read: {units.clean(item.path)}: {units.clean(item.reason)}" for item in history.unread]
