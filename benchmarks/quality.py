"""What each quantization scheme costs in perplexity: the reference model, plain and with planted outliers.

    python -m benchmarks.quality [--tokens 30000] [--schemes int4-rtn,int4-gptq]

Every scheme is made of the same model, calibrated on the same tokens and evaluated on the same held-out windows, so the
ratios are paired. Writes `benchmarks/results/quality.json`, and `docs/quality.md`, which shows it as a table.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import RESULTS, commit
from optimizer.artifact import installed_versions
from optimizer.backends.quantized_kv import register
from optimizer.calibration import load_calibration
from optimizer.evals.ceilings import describe
from optimizer.evals.outliers import plant_outliers
from optimizer.evals.statistics import perplexity_ratio
from optimizer.passes.base import Context, view
from optimizer.passes.calibration import Calibration, calibrate_on
from optimizer.passes.quantize import Quantize
from optimizer.passes.registry import build_pass
from optimizer.recipe import CalibrationSpec
from optimizer.source import load_source, reference_folder

INT4: dict[str, Any] = {"bits": 4, "group_size": 128}
SCHEMES: dict[str, list[dict[str, Any]]] = {
    "int8-rtn": [{}],
    "int4-rtn": [INT4],
    "int4-rtn-mse": [INT4 | {"clip": "mse"}],
    "int4-gptq": [INT4 | {"method": "gptq"}],
    "int4-gptq-mse": [INT4 | {"method": "gptq", "clip": "mse"}],
    "int4-awq": [INT4 | {"method": "awq"}],
    "int4-asym-rtn": [INT4 | {"symmetric": False}],
    "int4-asym-gptq": [INT4 | {"symmetric": False, "method": "gptq"}],
    "int4-asym-awq": [INT4 | {"symmetric": False, "method": "awq"}],
    "int4-rotate-gptq": [{"name": "rotate"}, INT4 | {"method": "gptq"}],
    "w8a8-naive": [{"activations": "int8"}],
    "w8a8-naive-static": [{"activations": "int8-static"}],
    "w8a8-smoothquant": [{"activations": "int8", "smooth": True}],
    "w8a8-smoothquant-gptq": [{"activations": "int8", "smooth": True, "method": "gptq"}],
    "w8a8-rotate": [{"name": "rotate"}, {"activations": "int8"}],
    "llm-int8": [{"activations": "llm-int8"}],
    "w4a8-gptq": [INT4 | {"activations": "int8", "method": "gptq"}],
    "w4a8-smoothquant-gptq": [INT4 | {"activations": "int8", "method": "gptq", "smooth": True}],
    "fp8-dynamic": [{"weights": "fp8", "activations": "fp8"}],
    "fp8-static": [{"weights": "fp8-tensor", "activations": "fp8-static"}],
    "fp8-block": [{"weights": "fp8-block", "activations": "fp8-group"}],
    "nvfp4": [{"weights": "nvfp4", "activations": "nvfp4"}],
    "nvfp4a16": [{"weights": "nvfp4"}],
    "mxfp4a16": [{"weights": "mxfp4"}],
    "mxfp4a16-gptq": [{"weights": "mxfp4", "method": "gptq"}],
    "kv-int8": [],
    "kv-fp8": [],
}
"""The passes of each scheme (`quantize` unless named otherwise)."""

LENGTH = 512
CALIBRATION = CalibrationSpec(samples=64, length=LENGTH)


def held_out(tokenizer: Any, tokens: int) -> list[Tensor]:
    """Windows `[B, 512]` of the held-out modules, up to about so many tokens."""
    file = reference_folder().parent / "held_out" / "perplexity.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    vocabulary = len(tokenizer)
    rows = calibrate_on(texts, tokenizer, samples=tokens // LENGTH, length=LENGTH, vocabulary=vocabulary).rows
    return list(Calibration(tuple(row for row in rows if len(row) == LENGTH)).batches(8 * LENGTH))


@torch.no_grad()
def log_likelihoods(model: Any, windows: list[Tensor]) -> Tensor:
    """The log-likelihood (nats) of each window's tokens after the first, `[windows]`."""
    found = []
    for batch in windows:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).sum((1, 2)))
    return torch.cat(found)


def perplexity(likelihoods: Tensor) -> float:
    """Per token, of windows of `LENGTH`."""
    return float((-likelihoods.sum() / (len(likelihoods) * (LENGTH - 1))).exp())


