"""What a serialized engine holds, read from its bytes: no GPU is needed, where TensorRT's own inspector needs one.

An engine of TensorRT for RTX carries its compiled graph as text: every constant with its dimensions, type and payload,
and every operation with the ONNX nodes it stands for. That text is nobody's contract, so what is found here is evidence
to report, never something to run on; where the text is not found, `read_plan` says so instead of reporting nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from optimizer.errors import ArtifactError

_CONSTANT = re.compile(
    rb'tensor=\{[^}]*?const_payload_size=(\d+) dims=\{([ \d]*)\} name="([^"]*)"[^\n]*? type=([a-z0-9_]+) \}'
)
_OPERATION = re.compile(rb'^ *([a-z_]+)=\{ name="?([^" ]+)"?([^\n]*?)layers="([^"]*)"', re.MULTILINE)
_OPERANDS = re.compile(rb' input=\{((?: ?"[^"]*")*) *\}')
_TENSOR = re.compile(rb'tensor=\{[^\n]*? name="([^"]*)"[^\n]*? type=([a-z0-9_]+) \}')
_PRODUCT = "fully_connected"
"""The kind of operation that a matrix product is."""


@dataclass(frozen=True)
class PlanConstant:
    """A constant of the engine: weights as the GPU will read them."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class PlanOperation:
    """One operation of the engine, the names of the ONNX nodes that it computes, and the types of a product's operands.

    A type is empty where the plan does not state it.
    """

    kind: str
    name: str
    nodes: tuple[str, ...]
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The constants and operations of an engine."""

    constants: tuple[PlanConstant, ...]
    operations: tuple[PlanOperation, ...]

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of constants by their type, largest first."""
        found: Counter[str] = Counter()
        for constant in self.constants:
            found[constant.type] += constant.bytes
        return dict(found.most_common())

    def products(self) -> dict[str, int]:
        """Matrix products by the types of their operands, such as `int8 × int8`, over all profiles."""
        kinds = (" × ".join(operation.operands) for operation in self.operations if operation.kind == _PRODUCT)
        return dict(Counter(kinds).most_common())


@dataclass(frozen=True)
class Weight:
    """A quantized weight as the network states it: the ONNX name, its shape `[K, N]` and type.

    `rounded` says that the inputs it is multiplied by are rounded to elements of the same type.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    rounded: bool = False

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def read_plan(engine: bytes) -> Plan:
    """The constants and operations stated in an engine's bytes.

    Raises `ArtifactError` where no constants are stated: the engine is not one of TensorRT for RTX, or of a version
    that writes another text.
    """
    constants = tuple(
        PlanConstant(name.decode(errors="replace"), tuple(map(int, dims.split())), kind.decode(), int(payload))
        for payload, dims, name, kind in _CONSTANT.findall(engine)
    )
    if not constants:
        raise ArtifactError(
            f"the engine ({len(engine)} bytes) states no constants, so what became of its weights is unknown. "
            "Inspect it with TensorRT's own inspector on the GPU it is for."
        )
    types = {name: kind.decode() for name, kind in _TENSOR.findall(engine)}
    operations = tuple(
        PlanOperation(
            kind.decode(), name.decode(errors="replace"), tuple(_nodes(layers.decode(errors="replace"))),
            _operands(rest, types) if kind.decode() == _PRODUCT else (),
        )
        for kind, name, rest, layers in _OPERATION.findall(engine)
    )  # fmt: skip
    return Plan(constants, operations)


def _operands(rest: bytes, types: Mapping[bytes, str]) -> tuple[str, ...]:
    """The types of the two matrices that an operation multiplies; its other inputs are factors."""
    found = _OPERANDS.search(rest)
    names = re.findall(rb'"([^"]*)"', found[1])[:2] if found else []
    return tuple(types.get(name, "") for name in names)


def _nodes(layers: str) -> Iterable[str]:
    return re.findall(r"\[ONNX Layer: ([^\]]*)\]", layers)


def fell_back(weights: Sequence[Weight], plan: Plan, profiles: int = 1) -> dict[str, str]:
    """Weights that the engine does not hold in their own type, each with what it holds instead.

    The plan states the graph once a profile and names constants anew, so weights are matched by type and number of
    elements, and those merged into one constant (query, key and value, say) by the total of their type. Of weights
    alike in shape where some fell back all are named: which of them it was, the plan does not say.
    """
    held: Counter[str] = Counter()
    by_size: Counter[tuple[str, int]] = Counter()
    for constant in plan.constants:
        held[constant.type] += constant.elements
        by_size[constant.type, constant.elements] += 1
    needed: Counter[str] = Counter()
    groups: Counter[tuple[str, int]] = Counter()
    for weight in weights:
        needed[weight.type] += profiles * weight.elements
        groups[weight.type, weight.elements] += profiles
    found = {}
    for weight in weights:
        key = weight.type, weight.elements
        missing = groups[key] - by_size[key]
        if held[weight.type] < needed[weight.type] and missing > 0:
            others = sorted({c.type for c in plan.constants if c.elements == weight.elements} - {weight.type})
            found[weight.name] = (
                f"{missing} of {groups[key]} constants of {weight.elements} elements are not {weight.type} there"
                + (f"; it holds {', '.join(others)}" if others else "")
            )
    return found


def multiplied_otherwise(weights: Sequence[Weight], plan: Plan, profiles: int = 1) -> dict[str, str]:
    """Weights with rounded inputs whose product is not one of two operands of their own type, each with what it is.

    An operation names the nodes that it computes, those of the weights included, and there is one a profile.
    """
    found = {}
    for weight in weights:
        if not weight.rounded:
            continue
        products = [op.operands for op in plan.operations if op.kind == _PRODUCT and weight.name in op.nodes]
        right = sum(operands == (weight.type, weight.type) for operands in products)
        if right < profiles:
            others = sorted({" × ".join(operands) for operands in products} - {f"{weight.type} × {weight.type}"})
            found[weight.name] = f"{right} of {profiles} products are {weight.type} × {weight.type}" + (
                f"; there is {', '.join(others)}" if others else ""
            )
    return found
