"""Whether what a diagnosis says would help does: every suggestion that a pass can carry out, predicted and measured.

    python -m benchmarks.diagnose [MODEL] [--work DIR] [--minutes 4]

The model is diagnosed as Hugging Face runs it and compiled, on a short request alone and on longer
ones together. Each suggestion is kept, then carried out, alone, and timed interleaved with what was diagnosed. Run it
again with the same `--work` to go on; `benchmarks/results/diagnose-<device>.json` is written when all was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import commit
from optimizer.artifact import installed_versions
from optimizer.backends.runner import BaseRunner
from optimizer.evals.ceilings import describe, measure_ceilings
from optimizer.evals.diagnose import diagnose
from optimizer.evals.interventions import Intervention
from optimizer.evals.timing import Workload, measure_generation, ratio
from optimizer.passes.base import Context, view
from optimizer.passes.registry import build_pass
from optimizer.pipeline import apply_passes, choose_device
from optimizer.plan_bench import Records
from optimizer.progress import Progress
from optimizer.source import Source, load_source
from optimizer.work_folder import WorkFolder

REPEATS = 7
RESULTS = Path(__file__).parent / "results"
COMPILED: tuple[dict[str, Any], ...] = ({"name": "merge_linears"}, {"name": "decode"})
FIRST = ("rotate", "quantize", "merge_linears", "decode", "fuse")
"""The order of passes."""


@dataclass(frozen=True)
class Case:
    """What is diagnosed: a model with some passes, on a workload."""

    name: str
    passes: tuple[dict[str, Any], ...]
    workload: Workload


CASES = (
    Case("as Hugging Face runs it", (), Workload(1, 128, 64)),
    Case("as Hugging Face runs it", (), Workload(4, 448, 32)),
    Case("compiled", COMPILED, Workload(1, 128, 64)),
    Case("compiled", COMPILED, Workload(4, 448, 32)),
)


def with_passes(there: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Passes with those of a suggestion, in the order in which they run; options of one that is there are added."""
    merged: dict[str, dict[str, Any]] = {}
    for step in (*there, *more):
        merged[step["name"]] = merged.get(step["name"], {}) | dict(step)
    return tuple(sorted(merged.values(), key=lambda step: FIRST.index(step["name"])))


def changed(case: Case, suggestion: Intervention) -> tuple[dict[str, Any], ...] | None:
    """The passes that carry a suggestion out, or None where no pass does it that is not there already."""
    passes = with_passes(case.passes, suggestion.recipe_passes)
    return None if not suggestion.recipe_passes or passes == with_passes(case.passes, ()) else passes


def runner_of(source: Source, passes: Sequence[Mapping[str, Any]], workload: Workload) -> BaseRunner:
    """The model with the passes carried out."""
    model, context = view(source.model), Context(tokenizer=source.tokenizer, batch=workload.batch)
    built = [build_pass(p["name"], {key: value for key, value in p.items() if key != "name"}) for p in passes]
    apply_passes(model, built, context, Progress())
    return context.make_runner(model, source.tokenizer)


def suggestions(runner: BaseRunner, case: Case) -> dict[str, Any]:
    """What the diagnosis says: its phases in short, and what it would do next."""
    found = diagnose(runner, measure_ceilings(runner.device), case.workload)
    keep = ("phase", "seconds", "terms", "verdict", "why", "floor_seconds", "profiled_seconds", "spread")
    phases = [{key: value for key, value in asdict(phase).items() if key in keep} for phase in found.phases]
    return {"phases": phases, "suggestions": [asdict(one) for one in found.interventions]}


def measured(before: BaseRunner, after: BaseRunner, workload: Workload) -> dict[str, Any]:
    """The gain of a runner with other passes over what was diagnosed, interleaved."""
    times = measure_generation({"before": before, "after": after}, workload, repeats=REPEATS)
    a, b = times["before"], times["after"]
    return {
        "prefill": asdict(ratio(a.ttft_rounds, b.ttft_rounds)),
        "decode": asdict(ratio(a.tpot_rounds, b.tpot_rounds)),
    }


