"""What `optimizer ci` found: one result for each job. Data for the reports that CI systems read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optimizer.ci_config import Job
from optimizer.evals.gate import Measurement
from optimizer.report import Report

Status = Literal["passed", "failed", "error"]


@dataclass(frozen=True)
class Problem:
    """Why a job has no verdict: the kind of error, its message, its exit code, and a defect's traceback."""

    kind: str
    message: str
    exit_code: int = 3
    trace: str = ""


UNFINISHED = Problem("Unfinished", "the job did not run to its end: it was killed, or the machine went away")


@dataclass(frozen=True)
class JobResult:
    """A job's verdict and its evidence, or the problem that kept it from one.

    `digest` is that of the artifact's deployable files. `notes` are what a reader should know besides.
    """

    job: Job
    status: Status
    report: Report | None = None
    evidence: Mapping[str, Measurement] = field(default_factory=dict)
    artifact: Path | None = None
    digest: str | None = None
    reports: tuple[Path, ...] = ()
    problem: Problem | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a floor missed, 2 usage, 3 failure."""
        if self.problem is not None:
            return self.problem.exit_code
        return 0 if self.status == "passed" else 1

    @property
    def speedup(self) -> float | None:
        """How many times faster it decodes; None where that was not measured."""
        return self.report.speed[0].decode_speedup.value if self.report and self.report.speed else None

    def summary(self) -> str:
        """One line: what the report says, or the problem."""
        if self.problem is not None:
            return f"{self.problem.kind}: {self.problem.message}"
        assert self.report is not None
        return self.report.summary

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "job": self.job.name,
            "model": self.job.model,
            "recipe": self.job.recipe.name,
            "verdict": self.status,
            "summary": self.summary(),
            "decode_speedup": self.speedup,
            "artifact": None if self.artifact is None else str(self.artifact),
            "digest": self.digest,
            "reports": [str(path) for path in self.reports],
            "missed": [floor.metric for floor in self.report.failed_floors] if self.report else [],
            "exit_code": self.exit_code,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def exit_code(results: Sequence[JobResult]) -> int:
    """The worst of all: a failure outweighs a missed floor."""
    return max((result.exit_code for result in results), default=0)


def verdict(results: Sequence[JobResult]) -> Status:
    """`error` if any job has no verdict, else `failed` if any floor was missed, else `passed`."""
    found = {result.status for result in results}
    return "error" if "error" in found or not found else "failed" if "failed" in found else "passed"
