import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.evals.architecture import from_parameters
from optimizer.evals.hardware import find_gpu
from optimizer.evals.roofline import Attention, Load, Lookup, ModelShape, Precision, Roofline, Weights

H100 = find_gpu("h100").roofline()
BIG = from_parameters(70e9)  # weights alone
BIG_CACHED = from_parameters(70e9, layers=80, heads=64, kv_heads=8, head_dim=128)

GOLDEN = {
    "weights": (BIG.weight_bytes, 140e9),
    "int4 weights": (from_parameters(70e9, weights=Precision(4)).weight_bytes, 35e9),
    "KV per token": (BIG_CACHED.kv_bytes_per_token, 327_680),
    "KV 4096": (BIG_CACHED.kv_cache_bytes(1, 4096), 1.342e9),
    "KV 8 x 128000": (BIG_CACHED.kv_cache_bytes(8, 128_000), 335.5e9),
    "prefill FLOP": (BIG.prefill(1, 4096).flops, 573.4e12),
    "prefill intensity": (BIG.prefill(1, 4096).intensity, 4096),
    "prefill floor": (BIG.prefill(1, 4096).floor_seconds(H100), 0.580),
    "decode FLOP": (BIG.decode(1, 0).flops, 140e9),
    "decode intensity": (BIG.decode(1, 0).intensity, 1.0),
    "decode floor": (BIG.decode(1, 0).floor_seconds(H100), 41.8e-3),
    "decode tokens/s": (BIG.decode(1, 0).tokens_per_second(H100), 23.9),
    "int4 floor": (from_parameters(70e9, weights=Precision(4)).decode(1, 0).floor_seconds(H100), 10.4e-3),
    "decode 32": (BIG.decode(32, 0).tokens_per_second(H100), 766),
    "decode 128": (BIG.decode(128, 0).tokens_per_second(H100), 3063),
    "TP bytes": (BIG.decode(1, 0, tensor_parallel=8).weight_bytes, 17.5e9),
    "TP floor": (BIG.decode(1, 0, tensor_parallel=8).floor_seconds(H100), 5.22e-3),
    "TP tokens/s": (BIG.decode(1, 0, tensor_parallel=8).tokens_per_second(H100), 191.4),
    "intensity with activations": (
        from_parameters(70e9, d_model=8192).decode(128, 0).intensity,
        128 * 140e9 / (140e9 + 128 * 8192 * 2),
    ),
}


@pytest.mark.parametrize("figure", GOLDEN)
def test_the_step_model_collapses_to_the_closed_formulas(figure):
    value, expected = GOLDEN[figure]
    assert value == pytest.approx(expected, rel=0.005)


def test_short_prefill_is_still_memory_bound():
    assert BIG.prefill(1, 256).intensity == pytest.approx(256)
    assert H100.bound(256) == "memory"
    assert H100.bound(4096) == "compute"


def test_a_cached_context_is_read_and_the_new_token_written():
    step = BIG_CACHED.decode(2, 4096)
    assert step.kv_bytes == 2 * 327_680 * (4096 + 1)
    assert step.flops == 2 * 2 * 70e9 + 2 * 80 * 4 * 64 * 128 * 4097
    assert step.required_bytes == 140e9 + step.kv_bytes


def test_tensor_parallel_attention_cannot_divide_below_one_cached_head():
    one, eight, sixteen = (BIG_CACHED.decode(1, 1000, tensor_parallel=n) for n in (1, 8, 16))
    assert eight.kv_bytes == one.kv_bytes / 8
    assert sixteen.kv_bytes == eight.kv_bytes
    assert sixteen.flops == pytest.approx(one.flops / 16)


def test_roofline_corners():
    roofline = Roofline(100.0, 10.0)
    assert roofline.ridge == 10
    assert roofline.attainable(5) == 50
    assert roofline.attainable(10) == roofline.attainable(1e9) == 100
    assert roofline.bound(9.999) == "memory"
    assert roofline.bound(10) == "compute"
    assert roofline.seconds(200, 1) == 2
    assert roofline.seconds(1, 30) == 3


