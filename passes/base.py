"""What a pass is, what it may use, and what it must report.

A pass is a frozen dataclass whose fields are its options. `check` raises before anything changes; `run` replaces
modules of the model and returns a `PassReport`. Tensors of the model are never written to, so a failed pass is
undone by putting the module tree back (`transaction`), and a copy of a model costs no memory (`view`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from optimizer.backends.runner import BaseRunner, EagerRunner
from optimizer.passes.calibration import Calibration


@dataclass(frozen=True)
class Skip:
    """A layer that a pass left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LayerChange:
    """What a pass did to one layer `[N, K]`: its format, bytes, how, and what it lost.

    `weight_error` is the relative Frobenius error of the weight; `output_error` that of the layer's output over the
    `tokens` of calibration that reached it, `‖X ΔWᵀ‖ / ‖X Wᵀ‖`.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    format: str
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    method: str = "rtn"
    output_error: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class PassReport:
    """What a pass matched, skipped and cost. `expected` is how many sites the architecture has."""

    name: str
    matched: int
    expected: int | None = None
    skipped: tuple[Skip, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass
class Context:
    """What the passes of one run share. A pass that builds a runner says how through `make_runner`.

    `scale_dtype` is the type in which the checkpoint will store scales (a default for each format unless given).
    `time` measures the seconds of calls, interleaved.
    """

    tokenizer: Any = None
    batch: int = 1
    calibration: Calibration | None = None
    scale_dtype: torch.dtype | None = None
    time: Callable[[Mapping[str, Callable[[], object]]], dict[str, float]] | None = None
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None
    make_runner: Callable[[nn.Module, Any], BaseRunner] = field(default=EagerRunner)


@runtime_checkable
class Pass(Protocol):
    """A transformation of a model. `stored` says that a checkpoint already holds its result."""

    name: ClassVar[str]
    stored: ClassVar[bool]

    @property
    def required(self) -> bool:
        """Whether it is an error to match nothing."""

    def check(self, model: nn.Module, ctx: Context) -> None:
        """Raise a typed error when this pass cannot do its work on the model. Changes nothing."""

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Replace modules of `model`; report every site matched and every one skipped."""


def view(model: nn.Module) -> Any:
    """A copy of the module tree that shares every tensor with the original, so passes cannot be seen through it."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Put the module tree, its parameters and its configuration back as they were if the body raises."""
    tables = ("_modules", "_parameters", "_buffers")
    before = {m: {k: dict(v) if k in tables else v for k, v in vars(m).items()} for m in model.modules()}
    try:
        yield
    except BaseException:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
        raise


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block was entered."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began
