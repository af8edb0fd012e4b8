"""One row by each kind of weight on a CPU, as a share of the read bandwidth of the same run, weights cold.

    python -m benchmarks.gemv_cpu

A sample is one pass over copies of a layer that together are more than five times the last-level cache, as a step
passes over its layers. Samples of the kernels and of plain reads of 256 MB take turns, and every round of reads ends in
its fastest. Writes `benchmarks/results/gemv_cpu.json`, and the table in `docs/cpu.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.bf16_linear import bf16_linear
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.dynamic_int8_linear import dynamic_int8_linear
from optimizer.backends.kernels.w4a16_linear import w4a16_linear
from optimizer.backends.kernels.w8a16_linear import w8a16_linear
from optimizer.evals.ceilings import cache_bytes, describe, reads
from optimizer.evals.timing import COLD_CACHES, Summary, ratio, time_interleaved

RESULT = Path(__file__).parent / "results" / "gemv_cpu.json"
SHAPES = {  # [N, K]: the layers of the 167 M model of `peers_cpu`, merged as they are served, and two of an 8 B model
    "qkv": (1536, 1024), "o": (1024, 1024), "gate, up": (6912, 1024), "down": (1024, 3456),
    "8 B q": (4096, 4096), "8 B up": (14336, 4096),
}  # fmt: skip
KINDS = ("int4 g128, int8 inputs", "int4 g32, int8 inputs", "int8, int8 inputs", "int4 g128", "int8", "bf16")
INPUT_GROUP = 32  # values of an input that share a scale, as recipes serve
READ_BYTES = 256 << 20
ASKED = 0.80
"""The share that int4 weights of groups of 128 with int8 inputs are asked for, on a processor with VNNI."""


def weight(kind: str, n: int, k: int, generator: torch.Generator) -> list[Tensor]:
    """Random tensors of a weight `[n, k]`."""
    if kind == "bf16":
        return [torch.randn(n, k, generator=generator).bfloat16()]
    groups = k // int(kind.partition(" g")[2].partition(",")[0]) if kind.startswith("int4") else 1
    scale = torch.rand(n, groups, generator=generator) + 0.5
    if kind.startswith("int4"):
        return [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator), scale]
    return [torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator), scale]


def product(kind: str, x: Tensor, tensors: list[Tensor]) -> Tensor:
    """`x` by the weight that `weight` made."""
    if kind == "bf16":
        return bf16_linear(x, *tensors, None)  # type: ignore[no-any-return]
    if kind.endswith("int8 inputs"):
        return dynamic_int8_linear(x, *tensors, None, None, INPUT_GROUP)  # type: ignore[no-any-return]
    op = w4a16_linear if kind.startswith("int4") else w8a16_linear
    return op(x, *tensors, None, None)  # type: ignore[no-any-return]


def layer_pass(kind: str, n: int, k: int, cold_bytes: int) -> tuple[Callable[[], None], int]:
    """A pass over cold copies of one layer, and the bytes of weights it reads."""
    generator = torch.Generator().manual_seed(0)
    x, tensors = torch.randn(1, k, generator=generator).bfloat16(), weight(kind, n, k, generator)
    size = sum(t.nbytes for t in tensors)
    copies = [[t.clone() for t in tensors] for _ in range(cold_bytes // size + 1)]

    def run() -> None:
        for copy in copies:
            product(kind, x, copy)

    return run, size * len(copies)


def measure(
    shapes: dict[str, tuple[int, int]], threads: int, *, repeats: int, cold_bytes: int, read_bytes: int
) -> list[dict[str, Any]]:
    """A row for each shape and kind: GB/s, and the share of the best read, and of the best of the same round."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    memory, found = torch.rand(read_bytes // 4), []
    probes = {f"read {i}": read for i, read in enumerate(reads(memory))}
    for name, (n, k) in shapes.items():
        passes = {kind: layer_pass(kind, n, k, cold_bytes) for kind in KINDS}
        calls: dict[str, Callable[[], object]] = {kind: run for kind, (run, _) in passes.items()}
        times = time_interleaved(calls | probes, repeats=repeats, warmup=2)
        by_round = [read_bytes / min(times[probe][i] for probe in probes) for i in range(repeats)]
        for kind, (_, size) in passes.items():
            speed = Summary.of([size / seconds for seconds in times[kind]])
            share = ratio([size / seconds for seconds in times[kind]], by_round)
            found.append({
                "layer": name, "outputs": n, "features": k, "kind": kind, "threads": threads,
                "bytes_per_second": asdict(speed), "read_bytes_per_second": max(by_round),
                "share_of_best": speed.median / max(by_round), "share_by_round": asdict(share),
            })  # fmt: skip
    torch.set_num_threads(before)
    return found


def markdown(document: dict[str, Any]) -> str:
    """The result as a table: a row for each layer and number of threads, a column for each kind of weight."""
    lines = ["| layer | [N, K] | threads | read GB/s | " + " | ".join(KINDS) + " |"]
    lines.append("|---|---|--:|--:|" + "--:|" * len(KINDS))
    by_row: dict[tuple[Any, ...], dict[str, str]] = {}
    worst: dict[int, float] = {}
    for row in document["rows"]:
        key = (
            row["layer"], f"{row['outputs']} × {row['features']}", row["threads"],
            f"{row['read_bytes_per_second'] / 1e9:.1f}",
        )  # fmt: skip
        by_row.setdefault(key, {})[row["kind"]] = f"{row['share_of_best']:.0%} ({row['share_by_round']['median']:.0%})"
        if row["kind"] == KINDS[0]:
            worst[row["threads"]] = min(worst.get(row["threads"], 1.0), row["share_of_best"])
    lines += [
        f"| {' | '.join(map(str, key))} | {' | '.join(cells[k] for k in KINDS)} |" for key, cells in by_row.items()
    ]
    verdicts = [
        f"{threads} thread{'s' * (threads > 1)}: {share:.0%}, {'holds' if share >= ASKED else '**missed**'}"
        for threads, share in worst.items()
    ]
    lines += ["", f"Asked of {KINDS[0]}: {ASKED:.0%} of the best read. The least here: {'; '.join(verdicts)}."]
    machine = document["machine"]
    lines += ["", f"{machine['device']}, {machine['cores']} cores ({machine['isa']}), torch {machine['torch']}, "
              f"{machine['date']}."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep, and write the page again."""
    if not (kernels := cpu_kernels()).loaded:
        raise SystemExit(f"our kernels are not loaded: {kernels.reason}")
    from benchmarks.peers_cpu import write_page

    cold = COLD_CACHES * cache_bytes("cpu")
    device, cores, isa = describe("cpu")
    rows = [
        row
        for threads in sorted({1, cores})
        for row in measure(SHAPES, threads, repeats=12, cold_bytes=cold, read_bytes=READ_BYTES)
    ]
    machine = {"device": device, "cores": cores, "isa": isa, "torch": torch.__version__,
               "date": datetime.now(UTC).date().isoformat()}  # fmt: skip
    document = {"machine": machine, "rows": rows}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_page()
    print(f"{markdown(document)}\nwritten to {RESULT}")


if __name__ == "__main__":
    main()
