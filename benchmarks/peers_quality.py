"""Our quantizers against llm-compressor's: the same models, calibration tokens and evaluation.

    python -m benchmarks.peers_quality --peer-python PATH [--tokens 40000] [--rows 16]
        [--only w4a16-gptq,fp8-static] [--models plain]

`PATH` is the Python of an environment with llm-compressor. The reference model, plain and with planted outliers, and
the tokens are exported to a folder. Each scheme of each side then runs in a process of its own, through the one
protocol of `benchmarks/peers/llm_compressor.py`: seconds and memory compare, and so do log-likelihoods, window by
window. Unquantized, both sides must agree, and where activations are rounded, that must show in the logits. Writes
`benchmarks/results/peers_quality.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.decode import RESULTS, commit
from benchmarks.peers import llm_compressor as peer
from benchmarks.quality import LENGTH, SCHEMES, held_out, perplexity
from optimizer.backends.linear import QuantizedLinear
from optimizer.calibration import load_calibration
from optimizer.evals.ceilings import describe
from optimizer.evals.outliers import plant_outliers
from optimizer.evals.statistics import perplexity_ratio
from optimizer.passes.base import Context
from optimizer.passes.calibration import Calibration
from optimizer.passes.registry import build_pass
from optimizer.recipe import CalibrationSpec
from optimizer.source import load_source

OURS = SCHEMES | {"none": [], "nvfp4-mse": [{"weights": "nvfp4", "activations": "nvfp4", "clip": "mse"}]}

AGREEMENT = 1e-5
"""How far, relatively, a window's log-likelihood may differ between two versions of transformers: float32 rounding."""

WORSE = 1.002
"""A perplexity so many times theirs is called worse."""


@dataclass(frozen=True)
class Pair:
    """A scheme of theirs and what we have for it. `activations`: both round them."""

    theirs: str
    ours: str
    activations: bool = False
    note: str = ""


PAIRS = (
    Pair("w4a16-rtn", "int4-rtn"),
    Pair("w4a16-rtn-mse", "int4-rtn-mse"),
    Pair("w4a16-gptq", "int4-gptq"),
    Pair("w4a16-gptq-mse", "int4-gptq-mse"),
    Pair("w4a16-gptq", "int4-awq", note="ours: AWQ"),
    Pair("w4a16-awq", "int4-awq", note="theirs with memory pinning off: it fails without an accelerator"),
    Pair("w8a8-rtn", "w8a8-naive", activations=True),
    Pair("w8a8-smoothquant", "w8a8-smoothquant", activations=True),
    Pair("w8a8-smoothquant-gptq", "w8a8-smoothquant-gptq", activations=True),
    Pair("fp8-dynamic", "fp8-dynamic", activations=True),
    Pair("fp8-static", "fp8-static", activations=True),
    Pair("nvfp4", "nvfp4", activations=True),
    Pair("nvfp4-mse", "nvfp4-mse", activations=True),
)


def prepare(scheme: str) -> Callable[[Any, Tensor], None]:
    """What runs our passes of a scheme on a model, for `peer.Side`."""

    def quantize(model: Any, rows: Tensor) -> None:
        context = Context(calibration=Calibration(tuple(rows)))
        for options in OURS[scheme]:
            step = build_pass(options.get("name", "quantize"), {k: v for k, v in options.items() if k != "name"})
            step.check(model, context)
            step.run(model, context)

    return quantize


