"""What a job prints while it works, on a terminal and elsewhere, and its final table."""

from __future__ import annotations

import io
import sys

import pytest

from optimizer import display
from optimizer.display import LiveProgress, PlainProgress, QuietProgress, print_table, progress_for
from optimizer.progress import Progress
from optimizer.report import Report
from tests.optimizer.report_example import example_report


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Progress, PlainProgress, QuietProgress])
def test_the_seconds_of_a_phase_add_up_and_survive_an_error(kind: type[Progress]) -> None:
    progress = kind()
    with progress.phase("a"):
        pass
    first = progress.seconds["a"]
    with pytest.raises(KeyError), progress.phase("a"):
        raise KeyError
    assert progress.seconds["a"] > first >= 0
    assert list(progress.seconds) == ["a"]


def test_plain_lines_go_to_stderr_alone(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = PlainProgress()
    with progress, progress.phase("load"):
        clock.now += 1
        progress.update("tensors", 1, 4)  # within the first five seconds: not a line
        clock.now += 5
        progress.update("tensors", 2, 4)
        clock.now += 1
        progress.update("tensors", 3, 4)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:2] == ["load ...", "  tensors 50% after 6 s, about 6 s left"]
    assert lines[2].startswith("load: ")
    assert len(lines) == 3
    assert "\x1b" not in err


@pytest.mark.parametrize(("done", "total"), [(0, 0), (0, 3), (3, 3), (1, -1)])
def test_odd_progress_is_no_error(done: int, total: int, clock: Clock) -> None:
    for progress in (PlainProgress(), QuietProgress(), LiveProgress()):
        with progress, progress.phase("p"):
            clock.now += 60
            progress.update("x", done, total)


def test_quiet_is_silent_but_keeps_the_times(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = progress_for(quiet=True)
    with progress, progress.phase("load"):
        clock.now += 60
        progress.update("tensors", 1, 2)
    assert capsys.readouterr() == ("", "")
    assert list(progress.seconds) == ["load"]


def test_plain_lines_where_there_is_no_terminal_and_a_bar_where_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(progress_for(quiet=False)) is PlainProgress
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert type(progress_for(quiet=False)) is LiveProgress
    assert type(progress_for(quiet=True)) is QuietProgress


def test_a_live_bar_leaves_one_line_a_phase_even_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = LiveProgress()

    def job() -> None:
        with progress:
            with progress.phase("load"):
                progress.update("tensors", 1, 2)
            with progress.phase("run"):
                raise RuntimeError

    with pytest.raises(RuntimeError):
        job()
    assert "load: " in terminal.getvalue()
    assert "run: " in terminal.getvalue()
    assert capsys.readouterr().out == ""


@pytest.fixture
def report() -> Report:
    return example_report()


def test_the_table_is_plain_and_aligned_in_a_log(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "before", "after", "ratio", "floor", "verdict"]
    assert len(lines) == 1 + len(report.table())
    column = lines[0].index("before")
    assert all(line[column - 2 : column].isspace() and line[column] != " " for line in lines[1:] if len(line) > column)
    assert not any("\x1b" in line or line.endswith(" ") for line in lines)


def test_the_table_is_ruled_on_a_terminal_and_holds_the_same_rows(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "250")
    print_table(report)
    text = terminal.getvalue()
    assert "━" in text or "─" in text
    for row in report.table():
        assert row.metric in text
