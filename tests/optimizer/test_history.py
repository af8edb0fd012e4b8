"""The history of a folder of runs: what is read, what is named instead, and the trend page."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from optimizer.errors import OutputError, UsageError
from optimizer.history import describe, read_history, render_page, save_page, series_of
from tests.optimizer.compare_example import example
from tests.optimizer.report_example import HOSTILE, bare_report, example_report, hostile_report


def record(folder: Path, created: str, **changes: object) -> None:
    folder.mkdir(parents=True)
    example_report(created=created, **changes).save(folder / "report.json")


def test_runs_are_listed_by_time_whatever_their_zone_is_written_like(tmp_path: Path) -> None:
    record(tmp_path / "b", "2026-03-01T00:00:00Z")
    record(tmp_path / "a" / "deep" / "er", "2026-03-02T00:00:00+00:00", recipe={"name": "other"})
    record(tmp_path / "c", "2026-02-28T23:59:59.5+00:00")
    history = read_history(tmp_path)
    assert [run.path for run in history.runs] == ["c/report.json", "b/report.json", "a/deep/er/report.json"]
    run = history.runs[0]
    report = example_report()
    assert run.decode_speedup == report.speed[0].decode_speedup.value
    assert run.ttft_seconds == report.speed[0].optimized.ttft_seconds.p50
    assert run.weights_bytes == report.memory.weights_bytes_after
    assert (run.recipe, run.verdict, run.device) == ("w4a8-cpu", "passed", "AMD EPYC 9R14")
    assert series_of(history.runs) == ["w4a8-cpu · example/stdlib-166m", "other · example/stdlib-166m"]


def test_the_perplexity_is_the_one_per_byte_where_there_is_one(tmp_path: Path) -> None:
    record(tmp_path / "word", "2026-01-01T00:00:00Z")
    entry = example_report().quality[1]
    both = [entry, entry.model_copy(update={"metric": "byte_perplexity", "ratio": 1.5})]
    record(tmp_path / "byte", "2026-01-02T00:00:00Z", quality=both)
    record(tmp_path / "none", "2026-01-03T00:00:00Z", quality=[])
    assert [run.perplexity_ratio for run in read_history(tmp_path).runs] == [1.0158, 1.5, None]


def test_a_copy_inside_the_artifact_counts_once(tmp_path: Path) -> None:
    record(tmp_path / "run", "2026-01-01T00:00:00Z")
    (tmp_path / "run" / "artifact").mkdir()
    os.link(tmp_path / "run" / "report.json", tmp_path / "run" / "artifact" / "report.json")
    assert len(read_history(tmp_path).runs) == 1


def test_each_variant_of_a_comparison_is_a_run(tmp_path: Path) -> None:
    example().save(tmp_path / "compare.json")
    runs = read_history(tmp_path).runs
    assert [(run.recipe, run.model, run.decode_speedup) for run in runs] == [
        ("int4", "base", 2.0),
        ("int8", "base", 2.5),
    ]
    assert [run.perplexity_ratio for run in runs] == [1.05, 1.002]


def test_what_cannot_be_read_is_named_and_stops_nothing(tmp_path: Path) -> None:
    record(tmp_path / "good", "2026-01-01T00:00:00Z")
    newer = json.loads(example_report().to_json()) | {"schema_version": 2}
    broken = {
        "newer": json.dumps(newer), "cut": example_report().to_json()[:500], "empty": "", "foreign": '{"a": 1}',
        "list": "[]", "deep": "[" * 100_000, "binary": "\udcff",
        "odd": example_report().to_json().replace("0.1.0", "\\ud800"),
    }  # fmt: skip
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compare.json").write_text(example_report().to_json(), encoding="utf-8")
    history = read_history(tmp_path)
    named = {item.path.split("/")[0]: item.reason for item in history.unread}
    assert set(named) == (set(broken) | {"folder", "other"}) - {run.path.split("/")[0] for run in history.runs}
    assert "good/report.json" in {run.path for run in history.runs}
    assert "schema_version 2" in named["newer"]
    assert "no comparison" in named["other"]
    assert all("\n" not in reason and len(reason) <= 300 for reason in named.values())
    text = "\n".join(describe(history))
    assert "not read: newer/report.json: the report has schema_version 2" in text
    assert "Not read" in render_page(history)


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        read_history(tmp_path / "missing")
    history = read_history(tmp_path)
    assert describe(history) == [
        f"no run is recorded under {tmp_path}: optimizer run --out {tmp_path}/NAME records one"
    ]
    assert "No run is recorded here" in render_page(history)


def test_the_trend_page_has_a_panel_for_each_measure_and_a_mark_for_each_run(tmp_path: Path) -> None:
    for day in (1, 2, 3):
        record(tmp_path / str(day), f"2026-01-0{day}T00:00:00Z", recipe={"name": "ab"[day % 2]})
    page = render_page(read_history(tmp_path))
    panels = re.findall(r"<svg.*?</svg>", page)
    assert len(panels) == 4
    for panel in panels:
        assert panel.count('class="mark') == 3
        assert panel.count('class="line') == 1  # one of two series has two runs
    bare = tmp_path / "bare"
    bare.mkdir()
    bare_report().save(bare / "report.json")
    assert "not measured" in render_page(read_history(bare))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    odd = tmp_path / "</script><img src=x onerror=alert(1)>"[:30].replace("/", "_")
    odd.mkdir()
    hostile_report().save(odd / "report.json")
    history = read_history(tmp_path)
    assert HOSTILE[:9] in history.runs[0].model
    page = render_page(history)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "\u202e" not in page + "\n".join(describe(history))


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    history = read_history(tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.html"):
        save_page(history, tmp_path / "page.txt")
    with pytest.raises(OutputError):
        save_page(history, tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []
    assert save_page(history, tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
