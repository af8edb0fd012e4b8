"""Number formats of quantized tensors, as data.

A format says how a weight `[N out, K in]` is stored: how many bits, on which grid, and how many values share one
scale. Integers follow the compressed-tensors convention: `w ≈ (q - zero) * scale` with `q` and `zero` signed,
`-2^(b-1) ≤ q ≤ 2^(b-1) - 1`, and `zero = 0` when symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from optimizer.errors import UsageError

GROUP_SIZES = (32, 64, 128, -1)
"""Values that share a scale along K; -1 is the whole row. Those that the serving kernels accept."""


@dataclass(frozen=True)
class Format:
    """An integer weight format. `group_size` -1 means one scale a row (per output channel)."""

    bits: int = 8
    symmetric: bool = True
    group_size: int = -1
    kind: Literal["int"] = "int"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"Invalid bits {self.bits}. Integer weights have 4 or 8 bits.")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"Invalid group size {self.group_size}. Use one of {', '.join(map(str, GROUP_SIZES))}.")

    @property
    def name(self) -> str:
        """A short label such as `int4-g128` or `int8-channel-asym`."""
        scope = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits}-{scope}" + ("" if self.symmetric else "-asym")

    @property
    def q_min(self) -> int:
        """The smallest stored integer."""
        return int(-(2 ** (self.bits - 1)))

    @property
    def q_max(self) -> int:
        """The largest stored integer."""
        return int(2 ** (self.bits - 1) - 1)

    def groups(self, k: int) -> int:
        """How many scales a row of `k` values has; `UsageError` when the groups do not fill the row."""
        if self.group_size == -1:
            return 1
        if k % self.group_size:
            raise UsageError(
                f"group size {self.group_size} does not divide {k} input features. "
                f"Use a group size of {', '.join(str(g) for g in GROUP_SIZES if g == -1 or k % g == 0)}."
            )
        return k // self.group_size

    def effective_bits(self, k: int, scale_bits: int = 16) -> float:
        """Stored bits a weight, with the scales and, when asymmetric, the packed zero points.

        `b + (scale bits + zero bits) / G`: 4-bit weights in groups of 64 with 16-bit scales cost 4.25 bits.
        """
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) * self.groups(k) / k

    def as_compressed_tensors(self) -> dict[str, Any]:
        """The `weights` entry of a compressed-tensors `config_groups` item."""
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
        }

    @classmethod
    def from_compressed_tensors(cls, weights: dict[str, Any]) -> Format:
        """Read a `weights` entry back; `UsageError` for one that this package does not run."""
        kind, strategy, size = weights.get("type"), weights.get("strategy"), weights.get("group_size")
        fits = {"channel": size in (None, -1), "group": isinstance(size, int) and size > 0}.get(str(strategy), False)
        if kind != "int" or not fits:
            raise UsageError(
                f"weights of type {kind!r} with strategy {strategy!r} and group size {size!r} cannot be loaded. "
                "Integer weights per channel, or per group of a given size, can."
            )
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if not isinstance(bits, int) or not isinstance(symmetric, bool):
            raise UsageError(f"num_bits {bits!r} and symmetric {symmetric!r} must be a number and a truth value.")
        return cls(bits=bits, symmetric=symmetric, group_size=-1 if size is None else size)
