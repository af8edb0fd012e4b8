"""`optimizer compare`: what the command measures, where it writes, and what it says."""

from __future__ import annotations

import os
from pathlib import Path

from optimizer.compare_html import kept_quality
from optimizer.compare_report import Comparison
from optimizer.errors import OutputError
from optimizer.report import speedup
from optimizer.report_units import BYTES, MISSING, NONE, NUMBER, SECONDS, TOKENS_PER_SECOND, interval

NAMES = ("compare.html", "compare.json", "compare.md")


def check_folder(out: Path) -> None:
    """Refuse, before minutes of measuring, a folder that cannot be written. Raises `OutputError`."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: {nearest} is no folder that may be written to; choose another")


def write(comparison: Comparison, out: Path) -> list[Path]:
    """The page, the data and the summary, side by side in `out`. Raises `OutputError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror or error}; choose another folder") from error
    return [comparison.save(out / name) for name in NAMES]


def describe(comparison: Comparison) -> list[str]:
    """The result as lines for people, one variant a line, columns aligned."""
    headlines = comparison.headlines()
    kept = {metric.label: kept_quality(metric) for metric in headlines}
    rows = [("variant", *(metric.task for metric in headlines), "decode", "speed-up", "TTFT", "size")]
    for variant in comparison.variants:
        quality = [
            interval(NUMBER, *values[variant.name]) if variant.name in values else NONE for values in kept.values()
        ]
        rows.append(
            (
                variant.name,
                *quality,
                TOKENS_PER_SECOND.format(variant.decode_tokens_per_second),
                speedup(variant.decode_speedup) if variant.decode_speedup else NONE,
                SECONDS.format(variant.speed.ttft_seconds.p50) if variant.speed else MISSING,
                BYTES.format(variant.stored_bytes) if variant.stored_bytes is not None else NONE,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{t.task}: {t.differing} of {t.total} documents answered differently" for t in comparison.tasks]
    lines += [f"{variant.name}: {note}" for variant in comparison.variants for note in variant.notes]
    return lines + comparison.layer_notes + comparison.warnings
