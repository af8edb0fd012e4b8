"""Results of a CI run in Markdown: the job summary, and the body of a comment on a pull request.

Both are the same blocks, most important first. A block is whole or absent: where the place that shows it has a limit,
the text ends after the last block that fits, with a note of what is left out. Names and messages, which a stranger may
have chosen, stand in code spans: there they are no markup, no mention and no link.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from optimizer.ci_result import JobResult, verdict
from optimizer.evals.arithmetic import cost_per_million_tokens
from optimizer.plan_entry import PlanEntry
from optimizer.report import Report, speedup
from optimizer.report_html import _markdown_code, _markdown_prose
from optimizer.report_units import NONE, RATIO, SECONDS, clean

COMMENT_BYTES = 64_000
"""GitHub takes comments of 65,536 characters; a character is at least a byte, and the workflow may add a line."""

SUMMARY_BYTES = 1_000_000
"""GitHub shows summaries of up to 1 MiB for a step."""

SIGNS = {"passed": "✅", "failed": "❌", "error": "💥"}
WORDS = {"passed": "PASSED", "failed": "FAILED", "error": "NO VERDICT"}


def marker(title: str) -> str:
    """The first line of a comment, by which the next run finds it again. It shows nothing."""
    return f"<!-- optimizer-ci {hashlib.sha256(title.encode('utf-8', 'replace')).hexdigest()[:16]} -->"


def comment(results: Sequence[JobResult], title: str, *, price_per_hour: float | None = None) -> str:
    """The body of a comment, at most `COMMENT_BYTES` of UTF-8."""
    return fit([marker(title), *blocks(results, title, price_per_hour)], COMMENT_BYTES)


def summary(
    results: Sequence[JobResult], title: str, *, price_per_hour: float | None = None, limit: int = SUMMARY_BYTES
) -> str:
    """The job summary, at most `limit` bytes of UTF-8."""
    return fit(list(blocks(results, title, price_per_hour)), limit)


def fit(parts: Sequence[str], limit: int) -> str:
    """As many whole parts, in order, as `limit` bytes of UTF-8 hold together with a note of how many are left out.

    Empty where not even the note fits.
    """
    parts = [part.encode("utf-8", "replace").decode() for part in parts]  # a file name can hold lone surrogates
    sizes = [len(part.encode()) + 2 for part in parts]  # each is followed by an empty line
    if sum(sizes) <= limit:
        return "".join(f"{part}\n\n" for part in parts)
    kept, used = 0, 0
    while used + sizes[kept] + len(_left_out(len(parts)).encode()) <= limit:
        used += sizes[kept]
        kept += 1
    text = "".join(f"{part}\n\n" for part in parts[:kept]) + _left_out(len(parts) - kept)
    return text if len(text.encode()) <= limit else ""


def _left_out(count: int) -> str:
    return f"_{count} more sections do not fit here: they are in the report._\n"


def blocks(results: Sequence[JobResult], title: str, price_per_hour: float | None = None) -> Iterator[str]:
    """Heading, overview, what went wrong, then each job's tables."""
    found = verdict(results)
    yield f"## {SIGNS[found]} {_markdown_prose(title)}: {WORDS[found]}"
    if len(results) != 1:
        yield _overview(results)
    for result in sorted(results, key=lambda result: -result.exit_code):  # stable: broken, missed, passed
        yield from _job(result, price_per_hour)


def _overview(results: Sequence[JobResult]) -> str:
    rows = [
        (
            _markdown_code(result.job.name),
            f"{SIGNS[result.status]} {WORDS[result.status]}",
            RATIO.format(result.speedup) if result.speedup is not None else NONE,
            _weights(result.report),
            ", ".join(_markdown_code(floor.metric) for floor in result.report.failed_floors[:5])
            if result.report
            else _markdown_code(result.problem.kind if result.problem else ""),
        )
        for result in results
    ]
    return _table(("Job", "Verdict", "Decode", "Weights", "Missed"), rows, numbers=(2, 3))