def keep_activations(model: Any) -> None:
    """Leave the inputs of all layers as they are."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.keep_inputs()


def export(folder: Path, models: Iterable[str], tokens: int, rows: int) -> str:
    """Write the models in their own type, and the token ids; returns what was planted."""
    source = load_source("reference")
    planted, what = plant_outliers(source.model)
    variants = dict(zip(peer.MODELS, (source.model, planted), strict=True))
    for name in models:
        variants[name].save_pretrained(folder / "models" / name)
        source.tokenizer.save_pretrained(folder / "models" / name)
    calibration = load_calibration(
        None, source.tokenizer, source.model.config, CalibrationSpec(samples=rows, length=LENGTH)
    )
    windows = torch.cat(held_out(source.tokenizer, tokens))
    save_file({"calibration": torch.stack(calibration.rows), "windows": windows}, folder / "data.safetensors")
    return what.describe()


def measure(folder: Path, side: str, scheme: str, command: list[str]) -> dict[str, Any]:
    """What a scheme cost and its log-likelihoods `[W]` a model; or, where its process fails, `failed` and why."""
    environment = {k: v for k, v in os.environ.items() if side == "ours" or k != "PYTHONPATH"}
    log = folder / f"{side}-{scheme}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, str(folder), scheme], stdout=output, stderr=output, env=environment, check=False
        )
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        return {"failed": last[:300]}
    facts = json.loads((folder / f"{side}-{scheme}.json").read_text(encoding="utf-8"))
    return facts | {"likelihoods": load_file(folder / f"{side}-{scheme}.safetensors")}


def compare(pair: Pair, theirs: dict[str, Any], ours: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Any]:
    """Both sides of a pair, each against the unquantized model and ours against theirs, paired by window."""
    row: dict[str, Any] = asdict(pair)
    for side, facts in (("theirs", theirs), ("ours", ours)):
        if "failed" in facts:
            return row | {"failed": f"{side}: {facts['failed']}"}
    for side, facts in (("theirs", theirs), ("ours", ours)):
        inactive = [name for name, model in facts["models"].items() if not model["activation_effect"]]
        if pair.activations and inactive:
            return row | {"failed": f"{side}: activations are not rounded in {', '.join(inactive)}"}
        row[f"{side}_process"] = facts["process"]
    row["models"] = {}
    for name in base:
        after = {"theirs": theirs["likelihoods"][name], "ours": ours["likelihoods"][name]}
        row["models"][name] = {
            side: {"perplexity": perplexity(found), "ratio": _ratio(base[name], found)} | facts["models"][name]
            for (side, found), facts in zip(after.items(), (theirs, ours), strict=True)
        } | {"ours_over_theirs": _ratio(after["theirs"], after["ours"])}
    return row


def _ratio(before: Tensor, after: Tensor) -> dict[str, float]:
    return asdict(perplexity_ratio(before.tolist(), after.tolist(), [float(LENGTH - 1)] * len(before)))


def agreed(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Tensor]:
    """The unquantized models' log-likelihoods, which are the same on both sides; else the harness is wrong."""
    for side, facts in (("theirs", theirs), ("ours", ours)):
        if "failed" in facts:
            raise SystemExit(f"{side} cannot evaluate the unquantized model: {facts['failed']}")
    base: dict[str, Tensor] = {name: ours["likelihoods"][name] for name in ours["models"]}
    for name, found in base.items():
        gap = float(((theirs["likelihoods"][name] - found) / found).abs().max())
        if not gap <= AGREEMENT:
            raise SystemExit(f"unquantized, {name}: log-likelihoods of the two sides differ by {gap:.1e}, relatively.")
    return base


def _label(row: dict[str, Any]) -> str:
    return row["theirs"] + (f" ({row['note']})" if row["note"] else "")


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"


