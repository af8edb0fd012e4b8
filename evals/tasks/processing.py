"""Loads the built data in memory, for the `!function` entries of the task files.

lm-eval would otherwise read JSON through the datasets cache, by a path relative to the current directory. This works
from any directory and from an installed package, writes no file, and needs no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HELD_OUT = Path(__file__).resolve().parents[1] / "reference" / "held_out"


def load(file: str, **_: Any) -> dict[str, Any]:
    """The rows of `held_out/<file>` as the `test` split; lm-eval passes a task's metadata along, which is not used."""
    from datasets import Dataset

    lines = (HELD_OUT / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
