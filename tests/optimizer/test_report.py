"""The report: round trip, refusals, the shared table, number formats, escaping, atomic saving."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optimizer.errors import ArtifactError, OutputError, UsageError
from optimizer.report import FloorEntry, LayerEntry, Report
from optimizer.report_charts import PALETTE, PANELS, forest_chart, roofline_chart, speed_chart
from optimizer.report_html import LAYER_ROWS
from optimizer.report_units import BYTES, COUNT, NUMBER, PERCENT, RATIO, SECONDS, TOKENS_PER_SECOND, interval
from tests.optimizer.report_example import (
    HOSTILE,
    MISSED,
    bare_report,
    example_report,
    failed_report,
    hostile_report,
    ungated_report,
)

CASES = {
    "passed": example_report,
    "failed": failed_report,
    "ungated": ungated_report,
    "bare": bare_report,
    "hostile": hostile_report,
}


class Page(HTMLParser):
    """The tags, attributes and text of a page, read by a parser that knows nothing of the template."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return {name: make().to_html() for name, make in CASES.items()}


@pytest.fixture(scope="module")
def pages(documents: dict[str, str]) -> dict[str, Page]:
    return {name: Page(html) for name, html in documents.items()}


# Data


@pytest.mark.parametrize("name", CASES)
def test_json_round_trips(name: str) -> None:
    report = CASES[name]()
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text


def test_json_keeps_nan_and_infinity_and_stays_strict() -> None:
    layer = example_report().layers[0].model_copy(update={"weight_error": math.nan, "output_error": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = example_report(layers=[layer]).to_json()
    json.loads(text, parse_constant=refuse)
    read = Report.from_json(text).layers[0]
    assert read.weight_error is not None
    assert math.isnan(read.weight_error)
    assert read.output_error == math.inf


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None])
def test_another_version_is_refused(version: object) -> None:
    raw = json.loads(example_report().to_json()) | {"schema_version": version}
    with pytest.raises(ArtifactError, match=re.escape(f"schema_version {version!r}")):
        Report.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", b"\xff\xfe", '{"schema_version": 1}'])
def test_malformed_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ArtifactError):
        Report.from_json(text)