def markdown(document: dict[str, Any]) -> str:
    """A table for each model, then what is worse than theirs."""
    lines: list[str] = []
    for name, base in document["unquantized"].items():
        lines += [
            f"**{name}**, perplexity {base:.3f} unquantized", "",
            "| scheme | theirs, × unquantized | ours, × unquantized | ours / theirs | theirs s | ours s "
            "| theirs, peak MiB (step) | ours, peak MiB (step) |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in document["rows"]:
            lines.append(f"| {_label(row)} | " + " | ".join(_cells(row, name)) + " |")
        lines.append("")
    versions = document["versions"]
    theirs = ", ".join(f"{package} {found}" for package, found in versions["theirs"].items())
    ours = ", ".join(f"{package} {found}" for package, found in versions["ours"].items())
    return "\n".join(
        [
            *lines,
            f"Theirs: {theirs}. Ours: {ours}. {document['machine']}, {document['threads']} threads, float32. "
            f"{document['tokens']} held-out tokens, {document['calibration_rows']} × {LENGTH} of calibration, "
            f"{document['date']}, {document['commit']}.",
            "", *worse(document["rows"]),
        ]
    )  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """`docs/peers.md`."""
    return (
        "# Quality beside llm-compressor\n\n"
        "The same model, calibration tokens, held-out windows and evaluation code, each side in an environment and "
        "processes of its own\n(`python -m benchmarks.peers_quality`). *Outliers* is the same model with large "
        "activations planted; see\n[quality.md](quality.md). Ratios have 95 % intervals paired by window; seconds and "
        "peaks are those of one run, on a machine\nwith other work. Round-to-nearest, where both must agree, agrees "
        "exactly.\n\n" + markdown(document).rstrip() + "\n"
    )


def _cells(row: dict[str, Any], name: str) -> Iterable[str]:
    if "failed" in row:
        return [f"failed: {row['failed']}", *[""] * 6]
    model, sides = row["models"][name], ("theirs", "ours")
    memory = (row[f"{side}_process"] for side in sides)
    return [
        *(f"{model[side]['perplexity']:.3f}, {_interval(model[side]['ratio'])}" for side in sides),
        _interval(model["ours_over_theirs"]),
        *(f"{model[side]['seconds']:.1f}" for side in sides),
        *(f"{m['peak_bytes'] / 2**20:.0f} ({m['step_bytes'] / 2**20:.0f})" for m in memory),
    ]


def worse(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each scheme in which our perplexity is `WORSE` times theirs, or more."""
    return [
        f"Worse than theirs, {name}: {row['ours']} against {row['theirs']}, {_interval(model['ours_over_theirs'])}"
        for row in rows
        for name, model in row.get("models", {}).items()
        if not model["ours_over_theirs"]["value"] < WORSE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rows", type=int, default=16, help=f"calibration rows of {LENGTH} tokens")
    parser.add_argument("--only", help="schemes of theirs, comma-separated")
    parser.add_argument("--models", choices=[*peer.MODELS, "both"], default="both")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers_quality.json")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [pair.theirs for pair in PAIRS]
    if unknown := set(wanted) - {pair.theirs for pair in PAIRS}:
        parser.error(f"no scheme is called {', '.join(sorted(unknown))}")
    pairs = [pair for pair in PAIRS if pair.theirs in wanted]
    models = peer.MODELS if options.models == "both" else (options.models,)
    with tempfile.TemporaryDirectory() as temporary:
        command = f"python -m benchmarks.peers_quality --rows {options.rows} --tokens {options.tokens}"
        document = {"command": command} | benchmark(
            Path(temporary), options.peer_python, pairs, models, options.tokens, options.rows
        )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.only is None and options.models == "both":
        (RESULTS.parents[1] / "docs" / "peers.md").write_text(page(document), encoding="utf-8")
    print(f"\n{markdown(document)}\n\nwritten to {options.out}")


def benchmark(
    folder: Path, peer_python: Path, pairs: list[Pair], models: Iterable[str], tokens: int, rows: int
) -> dict[str, Any]:
    """Every scheme of both sides, once each."""
    planted = export(folder, models, tokens, rows)
    commands = {
        "theirs": [str(peer_python), str(Path(peer.__file__).resolve())],
        "ours": [sys.executable, "-c", "from benchmarks import peers_quality; peers_quality.ours()"],
    }
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def measured(side: str, scheme: str) -> dict[str, Any]:
        if (side, scheme) not in found:
            found[side, scheme] = measure(folder, side, scheme, commands[side])
        return found[side, scheme]

    base = agreed(measured("theirs", "none"), measured("ours", "none"))
    compared: list[dict[str, Any]] = []
    for pair in pairs:
        row = compare(pair, measured("theirs", pair.theirs), measured("ours", pair.ours), base)
        compared.append(row)
        for name, model in row.get("models", {}).items():
            print(f"{_label(row):<24} {name:<9} {_interval(model['ours_over_theirs'])}", flush=True)
        if "failed" in row:
            print(f"{_label(row):<24} failed, {row['failed']}", flush=True)
    windows = len(next(iter(base.values())))
    return {
        "machine": describe("cpu")[0],
        "threads": found["ours", "none"]["process"]["threads"],
        "versions": {side: found[side, "none"]["versions"] for side in commands},
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "planted": planted,
        "tokens": windows * (LENGTH - 1),
        "calibration_rows": rows,
        "unquantized": {name: perplexity(likelihoods) for name, likelihoods in base.items()},
        "rows": compared,
    }


def ours() -> None:
    """Our side of one scheme, in a process of its own: the arguments are the folder and the scheme."""
    packages = ("roofline-optimizer", "torch", "transformers")
    side = peer.Side("ours", packages, prepare, keep_activations)
    peer.run(side, Path(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    main()
