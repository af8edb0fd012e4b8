"""Worked figures, recomputed by hand from published model sizes and vendor rates; not copied from the code."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.evals import arithmetic as a
from optimizer.evals.hardware import find_gpu

P, LAYERS, D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 70e9, 80, 8192, 64, 8, 128
H100 = find_gpu("h100")
KV = a.kv_bytes_per_token(LAYERS, KV_HEADS, HEAD_DIM)

GOLDEN = {
    "weights": (a.weight_bytes(P), 140e9),
    "int4 payload": (a.weight_bytes(P, 4), 35e9),
    "KV per token": (KV, 327_680),
    "KV 4096": (KV * 4096, 1.342e9),
    "KV 4608": (KV * 4608, 1.510e9),
    "KV 8192": (KV * 8192, 2.684e9),
    "KV 8 x 128000": (KV * 8 * 128_000, 335.5e9),
    "prefill FLOP": (a.prefill_flops(P, 4096), 573.4e12),
    "prefill intensity": (a.prefill_flops(P, 4096) / a.weight_bytes(P), 4096),
    "prefill floor": (a.iron_law_seconds(140e9, 3.35e12, a.prefill_flops(P, 4096), 989.4e12), 0.580),
    "decode FLOP": (a.decode_flops(P), 140e9),
    "decode intensity": (a.decode_intensity(P, 1), 1.0),
    "decode intensity with activations": (a.decode_intensity(P, 128, D_MODEL), 128 * 140e9 / (140e9 + 128 * 8192 * 2)),
    "decode floor": (a.iron_law_seconds(140e9, 3.35e12, 140e9, 989.4e12), 41.8e-3),
    "requests, fp16": (a.requests_that_fit(80e9, 140e9 / 8, KV * 4096 / 8), 372),
    "requests, int4 and int8 cache": (a.requests_that_fit(80e9, 35e9 / 8, KV / 2 * 4096 / 8), 901),
    "GEMM FLOP": (a.gemm(4096, 4096, 4096).flops, 137.4e9),
    "GEMM bytes": (a.gemm(4096, 4096, 4096).bytes, 100.7e6),
    "GEMM intensity": (a.gemm(4096, 4096, 4096).intensity, 1365),
    "GELU bytes": (a.elementwise(4096**2, 5).bytes, 67.1e6),
    "GELU intensity": (a.elementwise(4096**2, 5).intensity, 1.25),
    "LayerNorm intensity": (a.Work(15e12, 2.8e12).intensity, 5.4),
    "LayerNorm MBU": (a.utilisation(2.8e12, 1, H100.bandwidth), 0.84),
    "attention head, materialised": (a.attention(8192, 1, 128, materialised=True).bytes, 545.3e6),
    "attention layer, materialised": (a.attention(8192, 64, 128, materialised=True).bytes, 34.9e9),
    "attention head, tiled": (a.attention(8192, 1, 128, materialised=False).bytes, 8.39e6),
    "attention layer, tiled": (a.attention(8192, 64, 128, materialised=False).bytes, 536.9e6),
    "attention saving": (
        a.attention(8192, 64, 128, materialised=True).bytes / a.attention(8192, 64, 128, materialised=False).bytes,
        65,
    ),
    "fused LayerNorm(GELU)": (a.fused_bytes_saved(2048 * 4096, 2), 67.1e6),
    "one intermediate": (a.fused_bytes_saved(2048 * 4096, 1) / 2, 16.8e6),
    "bits, g64": (a.effective_bits(4, 64), 4.25),
    "bits, g16": (a.effective_bits(4, 16), 5.0),
    "int8 overhead": (a.effective_bits(8, 128, scale_bits=32) / 8 - 1, 0.0313),
    "speculative 0.78, 5": (a.speculative_tokens(0.78, 5), 3.52),
    "speculative 0.8, 4": (a.speculative_tokens(0.8, 4), 3.36),
    "speculative ITL": (a.speculative_itl(4e-3, 32e-3, a.speculative_tokens(0.78, 5)), 10.2e-3),
    "bubble": (a.pipeline_bubble(4, 12), 3 / 15),
    "scaling tax": (a.scaling_tax(0.48, 0.65), 0.262),
    "all-reduce, 1": (a.all_reduce_bytes(D_MODEL, 1), 32.8e3),
    "all-reduce, 64": (a.all_reduce_bytes(D_MODEL, 64), 2.1e6),
    "all-reduce seconds": (a.all_reduce_bytes(D_MODEL, 64) / 900e9, 2.33e-6),
    "MFU": (a.utilisation(573.4e12, 1.16, 989.4e12), 0.4996),
    "cost": (a.cost_per_million_tokens(3.6, 1000), 1.0),
}


@pytest.mark.parametrize("figure", GOLDEN)
def test_worked_figures(figure):
    value, expected = GOLDEN[figure]
    assert value == pytest.approx(expected, rel=0.01)


def test_counts_that_are_exact():
    assert KV == 327_680
    assert a.requests_that_fit(80e9, 17.5e9, KV * 512) == 372
    assert a.requests_that_fit(80e9, 4.375e9, KV * 256) == 901
    assert a.requests_that_fit(80e9, 140e9, KV) == 0


SHARES = {"gemm": 0.50, "elementwise": 0.35, "launch": 0.15}


def test_amdahl_worked_step():
    seconds = a.amdahl_seconds(1 / 120, SHARES, {"elementwise": 0.7, "launch": 0.8})
    assert seconds == pytest.approx(5.29e-3, rel=1e-3)
    assert 1 / seconds == pytest.approx(189, rel=1e-3)
    assert 1 / 120 / seconds == pytest.approx(1.58, rel=5e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: a.amdahl_seconds(1, {"gemm": 0.5}, {}),
        lambda: a.amdahl_seconds(1, SHARES, {"comms": 0.5}),
        lambda: a.speculative_tokens(1.1, 3),
        lambda: a.speculative_tokens(0.5, -1),
        lambda: a.speculative_tokens(math.nan, 3),
        lambda: a.effective_bits(4, 0),
        lambda: a.requests_that_fit(80, 1, 0),
        lambda: a.expected_experts(4, 5, 1),
        lambda: a.expected_experts(4, 0, 1),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(UsageError):
        call()


def test_the_iron_law_adds_or_overlaps():
    terms = {
        "bytes_moved": 10,
        "bandwidth": 5,
        "flops": 12,
        "peak_flops": 8,
        "efficiency": 0.5,
        "latency_seconds": 0.25,
    }
    assert a.iron_law_seconds(**terms, overlapped=False) == 2 + 3 + 0.25
    assert a.iron_law_seconds(**terms) == 3 + 0.25


def test_goodput_needs_both_objectives():
    requests = [(0.1, 0.01), (0.3, 0.01), (0.1, 0.05), (0.2, 0.02)]
    assert a.goodput(requests, 2.0, ttft_slo=0.2, tpot_slo=0.02) == 1.0
    assert a.goodput([(math.nan, 0.01)], 1.0, ttft_slo=1, tpot_slo=1) == 0


def test_certain_acceptance_has_no_division_by_zero():
    assert a.speculative_tokens(1.0, 4) == 5
    assert a.speculative_tokens(0.0, 4) == 1


@given(st.integers(1, 64), st.data())
def test_expected_experts_agrees_with_the_chance_of_each_being_missed(experts, data):
    active = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(1, 50))
    missed = math.prod([(experts - active) / experts] * tokens)
    value = a.expected_experts(experts, active, tokens)
    assert value == pytest.approx(experts * (1 - missed))
    assert active - 1e-9 <= value <= experts
