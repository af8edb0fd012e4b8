"""Every built-in recipe on the reference model, as `optimizer run` carries it out: verdict, quality, speed, size, time.

    python -m benchmarks.recipes [--only default,int4-rtn] [--keep FOLDER]

A process a recipe. The original is evaluated once for all recipes that ask for the same tasks; every speed-up is
measured against it in the recipe's own run, interleaved. Writes `benchmarks/results/recipes-cpu.json`, and
`docs/recipes.md`, which shows it as a table. With `--only`, the other recipes' results stay. `--keep` leaves the reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, commit
from optimizer.recipe import builtin
from optimizer.report import Report

OUT = RESULTS / "recipes-cpu.json"
FLOOR = {"metric", "rule", "value", "low", "high", "passed"}
PERPLEXITY, CHOICE = ("reference_perplexity", "byte_perplexity"), ("reference_next_line", "acc")


def run(name: str, folder: Path) -> dict[str, Any]:
    """What the run of a recipe found, or `failed` and its last words where it ended without a verdict."""
    code = f"from benchmarks import recipes; recipes.optimize_reference({name!r}, {str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"verdict": "failed to run", "why": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return row(Report.from_json((folder / name / "report.json").read_text(encoding="utf-8")))


def optimize_reference(name: str, folder: str) -> None:
    """One run, in a process of its own: `report.md`, `report.html` and `report.json` in `<folder>/<name>`."""
    from optimizer.api import optimize
    from optimizer.baseline_cache import BaselineCache

    out = Path(folder) / name
    result = optimize("reference", name, out=out / "artifact", baselines=BaselineCache(Path(folder) / "baselines"))
    out.mkdir(exist_ok=True)  # a refused model left no artifact in it
    for kind in ("md", "html", "json"):
        result.report.save(out / f"report.{kind}")


def row(report: Report) -> dict[str, Any]:
    """What the table shows of a report."""
    quality = {(entry.task, entry.metric): entry for entry in report.quality}
    cell, memory, spent = report.speed[0], report.memory, report.break_even
    assert spent is not None
    repaired = report.attribution is not None and report.attribution.reverted
    return {
        "verdict": "passed once repaired" if report.verdict == "passed" and repaired else report.verdict,
        "why": "" if report.verdict == "passed" and not repaired else report.summary,
        "floors": [floor.model_dump(include=FLOOR) for floor in report.floors],
        "perplexity": interval(quality[PERPLEXITY], "ratio"),
        "recovery": interval(quality[CHOICE], "ratio"),
        "decode_speedup": interval(cell.decode_speedup, "value"),
        "ttft_speedup": interval(cell.ttft_speedup, "value"),
        "weights_ratio": memory.weights_bytes_after / memory.weights_bytes_before,
        "kernels": report.ledger.kernels,
        "optimization_seconds": spent.optimization_seconds,
        "run_seconds": spent.run_seconds,
        "machine": f"{report.machine.device}, {report.machine.cores} cores ({report.machine.isa})",
        "versions": {name: report.versions[name] for name in ("torch", "transformers")},
        "date": report.created[:10],
        "commit": commit(),
    }  # fmt: skip


def interval(entry: Any, name: str) -> dict[str, float | None]:
    """A value of a report with its interval."""
    low, high = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    return {"value": getattr(entry, name), "low": getattr(entry, low), "high": getattr(entry, high)}


def markdown(document: dict[str, Any]) -> str:
    """The result as a table, and a line for each recipe that was not released as it is."""
    lines = [
        "| recipe | verdict | perplexity | answers kept | decode speed-up | TTFT speed-up | size | s to make | s with proof |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    why = []
    for name, found in document["recipes"].items():
        if "perplexity" not in found:
            lines.append(f"| `{name}` | **{found['verdict']}** |" + " |" * 7)
        else:
            verdict = found["verdict"] if found["verdict"] == "passed" else f"**{found['verdict']}**"
            cells = [
                verdict, _shown(found["perplexity"], "×{:.4f}"), _shown(found["recovery"], "{:.3f}"),
                _shown(found["decode_speedup"], "{:.2f}×"), _shown(found["ttft_speedup"], "{:.2f}×"),
                f"{found['weights_ratio']:.2f}×", f"{found['optimization_seconds']:.0f}", f"{found['run_seconds']:.0f}",
            ]  # fmt: skip
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        if found["why"]:
            why.append(f"- `{name}`: {found['why']}")
    return "\n".join([*lines, "", *why, *([""] if why else [])])


def _shown(figure: dict[str, float | None], form: str) -> str:
    ends = [form.strip("×").format(figure[end]) for end in ("low", "high") if figure[end] is not None]
    return form.format(figure["value"]) + (f" [{', '.join(ends)}]" if ends else "")


def page(document: dict[str, Any]) -> str:
    """`docs/recipes.md`."""
    found = [row for row in document["recipes"].values() if "machine" in row]
    machines = sorted({f"{row['machine']}, torch {row['versions']['torch']}" for row in found})
    dates = sorted({row["date"] for row in found})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"""# The built-in recipes on a CPU

Each recipe on the built-in model, as `optimizer run reference --recipe NAME` carries it out
(`python -m benchmarks.recipes`). Perplexity a byte of held-out code and the answers kept of multiple choice are
optimized ÷ original, on the same items; speed-ups are against Hugging Face `generate` on the original in bfloat16, batch 1,
{document["prompt"]} tokens in, {document["output"]} out, interleaved in the recipe's own run; size is weights after ÷ before.
Medians with 95 % intervals. *To make* are calibration, passes and compilation; *with proof* is the run, less the
original's evaluation where another recipe's run had made it. Seconds are those of a machine with other work.

{markdown(document)}
{"; ".join(machines)}; {when}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="recipes, comma-separated; all unless given")
    parser.add_argument("--keep", type=Path, help="folder in which reports, artifacts and the baseline are left")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(builtin())
    if unknown := set(names) - set(builtin()):
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}")
    document: dict[str, Any] = {"command": "python -m benchmarks.recipes", "prompt": 128, "output": 64, "recipes": {}}
    if options.only and OUT.is_file():
        document = json.loads(OUT.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            document["recipes"][name] = found = run(name, options.keep or Path(temporary))
            print(f"{name:<18} {found['verdict']}  {found['why']}", flush=True)
            document["recipes"] = {key: document["recipes"][key] for key in builtin() if key in document["recipes"]}
            OUT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")  # an interrupted run keeps its rows
    if set(document["recipes"]) == set(builtin()):
        (RESULTS.parents[1] / "docs" / "recipes.md").write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    main()
