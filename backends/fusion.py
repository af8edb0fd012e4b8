"""What a fusion is, as data, and the ledger of what fusions did. The machinery that runs them is `backends.inductor`.

A fusion is a pair of plain functions on example inputs: the pattern as a model's author writes it and the replacement
that calls one `optimizer::*` op. Two spellings of one computation are two fusions of the same name. Whatever may keep
a match from being replaced is a reason in words, so that no site is ever passed over silently.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the fused kernels take."""

TRACED = (torch.float32, torch.bfloat16)
"""Types whose graphs differ: float32 has no casts around its arithmetic; float16 has those of bfloat16."""

LEFT = "left to Inductor"
"""How a reason begins where nothing is wrong with a match, but the device has no kernel for the op."""

Guard = Callable[[Mapping[str, Any]], str]
"""Given the nodes (or numbers) that a match bound to the pattern's arguments: why not to replace it, or nothing."""


@dataclass(frozen=True)
class Anchor:
    """One kind of place that fusions are for, known by a node that every spelling of it has.

    `found` tells that node. One that is still in the graph when all fusions have run is a miss.
    """

    name: str
    found: Callable[[Node], bool]


@dataclass(frozen=True)
class Fusion:
    """One rewrite: where the graph computes `pattern`, compute `replacement`.

    `inputs(dtype)` makes example inputs (fake ones will do) for the arguments that are tensors; the others are
    `scalars`, whose example values must occur nowhere else in the pattern: in a match they take any value. `removes`
    names the operators that every match takes out of the graph. `devices` are those on which the op has a kernel of
    its own: elsewhere it is a reference in plain PyTorch, slower than what Inductor makes of the same lines.
    """

    name: str
    variant: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    anchor: Anchor
    guard: Guard
    removes: tuple[str, ...]
    scalars: tuple[tuple[str, float], ...] = ()
    dtypes: tuple[torch.dtype, ...] = TRACED
    devices: tuple[str, ...] = ("cuda",)

    def __str__(self) -> str:
        return f"{self.name}[{self.variant}]"


@dataclass(frozen=True)
class Site:
    """A place where a fusion matched: the module it lies in, its last node, and why it was left, if it was."""

    fusion: str
    variant: str
    where: str
    node: str
    reason: str = ""

    @property
    def applied(self) -> bool:
        """Whether the graph was rewritten here."""
        return not self.reason

    @property
    def left(self) -> bool:
        """Whether it was left to Inductor because of the device alone."""
        return self.reason.startswith(LEFT)


@dataclass(frozen=True)
class Miss:
    """An anchor that no fusion matched, and what came nearest."""

    anchor: str
    where: str
    node: str
    reason: str


@dataclass(frozen=True)
class GraphRecord:
    """What the fusions did to one graph; `note` says so where the whole graph was left alone."""

    sites: tuple[Site, ...] = ()
    misses: tuple[Miss, ...] = ()
    note: str = ""

    def refused(self) -> tuple[Site, ...]:
        """Sites that look right but for what their guard says."""
        return tuple(site for site in self.sites if not (site.applied or site.left))

    def matched(self) -> Counter[str]:
        """Matches by fusion, whether applied or left to Inductor. One that a guard refused is none."""
        return Counter(site.fusion for site in self.sites if site.applied or site.left)

    def applied(self) -> Counter[str]:
        """Rewrites by fusion."""
        return Counter(site.fusion for site in self.sites if site.applied)


@dataclass
class FusionLedger:
    """One record for each graph that was compiled, in order. A graph that Inductor's cache supplied has none."""

    graphs: list[GraphRecord] = field(default_factory=list)

    def matched(self) -> Counter[str]:
        """Matches by fusion, over all graphs."""
        return sum((graph.matched() for graph in self.graphs), Counter())

    def applied(self) -> Counter[str]:
        """Rewrites by fusion, over all graphs."""
        return sum((graph.applied() for graph in self.graphs), Counter())


def first_reason(reasons: Iterable[str]) -> str:
    """The first reason that is one."""
    return next((reason for reason in reasons if reason), "")


def value(node: Any) -> Any:
    """The fake tensor (or symbol) that a node stands for; a number is itself."""
    return node.meta["val"] if isinstance(node, Node) else node


def where(node: Node) -> str:
    """The path of the module that a node comes from, as `named_modules` has it; empty for none."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\[[^\]]*\]\.?", "", stack[-1][0]) if stack else ""


def not_float(tensor: Tensor) -> str:
    """A reason where the kernels have no code for the type."""
    return "" if tensor.dtype in FLOATS else f"no kernel for {tensor.dtype}"


def not_same(name: str, tensor: Tensor, other: Tensor) -> str:
    """A reason where two tensors differ in shape (so one is broadcast) or in type."""
    if tensor.dtype != other.dtype:
        return f"{name} is {tensor.dtype}, the other operand {other.dtype}"
    same = tensor.dim() == other.dim() and all(a == b for a, b in zip(tensor.shape, other.shape, strict=True))
    return "" if same else f"{name} is {_shape(tensor)}, the other operand {_shape(other)}: one is broadcast"


def not_a_row(name: str, node: Any, x: Tensor) -> str:
    """A reason where `node` is not a parameter `[N]` of the model for the last dimension of `x [..., N]`.

    A vector that the graph itself computes could depend on what the fused op also returns.
    """
    if not isinstance(node, Node):
        return f"{name} is {node!r}, not a parameter"
    if node.op not in ("placeholder", "get_attr"):
        return f"{name} is computed in the graph, not a parameter"
    tensor = value(node)
    if tensor.dim() != 1 or tensor.shape[0] != x.shape[-1]:
        return f"{name} is {_shape(tensor)}, not one value a channel of {_shape(x)}"
    return not_float(tensor)


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"  # a symbol as its name
