"""The training and held-out text of the reference model: the source of the CPython standard library.

The corpus is read from the interpreter that runs this file (`sysconfig.get_path("stdlib")`), so nothing is
downloaded. Modules in `HELD_OUT` are never trained on, and neither are their tests; everything under a `test`
folder, generated tables and third-party code (`site-packages`) is left out.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT = (
    "bisect", "calendar", "cmd", "configparser", "csv", "filecmp", "fnmatch", "fractions", "getopt", "graphlib",
    "gzip", "heapq", "netrc", "queue", "sched", "shlex", "statistics", "string", "textwrap", "timeit", "wave", "zipapp",
)  # fmt: skip
"""Top-level modules kept for evaluation: plain library code in the style of the training text."""

SKIPPED_FOLDERS = ("site-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "turtledemo", "lib-dynload")
SKIPPED_MODULES = ("stringprep", "entities", "_sysconfigdata__linux_x86_64-linux-gnu", "this", "keyword", "token")
"""Generated tables, whose text teaches nothing about code."""


def stdlib() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _wanted(path: Path) -> bool:
    return not set(path.parts) & set(SKIPPED_FOLDERS) and path.stem not in SKIPPED_MODULES


def training_files() -> list[Path]:
    """Every module that may be trained on, in a fixed order."""
    root = stdlib()
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in files if _wanted(path) and not (len(path.parts) == 1 and path.stem in HELD_OUT)]
    return [root / path for path in sorted(kept)]


def held_out_files() -> list[Path]:
    """The held-out modules, in the order of `HELD_OUT`."""
    return [stdlib() / f"{name}.py" for name in HELD_OUT]


def read(files: list[Path]) -> list[str]:
    """The text of each file; a file that is not UTF-8 is an error, since it would silently change the corpus."""
    return [path.read_text(encoding="utf-8") for path in files]
