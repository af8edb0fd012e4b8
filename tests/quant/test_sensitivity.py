"""Mixes of precision against every possible mix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.quant import sensitivity
from optimizer.quant.formats import NVFP4, Format, Scheme
from optimizer.quant.sensitivity import LayerOption, choose_at_price, choose_mix, rank

Options = Mapping[str, Sequence[LayerOption]]


def option(name: str, error: float, milliseconds: float, size: int = 1) -> LayerOption:
    return LayerOption(name, Scheme(Format(8)), error, milliseconds, size)


EXAMPLE: Options = {
    "a": [option("exact", 0, 4), option("int8", 1, 3), option("int4", 5, 1)],
    "b": [option("exact", 0, 4), option("int4", 2, 1)],
}


def names(mix: Mapping[str, LayerOption]) -> dict[str, str]:
    return {layer: choice.name for layer, choice in mix.items()}


def sums(mix: Mapping[str, LayerOption]) -> tuple[float, float]:
    """Error and milliseconds."""
    return sum(o.error for o in mix.values()), sum(o.milliseconds for o in mix.values())


def all_mixes(options: Options) -> list[tuple[float, float]]:
    return [sums(dict(zip(options, choice, strict=True))) for choice in product(*options.values())]


def test_the_worked_example_of_the_docstring() -> None:
    mix = choose_mix(EXAMPLE, 3)
    assert names(mix) == {"a": "int8", "b": "int4"}
    assert sums(mix) == (3, 4)
    assert names(choose_at_price(EXAMPLE, 1.5)) == {"a": "int8", "b": "int4"}


numbers = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))  # integers give ties
layers = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda rows: {f"layer{i}": [option(str(j), e, t) for j, (e, t) in enumerate(row)] for i, row in enumerate(rows)}
)


@settings(deadline=None)
@given(layers, st.floats(0, 1))
def test_no_other_mix_within_the_budget_is_cheaper(options: Options, share: float) -> None:
    every = all_mixes(options)
    errors = [error for error, _ in every]
    budget = min(errors) + share * (max(errors) - min(errors))
    error, milliseconds = sums(choose_mix(options, budget))
    assert error <= budget * (1 + 1e-9)
    best = min(ms for e, ms in every if e <= budget)
    assert milliseconds <= best + 1e-9
    # The same problem the other way round: the least error at no more time.
    error, milliseconds = sums(choose_mix(options, best, within="milliseconds", minimize="error"))
    assert milliseconds <= best * (1 + 1e-9)
    assert error <= min(e for e, ms in every if ms <= best) + 1e-9


@settings(deadline=None)
@given(layers, st.floats(0, 5))
def test_the_mix_at_a_price_is_on_the_frontier(options: Options, price: float) -> None:
    error, milliseconds = sums(choose_at_price(options, price))
    best = min(e + price * ms for e, ms in all_mixes(options))
    assert error + price * milliseconds == pytest.approx(best)


@settings(deadline=None, max_examples=30)
@given(layers, st.floats(0, 1))
def test_a_thinned_frontier_still_meets_the_budget(options: Options, share: float) -> None:
    errors = [error for error, _ in all_mixes(options)]
    budget = min(errors) + share * (max(errors) - min(errors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "STATES", 3)
        assert sums(choose_mix(options, budget))[0] <= budget * (1 + 1e-9)


def test_many_layers_come_within_a_percent_of_the_bound_of_any_price() -> None:
    options = {
        str(i): [
            option("exact", 0, 4 + i % 7),
            option("int8", 0.01 * (1 + i % 5), 2 + i % 3),
            option("int4", 0.1 * (1 + i % 11), 1.01**i),
        ]
        for i in range(120)
    }
    error, milliseconds = sums(choose_mix(options, 20.0))
    assert error <= 20
    # Lagrange: at every price, cost + (error - budget) / price of the best mix is a lower bound.
    bounds = []
    for price in (10 ** (i / 20 - 3) for i in range(80)):
        e, ms = sums(choose_at_price(options, price))
        bounds.append(ms + (e - 20) / price)
    assert max(bounds) <= milliseconds <= 1.01 * max(bounds)


def test_bytes_are_a_budget_too() -> None:
    options = {"a": [option("exact", 0, 4, 16), option("int4", 5, 5, 4)], "b": [option("exact", 0, 4, 16)]}
    assert names(choose_mix(options, 20, within="bytes", minimize="error")) == {"a": "int4", "b": "exact"}
    assert names(choose_mix(options, 32, within="bytes", minimize="error")) == {"a": "exact", "b": "exact"}


def test_ties_are_broken_by_error_and_then_by_order() -> None:
    options = {"a": [option("first", 1, 1), option("second", 1, 1), option("exact", 0, 1)]}
    assert names(choose_mix(options, 5)) == {"a": "exact"}
    assert names(choose_mix({"a": options["a"][:2]}, 5)) == {"a": "first"}
    assert names(choose_at_price({"a": options["a"][:2]}, 5)) == {"a": "first"}
    assert choose_mix({}, 0) == {}


def test_layers_that_lose_most_for_what_they_gain_come_first() -> None:
    options = {
        "fair": [option("exact", 0, 4), option("int4", 1, 2)],
        "slow": [option("exact", 0, 4), option("int4", 1, 4)],
        "bad": [option("exact", 0.5, 4), option("int8", 1, 3), option("int4", 6.5, 2)],
    }
    trades = rank(options)
    assert [(t.layer, t.option.name, t.error_added, t.saved) for t in trades] == [
        ("bad", "int4", 6, 2), ("fair", "int4", 1, 2), ("slow", "exact", 0, 0),
    ]  # fmt: skip
    assert [t.price for t in trades] == [3, 0.5, 0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="least is 1"):
        choose_mix({"a": [option("int8", 1, 1)]}, 0.5)
    for budget in (-1.0, math.nan):
        with pytest.raises(UsageError, match="Raise the budget"):
            choose_mix(EXAMPLE, budget)
    with pytest.raises(UsageError, match="'a' has no option"):
        choose_mix({"a": []}, 1)
    with pytest.raises(UsageError, match="two different"):
        choose_mix(EXAMPLE, 1, within="error", minimize="error")
    for price in (-1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="price"):
            choose_at_price(EXAMPLE, price)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="finite"):
            LayerOption("int4", Scheme(NVFP4), bad, 1, 1)
        with pytest.raises(UsageError, match="finite"):
            LayerOption("int4", None, 1, bad, 1)
