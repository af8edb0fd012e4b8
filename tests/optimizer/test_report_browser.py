"""The page in a real browser: no console error, no request, no sideways scrolling on a desktop or a phone.

One launch opens the saved file as a user would; a second shows pages in frames of both widths (headless Chromium has a
least window width of 500 px) and writes what it measured into its own document, which `--dump-dom` prints. The pages
themselves hold no script.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.optimizer.report_example import bare_report, example_report, hostile_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
    "--enable-logging=stderr",
    "--v=0",
    "--run-all-compositor-stages-before-draw",
    "--virtual-time-budget=2000",
    "--dump-dom",
]
WIDTHS = (1280, 390)
FRAME = '<iframe id="{name}-{width}" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>'
MEASURE = """<script>
addEventListener('load', () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const inside = frame.contentDocument, root = inside.documentElement;
    found[frame.id] = {
      scroll: root.scrollWidth, client: root.clientWidth, text: inside.body.innerText,
      requests: frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name),
      scripts: inside.scripts.length, charts: [...inside.querySelectorAll('svg')].filter(
        svg => svg.getBoundingClientRect().width > 0).length,
    };
    frame.remove();
  }
  document.body.textContent = JSON.stringify(found);
});
</script>"""


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """`(document, console)` after the page at `path` has loaded."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_report().save(tmp_path_factory.mktemp("saved") / "report.html")


@pytest.fixture(scope="module")
def framed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("framed")
    pages = {
        "passed": saved.read_text(encoding="utf-8"),
        "ungated": bare_report().to_html(),
        "hostile": hostile_report().to_html(),
    }
    frames = [
        FRAME.format(name=name, width=width, page=html.escape(page)) for name, page in pages.items() for width in WIDTHS
    ]
    path = folder / "frames.html"
    path.write_text("<!DOCTYPE html><meta charset=utf-8><body>" + "".join(frames) + MEASURE, encoding="utf-8")
    document, console = browse(path, folder / "profile")
    body = re.search(r"<body>(\{.*\})</body>", document, re.DOTALL)
    assert body, document[-2000:]
    return json.loads(html.unescape(body[1])), console


def test_the_saved_file_opens_without_a_complaint(saved: Path, tmp_path: Path) -> None:
    document, console = browse(saved, tmp_path / "profile")
    assert console == ""
    for text in ("PASSED", "example/stdlib-166m", "26.9 ms", "model.layers.11.mlp.down_proj", "Glossary of"):
        assert text in document


def test_the_console_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "noisy.html"
    path.write_text("<!DOCTYPE html><script>console.error('heard')</script>", encoding="utf-8")
    assert "heard" in browse(path, tmp_path / "profile")[1]


def test_frames_report_no_console_message_and_no_request(framed: tuple[dict[str, Any], str]) -> None:
    found, console = framed
    assert console == ""
    assert len(found) == 6
    for name, page in found.items():
        assert page["requests"] == [], name
        assert page["scripts"] == 0, name


def test_nothing_scrolls_sideways(framed: tuple[dict[str, Any], str]) -> None:
    for name, page in framed[0].items():
        assert page["scroll"] <= page["client"] <= int(name.rpartition("-")[2]), name


def test_a_reader_sees_the_verdict_and_each_chart_once(framed: tuple[dict[str, Any], str]) -> None:
    found = framed[0]
    for width in WIDTHS:
        assert "UNGATED" in found[f"ungated-{width}"]["text"]
        assert "PASSED" not in found[f"ungated-{width}"]["text"]
        assert "PASSED" in found[f"passed-{width}"]["text"]
        assert "<script>alert(1)</script>" in found[f"hostile-{width}"]["text"]
        assert found[f"passed-{width}"]["charts"] == 5
