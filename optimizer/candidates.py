"""What an automatic plan may try: storage of weights × storage of the cache, as data.

`relieves` names the terms of a step's time (`optimizer.evals.predict.Bottleneck`) that an option makes smaller: it is
tried only where one of them is worth it. `risk` orders options of one kind by what they may cost in quality; an option
that is at least as risky in both kinds as one that missed its quality floor is not tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WeightOption:
    """How weights are stored and multiplied: options of the pass `quantize` (none: as they are)."""

    name: str
    risk: int
    relieves: frozenset[str]
    quantize: Mapping[str, Any] | None = None
    int8_inputs: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether the integers are found by calibration, which takes much longer than rounding."""
        return "method" in (self.quantize or {})

    @property
    def kernels(self) -> Mapping[str, Any]:
        """What decides which kernels run: how the integers are found does not."""
        return {key: value for key, value in (self.quantize or {}).items() if key not in ("method", "clip", "smooth")}


@dataclass(frozen=True)
class CacheOption:
    """How keys and values are stored: options of the pass `decode`. `bits` None: as they are."""

    name: str
    risk: int
    relieves: frozenset[str]
    decode: Mapping[str, Any] = field(default_factory=dict)
    bits: int | None = None


_MEMORY = frozenset({"weights", "other"})  # another kernel runs, which may be nearer to the machine's ceilings
_BOTH = _MEMORY | {"compute"}

WEIGHTS = (
    WeightOption("unquantized", 0, frozenset({"launch"})),
    WeightOption("int8", 1, _MEMORY, {"bits": 8}),
    WeightOption("int8, int8 inputs", 2, _BOTH, {"bits": 8}, int8_inputs=True),
    WeightOption("fp8", 3, _MEMORY, {"weights": "fp8"}),
    WeightOption("w8a8-int8", 4, _BOTH, {"bits": 8, "activations": "int8"}),
    WeightOption("w8a8-fp8", 4, _BOTH, {"weights": "fp8", "activations": "fp8"}),
    WeightOption("int4-g32 gptq", 5, _MEMORY, {"bits": 4, "group_size": 32, "method": "gptq", "clip": "mse"}),
    WeightOption("int4-g128 gptq", 6, _MEMORY, {"bits": 4, "group_size": 128, "method": "gptq", "clip": "mse"}),
    WeightOption(
        "int4-g128 gptq, int8 inputs", 7, _BOTH,
        {"bits": 4, "group_size": 128, "method": "gptq", "clip": "mse"}, int8_inputs=True,
    ),
    WeightOption("int4-g32", 7, _MEMORY, {"bits": 4, "group_size": 32}),
    WeightOption("int4-g128", 8, _MEMORY, {"bits": 4, "group_size": 128}),
    WeightOption("int4-g128, int8 inputs", 9, _BOTH, {"bits": 4, "group_size": 128}, int8_inputs=True),
)  # fmt: skip

CACHES = (
    CacheOption("static cache", 0, frozenset({"launch"})),
    CacheOption("paged cache", 0, frozenset({"kv"}), {"cache": "paged"}),
    CacheOption("kv int8", 1, frozenset({"kv"}), {"cache": "paged", "kv": "int8"}, bits=8),
    CacheOption("kv fp8", 2, frozenset({"kv"}), {"cache": "paged", "kv": "fp8"}, bits=8),
)


@dataclass(frozen=True)
class Candidate:
    """One of each."""

    weights: WeightOption
    cache: CacheOption = CACHES[0]

    @property
    def name(self) -> str:
        """Such as `int8` or `int8, kv int8`."""
        return self.weights.name if self.cache is CACHES[0] else f"{self.weights.name}, {self.cache.name}"

    def as_risky_as(self, other: Candidate) -> bool:
        """Whether there is no reason to expect better quality of this one."""
        return self.weights.risk >= other.weights.risk and self.cache.risk >= other.cache.risk

    def passes(
        self, ignore: Sequence[str] = (), *, decode: Mapping[str, Any] | None = None, fuse: bool = False
    ) -> list[dict[str, Any]]:
        """The passes of a recipe: layers named in `ignore` stay as they are, `decode` adds options of that pass."""
        found: list[dict[str, Any]] = []
        if self.weights.quantize is not None:
            found.append({"name": "quantize", **self.weights.quantize, "ignore": list(ignore)})
        found.append({"name": "merge_linears", "required": False})
        inputs = {"int8_inputs": True} if self.weights.int8_inputs else {}
        found.append({"name": "decode", **(decode or {}), **inputs, **self.cache.decode})
        if fuse:
            found.append({"name": "fuse", "strict": False, "required": False})
        return found


def candidates() -> list[Candidate]:
    """Every pair, the least risky first."""
    pairs = [Candidate(weights, cache) for weights in WEIGHTS for cache in CACHES]
    return sorted(pairs, key=lambda pair: (pair.weights.risk + pair.cache.risk, pair.cache.risk))
