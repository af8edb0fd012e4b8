"""Compile every shipped kernel ahead of time, for GPUs that this machine need not have, and read what came out.

    python -m optimizer.backends.kernels.ahead [--kernel NAME] [--json]

Registers, local memory (spills) and shared memory are those the assembler reports for the cubin. Features are looked
for in the generated PTX.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from optimizer.backends import kernels
from optimizer.backends.kernels.gpu import Shipped
from optimizer.errors import DeviceError

FEATURES = {
    "load128": r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.\S+ .*0x10|cp\.async\.bulk",
    "store128": r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64",
    "lop3": r"\blop3\.b32",
    "mma": r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma",
    "mma-int8": r"\bmma\.sync\S*\.s8|\bwgmma\.mma_async\S*\.s8|\btcgen05\.mma\S*kind::i8",
    "mma-fp8": r"\bmma\.sync\S*\.e4m3|\bwgmma\.mma_async\S*\.e4m3|\btcgen05\.mma\S*kind::f8f6f4",
    "evict_first": r"evict_first",
    "evict_last": r"evict_last",
    "no-atomics": r"\A(?!.*\b(?:atom|red)\.)",
}
"""What a kernel's design may claim of its code, as a pattern for its PTX."""


@dataclass(frozen=True)
class Compiled:
    """One build for one target: what a launch of it takes. Bytes of `local` and `stack` are spills."""

    kernel: str
    label: str
    sm: int
    warps: int
    registers: int
    local: int
    stack: int
    shared: int
    features: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """What of its own description the build does not keep."""
        found = [f"{self.local + self.stack} bytes spilled"] if self.local + self.stack else []
        return found + [f"no {name} in the code" for name in self.missing]


def shipped(only: str | None = None) -> Iterator[tuple[str, Shipped]]:
    """Every shipped build as `(op file, build)`, or those of one file."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if only in (None, module.name):
            for build in getattr(importlib.import_module(f"{kernels.__name__}.{module.name}"), "SHIPPED", ()):
                yield module.name, build


def compile_ahead(name: str, build: Shipped, sm: int) -> Compiled:
    """Compile one build for compute capability `sm` (90 is 9.0). Raises `DeviceError` where it takes too much."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        raise DeviceError("compiling kernels needs Triton: pip install triton.") from None
    if not hasattr(build.kernel, "cache_key"):
        raise DeviceError(f"{name}: TRITON_INTERPRET is set, so there is nothing to compile. Unset it.")
    order = build.kernel.arg_names
    signature = {arg: build.signature.get(arg, "constexpr") for arg in order}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(order)
        if signature[arg][0] in "*iu" and arg not in build.unaligned
    }
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx = re.sub(r"\s*//.*", "", compiled.asm["ptx"])
    features = tuple(f for f, pattern in FEATURES.items() if re.search(pattern, ptx, re.DOTALL))
    used = _resources(compiled.asm["cubin"])
    if used["REG"] > build.registers:
        raise DeviceError(
            f"{name} ({build.label}) takes {used['REG']} registers on sm_{sm}, allowed {build.registers}."
        )
    missing = tuple(f for f in build.expects if f not in features)
    return Compiled(
        name, build.label, sm, build.num_warps, used["REG"], used["LOCAL"], used["STACK"],
        int(compiled.metadata.shared), features, missing,
    )  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump` reports of a cubin's only function: REG, STACK, SHARED, LOCAL."""
    from triton import backends

    tool = Path(backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out.stdout)}


def compile_all(only: str | None = None, processes: int | None = None) -> list[Compiled]:
    """Every build (of one op file) for every target, in the order of `shipped`; a process a core unless told."""
    work = [
        (module, index, sm)
        for module, builds in itertools.groupby(shipped(only), key=lambda pair: pair[0])
        for index, (_, build) in enumerate(builds)
        for sm in build.targets
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_one, work, chunksize=4))


def _compile_one(work: tuple[str, int, int]) -> Compiled:
    module, index, sm = work
    return compile_ahead(module, next(itertools.islice(shipped(module), index, None))[1], sm)


def markdown(rows: Iterable[Compiled]) -> str:
    """The table of `docs/kernels.md`: a row a build, with its registers for each target it is for."""
    lines = [
        "| op | build | warps | registers: sm_80 / 90 / 100 | shared memory | in the code for every target |",
        "|---|---|--:|--:|--:|---|",
    ]
    for (kernel, label), same in itertools.groupby(rows, key=lambda row: (row.kernel, row.label)):
        builds = {row.sm: row for row in same}
        registers = " / ".join(str(builds[sm].registers) if sm in builds else "–" for sm in (80, 90, 100))
        shared = max(row.shared for row in builds.values())
        features = [f for f in FEATURES if f != "no-atomics" and all(f in row.features for row in builds.values())]
        warps = next(iter(builds.values())).warps
        lines.append(f"| `{kernel}` | {label} | {warps} | {registers} | {shared:,} B | {', '.join(features) or '–'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print, and fail on a spill or a missing feature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", help="one op file only")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args()
    rows = compile_all(options.kernel)
    print(json.dumps([asdict(row) | {"faults": row.faults} for row in rows]) if options.json else markdown(rows))
    faults = [f"{row.kernel} ({row.label}) sm_{row.sm}: {fault}" for row in rows for fault in row.faults]
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
