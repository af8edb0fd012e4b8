"""Every kernel and step that a GPU claim rests on, measured beside what it replaces, in one run of a few minutes.

    python -m benchmarks.gpu [--parts gemv,attention,blocks,steps,…] [--out FILE]
    python -m benchmarks.gpu --smoke        the same code on tiny shapes and any device, to see that it runs

Kernels run from a captured graph over rotating operands of more than five times the L2 cache, so that weights are cold
and launches are not what is measured; candidates are interleaved. Bandwidth shares divide by the read bandwidth that
the same run measured. Writes `benchmarks/results/gpu.json` and the table of `docs/gpu.md`.

Imports only what is needed beside torch, triton and transformers: no pydantic, lm-eval or datasets.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu import caches, kernels, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.claims import DOC, RESULT, page

PARTS: dict[str, Callable[[Bench], None]] = {
    "gemv": kernels.gemv, "gemm": kernels.gemm, "prefill": kernels.prefill, "attention": kernels.attention,
    "blocks": caches.attention, "kv_write": caches.write, "elementwise": kernels.elementwise,
    "steps": models.steps, "contexts": models.contexts, "quantizers": models.quantizers,
}  # fmt: skip


def main() -> None:
    """Measure the parts that were asked for and write the result beside earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device; --smoke runs its code on tiny shapes without one.")
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), *((16, 1) if args.smoke else ()))
    kernels.ceilings(bench)
    spent = {}
    for part in args.parts.split(","):
        began = time.perf_counter()
        PARTS[part](bench)
        spent[part] = round(time.perf_counter() - began, 1)
        bench.free()
    if args.smoke and args.out is None:
        return
    out = args.out or RESULT
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    document = {
        "command": f"python -m benchmarks.gpu --parts {args.parts}", "device": device_name(bench.device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(), "seconds": earlier.get("seconds", {}) | spent,
        "rows": earlier.get("rows", {}) | bench.rows,
    }  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if out == RESULT:
        DOC.write_text(page(document), encoding="utf-8")
    print(f"written to {out}")


def device_name(device: torch.device) -> str:
    """The GPU as its driver names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
