"""Mixed precision: which layers are worth more bits, and the cheapest mix that stays within a budget.

Each layer can be stored in one of several ways. Objective: choose one option a layer so that the sum of one quantity is
least while the sum of another stays within a budget, such as

    minimize Σ_l milliseconds(l, choice_l)   subject to   Σ_l error(l, choice_l) ≤ budget.

Milliseconds are measured where the model will run. The error is any loss that adds up over layers and compares between
them, such as the relative output error `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)` (`gram.output_error`): errors of different layers
are nearly independent, so to first order their energies add. It ranks layers; what a mix does to the model is measured.

This is the multiple-choice knapsack problem. Layers are added one by one, and of all partial mixes only those are kept
that no other beats in both sums. While they number at most `STATES` the answer is exact; beyond that they are thinned,
evenly and keeping both ends, so a mix within the budget is found whenever there is one.

| symbol   | meaning                                                            |
|----------|--------------------------------------------------------------------|
| option   | a way to store one layer: scheme, error, milliseconds, bytes       |
| frontier | partial mixes that no other beats in both sums, the cheapest first |

Worked example, (error, ms): layer a exact (0, 4), int8 (1, 3), int4 (5, 1); layer b exact (0, 4), int4 (2, 1). Within
an error of 3 the cheapest mix is a in int8 and b in int4: error 3, 4 ms. Where a millisecond is worth an error of 1.5,
the same: a loses 1 to gain 1 in int8, but would lose 4 more to gain 2; b loses 2 to gain 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optimizer.errors import UsageError
from optimizer.quant.formats import Scheme

Quantity = Literal["error", "milliseconds", "bytes"]

STATES = 1000
"""Partial mixes kept: 200 layers with 4 options take about a second."""


@dataclass(frozen=True)
class LayerOption:
    """One way to store a layer; `scheme` None leaves it as it is. `error` adds up over layers."""

    name: str
    scheme: Scheme | None
    error: float
    milliseconds: float
    bytes: int

    def __post_init__(self) -> None:
        for quantity in ("error", "milliseconds", "bytes"):
            value = getattr(self, quantity)
            if not 0 <= value < math.inf:
                raise UsageError(f"option {self.name!r} has {quantity} {value}. Give a finite number, at least 0.")


@dataclass(frozen=True)
class Trade:
    """What a layer gives and gets when its most exact option is replaced by `option`."""

    layer: str
    option: LayerOption
    error_added: float
    saved: float

    @property
    def price(self) -> float:
        """Error added for each unit saved; infinite where nothing is saved, and 0 where nothing is lost."""
        if self.saved > 0:
            return self.error_added / self.saved
        return math.inf if self.error_added > 0 else 0.0


def choose_mix(
    options: Mapping[str, Sequence[LayerOption]],
    budget: float,
    *,
    within: Quantity = "error",
    minimize: Quantity = "milliseconds",
) -> dict[str, LayerOption]:
    """One option for each layer with the least sum of `minimize`, the sum of `within` being at most `budget`.

    Ties go to the smaller sum of `within`, then to the option listed first. Raises `UsageError` for a layer with no
    option and for a budget that not even the frugal choice of every layer meets.
    """
    _check(options)
    if within == minimize:
        raise UsageError(f"cannot limit and minimize {within} at once. Name two different quantities.")
    layers = list(options)
    # The least that the layers still to come need of the budget.
    rest = [0.0]
    for layer in reversed(layers):
        rest.append(rest[-1] + min(_value(option, within) for option in options[layer]))
    rest.reverse()
    limit = budget * (1 + 1e-12)  # sums in another order round differently
    if not rest[0] <= limit:
        raise UsageError(f"no mix has {within} of at most {budget:g}: the least is {rest[0]:g}. Raise the budget.")

    frontier: list[_State] = [_State(0.0, 0.0)]
    for layer, needed in zip(layers, rest[1:], strict=True):
        grown = (
            _State(state.cost + _value(option, minimize), state.used + _value(option, within), index, state)
            for state in frontier
            for index, option in enumerate(options[layer])
        )
        frontier = _thin(_undominated([state for state in grown if state.used + needed <= limit]))
    return {layer: options[layer][index] for layer, index in zip(layers, frontier[0].choices(), strict=True)}


def choose_at_price(
    options: Mapping[str, Sequence[LayerOption]], price: float, *, minimize: Quantity = "milliseconds"
) -> dict[str, LayerOption]:
    """For each layer the least `error + price · minimize`: more bits where fewer would lose more than they gain.

    `price` is the error that one unit is worth. Ties go to the smaller error, then to the option listed first.
    """
    _check(options)
    if not 0 <= price < math.inf:
        raise UsageError(f"Invalid price {price}. Give the error that one unit of {minimize} is worth, at least 0.")
    return {
        layer: min(choices, key=lambda option: (option.error + price * _value(option, minimize), option.error))
        for layer, choices in options.items()
    }


def rank(options: Mapping[str, Sequence[LayerOption]], *, minimize: Quantity = "milliseconds") -> list[Trade]:
    """For each layer the step from its most exact to its cheapest option, the most harmful for its gain first."""
    _check(options)
    trades = []
    for layer, choices in options.items():
        exact = min(choices, key=lambda option: (option.error, _value(option, minimize)))
        cheap = min(choices, key=lambda option: (_value(option, minimize), option.error))
        saved = _value(exact, minimize) - _value(cheap, minimize)
        trades.append(Trade(layer, cheap, cheap.error - exact.error, saved))
    return sorted(trades, key=lambda trade: -trade.price)


@dataclass(frozen=True, slots=True)
class _State:
    """A partial mix: its sums, the option of its last layer, and the mix before that."""

    cost: float
    used: float
    index: int = -1
    before: _State | None = None

    def choices(self) -> list[int]:
        found: list[int] = []
        state: _State | None = self
        while state is not None and state.before is not None:
            found.append(state.index)
            state = state.before
        return found[::-1]


def _undominated(states: list[_State]) -> list[_State]:
    """Those that no other beats in both sums, by rising cost and so by falling use. The sort is stable."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state.cost, state.used)):
        if not kept or state.used < kept[-1].used:
            kept.append(state)
    return kept


def _thin(frontier: list[_State]) -> list[_State]:
    if len(frontier) <= STATES:
        return frontier
    last = len(frontier) - 1
    return [frontier[i * last // (STATES - 1)] for i in range(STATES)]


def _value(option: LayerOption, quantity: Quantity) -> float:
    return float(getattr(option, quantity))


def _check(options: Mapping[str, Sequence[LayerOption]]) -> None:
    for layer, choices in options.items():
        if not choices:
            raise UsageError(f"layer {layer!r} has no option. Give at least the one that leaves it as it is.")