def test_unknown_fields_are_refused_at_every_level() -> None:
    for path in ((), ("model",), ("floors", 0), ("speed", 0, "baseline", "ttft_seconds")):
        raw = json.loads(example_report().to_json())
        place = raw
        for step in path:
            place = place[step]
        place["surprise"] = 1
        with pytest.raises(ArtifactError, match="surprise"):
            Report.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floors": []}, "no floor was judged"),
        ({"floors": [MISSED]}, "missed .'ttft.speedup'"),
        ({"verdict": "failed"}, "no floor was missed"),
        ({"summary": "two\nlines"}, "one line"),
        ({"recipe": {}}, "no name"),
        ({"created": "2026-01-31T12:00:00"}, "UTC"),
        ({"created": "2026-01-31T12:00:00+02:00"}, "UTC"),
        ({"created": "yesterday"}, "created"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        example_report(**changes)


def test_importing_is_light() -> None:
    heavy = "{'torch', 'altair', 'vl_convert', 'jinja2'}"
    code = f"import sys, optimizer.report, optimizer.report_html; print(*{heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# The table


def test_table_has_the_figures_floors_and_verdicts() -> None:
    rows = {row.metric.split(" · ")[0]: row for row in failed_report().table()}
    assert list(rows) == [
        "stdlib_next_line/acc ↑",
        "stdlib_perplexity/word_perplexity ↓",
        "TTFT",
        "TPOT",
        "Throughput",
        "MBU",
        "Weights",
        "KV cache per token",
        "eager_steps",
    ]
    tpot = rows["TPOT"]
    assert (tpot.before, tpot.after, tpot.ratio) == ("26.9 ms", "4.07 ms", "6.61× [6.41, 6.81]")
    assert tpot.verdict == "pass"
    assert rows["TTFT"].verdict == "FAIL"
    assert rows["TTFT"].floor == MISSED.rule
    assert (rows["Weights"].before, rows["Weights"].after, rows["Weights"].ratio) == ("332 MB", "92.1 MB", "0.277×")
    assert rows["Weights"].verdict == "–"


def test_no_floor_is_lost_from_the_table() -> None:
    twins = [MISSED, MISSED.model_copy(update={"rule": "another"}), MISSED.model_copy(update={"metric": "never heard"})]
    rows = example_report(verdict="failed", floors=twins).table()
    assert sorted(row.floor for row in rows if row.verdict == "FAIL") == sorted(f.rule for f in twins)


def test_a_floor_finds_its_row_under_either_name() -> None:
    plain, filtered = (e.model_copy(update={"filter": "strict"}) for e in example_report().quality[:1] * 2)
    for name, entry in (("acc", plain), ("acc,strict", filtered)):
        floor = MISSED.model_copy(update={"metric": f"quality.stdlib_next_line.{name}.recovery"})
        rows = example_report(verdict="failed", quality=[entry], floors=[floor]).table()
        assert [row.metric for row in rows if row.verdict == "FAIL"] == ["stdlib_next_line/acc,strict ↑"]


def test_ungated_is_never_a_pass_even_with_floors_that_hold() -> None:
    report = example_report(verdict="ungated")
    assert {row.verdict for row in report.table()} == {"ungated"}
    assert "pass" not in {row.verdict for row in ungated_report().table()}


def test_missing_is_said_to_be_missing() -> None:
    rows = bare_report().table()
    assert [row.before for row in rows[:5]] == ["not measured"] * 5
    floor = FloorEntry(metric="decode.mbu", rule="≥ 0.7", passed=False, reason="mbu was not measured")
    row = next(r for r in bare_report(verdict="failed", floors=[floor]).table() if r.metric == "MBU")
    assert (row.before, row.after, row.floor, row.verdict) == ("not measured", "not measured", "≥ 0.7", "FAIL")


# Numbers


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (SECONDS.format(0.0123456), "12.3 ms"),
        (SECONDS.format(0.9997), "1.00 s"),
        (SECONDS.format(3.1e-6), "3.10 µs"),
        (SECONDS.format(0.0), "0 s"),
        (SECONDS.format(-0.002), "−2.00 ms"),
        (SECONDS.format(7384.0), "7,384 s"),
        (SECONDS.format(1e-15), "1.00e−6 ns"),
        (SECONDS.format(1e30), "1.00e30 s"),
        (SECONDS.format(None), "not measured"),
        (SECONDS.format(math.nan), "NaN"),
        (SECONDS.format(-math.inf), "−∞"),
        (BYTES.format(0), "0 B"),
        (BYTES.format(512), "512 B"),
        (BYTES.format(1000), "1.00 kB"),
        (BYTES.format(140e9), "140 GB"),
        (RATIO.format(2.5), "2.50×"),
        (PERCENT.format(0.7123), "71.2 %"),
        (PERCENT.format(0.00001), "0.00100 %"),
        (TOKENS_PER_SECOND.format(1234.5), "1,234 tok/s"),
        (COUNT.format(2560), "2,560"),
        (COUNT.format(8_030_000_000), "8.03 B"),
        (NUMBER.format(3.1e-9), "3.100e−9"),
        (SECONDS.pair(1.19, 0.93), ("1,190 ms", "930 ms")),
        (SECONDS.pair(20.0, 1e-6), ("20.0 s", "1.00 µs")),
        (SECONDS.pair(None, 0.01), ("not measured", "10.0 ms")),
        (SECONDS.pair(math.nan, 0.01), ("NaN", "10.0 ms")),
        (interval(RATIO, 2.41, 2.3456, None), "2.41× [2.35, –]"),
        (interval(NUMBER, 0.9916, 0.9741, 1.0088), "0.9916 [0.9741, 1.0088]"),
        (interval(PERCENT, 0.5, 0.4, 0.6), "50.0 % [40.0, 60.0]"),
        (interval(RATIO, 2.0, math.nan, math.inf), "2.00× [NaN, ∞]"),
        (interval(RATIO, None, 1.0, 2.0), "not measured"),
        (interval(NUMBER, 0.0, -0.0112, 0.0112), "0 [−0.01120, 0.01120]"),
    ],
)
def test_numbers_read_well(got: object, expected: object) -> None:
    assert got == expected


@given(st.floats(allow_nan=True, allow_infinity=True) | st.none(), st.floats(allow_nan=True) | st.none())
def test_any_number_formats_and_keeps_its_value(value: float | None, other: float | None) -> None:
    for unit in (SECONDS, BYTES, RATIO, PERCENT, NUMBER, COUNT):
        assert all(unit.pair(value, other))
        assert interval(unit, value, other, value)
    if value is not None and math.isfinite(value) and 1e-290 < abs(value) < 1e290:
        text = NUMBER.format(value).replace("−", "-").replace(",", "")
        assert float(text) == pytest.approx(value, rel=5.1e-4)


# HTML and Markdown


