"""Number formats of quantized tensors, as data.

A weight `[N out, K in]` is stored as elements on a grid and as scales: `w ≈ (q - zero) * scale`, with

    int b      q an integer, -2^(b-1) ≤ q ≤ 2^(b-1) - 1; zero likewise, and 0 when symmetric
    float 8    q in e4m3 (largest 448), always symmetric
    float 4    q in e2m1: ± 0, 0.5, 1, 1.5, 2, 3, 4, 6, always symmetric

One scale serves the whole tensor, a row (`channel`), `group_size` values along a row (`group`), or a `BLOCK` × `BLOCK`
tile (`block`). Scales are floats, or 8 bits themselves: NVFP4 has e4m3 scales under one float32 for the tensor, MXFP4
has powers of two (e8m0). The conventions are those of compressed-tensors.

Sources: FP8 arXiv:2209.05433, microscaling formats arXiv:2310.10537,
https://docs.nvidia.com/deeplearning/transformer-engine (NVFP4), arXiv:2412.19437 section 3.3 (128 × 128 blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from optimizer.errors import UsageError

GROUP_SIZES = (32, 64, 128, -1)
"""Values that share a scale along K; -1 is the whole row. Those that the serving kernels accept for integers."""

BLOCK = 128
"""Side of the tile that shares a scale in `block` granularity."""

Kind = Literal["int", "float"]
Granularity = Literal["tensor", "channel", "group", "block"]

_STRATEGIES: dict[Granularity, str] = {"tensor": "tensor", "channel": "channel", "group": "group", "block": "block"}
_NVFP4_STRATEGY = "tensor_group"


@dataclass(frozen=True)
class Format:
    """A weight format. `group_size` -1 means one scale a row, unless `granularity` says tensor or block."""

    bits: int = 8
    symmetric: bool = True
    group_size: int = -1
    kind: Kind = "int"
    granularity: Granularity = "channel"
    scale: Literal["float", "e4m3", "e8m0"] = "float"

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.granularity == "channel":
            object.__setattr__(self, "granularity", "group")
        if self.bits not in (4, 8):
            raise UsageError(f"Invalid bits {self.bits}. Weights have 4 or 8 bits.")
        if self.kind == "float" and not self.symmetric:
            raise UsageError("Floating-point weights are symmetric. Use symmetric: true.")
        sizes = {(4, "float", "e4m3"): (16,), (4, "float", "e8m0"): (32,)}.get((self.bits, self.kind, self.scale))
        if self.bits == 4 and self.kind == "float" and sizes is None:
            raise UsageError("4-bit floats are NVFP4 (e4m3 scales, groups of 16) or MXFP4 (e8m0 scales, groups of 32).")
        if self.group_size not in (sizes or GROUP_SIZES):
            raise UsageError(
                f"Invalid group size {self.group_size}. Use one of {', '.join(map(str, sizes or GROUP_SIZES))}."
            )
        if (self.group_size != -1) != (self.granularity == "group"):
            raise UsageError(
                f"Invalid group size {self.group_size} for granularity {self.granularity!r}. "
                "Groups need a group size; a tensor, rows and blocks have none."
            )
        if self.granularity == "block" and not self.symmetric:
            raise UsageError("Blocks are symmetric. Use symmetric: true.")

    @property
    def name(self) -> str:
        """A short label such as `int4-g128`, `int8-channel-asym`, `fp8-block` or `nvfp4`."""
        if self.scale != "float":
            return {"e4m3": "nvfp4", "e8m0": "mxfp4"}[self.scale]
        scope = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"{'fp' if self.kind == 'float' else 'int'}{self.bits}-{scope}" + ("" if self.symmetric else "-asym")

    @property
    def q_min(self) -> float:
        """The smallest element."""
        return -self.q_max if self.kind == "float" else -float(2 ** (self.bits - 1))

    @property
    def q_max(self) -> float:
        """The largest element."""
        if self.kind == "float":
            return {4: 6.0, 8: 448.0}[self.bits]
        return float(2 ** (self.bits - 1) - 1)

    def groups(self, k: int) -> int:
        """How many scales lie along a row of `k` values; `UsageError` when the groups do not fill the row."""
        if self.granularity == "block":
            return -(-k // BLOCK)
        if self.granularity != "group":
            return 1
        if k % self.group_size:
            usable = [g for g in GROUP_SIZES if g == -1 or k % g == 0] if self.scale == "float" else []
            remedy = f"Use a group size of {', '.join(map(str, usable))}." if usable else "Leave this layer as it is."
            raise UsageError(f"group size {self.group_size} does not divide {k} input features. {remedy}")
        return k // self.group_size

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """The shape of the scales of a weight `[n, k]`."""
        rows = {"tensor": 1, "block": -(-n // BLOCK)}.get(self.granularity, n)
        return rows, self.groups(k)

    def effective_bits(self, k: int, scale_bits: int = 16) -> float:
        """Stored bits a weight, with the scales and, when asymmetric, the packed zero points.

        `b + (scale bits + zero bits) / G`: 4-bit weights in groups of 64 with 16-bit scales cost 4.25 bits. What a
        whole tensor or a block shares is counted a row's share of it, as if N were `BLOCK` (NVFP4's single float32
        is not counted).
        """
        scale_bits = scale_bits if self.scale == "float" else 8
        zero_bits = 0 if self.symmetric else self.bits
        shared = BLOCK if self.granularity in ("block", "tensor") else 1
        return self.bits + (scale_bits + zero_bits) * self.groups(k) / (k * shared)

    def as_compressed_tensors(self) -> dict[str, Any]:
        """The `weights` entry of a compressed-tensors `config_groups` item."""
        entry: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": _NVFP4_STRATEGY if self.scale == "e4m3" else _STRATEGIES[self.granularity],
            "group_size": None if self.group_size == -1 else self.group_size,
        }
        if self.granularity == "block":
            entry["block_structure"] = [BLOCK, BLOCK]
        if self.scale != "float":
            entry["scale_dtype"] = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[self.scale]
        return entry

    @classmethod
    def from_compressed_tensors(cls, weights: dict[str, Any]) -> Format:
        """Read a `weights` entry back; `UsageError` for one that this package does not run."""
        kind, strategy, size = weights.get("type"), weights.get("strategy"), weights.get("group_size")
        granularity = {**{v: k for k, v in _STRATEGIES.items()}, _NVFP4_STRATEGY: "group"}.get(str(strategy))
        grouped = isinstance(size, int) and size > 0
        fits = grouped if granularity == "group" else size in (None, -1)
        blocks = weights.get("block_structure")
        nested = strategy == _NVFP4_STRATEGY and (kind, weights.get("num_bits")) != ("float", 4)
        if (
            kind not in ("int", "float")
            or nested
            or not fits
            or granularity is None
            or blocks not in (None, [BLOCK, BLOCK])
        ):
            raise UsageError(
                f"weights of type {kind!r} with strategy {strategy!r}, group size {size!r} and blocks {blocks!r} "
                "cannot be loaded. Integers and floats per tensor, channel, group or 128 × 128 block can."
            )
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if not isinstance(bits, int) or not isinstance(symmetric, bool):
            raise UsageError(f"num_bits {bits!r} and symmetric {symmetric!r} must be a number and a truth value.")
        scale: Any = "float"
        if kind == "float" and bits == 4:
            scale = "e4m3" if strategy == _NVFP4_STRATEGY else "e8m0"
        return cls(bits, symmetric, size if grouped else -1, kind, granularity, scale)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ActivationFormat:
    """How the input `[..., K]` of a layer is rounded before the product.

    `dynamic` scales are taken from each input: one for each `token`, for the whole `tensor`, or for `group_size`
    values of a token. A static scale is a number found in calibration. `outlier_threshold` is that of LLM.int8
    (arXiv:2208.07339): input features in which some value is larger stay unrounded.
    """

    bits: int = 8
    kind: Kind = "int"
    granularity: Literal["tensor", "token", "group"] = "token"
    dynamic: bool = True
    group_size: int = -1
    outlier_threshold: float | None = None

    @property
    def name(self) -> str:
        """A short label such as `int8-token` or `fp8-tensor-static`."""
        scope = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        outliers = "" if self.outlier_threshold is None else f"-outliers{self.outlier_threshold:g}"
        number = f"{'fp' if self.kind == 'float' else 'int'}{self.bits}"
        return f"{number}-{scope}" + ("" if self.dynamic else "-static") + outliers


FP8_TENSOR = Format(8, kind="float", granularity="tensor")
FP8_CHANNEL = Format(8, kind="float")
FP8_BLOCK = Format(8, kind="float", granularity="block")
NVFP4 = Format(4, group_size=16, kind="float", scale="e4m3")
MXFP4 = Format(4, group_size=32, kind="float", scale="e8m0")

FLOATS: dict[str, Format] = {
    "fp8": FP8_CHANNEL,
    "fp8-tensor": FP8_TENSOR,
    "fp8-block": FP8_BLOCK,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}
"""Floating-point weight formats by the name that a recipe gives them."""

ACTIVATIONS: dict[str, ActivationFormat] = {
    "int8": ActivationFormat(),
    "llm-int8": ActivationFormat(outlier_threshold=6.0),
    "fp8": ActivationFormat(kind="float"),
    "fp8-static": ActivationFormat(kind="float", granularity="tensor", dynamic=False),
    "int8-static": ActivationFormat(granularity="tensor", dynamic=False),
    "fp8-group": ActivationFormat(kind="float", granularity="group", group_size=BLOCK),
    "nvfp4": ActivationFormat(4, "float", "group", dynamic=False, group_size=16),  # static is its tensor scale only
}
"""Activation formats by the name that a recipe gives them."""


@dataclass(frozen=True)
class Scheme:
    """What a layer is stored and run in: `activation` None keeps the input in its own type."""

    weight: Format
    activation: ActivationFormat | None = None

    @property
    def name(self) -> str:
        """Such as `int4-g128` or `fp8-channel × fp8-token`."""
        return self.weight.name + (f" × {self.activation.name}" if self.activation else "")
