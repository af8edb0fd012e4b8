"""JUnit XML against a schema of what GitHub's reporters, GitLab and Jenkins read, and against hostile names."""

from __future__ import annotations

from io import BytesIO
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from lxml import etree

from optimizer.ci_result import UNFINISHED, JobResult, Problem
from optimizer.junit import TEXT_LIMIT, junit_xml
from tests.optimizer.ci_examples import HOSTILE, UNMEASURED, broken, failed, hostile, job, passed

# The elements, attributes and order that every reader takes: the strictest common denominator of their schemas, in
# which a suite has its counts, and a case its class, name and time, and at most one of the three outcomes.
SCHEMA = """<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">
  <xs:complexType name="outcome"><xs:simpleContent><xs:extension base="xs:string">
    <xs:attribute name="message"/><xs:attribute name="type"/></xs:extension></xs:simpleContent></xs:complexType>
  <xs:complexType name="case"><xs:sequence>
      <xs:choice minOccurs="0">
        <xs:element name="skipped" type="outcome"/><xs:element name="error" type="outcome"/>
        <xs:element name="failure" type="outcome"/>
      </xs:choice>
      <xs:element name="system-out" type="xs:string" minOccurs="0"/>
    </xs:sequence>
    <xs:attribute name="classname" use="required"/><xs:attribute name="name" use="required"/>
    <xs:attribute name="time" type="xs:decimal" use="required"/></xs:complexType>
  <xs:complexType name="properties"><xs:sequence><xs:element name="property" maxOccurs="unbounded"><xs:complexType>
    <xs:attribute name="name" use="required"/><xs:attribute name="value" use="required"/>
  </xs:complexType></xs:element></xs:sequence></xs:complexType>
  <xs:complexType name="suite"><xs:sequence>
      <xs:element name="properties" type="properties" minOccurs="0"/>
      <xs:element name="testcase" type="case" maxOccurs="unbounded"/>
      <xs:element name="system-out" type="xs:string" minOccurs="0"/>
    </xs:sequence>
    <xs:attribute name="name" use="required"/>
    <xs:attribute name="tests" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="failures" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="errors" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="skipped" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="time" type="xs:decimal" use="required"/>
    <xs:attribute name="timestamp" type="xs:dateTime"/></xs:complexType>
  <xs:element name="testsuites"><xs:complexType>
    <xs:sequence><xs:element name="testsuite" type="suite" minOccurs="0" maxOccurs="unbounded"/></xs:sequence>
    <xs:attribute name="name"/><xs:attribute name="tests" type="xs:nonNegativeInteger"/>
    <xs:attribute name="failures" type="xs:nonNegativeInteger"/>
    <xs:attribute name="errors" type="xs:nonNegativeInteger"/>
    <xs:attribute name="time" type="xs:decimal"/></xs:complexType></xs:element>
</xs:schema>"""


def parsed(*results: JobResult) -> Any:
    """The document, valid, and read by a second parser."""
    raw = junit_xml(results).encode()
    ET.fromstring(raw)
    tree = etree.parse(BytesIO(raw))
    etree.XMLSchema(etree.fromstring(SCHEMA)).assertValid(tree)
    return tree.getroot()


def outcomes(root: Any) -> dict[str, str]:
    """The outcome of each case: a tag, or passed."""
    tags = ("failure", "error", "skipped")
    return {
        case.get("name"): next((t for t in tags if case.find(t) is not None), "passed")
        for case in root.iter("testcase")
    }


def test_a_passed_job_has_a_case_for_each_floor_and_skips_what_no_floor_judges() -> None:
    result = passed()
    assert result.report is not None
    found = outcomes(parsed(result))
    assert found.pop("the job runs to a verdict") == "passed"
    assert found.pop("kv.ratio") == "skipped"
    assert set(found) == {f"{floor.metric} {floor.rule}" for floor in result.report.floors}
    assert set(found.values()) == {"passed"}


def test_a_missed_floor_and_one_that_was_not_measured_are_failures_with_their_reasons() -> None:
    missed = failed().report
    assert missed is not None
    root = parsed(failed(missed.floors[0], UNMEASURED))
    kinds = {failure.get("type"): failure.get("message") for failure in root.iter("failure")}
    assert kinds == {"FloorMissed": missed.floors[0].reason, "NotMeasured": UNMEASURED.reason}
    assert "not measured" in next(f.text for f in root.iter("failure") if f.get("type") == "NotMeasured")


def test_a_broken_job_is_an_error_and_no_failure() -> None:
    root = parsed(broken(problem=Problem("ZeroDivisionError", "division", trace="x" * 3 * TEXT_LIMIT + "the end")))
    assert outcomes(root) == {"the job runs to a verdict": "error"}
    error = next(root.iter("error"))
    assert error.get("type") == "ZeroDivisionError"
    assert len(error.text) == TEXT_LIMIT
    assert error.text.endswith("the end")


def test_the_counts_are_those_of_the_cases() -> None:
    root = parsed(passed(), failed(), broken(), JobResult(job("later"), "error", problem=UNFINISHED))
    for holder in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            assert int(holder.get(attribute)) == len(list(holder.iter(tag)))
    assert float(root.get("time")) == pytest.approx(25.0)
    assert (root.get("failures"), root.get("errors")) == ("1", "2")


def test_properties_say_what_was_run_where() -> None:
    found = {p.get("name"): p.get("value") for p in parsed(passed()).iter("property")}
    assert found["model"] == "tiny"
    assert found["artifact.digest"] == "ab" * 32
    assert found["device"] == "AMD EPYC 9R14"
    assert found["version.torch"] == "2.13.0"


def test_hostile_names_are_text_and_nothing_else() -> None:
    root = parsed(hostile(), broken(problem=Problem(HOSTILE, HOSTILE)))
    readable = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    readable = readable.replace("\ufffe", "\ufffd")
    assert root[0].get("name") == readable  # even the line break, as a character reference
    assert next(root.iter("failure")).get("message") == readable
    assert {element.tag for element in root.iter()} <= {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "error", "skipped", "system-out",
    }  # fmt: skip


def test_no_job_is_a_valid_document() -> None:
    assert parsed().get("tests") == "0"
