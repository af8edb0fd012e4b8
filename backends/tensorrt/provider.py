"""Which TensorRT is installed: the data-centre package, or TensorRT for RTX. Both have one API, with small gaps.

TensorRT for RTX compiles kernels on the machine that runs the engine, so it builds an engine for any listed GPU
architecture without a GPU. The data-centre package times kernels while it builds, and so builds for the GPU it runs on.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from optimizer.errors import DeviceError, UsageError

Name = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class _Known:
    name: Name
    modules: tuple[str, ...]
    install: str


KNOWN = (
    _Known("tensorrt", ("tensorrt",), "pip install tensorrt-cu13"),
    _Known(
        "tensorrt_rtx",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
)
"""In the order they are tried."""


@dataclass(frozen=True)
class Provider:
    """An importable TensorRT: `module` is its Python API."""

    name: Name
    module: Any
    version: str

    @property
    def cross_compiles(self) -> bool:
        """Whether it builds engines for GPUs that are not in this machine."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures it can be told to build for, as `sm89`; empty where it builds for the GPU it runs on."""
        if not self.cross_compiles:
            return ()
        return tuple(name.lower() for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))


def find_provider(name: Name | None = None) -> Provider:
    """The TensorRT called `name`, or the first of `KNOWN` that imports.

    Raises `UsageError` for a name that is not known, `DeviceError` with the pip line where none is installed.
    """
    wanted = [known for known in KNOWN if name in (None, known.name)]
    if not wanted:
        raise UsageError(f"unknown TensorRT provider {name!r}. Use {' or '.join(known.name for known in KNOWN)}.")
    for known in wanted:
        for module in known.modules:
            try:
                found = importlib.import_module(module)
            except ImportError:
                continue
            if hasattr(found, "Builder"):  # `tensorrt` on PyPI can be a stub whose libraries were never fetched
                return Provider(known.name, found, str(found.__version__))
    remedies = " or ".join(f"`{known.install}`" for known in wanted)
    raise DeviceError(f"no TensorRT is installed here ({', '.join(known.name for known in wanted)}). Run {remedies}.")


def this_gpu() -> str:
    """The architecture of the GPU in this machine, as `sm89`. Raises `DeviceError` where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            "PyTorch sees no GPU here. Name the architecture to build for, such as sm89; run engines where it is."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def collecting_log(provider: Provider) -> Any:
    """A logger that keeps errors in `.errors` for our own message, and prints nothing."""
    trt: Any = provider.module

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Log()
