from __future__ import annotations

import math

import pytest

from optimizer.errors import UsageError
from optimizer.evals.break_even import BreakEven


def test_the_time_spent_over_the_time_saved_a_token():
    # 60 s once, 10 ms a token before and 4 after: 60 / 0.006.
    found = BreakEven(60.0, 0.010, 0.004, speedup_low=2.0)
    assert found.tokens == 10_000
    assert found.tokens_at_worst == 12_000  # twice as fast saves 5 ms


def test_what_is_not_faster_never_pays():
    assert BreakEven(1.0, 0.01, 0.01, 1.0).tokens is None
    assert BreakEven(1.0, 0.01, 0.02, 0.5).tokens is None
    assert BreakEven(1.0, 0.01, 0.009, 0.95).tokens is not None
    assert BreakEven(1.0, 0.01, 0.009, 0.95).tokens_at_worst is None


def test_what_cost_nothing_pays_at_once():
    assert BreakEven(0.0, 0.01, 0.005, 1.5).tokens == 0


@pytest.mark.parametrize(
    "values", [(math.nan, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, 1, math.inf), (-1, 1, 1, 1)]
)
def test_times_that_cannot_be_are_refused(values):
    with pytest.raises(UsageError, match="break-even"):
        BreakEven(*values)
