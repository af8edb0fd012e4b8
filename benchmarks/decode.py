"""Decode speed of the recipes that have kernels of their own against Hugging Face eager `generate`, interleaved.

    python -m benchmarks.decode [MODEL] [--batch 1] [--prompt 128] [--output 64] [--repeats 9]

Writes `benchmarks/results/decode-<device>.json` with the machine, the versions, the date and the commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optimizer.artifact import installed_versions
from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.runner import BaseRunner, EagerRunner
from optimizer.evals.ceilings import describe
from optimizer.evals.timing import Workload, measure_generation, ratio
from optimizer.passes.base import Context, view
from optimizer.pipeline import apply_passes, choose_device
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import load_source

BASELINE = "Hugging Face generate"
RECIPES = ("default", "int4-rtn")
"""One recipe a weight format: how the integers were found does not change the speed."""
RESULTS = Path(__file__).parent / "results"


def runners(model: Any, tokenizer: Any, workload: Workload) -> dict[str, BaseRunner]:
    """The baseline, the unquantized model compiled, and one runner for each distinct list of passes."""
    found: dict[str, BaseRunner] = {BASELINE: EagerRunner(model, tokenizer)}
    lists = {"merge + decode, not quantized": [{"name": "merge_linears"}, {"name": "decode"}]}
    for name in RECIPES:
        lists[f"recipe {name}"] = Recipe.load(name).passes
    template = Recipe.load("default")
    for name, passes in lists.items():
        copy, context = view(model), Context(tokenizer=tokenizer, batch=workload.batch)
        apply_passes(copy, template.model_copy(update={"passes": passes}).build_passes(), context, Progress())
        runner = context.make_runner(copy, tokenizer)
        if isinstance(runner, CompiledRunner):
            runner.warm_up(workload.batch, workload.prompt + workload.output)
        found[name] = runner
    return found


def commit() -> str:
    """The commit that is checked out, with a mark when the tree differs from it."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def markdown(document: dict[str, Any]) -> str:
    """The result as the table that the README shows."""
    lines = ["| | TTFT ms | TPOT ms | decode speed-up | TTFT speed-up |", "|---|---|---|---|---|"]
    for name, row in document["rows"].items():
        decode, ttft = row["decode_speedup"], row["ttft_speedup"]
        lines.append(
            f"| {name} | {row['ttft_seconds']['median'] * 1e3:.1f} | {row['tpot_seconds']['median'] * 1e3:.2f} "
            f"| {decode['median']:.2f}× [{decode['low']:.2f}, {decode['high']:.2f}] | {ttft['median']:.2f}× |"
        )
    versions = document["versions"]
    lines += ["", f"{document['machine']}, {document['cores']} cores ({document['isa']}), torch {versions['torch']}, "
              f"transformers {versions['transformers']}, {document['date']}; medians with 95 % intervals."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    for name, default in (("batch", 1), ("prompt", 128), ("output", 64), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = choose_device(None)
    source = load_source(args.model, device=device)
    workload = Workload(args.batch, args.prompt, args.output)
    timings = measure_generation(runners(source.model, source.tokenizer, workload), workload, repeats=args.repeats)
    base = timings[BASELINE]
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        rows[name] = {
            "ttft_seconds": asdict(timing.ttft),
            "tpot_seconds": asdict(timing.tpot),
            "decode_speedup": asdict(ratio(base.tpot_rounds, timing.tpot_rounds)),
            "ttft_speedup": asdict(ratio(base.ttft_rounds, timing.ttft_rounds)),
        }
    machine, cores, isa = describe(device)
    document = {
        "command": "python -m benchmarks.decode", "model": args.model, "dtype": str(source.model.dtype),
        "workload": asdict(workload), "repeats": args.repeats, "machine": machine, "cores": cores, "isa": isa,
        "versions": installed_versions(), "date": datetime.now(UTC).date().isoformat(), "commit": commit(),
        "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"decode-{device.type}.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{markdown(document)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
