"""Every built-in recipe on the reference model: verdict, quality, speed, size and seconds.

    python -m benchmarks.recipes [--only default,int4-rtn] [--keep FOLDER] [--part runs|speed]

*Runs*: `optimize` with each recipe in a process of its own, without repair; the original's quality is evaluated once
for all that ask for the same tasks. *Speed*: the artifacts are timed again, each interleaved with the original, since a
process that has just evaluated a model shares the machine with whatever else runs during those minutes; the floors on
speed are judged on these figures. Writes `benchmarks/results/recipes-cpu.json`, and `docs/recipes.md`, which shows it.
What is not run again keeps its rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, commit
from optimizer.api import load, optimize
from optimizer.artifact import installed_versions
from optimizer.backends.runner import EagerRunner
from optimizer.baseline_cache import BaselineCache
from optimizer.evals.ceilings import describe
from optimizer.evals.gate import Measurement, judge
from optimizer.evals.timing import Ratio, Workload, measure_generation, ratio
from optimizer.quality_looks import floors_of
from optimizer.recipe import Recipe, builtin
from optimizer.report import Report
from optimizer.source import load_source

OUT = RESULTS / "recipes-cpu.json"
PERPLEXITY, CHOICE = ("reference_perplexity", "byte_perplexity"), ("reference_next_line", "acc")
WORKLOAD = Workload(1, 128, 64)
REPEATS = 7


def run(name: str, folder: Path) -> dict[str, Any]:
    """What the run of a recipe found, or `error`, its last words, where it ended without a verdict."""
    code = f"from benchmarks import recipes; recipes.optimize_reference({name!r}, {str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return row(Report.from_json((folder / name / "report.json").read_text(encoding="utf-8")))


def optimize_reference(name: str, folder: str) -> None:
    """One run, in a process of its own: artifact (UNGATED where it was refused) and reports in `<folder>/<name>`."""
    out = Path(folder) / name
    result = optimize("reference", name, repair=False, baselines=BaselineCache(Path(folder) / "baselines"))
    result.save(out / "artifact", ungated=True)
    for kind in ("md", "html", "json"):
        result.report.save(out / f"report.{kind}")


def row(report: Report) -> dict[str, Any]:
    """What the table shows of a report, and its floors."""
    quality = {(entry.task, entry.metric): entry for entry in report.quality}
    spent = report.break_even
    assert spent is not None
    return {
        "perplexity": _ratio(quality[PERPLEXITY]),
        "recovery": _ratio(quality[CHOICE]),
        "weights_ratio": report.memory.weights_bytes_after / report.memory.weights_bytes_before,
        "kernels": report.ledger.kernels,
        "seconds_to_make": spent.optimization_seconds,
        "seconds": spent.run_seconds,
        "floors": {f.metric: {"held": f.passed, "reason": f.reason} for f in report.floors},
    }


def _ratio(entry: Any) -> dict[str, float]:
    return {"value": entry.ratio, "low": entry.ratio_low, "high": entry.ratio_high}


def time_artifacts(names: list[str], folder: Path) -> dict[str, dict[str, Ratio]]:
    """Decode and TTFT speed-up of each artifact over Hugging Face `generate` of the original, interleaved."""
    source = load_source("reference")
    original, found = EagerRunner(source.model, source.tokenizer), {}
    for name in names:
        runner: Any = load(folder / name / "artifact")
        if hasattr(runner, "warm_up"):
            runner.warm_up(WORKLOAD.batch, WORKLOAD.prompt + WORKLOAD.output)
        timings = measure_generation({"original": original, name: runner}, WORKLOAD, repeats=REPEATS)
        before, after = timings["original"], timings[name]
        found[name] = {
            "decode": ratio(before.tpot_rounds, after.tpot_rounds),
            "ttft": ratio(before.ttft_rounds, after.ttft_rounds),
        }
        print(
            f"{name:<18} decode {found[name]['decode'].median:.2f}×, TTFT {found[name]['ttft'].median:.2f}×", flush=True
        )
    return found


def judged(name: str, row: dict[str, Any], speed: dict[str, Ratio]) -> dict[str, Any]:
    """The row with these speed-ups, and its floors on them judged again."""
    evidence = {f"{what}.speedup": Measurement(r.median, r.low, r.high, r.n, "×") for what, r in speed.items()}
    floors = [floor for floor in floors_of(Recipe.load(name)) if floor.metric in evidence]
    again = {f.floor.metric: {"held": f.passed, "reason": f.reason} for f in judge(floors, evidence).floors}
    return row | {f"{what}_speedup": asdict(r) for what, r in speed.items()} | {"floors": row["floors"] | again}


def markdown(document: dict[str, Any]) -> str:
    """The result as a table, and a line for each floor that was missed."""
    lines = [
        "| recipe | verdict | perplexity | answers kept | decode speed-up | TTFT speed-up | size | to make | in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name, found in document["recipes"].items():
        if "error" in found:
            lines.append(f"| `{name}` | **no verdict** |" + " |" * 7)
            missed.append(f"- `{name}`: {found['error']}")
            continue
        reasons = [floor["reason"] for floor in found["floors"].values() if not floor["held"]]
        missed += [f"- `{name}`: {reason}" for reason in reasons]
        cells = [
            "**missed**" if reasons else "passed", _shown(found["perplexity"], 4), _shown(found["recovery"], 3),
            _speedup(found["decode_speedup"]), _speedup(found["ttft_speedup"]), f"{found['weights_ratio']:.2f}×",
            f"{found['seconds_to_make']:.0f} s", f"{found['seconds']:.0f} s",
        ]  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *missed] if missed else [])])


def _shown(figure: dict[str, float], digits: int) -> str:
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _speedup(figure: dict[str, float]) -> str:
    return f"{figure['median']:.2f}× [{figure['low']:.2f}, {figure['high']:.2f}]"


def page(document: dict[str, Any]) -> str:
    """`docs/recipes.md`."""
    made = f"{document['machine']}, {document['cores']} cores ({document['isa']})"
    versions = document["versions"]
    return f"""# The built-in recipes on a CPU

