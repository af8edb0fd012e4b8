"""Our GPTQ and AWQ checkpoints of the reference model, loaded by GPTQModel in an environment of its own.

    python -m benchmarks.consumers --gptqmodel-python ENVIRONMENT/bin/python

Compares the weights that its own code makes of the files with those that were evaluated, and its logits with ours, and
writes `benchmarks/results/consumers.json`. transformers with compressed-tensors is checked by the test suite.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.decode import RESULTS
from optimizer.artifact import installed_versions
from optimizer.backends.linear import QuantizedLinear
from optimizer.checkpoint import save_checkpoint
from optimizer.passes.base import Context, view
from optimizer.passes.quantize import Quantize
from optimizer.source import load_source

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-int4": ("gptq", {"bits": 4, "group_size": 128}),
    "gptq-int8": ("gptq", {"bits": 8, "group_size": 128}),
    "awq-int4": ("awq", {"bits": 4, "group_size": 128}),
    "awq-int4-asym": ("awq", {"bits": 4, "group_size": 128, "symmetric": False}),
}
"""Folder name: layout, and the options of `quantize`."""

PEER = Path(__file__).parent / "peers" / "load_gptqmodel.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel-python", required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "consumers.json")
    options = parser.parse_args()
    source = load_source("reference")
    tokens = torch.randint(3, 4000, (2, 32), generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work, models = Path(temporary), {}
        for name, (layout, quantize) in CASES.items():
            model = view(source.model).to(torch.float16)
            Quantize(**quantize).run(model, Context(scale_dtype=torch.float16))
            (work / name).mkdir()
            save_checkpoint(model, source.tokenizer, work / name, layout)
            models[name] = model
        save_file({"tokens": tokens}, work / "tokens.safetensors")
        out, given = work / "out.safetensors", [str(work / name) for name in CASES]
        command = [options.gptqmodel_python, str(PEER), str(out), str(work / "tokens.safetensors"), *given]
        subprocess.run(command, check=True)
        theirs = load_file(out)
        for name, model in models.items():
            layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
            worst = max(
                float((theirs[f"{name}/{n}"] - m.stored_weight().dequantize()).abs().max()) for n, m in layers.items()
            )
            with torch.no_grad():
                logits = model(tokens).logits.float()
            away = float((theirs[f"{name}/logits"] - logits).norm() / logits.norm())
            rows[name] = {"layers": len(layers), "largest_weight_difference": worst, "relative_logit_difference": away}
            print(name, rows[name])
    version = "import importlib.metadata as m; print(m.version('gptqmodel'))"
    found = subprocess.run([options.gptqmodel_python, "-c", version], capture_output=True, text=True, check=True)
    document = {
        "consumer": f"GPTQModel {found.stdout.strip()}",
        "versions": installed_versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
