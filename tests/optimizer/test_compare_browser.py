"""The interactive pages in a real browser: what a reader clicks changes what a reader sees, and nothing complains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optimizer.history import read_history, save_page
from tests.browser import BROWSER, Page, browser_page
from tests.optimizer.compare_example import NAMES, example, hostile
from tests.optimizer.report_example import example_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")

VISIBLE = (
    "[...document.querySelectorAll({selector})].filter(e => e.checkVisibility() && e.getClientRects().length).length"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for day in (1, 2, 3):
        (folder / "runs" / str(day)).mkdir(parents=True)
        report = example_report(created=f"2026-01-0{day}T00:00:00Z", recipe={"name": "ab"[day % 2]})
        report.save(folder / "runs" / str(day) / "report.json")
    return {
        "example": example().save(folder / "example.html"),
        "hostile": hostile().save(folder / "hostile.html"),
        "history": save_page(read_history(folder / "runs"), folder / "history.html"),
    }


@pytest.fixture
def page(browser: Page, pages: dict[str, Path]) -> Page:
    browser.console.clear()
    browser.show(1280)
    browser.open(pages["example"])
    return browser


def visible(page: Page, selector: str) -> int:
    return int(page.evaluate(VISIBLE.format(selector=repr(selector))))


def toggle(page: Page, variant: int) -> None:
    page.evaluate(f"document.querySelector('input.filter[data-variant=\"{variant}\"]').click()")


def choose(page: Page, selector: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const s = document.querySelector({selector!r}); s.value = {value!r}; "
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_the_browser_reports_a_complaint(browser: Page, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.html"
    noisy.write_text("<!DOCTYPE html><script>console.error('heard'); nowhere()</script>", encoding="utf-8")
    browser.console.clear()
    browser.open(noisy)
    assert any("heard" in line for line in browser.console)
    assert any("nowhere" in line for line in browser.console)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["example", "hostile", "history"])
def test_a_page_opens_quietly_and_fits(
    browser: Page, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.console.clear()
    browser.requests.clear()
    browser.show(width, scheme)
    browser.open(pages[name])
    assert browser.console == []
    assert browser.requests == [pages[name].as_uri()]
    sizes = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert sizes[0] <= sizes[1] == width
    ink, paper = browser.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    bright = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (scheme == "light")


def test_a_hostile_page_runs_nothing_and_shows_the_text(browser: Page, pages: dict[str, Path]) -> None:
    browser.console.clear()
    browser.open(pages["hostile"])
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("document.querySelectorAll('img, iframe').length") == 0
    assert "<script>alert(1)</script>" in browser.evaluate("document.querySelector('.document').innerText")
    assert browser.console == []


def test_another_script_is_refused_by_the_policy(browser: Page, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["example"].read_text(encoding="utf-8").replace("</body>", "<script>window.ran = 1</script></body>")
    (tmp_path / "changed.html").write_text(text, encoding="utf-8")
    browser.console.clear()
    browser.open(tmp_path / "changed.html")
    assert browser.evaluate("window.ran") is None
    assert any("Content Security Policy" in line for line in browser.console)


def test_hiding_a_variant_hides_its_rows_marks_heat_map_and_answers(page: Page) -> None:
    before = {part: visible(page, part) for part in ("tbody tr[data-variant]", ".mark", ".heat", ".document tr")}
    assert before[".mark"] == 30
    toggle(page, 2)
    assert visible(page, "tbody tr[data-variant='2'], .mark.v2, .heat[data-variant='2']") == 0
    assert visible(page, ".mark") == 20
    assert visible(page, ".heat") == before[".heat"] - 1
    assert NAMES[2] not in page.evaluate("document.getElementById('documents-list').innerText")
    toggle(page, 2)
    assert {part: visible(page, part) for part in before} == before
    assert page.console == []


def test_the_front_is_drawn_again_for_what_is_shown(page: Page) -> None:
    path = "document.querySelector('.front').getAttribute('d')"
    assert page.evaluate(path).count("V") == 1  # base and int8: int4 is slower and worse than int8
    toggle(page, 1)
    marks = "[...document.querySelector('svg:has(.front)').querySelectorAll('.mark:not(.off)')]"
    shown = page.evaluate(f"{marks}.map(mark => String(Number(mark.dataset.x)))")
    assert len(shown) == 2
    assert all(x in page.evaluate(path) for x in shown)


def test_the_task_filter(page: Page) -> None:
    choose(page, "select[data-key=task]", "choice")
    assert visible(page, "#quality tbody tr") == 3
    assert visible(page, "#front .charts") == 1
    assert {"choice"} == set(page.evaluate("[...document.querySelectorAll('.document')].map(d => d.dataset.task)"))
    choose(page, "select[data-key=task]", "")
    assert visible(page, "#quality tbody tr") == 6


def test_only_disagreements_of_the_shown_variants(page: Page) -> None:
    assert visible(page, ".document") == 4
    toggle(page, 2)  # base and int8 agree on the first two
    assert visible(page, ".document") == 2
    page.evaluate("document.getElementById('only-disagreements').click()")
    assert visible(page, ".document") == 4
    choose(page, "#turned", "gained")
    assert visible(page, ".document") == 1
    assert page.evaluate("document.querySelector('.document').innerText").count("✓") == 1
    choose(page, "#turned", "lost")
    assert visible(page, ".document") == 0
    assert page.evaluate("document.getElementById('documents-count').textContent") == "0 of 0 shown"


def test_long_lists_come_a_page_at_a_time(browser: Page, tmp_path: Path) -> None:
    many = [example().documents[0].model_copy(update={"document": f"{i}:x"}) for i in range(45)]
    browser.open(example(documents=many).save(tmp_path / "many.html"))
    counts = []
    for _ in range(3):
        counts.append(visible(browser, ".document"))
        browser.evaluate("document.getElementById('documents-more').click()")
    assert counts == [20, 40, 45]
    assert visible(browser, "#documents-more") == 0


def test_a_heading_sorts_by_value_and_turns_around(page: Page) -> None:
    def column(index: int) -> list[Any]:
        return page.evaluate(
            f"[...document.querySelector('#result tbody').rows].map(r => r.cells[{index}].textContent.trim())"
        )

    heading = "document.querySelectorAll('#result th button')[4]"
    assert page.evaluate(f"{heading}.textContent") == "Decode"
    page.evaluate(f"{heading}.click()")
    assert column(0) == ["base", "int4", "int8"]
    page.evaluate(f"{heading}.click()")
    assert column(0) == ["int8", "int4", "base"]
    assert page.evaluate(f"{heading}.parentElement.getAttribute('aria-sort')") == "descending"
    size = "document.querySelectorAll('#result th button')[7].click()"
    page.evaluate(size)
    assert column(7) == ["6.00 MB", "10.0 MB", "20.0 MB"]  # by bytes, not by text


def test_a_mark_and_a_cell_tell_their_figures(page: Page) -> None:
    tip = "document.querySelector('.tip')"
    assert page.evaluate(f"{tip}.checkVisibility()") is False
    page.evaluate("document.querySelector('.mark.v1').focus()")
    assert page.evaluate(f"{tip}.textContent") == "int8: 250 tok/s, quality 0.9900 [0.9800, 1.0000] of base"
    assert page.evaluate(f"{tip}.checkVisibility()") is True
    page.evaluate("document.querySelector('.hot').dispatchEvent(new PointerEvent('pointerenter'))")
    assert "int8, model.layers.0.a: weight 0.500 %, output 1.00 %" in page.evaluate(f"{tip}.textContent")
    box = page.evaluate(f"(b => [b.left, b.right])({tip}.getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 1280
    page.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.evaluate(f"{tip}.checkVisibility()") is False


def test_the_heat_map_shows_one_error_or_both(page: Page) -> None:
    assert (visible(page, "[data-error=output]"), visible(page, "[data-error=weight]")) == (2, 0)
    choose(page, "select[data-key=error]", "weight")
    assert (visible(page, "[data-error=output]"), visible(page, "[data-error=weight]")) == (0, 2)
    choose(page, "select[data-key=error]", "")
    assert visible(page, "[data-error]") == 4


def test_text_on_a_heat_map_can_be_read_in_both_schemes(page: Page) -> None:
    contrast = """(() => {
      const lum = rgb => { const [r, g, b] = rgb.map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                           return .2126 * r + .7152 * g + .0722 * b; };
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const read = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                               return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255); };
      return Math.min(...[...document.querySelectorAll('.hot')].map(cell => {
        const style = getComputedStyle(cell), [a, b] = [lum(read(style.color)), lum(read(style.backgroundColor))];
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      }));
    })()"""
    for scheme in ("light", "dark"):
        page.show(1280, scheme)
        assert page.evaluate(contrast) >= 4.5, scheme


def test_without_its_script_the_page_still_reads(browser: Page, pages: dict[str, Path]) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["example"])
        tree = browser.evaluate("document.documentElement.outerHTML")
        assert 'class="scripted"' not in tree
        assert "holds the same documents" in browser.evaluate("document.body.innerText")
        assert visible(browser, ".controls") == 0
        assert "0.9900 [0.9800, 1.0000]" in tree
        assert "<title>int8: 250 tok/s" in tree
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_history_hides_and_sorts(browser: Page, pages: dict[str, Path]) -> None:
    browser.console.clear()
    browser.show(1280)
    browser.open(pages["history"])
    assert visible(browser, "tbody tr") == 3
    toggle(browser, 0)
    assert visible(browser, "tbody tr") == 1
    assert visible(browser, ".mark") == 4
    assert browser.console == []
