"""Crossovers against closed formulas and a search that tries every size."""

from __future__ import annotations

import pytest

from optimizer.evals.architecture import from_parameters
from optimizer.evals.crossovers import binding, crossovers, first
from optimizer.evals.roofline import Roofline

H100 = Roofline(989.4e12, 3.35e12)
LLAMA_70B = from_parameters(70e9, layers=80, heads=64, kv_heads=8, head_dim=128)


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 9, 1000, 4097])
def test_bisection_finds_the_first(answer):
    assert first(lambda n: n >= answer) == answer


def test_what_never_crosses_is_none():
    assert first(lambda n: False) is None
    assert first(lambda n: n > 100, most=64) is None


def found(shape, batch=1, context=4096):
    return {(c.phase, c.axis, c.after): c for c in crossovers(shape, H100, batch=batch, context=context)}


def test_a_worked_70b_model():
    by = found(LLAMA_70B)
    # KV of 327,680 B a token equals 140 GB of weights at 427,246 tokens of one row, the new one included.
    assert by["decode", "context", "KV reads"].value == pytest.approx(140e9 / 327_680, abs=1)
    # At 4,097 tokens a row holds 1.3425 GB: 104 rows are below 140 GB and 105 above.
    assert by["decode", "batch", "KV reads"].value == 105
    # Prefill computes from intensity 295 on: 2·P·S / (2·P) = S.
    assert by["prefill", "prompt", "compute"].value == pytest.approx(295, rel=0.01)
    # With 4,096 cached tokens each row reads more than its computing takes, so no batch is compute-bound.
    assert by["decode", "batch", "compute"].value is None
    assert "at every batch" in by["decode", "batch", "compute"].text


def test_without_a_cache_decode_turns_to_compute_at_the_ridge():
    by = found(from_parameters(70e9), context=1)
    assert by["decode", "batch", "compute"].value == pytest.approx(H100.ridge, abs=1)
    assert by["decode", "context", "KV reads"].value is None


def test_each_is_the_first_size_whose_step_is_bound_so():
    shape, machine = from_parameters(1e7, layers=6, heads=6, kv_heads=2, head_dim=64), Roofline(2e11, 6e10)
    by = {(c.axis, c.after): c.value for c in crossovers(shape, machine, batch=2, context=100)}

    def brute(cost, wanted):
        return next(n for n in range(1, 10_000) if wanted(cost(n)))

    assert by["context", "KV reads"] == brute(lambda n: shape.decode(2, n), lambda c: c.kv_bytes > c.weight_bytes)
    assert by["batch", "KV reads"] == brute(lambda n: shape.decode(n, 100), lambda c: c.kv_bytes > c.weight_bytes)
    assert by["prompt", "compute"] == brute(lambda n: shape.prefill(2, n), lambda c: binding(c, machine) == "compute")


def test_the_text_says_the_number():
    text = found(LLAMA_70B)["decode", "batch", "KV reads"].text
    assert "until batch 104" in text
    assert "from 105 on" in text
    assert "at context 4,096" in text


def test_what_sets_the_floor():
    assert binding(LLAMA_70B.decode(1, 4096), H100) == "weights"
    assert binding(LLAMA_70B.decode(200, 4096), H100) == "KV reads"
    assert binding(LLAMA_70B.prefill(1, 4096), H100) == "compute"
