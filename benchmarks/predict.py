"""How far the predictions of an automatic plan are from what its candidates then take.

    python -m benchmarks.predict [MODEL] [--work DIR] [--minutes 4]

For each workload the search's own predictions are made from the unquantized step and the layers alone, kept, and only
then is the candidate compiled and timed beside Hugging Face `generate`, in the order of the search; what was learnt
from those before corrects the next. Run it again with the same `--work` to go on;
`benchmarks/results/predict-<device>.json` is written when every candidate was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import commit
from optimizer.artifact import installed_versions
from optimizer.candidates import CACHES, WEIGHTS, Candidate
from optimizer.evals.ceilings import describe
from optimizer.evals.predict import Correction, StepTimes, median_error, relative_error
from optimizer.pipeline import choose_device
from optimizer.plan import PlanStep, Search, objective_of
from optimizer.plan_bench import ModelBench, Records
from optimizer.plan_command import base_recipe
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import load_source

WORKLOADS = ({"batch": 1, "prompt": 128, "output": 64}, {"batch": 4, "prompt": 448, "output": 32})
"""A short request alone, where weights are what a step reads, and longer ones together, where the cache counts too."""

RESULTS = Path(__file__).parent / "results"
TARGET = 0.25
"""The median error that the predictions are held to."""


def chosen(caches: int) -> list[Candidate]:
    """Every weight option with kernels of its own on the static cache, and some on each other cache."""
    rounded = [option for option in WEIGHTS if option.quantize is not None and not option.calibrates]
    paged = [
        Candidate(option, cache) for cache in CACHES[1:] for option in rounded if option.name == "int8, int8 inputs"
    ]
    return [Candidate(option) for option in rounded] + paged[:caches]


def base(workload: dict[str, int]) -> Recipe:
    """The recipe of a plan, of which the benchmark uses only the workload."""
    recipe = base_recipe(workload={**workload})
    evaluation = recipe.evaluation.model_copy(update={"tasks": {"reference_perplexity": 1}})
    return recipe.model_copy(update={"evaluation": evaluation})


def measure(bench: ModelBench, deadline: float) -> dict[str, Any] | None:
    """The rows of one workload, or None where the time was up before the last."""
    output = bench.workload.output
    search = Search(bench, [], [], objective_of([], output), output, 1.0)
    start = bench.start()
    steps = [search.describe(start, candidate) for candidate in chosen(len(CACHES) - 1)]
    waiting = [step for step in steps if step.raw is not None]
    left_out = {step.candidate.name: step.reason for step in steps if step.raw is None}
    corrections: dict[str, Correction] = {}
    rows: list[dict[str, Any]] = []
    while waiting:
        step = min(waiting, key=lambda step: _corrected(step, corrections).e2e(output))
        waiting.remove(step)
        row = _row(bench, step, _corrected(step, corrections), deadline)
        if row is None:
            return None
        rows.append(row)
        assert step.raw is not None
        corrections.setdefault(step.candidate.cache.name, Correction()).learn(step.raw, StepTimes(**row["measured"]))
    return {
        "workload": {k: getattr(bench.workload, k) for k in ("batch", "prompt", "output")},
        "original": asdict(start.eager),
        "unquantized": asdict(start.plain),
        "rows": rows,
        "left_out": left_out,
    }


def _corrected(step: PlanStep, corrections: dict[str, Correction]) -> StepTimes:
    assert step.raw is not None
    return corrections.setdefault(step.candidate.cache.name, Correction()).apply(step.raw)


def _row(bench: ModelBench, step: PlanStep, predicted: StepTimes, deadline: float) -> dict[str, Any] | None:
    """One candidate: its prediction, kept first, and what was then measured; None where the time is up."""
    name = step.candidate.name.replace(" ", "-").replace(",", "")
    assert step.raw is not None
    if bench.records.get(f"measured-{name}") is None and time.monotonic() > deadline:
        return None
    raw = bench.records.once(f"prediction-{name}", lambda: {"raw": asdict(step.raw), "predicted": asdict(predicted)})
    found = bench.records.once(f"measured-{name}", lambda: bench.time_candidate(step.candidate, step.ignore))
    measured = bench.on_clock_of_start(found)
    return {"candidate": step.candidate.name, **raw, "measured": asdict(measured), "as_it_was": found,
            "kept": list(step.kept)}  # fmt: skip


def errors(results: Sequence[dict[str, Any]], which: str, phases: Sequence[str] = ("ttft", "tpot")) -> float:
    """The median error of `predicted`, or of the `raw` sum, over every candidate and the phases."""
    pairs = [(row[which][p], row["measured"][p]) for result in results for row in result["rows"] for p in phases]
    found = median_error(pairs)
    assert found is not None
    return found


def markdown(document: dict[str, Any]) -> str:
    """The result as the tables that docs/plan.md shows."""
    lines = []
    for result in document["results"]:
        w = result["workload"]
        lines += [
            f"Batch {w['batch']}, {w['prompt']} tokens in, {w['output']} out; unquantized and compiled: TTFT "
            f"{result['unquantized']['ttft'] * 1e3:.1f} ms, TPOT {result['unquantized']['tpot'] * 1e3:.2f} ms",
            "",
            "| candidate | TTFT predicted | measured | error | TPOT predicted | measured | error |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["rows"]:
            cells = [row["candidate"]]
            for phase, digits in (("ttft", 1), ("tpot", 2)):
                predicted, measured = row["predicted"][phase], row["measured"][phase]
                cells += [f"{predicted * 1e3:.{digits}f}", f"{measured * 1e3:.{digits}f}"]
                cells.append(f"{relative_error(predicted, measured):+.0%}")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"Left out: {name}: {why}." for name, why in result["left_out"].items()), ""]
    tpot, ttft = (errors(document["results"], "predicted", (phase,)) for phase in ("tpot", "ttft"))
    whole, raw = (errors(document["results"], which) for which in ("predicted", "raw"))
    count = sum(len(result["rows"]) for result in document["results"])
    held = "held" if whole <= TARGET else "**missed**"
    lines += [
        f"Median error over {count} candidates: {whole:.1%} (TPOT {tpot:.1%}, TTFT {ttft:.1%}); at most {TARGET:.0%} "
        f"was asked for: {held}. Without what was learnt from those before: {raw:.1%}.",
        "",
        f"Milliseconds; in the order in which they were tried. {document['machine']['device']}, "
        f"{document['machine']['cores']} threads ({document['machine']['isa']}), torch "
        f"{document['versions']['torch']}, {document['date'][:10]}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what there is time for, and write the result when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--device")
    parser.add_argument("--work", type=Path, default=Path("out/predict"))
    parser.add_argument("--minutes", type=float, default=4.0, help="no candidate is begun after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    source = load_source(options.model, device=choose_device(options.device))
    results = []
    for workload in WORKLOADS:
        bench = ModelBench(source, base(workload), None, Progress(), Records())
        with bench.resumable(options.work):
            result = measure(bench, deadline)
        if result is None:
            raise SystemExit("the time was up: run it again to go on")
        results.append(result)
        tpot = median(abs(relative_error(r["predicted"]["tpot"], r["measured"]["tpot"])) for r in result["rows"])
        print(f"{workload}: median TPOT error {tpot:.1%}", flush=True)
    device = bench.original.device
    name, cores, isa = describe(device)
    document = {
        "model": options.model,
        "machine": {"device": name, "cores": cores, "isa": isa},
        "versions": installed_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "results": results,
    }
    target = RESULTS / f"predict-{device.type}.json"
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
