"""Engine folders: what stands in them, and every check that is made before an engine is loaded.

A folder holds `<target>.engine` for each GPU architecture and `engine.json`, written last: provider and version,
profiles, tensors, sha256 of each engine and of the ONNX it came from. `checked_engine` compares hash, version and
architecture *before* any byte is deserialized, since deserializing trusts its input.

Profiles bound dimensions by name: `{"batch": (1, 1, 8), "sequence": (1, 1, 1), "past": (0, 512, 2048)}` is
(least, best, most). A dimension that ONNX writes as a sum, `past + sequence`, is bounded by the sum of its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from optimizer.backends.tensorrt.provider import Provider
from optimizer.errors import ArtifactError, DeviceError, UsageError

SIDECAR = "engine.json"
SCHEMA = 1

Bounds = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """What one optimization profile admits: (least, best, most) of each named dimension."""

    name: str
    dimensions: Mapping[str, Bounds]

    def __post_init__(self) -> None:
        for name, (least, best, most) in self.dimensions.items():
            if not 0 <= least <= best <= most:
                raise UsageError(
                    f"profile {self.name!r}: {name} is ({least}, {best}, {most}), not 0 ≤ least ≤ best ≤ most."
                )

    def bounds(self, dimension: str) -> Bounds:
        """The bounds of a dimension as ONNX writes it: a number, a name, or a sum of both."""
        total = (0, 0, 0)
        for part in dimension.split("+"):
            part = part.strip()
            value = (int(part),) * 3 if part.isdecimal() else self.dimensions.get(part)
            if value is None:
                raise UsageError(
                    f"profile {self.name!r} says nothing of the dimension {part!r}; it has "
                    f"{', '.join(self.dimensions) or 'none'}. Bound every dynamic dimension of the network."
                )
            total = (total[0] + value[0], total[1] + value[1], total[2] + value[2])
        return total


@dataclass(frozen=True)
class BuiltEngine:
    """One engine and what was seen of it: bytes of constants by type as one profile reads them, and weights that fell
    back, not held in their own type; matrix products by the types of their operands over all profiles, and weights with
    rounded inputs that are not multiplied as elements of one type."""

    target: str
    file: str
    sha256: str
    bytes: int
    seconds: float
    constant_bytes: Mapping[str, int] = field(default_factory=dict)
    operations: int = 0
    fell_back: Mapping[str, str] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    multiplied_otherwise: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class EngineSet:
    """The engines of one model, as `engine.json` records them."""

    provider: str
    version: str
    onnx_sha256: str
    profiles: tuple[Profile, ...]
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    engines: tuple[BuiltEngine, ...]
    weights: int
    rounded: int = 0
    """Of the quantized weights, those whose inputs are rounded as well."""
    float32_layers: tuple[str, ...] = ()
    """Layers that compute in float32 although the network's own type is shorter, as its casts ask."""


def read_engines(folder: Path) -> EngineSet:
    """The record of an engine folder. Raises `ArtifactError` for one that is missing, damaged or of another schema."""
    try:
        found = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        if found.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        found["float32_layers"] = tuple(found["float32_layers"])
        found["engines"] = tuple(BuiltEngine(**engine) for engine in found["engines"])
        found["profiles"] = tuple(
            Profile(p["name"], {k: tuple(v) for k, v in p["dimensions"].items()}) for p in found["profiles"]
        )
        for part in ("inputs", "outputs"):
            found[part] = {name: tuple(dims) for name, dims in found[part].items()}
        return EngineSet(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / SIDECAR} is not a record of engines: {error}. Export the model again."
        ) from None


def checked_engine(folder: Path, target: str, provider: Provider) -> bytes:
    """The bytes of the engine for `target`, after every check that can be made without running them.

    Raises `ArtifactError` for a changed or missing file, `DeviceError` for another architecture, provider or version.
    """
    record = read_engines(folder)
    mine = (provider.name, provider.version)
    if mine != (record.provider, record.version):
        raise DeviceError(
            f"{folder} was built by {record.provider} {record.version}, and this is {mine[0]} {mine[1]}: an engine "
            "runs on the version that built it. Install that one, or export again."
        )
    engine = next((each for each in record.engines if each.target == target), None)
    if engine is None:
        made = ", ".join(each.target for each in record.engines)
        raise DeviceError(f"{folder} holds engines for {made}, and this GPU is {target}. Export for {target}.")
    if Path(engine.file).name != engine.file:
        raise ArtifactError(f"{folder / SIDECAR} names the engine {engine.file!r}, which is outside its folder.")
    path = folder / engine.file
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} is missing or no plain file. Export the model again.")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != engine.sha256:
        raise ArtifactError(f"{path} is not as it was written: its sha256 differs from {SIDECAR}'s. Export again.")
    return content