def _weights(report: Report | None) -> str:
    if report is None or not report.memory.weights_bytes_before:
        return NONE
    return RATIO.format(report.memory.weights_bytes_after / report.memory.weights_bytes_before)


def _job(result: JobResult, price_per_hour: float | None) -> Iterator[str]:
    yield f"### {SIGNS[result.status]} {_markdown_code(result.job.name)}: {WORDS[result.status]}"
    yield (
        f"Model {_markdown_code(result.job.model)}, recipe {_markdown_code(result.job.recipe.name)}, "
        f"{SECONDS.format(result.seconds)}"
        + (f", on {_markdown_code(result.report.machine.device)}" if result.report else "")
    )
    if (problem := result.problem) is not None:
        yield f"**{_markdown_code(problem.kind)}**, so there is no verdict:\n\n{fenced(problem.message)}"
    if (report := result.report) is not None:
        yield f"**{_markdown_prose(report.summary)}**"
        if report.plan is not None:
            yield _plan(report.plan)
        if report.failed_floors:
            yield _missed(report)
        yield _before_and_after(report)
        if price_per_hour is not None and report.speed:
            yield _cost(report, price_per_hour)
    if result.artifact is not None:
        yield f"Artifact {_markdown_code(str(result.artifact))}, digest {_markdown_code(result.digest or '')}"
    notes = dict.fromkeys([*result.notes, *(report.warnings if report else ())])
    if notes:
        yield "\n".join(f"- **note:** {_markdown_code(note)}" for note in notes)


def _plan(plan: PlanEntry) -> str:
    """What `auto` chose, of how many, and why it looked no further."""
    tried = [step for step in plan.steps if step.measured_tpot_seconds is not None]
    chosen = ", ".join(
        f"{_markdown_code(step.candidate)}, {_markdown_prose(step.reason)}" for step in tried if step.chosen
    )
    off = "" if plan.median_error is None else f"; predictions were off by {plan.median_error:.0%} in the median"
    return (
        f"Planned for {_markdown_prose(plan.objective)}: {chosen}. {len(tried)} of {len(plan.steps)} candidates were "
        f"tried, then {_markdown_prose(plan.stopped)}{off}."
    )


def _missed(report: Report) -> str:
    rows = [
        (
            _markdown_code(floor.metric),
            _markdown_prose(floor.rule),
            _markdown_prose(floor.measured),
            "" if floor.value is not None else _markdown_code(floor.reason),
        )
        for floor in report.failed_floors
    ]
    return _table(("Missed floor", "Asked", "Measured", "Why not"), rows, numbers=(2,))


def _before_and_after(report: Report) -> str:
    rows = [
        (
            _markdown_code(row.metric),
            row.before,
            _markdown_prose(row.after),
            _markdown_prose(row.ratio),
            _markdown_prose(row.floor),
            "**FAIL**" if row.verdict == "FAIL" else row.verdict,
        )
        for row in report.table()
    ]
    return _table(("Metric", "Before", "After", "Ratio", "Floor", "Verdict"), rows, numbers=(1, 2, 3))


def _cost(report: Report, price_per_hour: float) -> str:
    cell = report.speed[0]
    before, after = (
        cost_per_million_tokens(price_per_hour, stats.tokens_per_second) for stats in (cell.baseline, cell.optimized)
    )
    return (
        f"At {price_per_hour:g} an hour, a million output tokens cost {before:.4g} before and {after:.4g} after "
        f"(workload {_markdown_prose(cell.label)}, {_markdown_prose(speedup(cell.throughput_speedup))} the throughput)."
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    rule = ["--:" if column in numbers else ":--" for column in range(len(headers))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))


def fenced(text: str) -> str:
    """A code block that nothing in `text` can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n" + "\n".join(clean(line) for line in text.splitlines()) + f"\n{fence}"
