"""Dense bfloat16 linears on a CPU: oneDNN beside our kernel, by shape and rows, interleaved with cold weights.

    python -m benchmarks.dense_cpu

Writes `benchmarks/results/dense_cpu.json`: the times of both and what `DenseLinear` chooses from them.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from optimizer.backends.kernels.bf16_linear import bf16_linear
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.evals.ceilings import describe
from optimizer.evals.timing import rotate, time_interleaved

RESULT = Path(__file__).parent / "results" / "dense_cpu.json"
SHAPES = ((4096, 384), (384, 384), (4096, 1024), (2048, 1024), (1024, 2816))  # [N, K]
ROWS = (1, 2, 4, 8, 16, 64)
CACHE = 8 << 20  # bytes; weights rotate over five times as many


def measure() -> list[dict[str, Any]]:
    """Median microseconds of each shape and number of rows."""
    if not (kernels := cpu_kernels()).loaded:
        raise SystemExit(f"our kernels are not loaded: {kernels.reason}")
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for outputs, features in SHAPES:

        def make(n: int = outputs, k: int = features) -> torch.Tensor:
            return torch.randn(n, k, generator=generator).bfloat16()

        for rows in ROWS:
            x = torch.randn(rows, features, generator=generator).bfloat16()
            weights = {name: rotate(make, CACHE) for name in ("onednn", "ours")}
            calls = {
                "onednn": lambda x=x, w=weights["onednn"]: nn.functional.linear(x, next(w)),
                "ours": lambda x=x, w=weights["ours"]: bf16_linear(x, next(w), None),
            }
            times = {name: 1e6 * median(t) for name, t in time_interleaved(calls, repeats=40, warmup=8).items()}
            found.append({"outputs": outputs, "features": features, "rows": rows, **times})
    return found


def main() -> None:
    """Measure, print and keep."""
    rows = measure()
    device, cores, isa = describe(torch.device("cpu"))
    machine = {"device": device, "cores": cores, "isa": isa, "torch": torch.__version__, "date": str(date.today())}
    for row in rows:
        ratio = row["onednn"] / row["ours"]
        print(f"[{row['rows']}, {row['features']}] x {row['outputs']}: oneDNN {row['onednn']:.0f} µs, "
              f"ours {row['ours']:.0f} µs, {ratio:.2f}×")  # fmt: skip
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
