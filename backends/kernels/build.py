"""Compiles the CPU kernels on first use with the system compiler, and keeps them in the user's cache.

The cache key covers the source, the flags, the compiler, PyTorch and the processor's instruction sets, so a cached
library is never loaded where it could misbehave. Where there is no compiler the reference kernels run instead, and
`cpu_kernels()` says why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu") / "ops.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")


@dataclass(frozen=True)
class CpuKernels:
    """Whether the compiled kernels are loaded, and if not, why; `isa` is what the compiler was allowed to use."""

    loaded: bool
    isa: str
    reason: str = ""


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/roofline-optimizer`, `~/.cache/...` without it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "roofline-optimizer"


@lru_cache(maxsize=1)
def cpu_kernels() -> CpuKernels:
    """Load the compiled kernels, compiling them if this is the first use (about ten seconds)."""
    isa = torch.backends.cpu.get_cpu_capability()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return CpuKernels(False, isa, "no C++ compiler: install g++ or clang++, or set CXX")
    try:
        torch.ops.load_library(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        return CpuKernels(False, isa, f"{compiler} failed: {error.stderr.strip()[:500]}")
    except OSError as error:
        return CpuKernels(False, isa, f"the compiled kernels cannot be kept or loaded: {error}")
    return CpuKernels(True, isa)


def _built(compiler: str) -> Path:
    """The compiled library for this source, compiler, PyTorch and processor; built under a lock if absent."""
    from filelock import FileLock

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256()
    sources = [file.read_text() for file in sorted(SOURCE.parent.iterdir())]
    for part in (*sources, *FLAGS, version, torch.__version__, platform.machine(), _processor()):
        key.update(part.encode() + b"\0")
    library = cache_folder() / f"cpu-{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            torch_root = Path(torch.__file__).parent
            include, lib = torch_root / "include", torch_root / "lib"
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                out = Path(folder) / library.name
                subprocess.run(
                    [compiler, *FLAGS, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE),
                     f"-L{lib}", "-ltorch_cpu", "-lc10", "-o", str(out)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                out.replace(library)
    return library


def _processor() -> str:
    """The processor's model and instruction sets, which decide what `-march=native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
