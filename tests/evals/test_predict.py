"""Predictions of a step from its parts, the correction that is learnt, and what a step is bound by."""

from __future__ import annotations

import math

import pytest

from optimizer.errors import UsageError
from optimizer.evals.predict import (
    Bottleneck,
    Correction,
    LinearTimes,
    StepTimes,
    median_error,
    predict,
    relative_error,
)
from optimizer.evals.roofline import Load, OpCost, Roofline, StepCost

ANCHOR = StepTimes(ttft=0.100, tpot=0.010)


def kind(plain: tuple[float, float], quantized: tuple[float, float]) -> LinearTimes:
    return LinearTimes("down_proj", ("a.down_proj",), (8, 8), StepTimes(*plain), StepTimes(*quantized))


def test_a_prediction_swaps_the_measured_layers_and_keeps_the_rest() -> None:
    changed = [kind((0.040, 0.004), (0.030, 0.001)), kind((0.020, 0.002), (0.025, 0.001))]
    found = predict(ANCHOR, changed)
    assert found.ttft == pytest.approx(0.100 - 0.010 + 0.005)
    assert found.tpot == pytest.approx(0.010 - 0.003 - 0.001)
    assert predict(ANCHOR, []) == ANCHOR


def test_a_smaller_cache_saves_time_of_the_step_alone() -> None:
    found = predict(ANCHOR, [], cache_seconds=0.004)
    assert found == StepTimes(0.100, pytest.approx(0.006))


def test_a_prediction_stays_positive_where_parts_exceed_the_whole() -> None:
    assert predict(ANCHOR, [kind((9.0, 9.0), (0.0, 0.0))], cache_seconds=9.0) == StepTimes(0.001, 0.0001)


def test_e2e_is_the_first_token_and_the_gaps() -> None:
    assert ANCHOR.e2e(64) == pytest.approx(0.1 + 63 * 0.01)


def test_a_layer_loses_by_the_objective_and_beyond_the_noise() -> None:
    slower_prefill = kind((0.010, 0.002), (0.020, 0.001))
    assert slower_prefill.loses(lambda times: times.ttft)
    assert not slower_prefill.loses(lambda times: times.tpot)
    assert not kind((1.0, 1.0), (1.01, 1.01)).loses(lambda times: times.tpot)


def test_a_correction_is_drawn_towards_one_and_approaches_what_is_measured() -> None:
    correction = Correction()
    assert correction.apply(ANCHOR) == ANCHOR
    correction.learn(StepTimes(1.0, 1.0), StepTimes(1.0, 0.64))
    assert correction.apply(ANCHOR) == StepTimes(0.100, pytest.approx(0.010 * 0.8))  # the root of 0.64
    for _ in range(200):
        correction.learn(StepTimes(1.0, 1.0), StepTimes(1.0, 0.64))
    assert correction.apply(ANCHOR).tpot == pytest.approx(0.0064, rel=0.01)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_correction_refuses_what_is_no_time(wrong: float) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        Correction().learn(StepTimes(1.0, wrong), StepTimes(1.0, 1.0))
    with pytest.raises(UsageError, match="positive and finite"):
        Correction().learn(StepTimes(1.0, 1.0), StepTimes(wrong, 1.0))


def test_errors_are_shares_of_what_was_measured() -> None:
    assert relative_error(0.5, 1.0) == -0.5
    assert relative_error(2.0, 1.0) == 1.0
    assert median_error([(0.5, 1.0), (1.1, 1.0), (1.0, 1.0)]) == pytest.approx(0.1)
    assert median_error([]) is None


def step(weights: float, kv: float, flops: float) -> StepCost:
    return StepCost(Load(1, 1), (OpCost("all", "linear", flops=flops, weight_bytes=weights, kv_bytes=kv),))


@pytest.mark.parametrize(
    ("cost", "launch", "binds"),
    [
        (step(8e9, 1e9, 1e9), 0.0, "weights"),
        (step(1e9, 8e9, 1e9), 0.0, "kv"),
        (step(1e9, 1e9, 9e11), 0.0, "compute"),
        (step(1e9, 1e9, 1e9), 3.0, "launch"),
    ],
)
def test_what_binds_is_the_largest_term(cost: StepCost, launch: float, binds: str) -> None:
    found = Bottleneck.of("decode", cost, 4.0, Roofline(1e12, 1e10), launch_seconds=launch)
    assert found.binds == binds
    assert found.floor_seconds == pytest.approx(max(cost.required_bytes / 1e10, cost.flops / 1e12))
    assert f"{binds} binds" in str(found)


def test_what_no_ceiling_explains_is_other_and_shares_are_of_the_step() -> None:
    found = Bottleneck.of("decode", step(1e10, 0, 0), 4.0, Roofline(1e12, 1e10), launch_seconds=1.0)
    assert found.terms["other"] == pytest.approx(2.0)
    assert found.share("weights") == 0.25
    assert not found.near_limit
    assert Bottleneck.of("decode", step(1e10, 0, 0), 1.2, Roofline(1e12, 1e10)).near_limit
