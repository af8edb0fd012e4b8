"""The figures of the reference model on its held-out tasks: `figures.json`, which the data card and tests quote.

`python -m benchmarks.reference_figures` writes it. `all` is every item; `sample` the first ones of each task, few
enough for a test to measure again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.evals.quality import evaluate
from optimizer.evals.runner import Runner

FIGURES = Path(__file__).with_name("figures.json")
SAMPLE = {"reference_perplexity": 24, "reference_next_line": 120, "reference_cloze": 32}
WINDOW = 512  # tokens: what the model was trained on


def figures(runner: Runner, tokenizer: Any, limit: dict[str, int] | None) -> dict[str, dict[str, float]]:
    """Each metric of each task, with the number of items it is over."""
    found = evaluate(runner, tokenizer, list(SAMPLE), limit=limit, max_length=WINDOW)
    tasks: dict[str, dict[str, float]] = {}
    for metric in found.metrics:
        tasks.setdefault(metric.task, {})[metric.metric] = round(metric.value, 6)
        tasks[metric.task]["items"] = len(metric.documents)
    return tasks
