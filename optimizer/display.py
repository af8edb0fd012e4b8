"""Terminal output: progress on stderr (a live bar on a terminal, plain lines elsewhere) and the final table."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from optimizer.progress import Progress

if TYPE_CHECKING:
    from optimizer.report import Report

PLAIN_SECONDS = 5.0
"""Seconds between plain progress lines, so that a CI log stays short."""


class PlainProgress(Progress):
    """One line when a phase starts or ends, and one every few seconds in between."""

    def __init__(self) -> None:
        super().__init__()
        self._began = self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, name: str) -> None:
        """Announce the phase."""
        self._began = self._said = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)

    def update(self, what: str, done: float, total: float) -> None:
        """Say how far it is, with elapsed and estimated remaining time, every few seconds."""
        now = time.perf_counter()
        if now - self._said < PLAIN_SECONDS or total <= 0:
            return
        self._said, elapsed = now, now - self._began
        left = f", about {elapsed / done * (total - done):.0f} s left" if done else ""
        print(f"  {what} {done / total:.0%} after {elapsed:.0f} s{left}", file=sys.stderr, flush=True)

    def finished(self, name: str, seconds: float) -> None:
        """Say how long it took."""
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    def said(self, text: str) -> None:
        """The line as it is."""
        print(text, file=sys.stderr, flush=True)


class QuietProgress(PlainProgress):
    """Keeps the times, shows nothing."""

    def started(self, name: str) -> None:
        """Nothing."""

    def update(self, what: str, done: float, total: float) -> None:
        """Nothing."""

    def finished(self, name: str, seconds: float) -> None:
        """Nothing."""

    def said(self, text: str) -> None:
        """Nothing."""


class LiveProgress(PlainProgress):
    """A bar with elapsed and remaining time for the current phase; finished phases stay as lines above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars: Any = Bars(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, name: str) -> None:
        """A new bar."""
        self._task = self._bars.add_task(name, total=None)

    def update(self, what: str, done: float, total: float) -> None:
        """Move the bar; a phase with several parts starts over for each."""
        self._bars.update(self._task, description=what, completed=done, total=total)

    def finished(self, name: str, seconds: float) -> None:
        """Replace the bar by a line."""
        self._bars.remove_task(self._task)
        self._bars.console.print(f"[dim]{name}: {seconds:.1f} s[/dim]")

    def said(self, text: str) -> None:
        """A line above the bar."""
        self._bars.console.print(text, markup=False)


def progress_for(quiet: bool) -> PlainProgress:
    """Live on a terminal, plain lines in a log, nothing when quiet."""
    if quiet:
        return QuietProgress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def print_table(report: Report) -> None:
    """The final table on stdout: ruled on a terminal, aligned plain text elsewhere."""
    headers = ("metric", "before", "after", "ratio", "floor", "verdict")
    rows = [(r.metric, r.before, r.after, r.ratio, r.floor, r.verdict) for r in report.table()]
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
        for row in (headers, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers)
    for row in rows:
        style = {"FAIL": "red", "pass": "green"}.get(row[-1], "")
        table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style))
    Console().print(table)
