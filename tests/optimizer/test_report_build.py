"""What the report adds to the outcome: when the run has paid for itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from optimizer.evals.timing import Summary, Workload
from optimizer.report_build import break_even

COSTS = {
    "load": 1.0,
    "baseline quality": 20.0,
    "calibration data": 2.0,
    "pass quantize": 3.0,
    "compile": 15.0,
    "speed": 9,
}


def speed(before: float, after: float, low: float) -> Any:
    """Two rows of ten tokens that took so many seconds end to end."""
    timings = [SimpleNamespace(e2e=Summary.of([seconds])) for seconds in (before, after)]
    return SimpleNamespace(
        workload=Workload(2, 4, 10), baseline=timings[0], optimized=timings[1], throughput=SimpleNamespace(low=low)
    )


def test_the_optimization_is_calibration_passes_and_compilation() -> None:
    found = break_even(speed(2.0, 1.0, low=1.6), COSTS, None)
    assert (found.optimization_seconds, found.run_seconds) == (20.0, 50.0)
    assert (found.seconds_per_token_before, found.seconds_per_token_after) == (0.1, 0.05)  # prefill is in both
    assert found.tokens == pytest.approx(400, abs=1)
    assert found.tokens_at_worst == pytest.approx(20 / (0.1 - 0.1 / 1.6), abs=1)
    assert found.tokens_of_run == pytest.approx(1000, abs=1)
    assert found.cost is None


def test_a_price_makes_it_money() -> None:
    found = break_even(speed(2.0, 1.0, low=1.6), COSTS, 3.6)
    assert found.cost == pytest.approx(50 / 3600 * 3.6)
    assert found.cost_per_million_tokens_before == pytest.approx(3.6 / 3600 * 0.1 * 1e6)
    assert found.cost_per_million_tokens_after == pytest.approx(50)


def test_a_slower_model_never_pays() -> None:
    found = break_even(speed(1.0, 2.0, low=0.4), COSTS, None)
    assert (found.tokens, found.tokens_at_worst, found.tokens_of_run) == (None, None, None)
    assert dict(found.lines())["The whole run won back after"] == "never: not faster"