def rows_of(source: Source, case: Case, records: Records, deadline: float) -> dict[str, Any] | None:
    """The suggestions of one case with what each then gained; None where the time was up before the last."""
    w = case.workload
    key = f"{case.name}-{w.batch}-{w.prompt}-{w.output}".replace(" ", "-")
    before = cache(lambda: runner_of(source, case.passes, case.workload))
    said = records.once(f"said-{key}", lambda: suggestions(before(), case))
    rows, left = [], []
    for plain in said["suggestions"]:
        one = Intervention(**plain | {"recipe_passes": tuple(plain["recipe_passes"])})
        passes = changed(case, one)
        if passes is None:
            left.append({"phase": one.phase, "name": one.name, "predicted": one.predicted_gain})
            continue
        name = f"gain-{key}-{one.name}".replace(" ", "-")
        if records.get(name) is None and time.monotonic() > deadline:
            return None
        if (found := records.get(name)) is None:
            found = measured(before(), runner_of(source, passes, case.workload), case.workload)
            records.put(name, found)
        rows.append({"phase": one.phase, "name": one.name, "passes": list(passes), "predicted": one.predicted_gain,
                     "measured": found[one.phase]})  # fmt: skip
    return {"case": case.name, "workload": asdict(w), "phases": said["phases"], "rows": rows, "not_carried_out": left}


def errors(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Predicted over measured gain, less one, of every suggestion that was carried out."""
    return [row["predicted"] / row["measured"]["median"] - 1 for result in results for row in result["rows"]]


def markdown(document: Mapping[str, Any]) -> str:
    """The result as the table that docs/diagnose.md shows."""
    lines = ["| diagnosed | phase | suggestion | gain predicted | measured | error |", "|---|---|---|--:|--:|--:|"]
    for result in document["results"]:
        w = result["workload"]
        where = f"{result['case']} (batch {w['batch']}, {w['prompt']} + {w['output']} tokens)"
        for row in result["rows"]:
            m = row["measured"]
            lines.append(
                f"| {where} | {row['phase']} | {row['name']} | {row['predicted']:.2f}× | {m['median']:.2f}× "
                f"[{m['low']:.2f}, {m['high']:.2f}] | {row['predicted'] / m['median'] - 1:+.0%} |"
            )
    found = errors(document["results"])
    named = sorted({f"{row['name']} ({row['phase']})" for r in document["results"] for row in r["not_carried_out"]})
    machine = document["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"Median error over {len(found)} suggestions: {median(map(abs, found)):.0%}.",
            *([f"Named as well, and not carried out by a pass alone: {', '.join(named)}."] if named else []),
            f"{machine['device']}, {machine['cores']} threads ({machine['isa']}), torch "
            f"{document['versions']['torch']}, {document['date'][:10]}.",
        ]
    )


def main() -> None:
    """Measure what there is time for, and write the result when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--device")
    parser.add_argument("--work", type=Path, default=Path("out/diagnose"))
    parser.add_argument("--minutes", type=float, default=4.0, help="no suggestion is measured after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    source = load_source(options.model, device=choose_device(options.device))
    name, cores, isa = describe(source.model.device)
    machine = {"device": name, "cores": cores, "isa": isa}
    work = WorkFolder(options.work.absolute())
    with work.opened({"model": source.digest, "machine": machine, "versions": installed_versions()}):
        results = []
        for case in CASES:
            result = rows_of(source, case, Records(work), deadline)
            if result is None:
                raise SystemExit("the time was up: run it again to go on")
            results.append(result)
            print(f"{case.name}: {len(result['rows'])} suggestions measured", flush=True)
    document = {
        "model": options.model,
        "machine": machine,
        "versions": installed_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "results": results,
    }
    target = RESULTS / f"diagnose-{source.model.device.type}.json"
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
