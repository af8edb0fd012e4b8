"""Results of CI jobs for tests: passed, missed, not measured, broken, and with names that a stranger chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.ci_config import Job
from optimizer.ci_result import JobResult, Problem
from optimizer.evals.gate import Measurement
from optimizer.report import FloorEntry
from tests.optimizer.report_example import MISSED, example_report
from tests.optimizer.small_jobs import recipe

HOSTILE = "a]]>&<b>\x00\x1b[31m\ud800\ufffe|`x`\n@org/team #1 <!-- ${{ github.token }} $(id) \u202e"
UNMEASURED = FloorEntry(
    metric="quality.missing.acc.recovery", rule="≥ 0.9", threshold=0.9, passed=False,
    reason="quality.missing.acc.recovery was not measured; nothing alike was either",
)  # fmt: skip


def job(name: str = "tiny-small", model: str = "tiny") -> Job:
    return Job(name, model, recipe(), Path("out") / name)


def passed(**changes: Any) -> JobResult:
    evidence = {"decode.speedup": Measurement(6.6, 6.4, 6.8, 40, "×"), "kv.ratio": Measurement(1.0)}
    fields: dict[str, Any] = {
        "job": job(), "status": "passed", "report": example_report(), "evidence": evidence,
        "artifact": Path("out/tiny-small/artifact"), "digest": "ab" * 32, "seconds": 12.5,
        "reports": (Path("out/tiny-small/report.html"),),
    }  # fmt: skip
    return JobResult(**fields | changes)


def failed(*floors: FloorEntry, **changes: Any) -> JobResult:
    missed = list(floors or (MISSED,))
    summary = f"Not released: {len(missed)} of {len(missed)} floors missed."
    report = example_report(verdict="failed", floors=missed, summary=summary)
    return passed(status="failed", report=report, artifact=None, digest=None, **changes)


def broken(**changes: Any) -> JobResult:
    problem = Problem("ModelError", "No folder 'x': pass a folder", 2)
    return JobResult(**{"job": job("broken"), "status": "error", "problem": problem} | changes)


def hostile() -> JobResult:
    floor = MISSED.model_copy(update={"metric": HOSTILE, "rule": HOSTILE, "reason": HOSTILE})
    return failed(floor, job=job(HOSTILE, HOSTILE), notes=(HOSTILE,), evidence={HOSTILE: Measurement(float("nan"))})