Every recipe on the built-in model (`python -m benchmarks.recipes`), judged by the floors it ships with. Perplexity a
byte of held-out code and the answers kept of multiple choice are optimized ÷ original on the same items. Speed-ups are
those of the artifact over Hugging Face `generate` on the original in bfloat16: batch 1, {WORKLOAD.prompt} tokens in,
{WORKLOAD.output} out, {REPEATS} interleaved rounds. With 95 % intervals, of which a floor needs the unfavourable end.
Size is the weights' after ÷ before. *To make* are calibration, passes and compilation, *in all* the proof too, less the
original's evaluation where an earlier run had made it; both on a machine with other work.

{markdown(document)}

Where no kernel multiplies a format on this processor, its weights are decoded and its inputs rounded, and the product
is one of 16 bits: right, and slower than INT8 or INT4. FP8 and the 4-bit floats are for GPUs that have them.

{made}, torch {versions["torch"]}, transformers {versions["transformers"]}, {document["date"]}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="recipes, comma-separated; all unless given")
    parser.add_argument("--keep", type=Path, help="folder in which artifacts, reports and the baseline are left")
    parser.add_argument("--part", choices=("runs", "speed"), help="one of the two alone; speed needs --keep")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(builtin())
    if unknown := set(names) - set(builtin()):
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}")
    document: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"recipes": {}}
    rows = document["recipes"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name in names if options.part != "speed" else ():
            rows[name] = run(name, folder)
            print(f"{name:<18} {rows[name].get('error', 'measured')}", flush=True)
            OUT.write_text(
                json.dumps(document, indent=2) + "\n", encoding="utf-8"
            )  # what is interrupted keeps its rows
        if options.part != "runs":
            there = [name for name in names if "error" not in rows[name]]
            for name, speed in time_artifacts(there, folder).items():
                rows[name] = judged(name, rows[name], speed)
    machine, cores, isa = describe("cpu")
    document = {
        "command": "python -m benchmarks.recipes", "machine": machine, "cores": cores, "isa": isa,
        "versions": installed_versions(), "date": datetime.now(UTC).date().isoformat(), "commit": commit(),
        "recipes": {name: rows[name] for name in builtin() if name in rows},
    }  # fmt: skip
    OUT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if all("error" in rows.get(name, {}) or "decode_speedup" in rows.get(name, {}) for name in builtin()):
        (RESULTS.parents[1] / "docs" / "recipes.md").write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    main()
