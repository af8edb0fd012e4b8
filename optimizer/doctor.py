"""What this machine can run and why not: the checks behind `optimizer doctor`."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OPTIONAL = {
    "triton": "GPU kernels: pip install triton",
    "onnx": "ONNX files: pip install onnx",
    "onnxruntime": "ONNX Runtime: pip install onnxruntime",
    "tensorrt": "TensorRT engines on a data-centre GPU: pip install tensorrt",
    "tensorrt_rtx": "TensorRT for RTX engines: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}
DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx-cu13-bindings"}


@dataclass(frozen=True)
class Check:
    """One thing that is there or not, with its version or the remedy."""

    name: str
    ok: bool
    detail: str


def checks() -> list[Check]:
    """Every check, the required ones first."""
    import torch

    from optimizer.backends.kernels.build import cache_folder, cpu_kernels

    kernels = cpu_kernels()
    bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return [
        Check("python", (3, 11) <= sys.version_info[:2] <= (3, 13), platform.python_version()),
        *(_package(name) for name in ("torch", "transformers", "compressed-tensors", "lm-eval")),
        Check("cpu", True, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Check("cpu bfloat16 matmul", bf16, "native" if bf16 else "none: bfloat16 layers use our own kernel"),
        Check("cpu kernels", kernels.loaded, f"compiled, in {cache_folder()}" if kernels.loaded else kernels.reason),
        _cuda(),
        Check("disk", True, f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here"),
        *(_package(DISTRIBUTIONS.get(name, name), remedy, name) for name, remedy in OPTIONAL.items()),
    ]


def _package(distribution: str, remedy: str = "", name: str | None = None) -> Check:
    try:
        return Check(name or distribution, True, version(distribution))
    except PackageNotFoundError:
        return Check(name or distribution, False, f"not installed. {remedy}".strip())


def _cuda() -> Check:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Check("cuda", True, f"{properties.name}, sm_{properties.major}{properties.minor}")
    built = torch.version.cuda
    return Check("cuda", False, "this PyTorch is built without CUDA" if built is None else "no CUDA device is visible")
