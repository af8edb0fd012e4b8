"""Every kernel and step that a GPU claim rests on, measured beside what it replaces, in runs of a few minutes.

    python -m benchmarks.gpu [--parts gemv,attention,blocks,steps-8b,…] [--out FILE]
    python -m benchmarks.gpu --join FILE…   results of one machine into the committed one; needs no device
    python -m benchmarks.gpu --smoke        the same code on tiny shapes and any device, to see that it runs

Kernels run from a captured graph over rotating operands of more than five times the L2 cache, so that weights are cold
and launches are not what is measured; candidates are interleaved. Bandwidth shares divide by the read bandwidth that
the same run measured. Writes `benchmarks/results/gpu.json` and the table of `docs/gpu.md`, after every part: a part
that fails, or is stopped, costs no other. Figures of two machines or versions are never put into one result.

Imports only what is needed beside torch, triton and transformers: no pydantic, lm-eval or datasets.
"""

from __future__ import annotations

import argparse
import platform
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import caches, kernels, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.claims import DOC, RESULT, load, merged, write

PARTS: dict[str, Callable[[Bench], None]] = {
    "gemv": kernels.gemv, "gemm": kernels.gemm, "prefill": kernels.prefill, "attention": kernels.attention,
    "blocks": caches.attention, "kv_write": caches.write, "elementwise": kernels.elementwise,
    "steps-8b": partial(models.steps, size="8B"), "steps-1b": partial(models.steps, size="1B"),
    "contexts": models.contexts, "quantizers": models.quantizers,
}  # fmt: skip


def main() -> None:
    """Measure the parts that were asked for and write the result beside earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, help="JSON; by default the committed result, and with it docs/gpu.md")
    args = parser.parse_args()
    out = args.out or (None if args.smoke else RESULT)
    if args.join:
        save(out or RESULT, *(load(file) for file in args.join))
        return
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"unknown parts {', '.join(unknown)}: use some of {', '.join(PARTS)}.")
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device; --smoke runs its code on tiny shapes without one.")
    failed = run(parts, args.smoke, out)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}. The other parts are written.")


def run(parts: list[str], smoke: bool, out: Path | None) -> list[str]:
    """Measure one part after the other, and write what there is after each; the parts that failed."""
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), *((16, 1) if smoke else ()))
    earlier = load(out) if out else None
    if earlier:
        merged(earlier, document(bench, {}))  # refuses another machine's before minutes are spent
    kernels.ceilings(bench)
    spent: dict[str, float] = {}
    failed = []
    for part in parts:
        began = time.perf_counter()
        try:
            PARTS[part](bench)
        except Exception:  # whatever it is, the other parts are worth having
            traceback.print_exc()
            failed.append(part)
        bench.free()
        spent[part] = round(time.perf_counter() - began, 1)
        print(f"{part}: {spent[part]} s{', failed' if part in failed else ''}", flush=True)
        if out:
            save(out, earlier, document(bench, {name: took for name, took in spent.items() if name not in failed}))
    return failed


def document(bench: Bench, spent: dict[str, float]) -> dict[str, Any]:
    """The rows found so far, and where they come from."""
    return {
        "device": device_name(bench.device), "versions": versions(), "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(), "seconds": spent, "rows": bench.rows,
    }  # fmt: skip


def save(out: Path, *documents: dict[str, Any] | None) -> None:
    """Write what was found; the page too where `out` is the committed result."""
    found = merged(*(one for one in documents if one))
    write(found, out)
    if out == RESULT:
        write(found, DOC)
    print(f"written to {out}", flush=True)


def device_name(device: torch.device) -> str:
    """The GPU as its driver names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
