"""Experiment trackers that results are sent to as well: MLflow, Weights & Biases, trackio. Each is optional.

A tracker is other people's code that talks to other people's servers, so each runs in a process of its own with a
time limit: one that is missing, raises, exits, crashes or hangs is a note beside the verdict and never changes it.

A sink is a module here with `log(record, project, uri) -> str`, which says where the record went.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SINKS = {"mlflow": "MLflow", "wandb": "Weights & Biases", "trackio": "trackio"}
"""Extras of this package, each the name of what it imports, with the name people know."""

SECONDS = 120.0
"""How long a tracker may take."""


@dataclass(frozen=True)
class Record:
    """One job: `params` is the resolved recipe, `metrics` the evidence, `files` the reports."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Sequence[str] = ()

    def flat_params(self) -> dict[str, str]:
        """`params` as text, nested keys joined: `passes.0.bits: "8"`."""
        found: dict[str, str] = {}

        def walk(value: Any, key: str) -> None:
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
            if items is None:
                found[key] = "" if value is None else str(value)
            else:
                for name, item in items:
                    walk(item, f"{key}.{name}".removeprefix("."))

        walk(dict(self.params), "")
        return found


def missing(name: str) -> str | None:
    """Why the sink cannot be used here, with the remedy; None if its package is installed."""
    if find_spec(name) is not None:
        return None
    return f"sink {name}: {SINKS[name]} is not installed. pip install 'roofline-optimizer[{name}]'"


def publish(name: str, record: Record, *, project: str, uri: str | None = None, seconds: float = SECONDS) -> str:
    """Send `record` to the tracker `name`; returns a note that says where it is, or why it is not. Never raises."""
    if (problem := missing(name)) is not None:
        return problem
    request = json.dumps({"sink": name, "record": asdict(record), "project": project, "uri": uri})
    # -P and the path last: neither the caller's folder nor ours may shadow a module that the tracker imports.
    program = "import sys; sys.path.append(sys.argv[1]); from optimizer.sinks.__main__ import main; main()"
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-c", program, str(Path(__file__).absolute().parents[2])],
            input=request, capture_output=True, text=True, errors="replace", timeout=seconds, env=dict(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"sink {name}: nothing was logged: it took more than {seconds:g} s"
    except (OSError, ValueError) as error:
        return f"sink {name}: nothing was logged: {error}"
    answer = ran.stdout.rpartition("\0")[2].strip()
    if ran.returncode == 0 and answer:
        return f"sink {name}: logged to {_public(answer)}"
    last = (ran.stderr.strip().splitlines() or [f"it left with {ran.returncode}"])[-1]
    return f"sink {name}: nothing was logged: {_public(last)[:500]}"


def _public(text: str) -> str:
    """`text` without the user and password of an address: notes are shown in comments, where nothing masks secrets."""
    return re.sub(r"//[^/\s]*@", "//", text)