def quantized(model: Any, name: str, calibration: Calibration, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """A copy of the model in a scheme, and what making it took."""
    copy, began = view(model), time.perf_counter()
    context = Context(tokenizer=tokenizer, calibration=calibration, scale_dtype=torch.bfloat16)
    reports = []
    for options in SCHEMES[name]:
        step = build_pass(options.get("name", "quantize"), {k: v for k, v in options.items() if k != "name"})
        step.check(copy, context)
        reports.append(step.run(copy, context))
        if isinstance(step, Quantize):
            format = step.scheme.name
    seconds = time.perf_counter() - began
    if name.startswith("kv-"):
        copy.config._attn_implementation = register("int8" if name == "kv-int8" else "fp8")
        return copy, {"format": f"{name} cache, per head and token", "seconds": 0.0}
    return copy, {
        "format": format,
        "seconds": round(seconds, 2),
        "weight_error": max(c.weight_error or 0.0 for c in reports[-1].layers),
    }


def measure(model: Any, tokenizer: Any, schemes: list[str], tokens: int) -> dict[str, Any]:
    """Perplexity of a model and of each scheme of it."""
    windows = held_out(tokenizer, tokens)
    calibration = load_calibration(None, tokenizer, model.config, CALIBRATION)
    base = log_likelihoods(model, windows)
    counts = [float(LENGTH - 1)] * len(base)
    found: dict[str, Any] = {"unquantized": {"perplexity": perplexity(base)}}
    for name in schemes:
        copy, facts = quantized(model, name, calibration, tokenizer)
        after = log_likelihoods(copy, windows)
        ratio = perplexity_ratio(base.tolist(), after.tolist(), counts)
        found[name] = {"perplexity": perplexity(after), "ratio": asdict(ratio)} | facts
        print(f"{name:<24} {perplexity(after):8.3f}  {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]", flush=True)
    return {"tokens": len(base) * (LENGTH - 1), "calibration": str(calibration), "schemes": found}


GATES = (  # scheme, model, largest perplexity ratio; or the scheme whose excess it recovers, and the share
    ("int8-rtn", 1.005), ("fp8-dynamic", 1.015), ("fp8-static", 1.015), ("fp8-block", 1.015),
    ("w8a8-smoothquant", 1.02), ("kv-int8", 1.005), ("kv-fp8", 1.005),
)  # fmt: skip
RECOVERIES = (("int4-gptq-mse", "int4-rtn", 0.40), ("int4-awq", "int4-rtn", 0.30))


def verdicts(document: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was asked of a scheme, what was measured, and whether it holds, for each model."""
    rows = []
    for model, found in document["models"].items():
        schemes = found["schemes"]
        for name, limit in GATES:
            ratio = schemes[name]["ratio"]["value"]
            rows.append((model, f"`{name}` at most ×{limit:g}", f"×{ratio:.4f}", ratio <= limit))
        for name, other, share in RECOVERIES:
            excess = [schemes[n]["ratio"]["value"] - 1 for n in (name, other)]
            got = 1 - excess[0] / excess[1]
            rows.append((model, f"`{name}` recovers {share:.0%} of `{other}`'s excess", f"{got:.0%}", got >= share))
    naive = document["models"]["outliers"]["schemes"]["w8a8-naive"]["ratio"]["value"]
    rows.append(("outliers", "`w8a8-naive` fails visibly (more than ×1.1)", f"×{naive:.4f}", naive > 1.1))
    return rows


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"


def markdown(document: dict[str, Any]) -> str:
    """`docs/quality.md`."""
    models = document["models"]
    plain, outliers = (models[name]["schemes"] for name in ("plain", "outliers"))
    versions = document["versions"]
    tokens, base = f"{models['plain']['tokens']:,}", f"{plain['unquantized']['perplexity']:.2f}"
    lines = [
        "# Quality of the quantization schemes",
        "",
        f"Perplexity a token of the reference model on {tokens} held-out tokens in windows of {LENGTH},",
        f"as a multiple of the unquantized model's {base}, with 95 % intervals paired by",
        f"window. *Outliers*: the same model with {document['planted']},",
        f"which changes nothing it computes. Calibrated on {models['plain']['calibration']}.",
        "",
        "| scheme | formats | plain | outliers |",
        "|---|---|---|---|",
    ]
    for name, row in plain.items():
        if name != "unquantized":
            cells = (_interval(rows[name]["ratio"]) if name in rows else "–" for rows in (plain, outliers))
            lines.append(f"| `{name}` | {row['format']} | {' | '.join(cells)} |")
    lines += ["", "| model | asked | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {model} | {asked} | {got} | {'holds' if held else '**missed**'} |"
        for model, asked, got, held in verdicts(document)
    ]
    lines += [
        "",
        "INT8 weights miss their gate on the planted outliers: columns that were divided by 128 fall below the step of",
        "their row, and inputs 128 times larger make that count. Smoothing mends it (`w8a8-smoothquant`).",
        "",
        f"`python -m benchmarks.quality`, {document['machine']}, torch {versions['torch']}, {document['date']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    source = load_source("reference")
    model = source.model.float()  # exact: evaluation and calibration are float32 arithmetic on the bfloat16 weights
    planted, what = plant_outliers(model)
    names = options.schemes.split(",")
    models = {"plain": model, "outliers": planted}
    document: dict[str, Any] = {
        "machine": describe("cpu")[0],
        "versions": installed_versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "planted": what.describe(),
        "models": {name: measure(m, source.tokenizer, names, options.tokens) for name, m in models.items()},
    }
    if options.schemes != ",".join(SCHEMES) and options.out.is_file():  # some schemes again, beside the earlier others
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        for name, found in document["models"].items():
            found["schemes"] = earlier["models"][name]["schemes"] | found["schemes"]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if set(document["models"]["plain"]["schemes"]) == {"unquantized", *SCHEMES}:
        (RESULTS.parents[1] / "docs" / "quality.md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
