"""What CI systems read of a run: GitHub's outputs and summary, and GitLab's dotenv report."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from optimizer import ci_outputs
from optimizer.ci_config import CiConfig
from optimizer.ci_outputs import DOTENV_BYTES, append_github, dotenv, github_error, github_output, outputs
from optimizer.errors import OutputError
from tests.optimizer.ci_examples import HOSTILE, broken, failed, job, passed


def config(**changes: str) -> CiConfig:
    return CiConfig(models=["tiny"], **{"out": "out", **changes})  # type: ignore[arg-type]


def as_github_reads(text: str) -> dict[str, str]:
    """The rules of workflow commands in files: `name<<delimiter`, then lines up to the delimiter alone on one."""
    found, lines = {}, iter(text.split("\n"))
    for line in lines:
        if line:
            name, _, delimiter = line.partition("<<")
            assert delimiter, line
            value = []
            for part in lines:
                if part == delimiter:
                    break
                value.append(part)
            else:
                pytest.fail("the delimiter never came")
            assert name not in found
            found[name] = "\n".join(value)
    return found


@pytest.mark.parametrize("value", ["plain", "", "a\nb\n", "x<<y\nverdict=passed", "EOF\n\nEOF", HOSTILE])
def test_any_value_comes_back_and_starts_no_other_output(value: str) -> None:
    found = as_github_reads(github_output({"verdict": value, "after": "1"}))
    assert found == {"verdict": value.encode("utf-8", "replace").decode(), "after": "1"}


def test_a_delimiter_cannot_be_known_before() -> None:
    text = github_output({"a": "1", "b": "2"}) + github_output({"a": "1"})
    delimiters = re.findall(r"<<(.*)", text)
    assert len(set(delimiters)) == 3
    assert all(len(delimiter) > 30 for delimiter in delimiters)


def test_outputs_have_a_line_for_each_job() -> None:
    found = outputs(config(), [passed(), failed(job=job("bad")), broken()])
    assert found["verdict"] == "error"
    assert found["exit-code"] == "2"
    seen = outputs(config(), [passed(), broken()], Path("/build"))
    assert seen["artifact"] == "/build/out/tiny-small/artifact\n"
    assert seen["report"] == "/build/out/tiny-small/report.html\n"
    assert seen["junit"] == "/build/out/junit.xml"
    assert found["jobs"].split("\n") == ["tiny-small", "bad", "broken"]
    assert found["artifact"].split("\n") == ["out/tiny-small/artifact", "", ""]
    assert found["digest"].split("\n") == ["ab" * 32, "", ""]
    speedups = found["decode-speedup"].split("\n")
    assert speedups[2] == ""
    assert float(speedups[0]) == pytest.approx(passed().speedup, rel=1e-3)


def test_a_missed_floor_is_failed_with_1_and_a_passed_run_is_0() -> None:
    assert outputs(config(), [passed(), failed()])["verdict"] == "failed"
    assert outputs(config(), [passed(), failed()])["exit-code"] == "1"
    assert outputs(config(), [passed()])["exit-code"] == "0"


def test_github_gets_outputs_and_a_summary_after_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, shown = tmp_path / "output", tmp_path / "summary"
    out.write_text("earlier=1\n", encoding="utf-8")
    shown.write_text("x" * 999_000, encoding="utf-8")
    monkeypatch.setenv("GITHUB_OUTPUT", str(out))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(shown))
    append_github(config(), [passed(job=job(f"job-{i}")) for i in range(20)])
    assert out.read_text(encoding="utf-8").startswith("earlier=1\nverdict<<")
    assert 999_000 < shown.stat().st_size <= 1_000_000
    assert "PASSED" in shown.read_text(encoding="utf-8")


def test_github_is_told_when_nothing_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    github_error("unknown key 'recipe'. ```\n# big")
    found = as_github_reads((tmp_path / "output").read_text(encoding="utf-8"))
    assert found == {"verdict": "error", "exit-code": "2"}
    assert "````text\nunknown key 'recipe'. ```\n# big\n````" in (tmp_path / "summary").read_text(encoding="utf-8")


def test_elsewhere_nothing_is_appended_and_a_bad_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr(ci_outputs, "_append", lambda *_: pytest.fail("written"))
    append_github(config(), [passed()])
    monkeypatch.undo()
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path))
    with pytest.raises(OutputError, match="which the environment names"):
        append_github(config(), [passed()])


def test_the_dotenv_report_keeps_gitlabs_rules() -> None:
    given = outputs(config(out="out dir/'é'#"), [passed(), failed(job=job("b c"))]) | {"odd": HOSTILE}
    text = dotenv(given)
    lines = text.splitlines()
    assert all(re.fullmatch(r"[A-Z_]+=[!$-~]*", line) for line in lines)
    assert not re.search(r"[\s'\"#$`\\]", text.replace("\n", ""))
    found = dict(line.split("=", 1) for line in lines)
    assert unquote(found["OPTIMIZER_OUT"]) == "out dir/'é'#"
    assert found["OPTIMIZER_VERDICT"] == "failed"
    assert found["OPTIMIZER_DIGEST"] == "ab" * 32 + ","


def test_a_dotenv_report_that_would_be_too_large_keeps_the_verdict() -> None:
    text = dotenv(outputs(config(), [passed(job=job(f"a-job-with-a-long-name-{i}")) for i in range(300)]))
    assert len(text.encode()) <= DOTENV_BYTES
    assert text.startswith("OPTIMIZER_VERDICT=passed\nOPTIMIZER_EXIT_CODE=0\n")
    assert "OPTIMIZER_JUNIT=" in text