@pytest.mark.parametrize("ceilings", [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_a_roofline_needs_positive_ceilings(ceilings):
    with pytest.raises(UsageError, match="must be positive"):
        Roofline(*ceilings)


@pytest.mark.parametrize(
    ("precision", "rows", "columns", "expected"),
    [
        (Precision(16), 3, 5, 30),
        (Precision(4, 128, 16), 8, 256, 8 * 128 + 8 * 2 * 2),
        (Precision(4, 128, 16, 4), 8, 256, 8 * 128 + 8 * 2 * 2 + 8),
        (Precision(8, None, 32), 8, 100, 8 * 100 + 8 * 4),
        (Precision(4, 32, 16), 1, 33, 21),  # 132 bits and two ragged groups: 164 bits
        (Precision(3), 1, 3, 2),  # 9 bits
        (Precision(8, 128, 32), 1, 0, 0),
    ],
)
def test_stored_bytes_include_scales_and_zero_points(precision, rows, columns, expected):
    assert precision.bytes(rows, columns) == expected


@pytest.mark.parametrize("fields", [(0,), (4, 0), (4, -1), (4, 128, -1), (4, 128, 16, -4)])
def test_impossible_precisions_are_refused(fields):
    with pytest.raises(UsageError):
        Precision(*fields)


@pytest.mark.parametrize("fields", [(0, 1), (1, 0), (1, 1, -1), (1, 1, 0, 0)])
def test_impossible_loads_are_refused(fields):
    with pytest.raises(UsageError):
        Load(*fields)


@given(st.integers(1, 20), st.integers(0, 30), st.none() | st.integers(1, 25))
def test_attention_pairs_agree_with_counting_them(tokens, context, window):
    attention = Attention("a", 4, 2, 8, window)
    seen = [
        sum(1 for key in range(query + 1) if window is None or query - key < window)
        for query in range(context, context + tokens)
    ]
    assert attention.positions(tokens, context) == sum(seen)
    assert attention.cached(context) == seen[0] - 1


def test_a_window_bounds_cache_and_reads():
    model = ModelShape("m", (Attention("full", 4, 2, 8), Attention("window", 4, 2, 8, window=100)))
    token = 2 * 2 * 8 * 2
    assert model.kv_cache_bytes(3, 1000) == 3 * token * (1000 + 100)
    assert model.decode(3, 1000).kv_bytes == 3 * token * (1001 + 99 + 1)
    assert model.decode(3, 10).kv_bytes == 3 * token * 2 * 11


def test_quantized_cache_counts_its_scales():
    model = ModelShape("m", (Attention("a", 4, 2, 64),)).cached_as(Precision(8, 64, 16))
    assert model.kv_bytes_per_token == 2 * 2 * (64 + 2)


def bank(experts, active):
    return Weights("bank", "expert", 4, 8, 64, flops=64, elements=12, experts=experts, active=active)


def test_experts_in_a_batch_are_those_that_some_token_chose():
    model = ModelShape("m", (bank(8, 2),))
    assert model.weight_bytes == 8 * 64
    assert model.decode(1, 0).weight_bytes == pytest.approx(2 * 64)
    assert model.decode(1, 0).flops == 2 * 64
    # every one of the 28 × 28 pairs of choices of two tokens
    pairs = list(itertools.combinations(range(8), 2))
    distinct = sum(len({*p, *q}) for p in pairs for q in pairs) / len(pairs) ** 2
    assert model.decode(2, 0).weight_bytes == pytest.approx(distinct * 64)
    assert model.decode(10_000, 0).weight_bytes == pytest.approx(8 * 64)


def test_an_embedding_reads_rows_and_a_tied_table_is_stored_once():
    head = Weights("lm_head", "lm_head", 1000, 16, 32_000, flops=32_000, elements=1016)
    model = ModelShape("m", (Lookup("embed", 1000, 16, 32_000, tied=True), head))
    assert model.weight_bytes == 32_000
    assert model.decode(3, 0).weight_bytes == 3 * 32 + 32_000
    requantized = model.stored_as(Precision(4), head=Precision(8))
    assert requantized.weight_bytes == 32_000 + 16_000
    assert model.stored_as(Precision(4)).weight_bytes == 32_000


def test_the_head_sees_last_positions_unless_all_are_wanted():
    model = ModelShape("m", (Weights("lm_head", "lm_head", 10, 4, 80, flops=80, elements=14),))
    assert model.prefill(2, 7).flops == 2 * 80
    assert model.prefill(2, 7, all_logits=True).flops == 2 * 7 * 80


def test_one_operation_after_another_takes_no_less_than_all_at_once():
    compute = Weights("c", "linear", 1, 1, 1, flops=1000, elements=0)
    memory = Weights("m", "norm", 1, 1, 500, flops=1, elements=0)
    step = ModelShape("m", (compute, memory)).decode(1, 0)
    roofline = Roofline(10, 10)
    assert step.serial_seconds(roofline) == 100 + 50
    assert step.floor_seconds(roofline) == pytest.approx(100.1)
    kinds = step.by_kind()
    assert {kind: cost.bytes for kind, cost in kinds.items()} == {"linear": 1, "norm": 500}
    assert sum(cost.flops for cost in kinds.values()) == step.flops
