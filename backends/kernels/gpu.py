"""Triton as the kernel files use it: the decorator, and how a kernel says which of its builds are shipped.

Triton comes with CUDA builds of PyTorch and is absent from others. Without it the kernels keep their names, the
references serve, and a launch is an error. With `TRITON_INTERPRET=1` in the environment before this is imported,
kernels run on CPU tensors, one program after the other: so the tests check their arithmetic without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optimizer.errors import DeviceError

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
except ImportError:
    triton = tl = None

    class _Absent:
        """A kernel that cannot be launched."""

        def __init__(self, kernel: Callable[..., None]) -> None:
            self.name = kernel.__name__

        def __getitem__(self, grid: object) -> Callable[..., None]:
            raise DeviceError(f"{self.name} needs Triton, which is not installed: pip install triton.")

    jit = _Absent

__all__ = ["INTERPRETED", "Shipped", "bound", "jit", "tl", "triton"]

INTERPRETED = triton is not None and tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels are interpreted, for what the interpreter does otherwise: a constant inside kernels."""


@jit
def bound(n):  # type: ignore[no-untyped-def]
    """The end of a loop. Triton's interpreter holds scalars as arrays [1], which NumPy 2.4 takes for no index."""
    if INTERPRETED:
        return n.handle.data.item()
    return n


@dataclass(frozen=True)
class Shipped:
    """One build of a kernel that launches use: what compiling it ahead of time needs to know.

    `signature` gives the type of each run-time argument in order (`*bf16`, `i32`, `fp32`), `constants` the
    `tl.constexpr` ones. Pointers are multiples of 16 bytes and integers of 16 unless named in `unaligned`. `expects`
    names what the generated code must contain, out of `ahead.FEATURES`; `registers` is the most one thread may use
    (no spill is ever allowed), `targets` the compute capabilities it is for.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    expects: tuple[str, ...] = ()
    registers: int = 255
    targets: tuple[int, ...] = (80, 90, 100)
