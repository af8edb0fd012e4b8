"""The comparison as data, as Markdown and as a page that nothing in it can break out of."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from optimizer.compare_charts import Axis, Point, Scale, _tick, scatter
from optimizer.compare_html import heat_share, inert_json, kept_quality, page_script
from optimizer.compare_report import Comparison, LayerError, pareto
from optimizer.errors import ArtifactError, OutputError, UsageError
from optimizer.report_units import NUMBER
from tests.optimizer.compare_example import NAMES, example, hostile


class Reader(HTMLParser):
    """Elements, attributes and the text of scripts, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._kind: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._kind.append(dict(attrs).get("type"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._kind.pop()

    def handle_data(self, data: str) -> None:
        if self._kind:
            self.scripts.append((self._kind[-1], data))


def test_json_gives_the_same_comparison_back() -> None:
    found = example()
    assert Comparison.from_json(found.to_json()) == found
    odd = example(confidence=math.nan)
    assert '"NaN"' in odd.to_json()
    json.loads(odd.to_json(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", '{"schema_version": 2, "kind": "comparison"}', '{"schema_version": 1}', "[" * 100_000,
     '{"schema_version": true}', '{"schema_version": 1, "kind": "comparison", "extra": 1}'],
)  # fmt: skip
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        Comparison.from_json(text)


def test_names_must_differ_and_be_known() -> None:
    twice = [example().variants[0]] * 2
    with pytest.raises(ValidationError, match="two variants have one name"):
        example(variants=twice, quality=[], documents=[], layers=[])
    with pytest.raises(ValidationError, match="are no variants of"):
        example(variants=example().variants[:2])


def test_it_is_saved_by_its_extension(tmp_path: Path) -> None:
    for name in ("a.html", "a.md", "a.JSON"):
        assert example().save(tmp_path / name).stat().st_size > 1000
    with pytest.raises(UsageError, match=r"cannot be saved as 'a\.pdf'"):
        example().save(tmp_path / "a.pdf")
    with pytest.raises(OutputError):
        example().save(tmp_path / "missing" / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JSON", "a.html", "a.md"]


def test_the_front_is_what_a_search_over_all_pairs_finds() -> None:
    generator = random.Random(0)
    for _ in range(200):
        points = {str(i): (generator.randrange(6), generator.randrange(6)) for i in range(8)}
        points["nan"] = (math.nan, 9.0)
        beaten = {
            a
            for (a, p), (_, q) in itertools.product(points.items(), repeat=2)
            if q[0] >= p[0] and q[1] >= p[1] and q != p and "nan" not in (a,) and not math.isnan(q[0])
        }
        assert pareto(points) == set(points) - beaten - {"nan"}


def test_quality_kept_turns_a_perplexity_over() -> None:
    found = kept_quality(example().quality[1])
    assert found["base"] == (1.0, None, None)
    assert found["int4"] == pytest.approx((1 / 1.05, 1 / 1.06, 1 / 1.04))
    score = example().quality[1].scores[1].model_copy(update={"ratio": math.inf, "ratio_low": -math.inf})
    entry = example().quality[1].model_copy(update={"scores": [example().quality[1].scores[0], score]})
    assert kept_quality(entry)["int8"][::2] == (0.0, math.inf)


def test_markdown_marks_the_front_and_holds_every_variant() -> None:
    text = example().to_markdown()
    rows = {name: next(row for row in text.splitlines() if row.startswith(f"| `{name}`")) for name in NAMES}
    assert rows["base"].count("◆") == 2
    assert rows["int8"].count("◆") == 2
    assert rows["int4"].count("◆") == 0  # slower and worse than int8
    assert "0.9900 [0.9800, 1.0000]" in rows["int8"]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()}) == 1, table


def test_the_page_allows_exactly_its_own_script() -> None:
    page = Reader(example().to_html())
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    ((_, script),) = [each for each in page.scripts if each[0] is None]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert script == page_script()


def test_the_script_neither_evaluates_nor_asks_nor_writes_markup() -> None:
    for word in ("eval", "Function(", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "fetch", "XMLHttp",
                 "import(", "http", "setTimeout", "</script", "<!--"):  # fmt: skip
        assert word not in page_script(), word


@pytest.mark.parametrize("make", [example, hostile])
def test_the_page_needs_nothing_from_elsewhere(make: Any) -> None:
    page = Reader(make().to_html())
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)


def test_hostile_text_stays_text() -> None:
    plain, odd = Reader(example().to_html()), Reader(hostile().to_html())
    tags = [[tag for tag, _ in page.elements if tag not in ("code", "p", "li", "strong")] for page in (plain, odd)]
    assert set(tags[1]) <= set(tags[0])
    assert tags[1].count("script") == tags[0].count("script") == 2
    ((_, data),) = [each for each in odd.scripts if each[0] == "application/json"]
    assert not set("<>&\u2028") & set(data)
    found = json.loads(data)
    assert "<script>alert(1)</script>" in found["documents"][0]["context"]
    assert "\u202e" not in json.dumps(found, ensure_ascii=False)
    assert "\u202e" not in hostile().to_html()


def test_hostile_text_cannot_break_out_of_markdown() -> None:
    text = re.sub(r"\\.|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", hostile().to_markdown())
    assert "<script" not in text
    assert "<img" not in text


@pytest.mark.parametrize("value", ["</script>", "<!--<script>", "\u2028", "&lt;", {"<": ["</SCRIPT "]}])
def test_inert_json_holds_its_value_and_no_markup(value: Any) -> None:
    text = inert_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_nothing_measured_is_said_and_drawn_nowhere() -> None:
    bare = [
        variant.model_copy(update={"speed": None, "decode_tokens_per_second": None, "roofline": [], "serving": None})
        for variant in example().variants
    ]
    page = example(variants=bare, quality=[], tasks=[], documents=[], layers=[], machine=None).to_html()
    assert page.count("not measured") >= 5
    assert "<svg" not in page
    assert "Layers were not compared" in page


def test_each_mark_has_its_variant_and_its_tooltip() -> None:
    page = example().to_html()
    marks = re.findall(r'<g class="mark v\d" data-variant="(\d)"[^>]*><title>([^<]*)</title>', page)
    assert {int(variant) for variant, _ in marks} == {0, 1, 2}
    for variant, tip in marks:
        assert html.unescape(tip).startswith(NAMES[int(variant)])
    assert len(marks) == 2 * 4 * 3 + 6  # two tasks, four axes, three variants; prefill and decode on the roofline


def test_many_tasks_and_experts_do_not_widen_the_page_without_end() -> None:
    tasks = [example().quality[0].model_copy(update={"task": f"task{i}"}) for i in range(57)]
    experts = [
        LayerError(
            variant="int8", name=f"layers.0.moe.experts.{i}.w1", layer=0, projection=f"moe.experts.{i}.w1",
            weight_error=0.01 * i,
        )
        for i in range(64)
    ]  # fmt: skip
    page = example(quality=tasks, layers=experts).to_html()
    assert "51 more tasks stand under" in page
    assert page.count('class="charts"') == 6
    assert page.count(">task56/acc ↑</th>") == 3
    cells = re.findall(r'data-tip="int8, ([^:]*): weight ([^,]*)', page)
    assert set(cells) == {("layers.0.moe.experts.63.w1", "63.0 %")}


def test_a_cell_is_darker_the_larger_its_error() -> None:
    found = example()
    assert heat_share(0.24, found) == 100  # the largest of all
    assert 0 < heat_share(0.005, found) < heat_share(0.08, found) < 100
    assert [heat_share(value, found) for value in (None, 0.0, math.nan)] == [0, 0, 100]


def test_scales_are_round_and_keep_order() -> None:
    for low, high in ((0.0, 1.0), (3.7, 1234.0), (0.994, 1.001), (1e6, 2.2e7)):
        ticks = Scale(low, high, 0, 300, False).ticks()
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)
    scale = Scale(1, 1000, 0, 300, True)
    assert [scale(v) for v in (1, 10, 100, 1000, 5000)] == [0, 100, 200, 300, 300]
    assert scale.ticks() == [1, 10, 100, 1000]


def test_points_without_a_place_are_left_out() -> None:
    axis = Axis("x", NUMBER)
    assert scatter([Point(0, math.nan, 1.0, "t"), Point(1, 1.0, math.inf, "t")], axis, axis, "t") == ""
    drawn = scatter([Point(0, 1.0, 1.0, "t", low=-math.inf, high=math.inf)], axis, axis, "t")
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_ticks_tell_neighbours_apart() -> None:
    scale = Scale(0.99985, 1.00021, 0, 100, log=False)
    labels = [_tick(Axis("quality kept", NUMBER), value, scale) for value in scale.ticks()]
    assert labels == ["0.9999", "1", "1.0001", "1.0002"]
