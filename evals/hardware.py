"""Vendor figures of data-centre GPUs: dense rates, without sparsity.

They label a machine and plan for one that is absent. Where the device is present, utilisation is divided by what
`optimizer.evals.ceilings` measures on it. Sources: NVIDIA's data sheets, e.g. https://www.nvidia.com/en-us/data-center/h100/
(whose footnoted figures with sparsity are twice the dense ones). Data sheets give NVLink as the sum of both directions
(900 GB/s for an H100); a collective is bound by what a GPU can send, so `link_bandwidth` is half of that. The network
is one GPU's share of the adapters of the eight-GPU DGX machine, e.g. eight of 400 Gbit/s in a DGX H100
(https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from optimizer.errors import UsageError
from optimizer.evals.roofline import Roofline


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's peak rates in FLOP/s, memory bandwidth in bytes/s and memory in bytes (GB = 1e9).

    `link_bandwidth` and `network_bandwidth` are bytes/s that it can send to its neighbours in a machine of `node` GPUs
    and to other machines.
    """

    name: str
    fp16_flops: float
    fp8_flops: float | None
    bandwidth: float
    memory_bytes: float
    link_bandwidth: float
    network_bandwidth: float
    node: int = 8

    @property
    def ridge(self) -> float:
        """FLOP/byte at which fp16 or bf16 work turns from memory-bound to compute-bound."""
        return self.roofline().ridge

    def roofline(self, dtype: str = "bfloat16") -> Roofline:
        """The GPU's roofline for "float16" or "bfloat16", or "float8" where it has it.

        Raises:
            UsageError: the GPU has no figure for `dtype`.
        """
        peaks = {"float16": self.fp16_flops, "bfloat16": self.fp16_flops, "float8": self.fp8_flops}
        peak = peaks.get(dtype)
        if peak is None:
            known = ", ".join(name for name, value in peaks.items() if value)
            raise UsageError(f"{self.name}: no peak rate for dtype {dtype!r}; choose one of {known}")
        return Roofline(peak, self.bandwidth)


GPUS = (
    Gpu("V100 SXM", 125e12, None, 0.90e12, 32e9, 150e9, 6.25e9),
    Gpu("A100 SXM 80", 312e12, None, 2.04e12, 80e9, 300e9, 25e9),
    Gpu("H100 SXM", 989.4e12, 1979e12, 3.35e12, 80e9, 450e9, 50e9),
    Gpu("H200 SXM", 989.4e12, 1979e12, 4.80e12, 141e9, 450e9, 50e9),
    Gpu("B200", 2250e12, 4500e12, 8.00e12, 192e9, 900e9, 50e9),
)

_DECORATION = re.compile(r"nvidia|tesla|sxm\d?|hbm\d?e?|[^a-z0-9]")


def _key(name: str) -> str:
    return _DECORATION.sub("", name.lower())


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`: "h100", "H100 SXM" and "NVIDIA H100 80GB HBM3" are the same one.

    A variant with other figures ("H100 PCIe", "A100 40GB") is not in the table and is refused, not approximated.

    Raises:
        UsageError: no such GPU; the message lists the valid names and the nearest.
    """
    accepted: dict[str, Gpu] = {}
    for gpu in GPUS:
        model, size = _key(gpu.name.split()[0]), f"{gpu.memory_bytes / 1e9:.0f}"
        accepted |= {model: gpu, model + size: gpu, f"{model}{size}gb": gpu}
    key = _key(name)
    if key not in accepted:
        near = difflib.get_close_matches(key, accepted, n=1, cutoff=0.5)
        hint = f"; did you mean {accepted[near[0]].name!r}?" if near else ""
        raise UsageError(f"GPU {name!r} is not known: use one of {', '.join(gpu.name for gpu in GPUS)}{hint}")
    return accepted[key]