@pytest.mark.parametrize("name", CASES)
def test_page_is_one_file_that_asks_for_nothing(name: str, pages: dict[str, Page]) -> None:
    page = pages[name]
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("srcdoc", "srcset", "action")], tag
        for key in ("src", "href", "xlink:href", "data", "poster"):
            assert (attrs.get(key) or "#").startswith(("#", "data:")), (tag, attrs)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.named("meta"))


@pytest.mark.parametrize("name", CASES)
def test_page_is_well_structured(name: str, pages: dict[str, Page]) -> None:
    page = pages[name]
    assert [len(page.named(tag)) for tag in ("h1", "main", "header", "footer")] == [1, 1, 1, 1]
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.named("th"))
    assert all(attrs.get("aria-label") for attrs in page.named("svg"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        assert attrs.get("aria-labelledby", ids[0]) in ids
        assert (attrs.get("href") or "#" + str(ids[0])).removeprefix("#") in [*ids, "data:,"]


def test_page_says_what_was_found(pages: dict[str, Page]) -> None:
    text = pages["passed"].text
    report = example_report()
    found = ["PASSED", report.summary, report.model.name, "26.9 ms", "92.1 MB", "cpu_vnni_w4a8", "Compiled steps 2,560"]
    found += [floor.rule for floor in report.floors] + [floor.reason for floor in report.floors]
    found += [layer.name for layer in report.layers] + [cost.phase for cost in report.costs]
    found += [
        "excluded by the recipe: kept in bfloat16",
        "TTFT",
        "MFU",
        "Recovery",
        "2.13.0",
        "group_size",
        *report.warnings,
    ]
    assert [words for words in found if " ".join(words.split()) not in text] == []
    assert len(pages["passed"].named("svg")) == 2 + 3 + 2


def test_failed_page_names_each_missed_floor_first(pages: dict[str, Page]) -> None:
    banner = pages["failed"].text.partition("Before and after")[0]
    assert "FAILED" in banner
    assert MISSED.metric in banner
    assert MISSED.reason in banner
    assert "PASSED" not in pages["failed"].text


def test_ungated_is_unmistakable(documents: dict[str, str]) -> None:
    for text in (documents["ungated"], ungated_report().to_markdown()):
        assert text.count("UNGATED") >= 2
        assert not re.search(r"PASSED|✓|✅|>pass<|\| pass", text)


def test_hostile_names_are_shown_and_do_nothing(pages: dict[str, Page], documents: dict[str, str]) -> None:
    html = documents["hostile"]
    assert "<script>alert" not in html
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)</script>" in pages["hostile"].text
    assert {attrs.get("href") for attrs in pages["hostile"].named("a")} <= {
        attrs.get("href") for attrs in pages["passed"].named("a")
    }


def test_hostile_names_stay_in_their_markdown_cells() -> None:
    calm, hostile = example_report().to_markdown(), hostile_report().to_markdown()
    assert "\x00" not in hostile
    for line in hostile.splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)  # code spans are inert
        assert not re.search(r"<|(?<!\\)\[|javascript:0\)\s*$", outside), line
    for heading in ("Floors", "Quality", "Passes"):
        rows = [part.partition(f"## {heading}\n\n")[2].split("\n\n")[0].splitlines() for part in (calm, hostile)]
        widths = [{len(re.findall(r"(?<!\\)\|", row)) for row in table} for table in rows]
        assert widths[0] == widths[1]
        assert len(widths[0]) == 1


def test_markdown_says_what_was_found() -> None:
    text = failed_report().to_markdown()
    assert "**❌ FAILED**" in text
    assert f"**missed:** `{MISSED.metric}`" in text
    assert "| TPOT · B1 · 128→64 | 26.9 ms | 4.07 ms |" in text
    assert "`quantize` skipped `lm_head`: excluded by the recipe" in text


def test_every_form_says_when_the_run_has_paid_and_how_far_the_model_diverged(documents: dict[str, str]) -> None:
    report = example_report()
    assert report.break_even is not None
    for text in (report.to_markdown(), documents["passed"]):
        for part in (
            "797 tokens",
            "812 tokens",
            "6,106 tokens",
            "0.01230 [0.01100, 0.01360]",
            "8.139 → 1.656",
            "1,234",
        ):
            assert part in text.replace("\\", ""), part
    never = report.break_even.model_copy(update={"tokens": None, "cost": None})
    lines = dict(never.lines())
    assert lines["Optimization won back after"] == "never: not faster"
    assert not any("Price" in name for name in lines)


