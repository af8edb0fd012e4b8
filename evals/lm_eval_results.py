"""Writes an evaluation as lm-eval itself does, so that its tools read it.

`<folder>/<model>/results_<date>.json` holds the figures, and `samples_<task>_<date>.jsonl` every document with its
prompt, answers and scores. lm-eval's own `EvaluationTracker` writes them, so the schema is that of the version that is
installed. Standard errors, which our runs leave to paired statistics, are put where lm-eval has them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from optimizer.errors import OutputError
from optimizer.evals.quality import QualityResult


def save_lm_eval_results(
    result: QualityResult,
    folder: Path,
    *,
    model: str,
    options: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> list[Path]:
    """Write the results and samples of `model` below `folder`; returns the files, the results first.

    `options` goes into lm-eval's `config` (batch size, limit, seeds), `seconds` is how long the evaluation took. Raises
    `OutputError` where the files cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import sanitize_model_name

    name = model if model.strip(". ") else f"model {model}"  # a name of dots alone is no folder
    document = _document(result, name, options or {})
    target = folder / sanitize_model_name(name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lm_eval-") as staged:
            tracker = EvaluationTracker(output_path=staged)
            tracker.general_config_tracker.start_time = time.perf_counter() - (seconds or 0.0)
            tracker.general_config_tracker.log_experiment_args(
                model_source="roofline-optimizer", model_args={"pretrained": name}, system_instruction=None,
                chat_template=None, fewshot_as_multiturn=False,
            )  # fmt: skip
            # The tracker rewrites the rows that it is given.
            samples = {task: [dict(row) for row in rows] for task, rows in result.samples.items()}
            tracker.save_results_aggregated(document, samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task, rows)
            written = sorted(Path(staged).glob("*/*"))
            if len(written) != 1 + len(samples):  # it only logs what goes wrong
                raise OutputError(
                    f"lm-eval wrote {len(written)} of {1 + len(samples)} files of results below {folder}; "
                    "check that the folder can be written and has room"
                )
            moved = [path.replace(target / path.name) for path in written]
    except OSError as error:
        raise OutputError(f"lm-eval's results cannot be written below {folder}: {error.strerror or error}") from error
    return sorted(moved, key=lambda path: not path.name.startswith("results_"))


def _document(result: QualityResult, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results with standard errors, and what its `simple_evaluate` adds about the run."""
    document = deepcopy(result.lm_eval)
    document.pop("samples", None)
    document.setdefault("group_subtasks", {})
    for metric in result.metrics:
        row = document.get("results", {}).get(metric.task)
        if row is not None and metric.stderr is not None:
            row[f"{metric.metric}_stderr,{metric.filter}"] = metric.stderr
    document["config"] = {
        "model": "roofline-optimizer",
        "model_args": {"pretrained": model},
        "batch_size": None,
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": None,
        "bootstrap_iters": 0,
        "gen_kwargs": None,
    } | dict(options)
    document["git_hash"] = None
    document["date"] = time.time()
    return document


def seeds(seed: int) -> dict[str, int]:
    """One seed under the four names of lm-eval's configuration."""
    return dict.fromkeys(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), seed)
