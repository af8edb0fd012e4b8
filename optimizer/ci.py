"""The CI job: every model with every recipe of an `optimizer.yaml`, and the files that CI systems read.

In `out`: `junit.xml`, `summary.md`, `comment.md`, `results.json` and `optimizer.env` (`optimizer.ci_outputs`), and for
each job a folder with `report.html`, `report.md`, `report.json` and, if the gate passed it, `artifact/`. The files are
written before the first job, when each is "unfinished", and again after every job: whatever kills the process, what
lies there never tells of an earlier run, and never of a pass that did not happen.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from optimizer.api import Result, optimize
from optimizer.artifact import check_output, read_manifest
from optimizer.baseline_cache import BaselineCache
from optimizer.ci_config import AUTO, CiConfig, Job
from optimizer.ci_outputs import append_github, github_error, write_files
from optimizer.ci_result import UNFINISHED, JobResult, Problem, Status
from optimizer.errors import OptimizerError, OutputError, UsageError
from optimizer.progress import Progress
from optimizer.report_units import RATIO
from optimizer.sinks import Record, missing, publish

REPORTS = ("html", "md", "json")


def run_file(
    path: Path,
    *,
    out: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], object] = print,
) -> list[JobResult]:
    """`run_ci` of a file, with `out` and `cache` in place of the file's. GitHub is told of what cannot be run, too.

    `warn` receives what will go wrong at the end of hours of work and can be known before it.
    """
    try:
        config = CiConfig.from_yaml(path)
        given = {"out": out, "cache": cache}
        config = config.model_copy(update={key: str(value) for key, value in given.items() if value is not None})
        for sink in config.sinks:
            if (problem := missing(sink.name)) is not None:
                warn(f"warning: {problem}")
        return run_ci(config, progress=progress)
    except UsageError as error:
        github_error(str(error))
        raise


def run_ci(config: CiConfig, *, progress: Progress | None = None) -> list[JobResult]:
    """Run every job of `config` and write what CI systems read; a job that breaks does not stop the others.

    Raises `RecipeError` or `OutputError` before any work. What goes wrong in a job is in its result.
    """
    progress = progress or Progress()
    jobs = config.jobs()
    for job in jobs:
        check_output(job.folder / "artifact")
    results = [JobResult(job, "error", problem=UNFINISHED) for job in jobs]
    with _own_folder(Path(config.out)):
        _forget_reports(jobs)
        write_files(config, results)
    for index, job in enumerate(jobs):
        with progress.phase(f"job {job.name}"):
            results[index] = run_job(job, config, progress)
        write_files(config, results)
    append_github(config, results)
    return results


def run_job(job: Job, config: CiConfig, progress: Progress) -> JobResult:
    """One job to its verdict, or to the problem that kept it from one."""
    began, notes = time.perf_counter(), list[str]()
    try:
        result = _optimize(job, config, progress, notes)
        found = _found(job, result)
    except Exception as error:  # a defect of one job must not cost the verdicts of the others
        found = JobResult(job, "error", problem=_problem(error))
    found = replace(found, notes=tuple(notes), seconds=time.perf_counter() - began)
    return replace(found, notes=(*notes, *_publish(found, config, progress)))


def _optimize(job: Job, config: CiConfig, progress: Progress, notes: list[str]) -> Result:
    baselines = None if config.cache is None else BaselineCache(Path(config.cache), notes)
    calibrates = job.plan is not None or any(getattr(p, "calibrates", False) for p in job.recipe.build_passes())
    calibration = Path(config.calibration) if config.calibration is not None and calibrates else None
    artifact = job.folder / "artifact"
    result = optimize(
        job.model, job.recipe if job.plan is None else AUTO, calibration=calibration, device=config.device,
        out=artifact, progress=progress, baselines=baselines, **({} if job.plan is None else job.plan.model_dump()),
    )  # fmt: skip
    if not result.passed and artifact.exists():
        notes.append(f"{artifact} is an earlier run's, untouched: the gate refused this one")
    return result


def _found(job: Job, result: Result) -> JobResult:
    """The verdict, its reports written beside the artifact."""
    job.folder.mkdir(parents=True, exist_ok=True)
    reports = tuple(result.report.save(job.folder / f"report.{kind}") for kind in REPORTS)
    status: Status = "passed" if result.passed else "failed"
    artifact = job.folder / "artifact" if result.passed else None
    digest = None if artifact is None else read_manifest(artifact).digest
    return JobResult(job, status, result.report, result.outcome.evidence, artifact, digest, reports)


def _problem(error: Exception) -> Problem:
    if isinstance(error, OptimizerError):
        return Problem(type(error).__name__, str(error), error.exit_code)
    trace = "".join(traceback.format_exception(error))
    print(trace, file=sys.stderr)
    return Problem(type(error).__name__, str(error) or "no message", trace=trace)


def _publish(found: JobResult, config: CiConfig, progress: Progress) -> Iterator[str]:
    """Send the result to every sink; what one says, or why it failed. The verdict stays what it is."""
    for sink in config.sinks:
        with progress.phase(f"sink {sink.name}"):
            yield publish(sink.name, _record(found), project=sink.project, uri=sink.uri)


def _record(found: JobResult) -> Record:
    recipe = found.report.recipe if found.report is not None else found.job.recipe.model_dump(mode="json")
    tags = {"model": found.job.model, "recipe": found.job.recipe.name, "verdict": found.status}
    if found.digest is not None:
        tags["artifact.digest"] = found.digest
    metrics = {
        name + end: value
        for name, measured in found.evidence.items()
        for end, value in (("", measured.value), (".low", measured.low), (".high", measured.high))
        if value is not None
    }
    return Record(found.job.name, tags, recipe, metrics, [str(path.absolute()) for path in found.reports])


@contextlib.contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Make `out`; `OutputError` where nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out} cannot be written: {error}. Choose another `out`.") from None


def _forget_reports(jobs: Sequence[Job]) -> None:
    """Remove the reports of an earlier run: they would be read as this one's."""
    for job in jobs:
        for kind in REPORTS:
            (job.folder / f"report.{kind}").unlink(missing_ok=True)


def describe(results: Sequence[JobResult]) -> list[str]:
    """Lines for people: each job, what it missed and what a reader should know."""
    lines = []
    for result in results:
        speed = "" if result.speedup is None else f", decode {RATIO.format(result.speedup)}"
        lines.append(f"{result.status.upper()} {result.job.name}{speed}: {result.summary()}")
        for floor in result.report.failed_floors if result.report else ():
            lines.append(f"  missed: {floor.metric}: {floor.reason}")
        lines += [f"  note: {note}" for note in result.notes]
    return lines
