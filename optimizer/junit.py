"""Results of a CI run as JUnit XML, the form that GitHub's test reporters, GitLab and Jenkins read.

One suite for each job, in it a case that says whether the job ran, then one for each floor and one for each metric
that no floor judges: a missed floor is a `failure`, a floor whose metric was not measured is a `failure` that says so,
a job that broke is an `error`, and a metric without a floor is `skipped`, since nothing was asked of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree as ET

from optimizer.ci_result import JobResult
from optimizer.report import FloorEntry, Report

TEXT_LIMIT = 20_000
"""Characters that one text keeps: a traceback's end says more than its beginning, and GitLab refuses huge files."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(results: Sequence[JobResult], *, name: str = "optimizer") -> str:
    """The document, UTF-8. Characters that XML cannot hold become U+FFFD."""
    root = ET.Element("testsuites", name=_xml(name))
    for result in results:
        root.append(_suite(result))
    for count in ("tests", "failures", "errors"):  # Jenkins' schema knows no `skipped` here
        root.set(count, str(sum(int(suite.get(count, 0)) for suite in root)))
    root.set("time", f"{sum(result.seconds for result in results):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(result: JobResult) -> ET.Element:
    suite = ET.Element("testsuite", name=_xml(result.job.name))
    if properties := list(_properties(result)):
        holder = ET.SubElement(suite, "properties")
        for key, value in properties:
            ET.SubElement(holder, "property", name=_xml(key), value=_xml(value))
    cases = list(_cases(result))
    suite.extend(cases)
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("tests", str(len(cases)))
    suite.set("time", f"{result.seconds:.3f}")
    if result.report is not None:
        suite.set("timestamp", result.report.created.partition("+")[0])
    if result.notes:
        ET.SubElement(suite, "system-out").text = _xml("\n".join(result.notes))
    return suite


def _properties(result: JobResult) -> Iterator[tuple[str, str]]:
    yield "model", result.job.model
    yield "recipe", result.job.recipe.name
    yield "verdict", result.status
    if result.digest is not None:
        yield "artifact.digest", result.digest
    if (report := result.report) is not None:
        yield "device", report.machine.device
        yield "source.digest", report.model.source_digest or ""
        yield "version.roofline-optimizer", report.product_version
        for package, version in report.versions.items():
            yield f"version.{package}", version


def _cases(result: JobResult) -> Iterator[ET.Element]:
    ran = _case(result, "the job runs to a verdict", result.seconds)
    if (problem := result.problem) is not None:
        error = ET.SubElement(ran, "error", message=_xml(problem.message), type=_xml(problem.kind))
        error.text = _xml((problem.trace or problem.message)[-TEXT_LIMIT:])
    yield ran
    if result.report is None:
        return
    yield from _floor_cases(result, result.report)
    judged = {floor.metric for floor in result.report.floors}
    for metric, measured in result.evidence.items():
        if metric not in judged:
            case = _case(result, metric)
            ET.SubElement(case, "skipped", message=_xml(f"no floor judges it: {measured}"))
            yield case


def _floor_cases(result: JobResult, report: Report) -> Iterator[ET.Element]:
    for floor in report.floors:
        case = _case(result, f"{floor.metric} {floor.rule}")
        if not floor.passed:
            kind = "NotMeasured" if floor.value is None else "FloorMissed"
            failure = ET.SubElement(case, "failure", message=_xml(floor.reason), type=kind)
            failure.text = _xml(_evidence(floor))
        else:
            ET.SubElement(case, "system-out").text = _xml(_evidence(floor))
        yield case


def _evidence(floor: FloorEntry) -> str:
    """What was asked and what was measured, on lines of their own."""
    samples = "" if floor.samples is None else f"\nsamples:  {floor.samples}"
    return f"asked:    {floor.rule}\nmeasured: {floor.measured}{samples}\n{floor.reason}"


def _case(result: JobResult, name: str, seconds: float = 0.0) -> ET.Element:
    """Floors are judged on what the job measured, so all of its time belongs to its first case."""
    return ET.Element("testcase", classname=_xml(result.job.name), name=_xml(name), time=f"{seconds:.3f}")


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
