"""Comment and summary: what a reviewer reads, whole blocks within the limits, and no markup from strangers."""

from __future__ import annotations

import re

import pytest

from optimizer.ci_comment import COMMENT_BYTES, comment, fit, marker, summary
from optimizer.ci_result import Problem
from optimizer.evals.arithmetic import cost_per_million_tokens
from tests.optimizer.ci_examples import HOSTILE, UNMEASURED, broken, failed, hostile, job, passed
from tests.optimizer.report_example import MISSED


def test_a_passed_job_says_so_with_its_table_and_artifact() -> None:
    text = comment([passed()], "Models")
    assert text.startswith(marker("Models") + "\n")
    assert "## ✅ Models: PASSED" in text
    assert "| `TPOT · B1 · 128→64` |" in text
    assert "ab" * 32 in text
    assert "❌" not in text


def test_what_was_missed_comes_first_with_what_was_asked_and_measured() -> None:
    text = comment([passed(), failed(MISSED, UNMEASURED, job=job("bad")), broken()], "Models")
    assert "## 💥 Models: NO VERDICT" in text
    assert text.index("### 💥 `broken`") < text.index("### ❌ `bad`") < text.index("### ✅ `tiny-small`")
    assert "| `ttft.speedup` | ≥ 1.3 (lower end of 95 % interval) | 1.289× \\[1.251, 1.328\\] |  |" in text
    assert f"| not measured | `{UNMEASURED.reason}` |" in text
    assert "No folder 'x': pass a folder" in text
    assert "| `bad` | ❌ FAILED |" in text


def test_a_price_becomes_the_cost_of_a_million_tokens() -> None:
    result = passed()
    assert result.report is not None
    rate = result.report.speed[0].optimized.tokens_per_second
    assert f"{cost_per_million_tokens(2.5, rate):.4g} after" in comment([result], "x", price_per_hour=2.5)
    assert "a million output tokens" not in comment([result], "x")


def tables(text: str) -> list[list[str]]:
    """The tables of a text, as lists of rows; every row has as many cells as its header."""
    found: list[list[str]] = []
    for block in text.split("\n\n"):
        rows = block.strip().split("\n")
        if rows[0].startswith("| "):
            found.append(rows)
    return found


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row))


@pytest.mark.parametrize(("count", "cut"), [(1, False), (30, False), (100, True), (400, True)])
def test_a_comment_of_many_jobs_ends_after_a_whole_table_with_a_note(count: int, cut: bool) -> None:
    results = [failed(job=job(f"job-{i}-é漢")) for i in range(count)]
    text = comment(results, "Models")
    assert len(text.encode()) <= COMMENT_BYTES
    assert ("more sections do not fit" in text) is cut
    assert tables(text)
    for rows in tables(text):
        assert {cells(row) for row in rows} == {cells(rows[0])}
    assert text.endswith("\n")
    whole = summary(results, "Models", limit=10**9)
    for rows in tables(text):
        assert "\n".join(rows) + "\n" in whole  # no table is cut short


@pytest.mark.parametrize("limit", [0, 10, 80, 200, 700, 1500, 2500])
def test_parts_are_whole_or_absent_at_any_limit(limit: int) -> None:
    parts = [f"part {i} é漢" + "x" * (97 * i % 400) for i in range(12)]
    text = fit(parts, limit)
    assert len(text.encode()) <= limit
    kept = [part for part in text.strip().split("\n\n") if part and not part.startswith("_")]
    assert kept == parts[: len(kept)]
    if 0 < len(kept) < len(parts):
        assert f"_{len(parts) - len(kept)} more sections do not fit" in text


def test_a_summary_takes_no_more_than_what_is_left() -> None:
    results = [failed(job=job(f"job-{i}")) for i in range(50)]
    assert len(summary(results, "x", limit=5_000).encode()) <= 5_000
    assert summary(results, "x", limit=-7) == ""


def test_hostile_names_stay_text() -> None:
    text = comment([hostile(), broken(problem=Problem("E", HOSTILE + "\n````\n# big"))], HOSTILE)
    text.encode()
    prose = re.sub(r"(`+)text\n.*?\n\1(?=\n)", "", text, flags=re.DOTALL)  # code blocks, then code spans
    prose = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", prose)
    for sign in ("\x00", "\x1b", "\u202e"):
        assert sign not in text
    assert "<b>" not in prose
    assert "<!--" not in prose.replace(marker(HOSTILE), "")
    assert "\n# big" not in prose
    for rows in tables(text):
        assert {cells(row) for row in rows} == {cells(rows[0])}


def test_the_marker_shows_nothing_whatever_the_title() -> None:
    assert re.fullmatch(r"<!-- optimizer-ci [0-9a-f]{16} -->", marker("--> <b>"))
    assert marker("a") != marker("b")
