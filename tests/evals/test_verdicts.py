"""The order in which causes are ruled out, on phases whose figures are made up."""

from __future__ import annotations

import pytest

from optimizer.evals.memory_probe import MemoryKind, Point
from optimizer.evals.roofline import Attention, Load, ModelShape, Precision, Roofline, Weights
from optimizer.evals.trace import Event, Overheads, Split
from optimizer.evals.verdicts import Facts, judge_phase

MACHINE = Roofline(peak_flops=1e11, bandwidth=1e10)  # ridge 10
DECODE = ModelShape("m", (Weights("w", "linear", 1, 1, 1e8, int(1e8), 0),))  # 10 ms to read, 1 ms to compute
PREFILL = ModelShape("m", (Weights("w", "linear", 1, 1, 1e6, int(1e9), 0),))  # 10 ms to compute
KV = ModelShape("m", (Attention("layers.0.attention", 1, 1, 64, kv=Precision(16)),))


STEP = Load(1, 1)


def facts(shape=DECODE, compiled=False, phase="decode", calls=1, load=STEP, per_call=1e-6, **milliseconds):
    terms = {term: value / 1e3 for term, value in milliseconds.items()}
    found = Split(sum(terms.values()), dict(terms), compiled=compiled)
    for term, seconds in terms.items():
        if term not in ("launch", "host"):
            found.work += [(Event(term, 0, 0), term, seconds / calls, None)] * calls
    return Facts(phase, found, shape.step(load), MACHINE, Overheads(per_call=per_call), compiled)


@pytest.mark.parametrize(
    ("verdict", "given"),
    [
        ("host-bound", {"matmul": 20, "host": 20, "launch": 20}),
        ("launch-bound", {"matmul": 20, "host": 1, "launch": 5}),
        ("launch-bound", {"matmul": 2, "launch": 5, "compiled": True}),
        ("communication-bound", {"matmul": 20, "communication": 5, "launch": 1}),
        ("near limit", {"matmul": 11, "launch": 0.5}),
        ("latency-bound", {"elementwise": 40, "calls": 10_000, "launch": 1}),
        ("compute-bound", {"shape": PREFILL, "matmul": 20, "launch": 1, "phase": "prefill"}),
        ("implementation", {"shape": PREFILL, "matmul": 100, "launch": 1, "phase": "prefill"}),
        ("memory: bandwidth saturated", {"matmul": 16, "launch": 1}),
        ("memory: locality lost", {"matmul": 10, "elementwise": 40}),
        ("implementation", {"matmul": 100, "launch": 1}),
        ("implementation", {"matmul": 100, "launch": 15, "compiled": True}),  # graphs are there already
    ],
)
def test_one_verdict_each(verdict, given):
    found, why, memory = judge_phase(facts(**given))
    assert found == verdict
    assert why
    assert memory is None


@pytest.mark.parametrize("kind", ["bandwidth saturated", "irregular access", "locality lost"])
def test_a_sweep_names_the_kind_of_memory_problem(kind):
    swept = MemoryKind(kind, "because", ())
    verdict, why, memory = judge_phase(facts(matmul=30, launch=1), lambda: swept)
    assert verdict == f"memory: {kind}"
    assert "because" in why
    assert memory is swept


def test_a_step_far_from_the_limit_is_not_called_saturated_by_a_sweep():
    verdict, _, _ = judge_phase(facts(matmul=90, launch=1), lambda: MemoryKind("bandwidth saturated", "", ()))
    assert verdict == "implementation"


def test_a_machine_that_slowed_down_is_judged_by_its_stream_of_that_moment():
    slow = MemoryKind("bandwidth saturated", "", (Point(1, 1e9, 1e9), Point(100, 1e9, 1.2e9)))
    verdict, _, _ = judge_phase(facts(matmul=90, launch=1), lambda: slow)  # 1.1 GB/s, where a stream does 1.2
    assert verdict == "memory: bandwidth saturated"


def test_the_sweep_is_not_run_where_it_decides_nothing():
    def must_not_run():
        raise AssertionError

    judge_phase(facts(matmul=16, launch=1), must_not_run)
    judge_phase(facts(matmul=16, host=20), must_not_run)
    judge_phase(facts(shape=PREFILL, matmul=20, phase="prefill"), must_not_run)


def test_attention_counts_with_the_upkeep_of_its_cache():
    load = Load(1, 1, 1_000_000)  # 256 MB of cache: 25.6 ms
    found, why, _ = judge_phase(facts(KV, load=load, attention=30, kv=10, matmul=12))
    assert found == "memory: bandwidth saturated"
    assert "KV reads bind" in why
    assert "attention with its cache, 77% of the step at 64%" in why
