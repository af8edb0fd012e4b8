"""Kinds of memory problems: from sweeps that are made up, and from operations in which one is planted."""

from __future__ import annotations

import pytest

from optimizer.errors import UsageError
from optimizer.evals.memory_probe import Operation, Point, judge_sweep, probe_memory, working_sets
from tests.evals import planted

MIB = planted.MIB


def sweep(*shares, stream=(60e9, 40e9, 10e9)):
    return [Point(size, share * rate, rate) for size, share, rate in zip((1, 16, 64), shares, stream, strict=True)]


@pytest.mark.parametrize(
    ("kind", "points", "passes"),
    [
        ("bandwidth saturated", sweep(0.9, 0.9, 0.9), 1),  # faster in a cache, as every stream is
        ("locality lost", sweep(0.9, 0.9, 0.9), 8),  # the same, but it comes back for its data
        ("bandwidth saturated", sweep(0.9, 0.9, 0.9, stream=(10e9, 10e9, 10e9)), 8),  # no cache helps
        ("irregular access", sweep(0.05, 0.02, 0.01), 1),
        ("irregular access", sweep(0.05, 0.02, 0.01), 8),  # coming back does not make it regular
        ("irregular access", sweep(0.9, 0.4, 0.2), 1),
    ],
)
def test_a_sweep_has_one_reading(kind, points, passes):
    found = judge_sweep(points, passes)
    assert found.kind == kind
    assert "GB/s" in found.why


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("bandwidth saturated", planted.saturated),
        ("irregular access", planted.irregular),
        ("locality lost", planted.locality_lost),
    ],
)
def test_what_is_planted_is_found(kind, plant):
    *_, probe = plant()
    found = probe_memory(probe.operation_at, [MIB // 2, 4 * MIB, probe.working_set], repeats=4)
    assert found.kind == kind, found


def test_working_sets_grow_to_the_full_one():
    assert working_sets(64 * MIB) == [MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
    assert working_sets(100) == [25, 100]
    assert working_sets(1) == [1, 1]


@pytest.mark.parametrize("sizes", [[], [5], [5, 3]])
def test_a_sweep_needs_sizes_that_grow(sizes):
    with pytest.raises(UsageError, match="at least two, growing"):
        probe_memory(lambda size: Operation(lambda: None, size, size), sizes)


def test_an_operation_that_touches_nothing_is_refused():
    with pytest.raises(UsageError, match="touches 0 bytes"):
        probe_memory(lambda _: Operation(lambda: None, 0, 1), [1, 2])