def test_an_evaluation_that_stopped_early_says_so() -> None:
    report = example_report()
    entry = report.quality[0].model_copy(
        update={"samples": 240, "samples_planned": 700, "loss": 0.002, "loss_low": -0.01, "loss_high": 0.014}
    )
    text = report.model_copy(update={"quality": [entry]}).to_markdown()
    assert "| 240 of 700 |" in text
    assert "0.002000 \\[−0.010000, 0.014000\\]" in text


def test_many_layers_stay_small_and_nothing_is_dropped_in_silence() -> None:
    layer = example_report().layers[0]
    many = [layer.model_copy(update={"name": f"layer_{i}.", "weight_error": 0.01 + i * 1e-6}) for i in range(5000)]
    many[7] = LayerEntry(**(many[7].model_dump() | {"weight_error": math.nan}))
    html = example_report(layers=many).to_html()
    assert len(html.encode()) < 400_000
    assert f"{LAYER_ROWS} layers with the largest errors, of 5000" in html
    assert "layer_4999." in html
    assert "layer_7." in html  # a NaN error counts as the largest
    assert "layer_8." not in html


def test_palette_has_readable_contrast() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for mode in (0, 1):
        for ground in ("page", "panel"):
            for text in ("ink", "muted", "pass", "fail", "warn", "optimized"):
                assert contrast(PALETTE[text][mode], PALETTE[ground][mode]) >= 4.5, (text, ground, mode)
        assert contrast(PALETTE["baseline"][mode], PALETTE["page"][mode]) >= 3  # graphics


# Charts


def test_charts_carry_their_numbers_as_tooltips() -> None:
    report = example_report()
    roofline = roofline_chart(report, 640)
    assert "<title>B1, decode, optimized: 84.0 GFLOP/s of 149 GFLOP/s attainable at 3.60 FLOP/B</title>" in roofline
    assert "<title>Peak, int8 660 GFLOP/s</title>" in roofline
    assert "<title>Read bandwidth, memory 41.3 GB/s</title>" in roofline
    forest = forest_chart(report, 640)
    assert forest.count("<title>Floor: ") == 2
    assert "0.9916 [0.9741, 1.0088]" in forest
    speed = speed_chart(report.speed, PANELS[1])
    assert "<title>B1 · 128→64, optimized: 4.07 ms, p95 4.80 ms</title>" in speed


def test_charts_colours_are_all_in_the_palette() -> None:
    report = example_report()
    drawn = roofline_chart(report, 640) + forest_chart(report, 280) + speed_chart(report.speed, PANELS[0])
    light = {colour for colour, _ in PALETTE.values()}
    assert set(re.findall(r'(?:fill|stroke)="(#[^"]*|[a-z]+)"', drawn)) - {"none", "transparent"} <= light


def test_charts_leave_out_what_cannot_be_drawn() -> None:
    report = example_report()
    broken = [p.model_copy(update={"achieved_flops": v}) for p in report.roofline for v in (0.0, math.nan, -1.0)]
    assert roofline_chart(example_report(roofline=broken), 640) == ""
    assert roofline_chart(bare_report(), 640) == ""
    lost = [entry.model_copy(update={"ratio": math.nan}) for entry in report.quality]
    assert forest_chart(example_report(quality=lost), 640) == ""
    assert speed_chart([], PANELS[0]) == ""


def test_page_with_nan_everywhere_still_renders() -> None:
    raw = json.dumps(json.loads(example_report().to_json()))
    raw = re.sub(r"(?<=[ \[])\d+\.\d+(?=[,}\]])", '"NaN"', raw)
    report = Report.from_json(raw)
    assert "NaN" in report.to_html()
    assert "NaN" in report.to_markdown()


# Saving


@pytest.mark.parametrize(("name", "start"), [("r.html", "<!DOCTYPE html>"), ("r.MD", "# Opt"), ("r.json", "{")])
def test_save_by_extension(name: str, start: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("old")
    assert bare_report().save(str(path)) == path
    assert path.read_text(encoding="utf-8").startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_saved_json_reads_back(tmp_path: Path) -> None:
    report = hostile_report()
    assert Report.from_json(report.save(tmp_path / "r.json").read_bytes()) == report
    assert HOSTILE in report.model.name


@pytest.mark.parametrize("name", ["report", "report.pdf", ".html", "html"])
def test_unknown_extension_names_the_valid_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.html, \.md, \.json"):
        bare_report().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    long = tmp_path / ("n" * 250 + ".json")
    for path in (tmp_path / "missing" / "r.json", tmp_path / "folder.json", tmp_path / "file" / "r.json", long):
        with pytest.raises(OutputError, match="cannot be written"):
            bare_report().save(path)
    assert {p.name for p in tmp_path.iterdir()} == {"folder.json", "file"}


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        bare_report().save(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
