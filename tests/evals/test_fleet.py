"""The arithmetic of one model on many GPUs: worked figures, limits, and how it must move with its inputs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.evals import arithmetic
from optimizer.evals.architecture import from_config, from_parameters
from optimizer.evals.fleet import Layout, Replica, layouts, misfit, smallest_that_fits
from optimizer.evals.hardware import GPUS, find_gpu
from optimizer.evals.roofline import Attention, Precision

H100 = find_gpu("H100")
SIZES = {"d_model": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128}
MODEL = from_parameters(70e9, **SIZES)
INT4 = from_parameters(70e9, **SIZES, weights=Precision(4), kv=Precision(8))
EXPERTS = from_config(
    {"model_type": "mixtral", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
     "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
)  # fmt: skip


def on(tensor=1, pipeline=1, expert=1, microbatches=None, shape=MODEL, **options):
    return Replica(shape, H100, Layout(tensor, pipeline, expert, microbatches), **options)


def test_eight_way_tensor_parallelism_reads_an_eighth():
    replica = on(8, latency=0.0)
    assert replica.weight_bytes == pytest.approx(17.5e9)
    assert replica.decode(1, 0).moving == pytest.approx(5.22e-3, rel=1e-2)
    assert 1 / replica.decode(1, 0).moving == pytest.approx(191.4, rel=1e-2)


def test_requests_that_fit_on_eight_gpus():
    assert on(8).capacity(4096) == 372
    assert on(8, shape=INT4).capacity(4096) == 901
    assert on(8, reserve_bytes=62.5e9).capacity(4096) == 0


def test_a_ring_sends_twice_the_payload_less_a_share():
    payload = arithmetic.all_reduce_bytes(8192, 64)
    assert payload == pytest.approx(2.1e6, rel=1e-2)
    assert arithmetic.all_reduce_seconds(payload, 8, 450e9) == pytest.approx(2 * 7 / 8 * payload / 450e9)
    step = on(8, latency=0.0).decode(64, 0)
    assert step.all_reduce == pytest.approx(80 * 2 * 7 / 8 * payload / 450e9)
    assert on(8, latency=5e-6).decode(64, 0).all_reduce == pytest.approx(step.all_reduce + 160 * 5e-6)


def test_groups_wider_than_a_machine_use_the_network():
    narrow, wide = on(8, latency=0.0), Replica(MODEL, H100, Layout(16), latency=0.0)
    assert narrow.decode(64, 0).all_reduce / (7 / 8) * 9 == pytest.approx(wide.decode(64, 0).all_reduce / (15 / 16))


def test_the_bubble_of_a_prompt_and_of_a_small_batch():
    replica = on(1, 4, microbatches=12)
    prefill, alone = replica.prefill(1, 4096), on(latency=0.0).prefill(1, 4096)
    assert prefill.bubble == pytest.approx(0.2) == arithmetic.pipeline_bubble(4, 12)
    assert prefill.computing == pytest.approx(alone.computing / 4)
    assert prefill.seconds == pytest.approx(prefill.occupied_seconds / (1 - 0.2))
    assert replica.decode(1, 0).bubble == pytest.approx(0.75)
    assert replica.decode(4, 0).bubble == replica.decode(400, 0).bubble == 0


def test_pipeline_decode_of_one_request_is_no_faster_than_one_gpu():
    assert on(1, 8, latency=0.0).decode(1, 0).seconds >= on(latency=0.0).decode(1, 0).seconds * (1 - 1e-12)


def test_stages_hold_whole_layers():
    assert on(1, 3).weight_bytes == pytest.approx(140e9 * 27 / 80)


def test_more_ranks_than_kv_heads_repeat_them():
    assert on(16).kv_bytes(4096) == on(8).kv_bytes(4096) == pytest.approx(0.1678e9, rel=1e-3)
    assert on(4).kv_bytes(4096) == pytest.approx(2 * 0.1678e9, rel=1e-3)


def test_handing_over_a_cache():
    """1.342 GB over eight adapters of 50 GB/s."""
    assert on(8, latency=0.0).kv_transfer_seconds(4096) == pytest.approx(1.342e9 / 400e9, rel=1e-3)


def test_one_gpu_is_the_plain_roofline():
    for shape in (MODEL, INT4, EXPERTS):
        roof, replica = H100.roofline(), Replica(shape, H100)
        for step, cost in (
            (replica.decode(3, 70), shape.decode(3, 70)),
            (replica.prefill(2, 300), shape.prefill(2, 300)),
        ):
            assert step.seconds == pytest.approx(roof.seconds(cost.flops, cost.required_bytes))
            assert step.all_reduce == step.all_to_all == step.send == step.bubble == 0
        assert replica.weight_bytes == pytest.approx(shape.weight_bytes)
        assert replica.kv_bytes(100) == shape.kv_cache_bytes(1, 100)


def test_experts_are_spread_and_all_else_is_copied():
    whole, spread = Replica(EXPERTS, H100), Replica(EXPERTS, H100, Layout(expert=4), latency=0.0)
    bank = sum(op.total_bytes for op in EXPERTS.ops if getattr(op, "experts", 1) > 1)
    assert spread.weight_bytes == pytest.approx(whole.weight_bytes - bank * 3 / 4)
    batch = 64
    # A group's 16 tokens go to 2 experts each, three quarters of them elsewhere, and come back: bf16, 4 layers.
    assert spread.decode(batch, 8).all_to_all == pytest.approx(4 * 2 * 16 * 2 * 256 * 2 * 3 / 4 / 450e9)
    assert spread.capacity(64) >= 4 * whole.capacity(64)


def test_busy_experts_cost_more_but_never_more_than_one_gpu_doing_all():
    even, busy, one = (
        Replica(EXPERTS, H100, Layout(expert=4), imbalance=x, latency=0.0).prefill(4, 512) for x in (1, 2, 100)
    )
    assert even.computing < busy.computing < one.computing
    assert busy.all_to_all == pytest.approx(2 * even.all_to_all)
    assert one.computing <= Replica(EXPERTS, H100).prefill(4, 512).computing


@pytest.mark.parametrize(
    ("layout", "shape", "words"),
    [
        (Layout(3), MODEL, "tensor 3 does not divide the 64 heads"),
        (Layout(12), from_parameters(7e9, **{**SIZES, "heads": 48}), "neither divides nor is a multiple of the 8 KV"),
        (Layout(1, 81), MODEL, "pipeline 81 has more stages than the model's 80 layers"),
        (Layout(1, 1, 2), MODEL, "expert 2 needs a mixture of experts"),
        (Layout(1, 1, 3), EXPERTS, "expert 3 does not divide the 8 experts"),
        (Layout(2), from_parameters(7e9), "give layers, heads"),
    ],
)
def test_divisions_that_cannot_be(layout, shape, words):
    with pytest.raises(UsageError, match=words):
        Replica(shape, H100, layout)


@pytest.mark.parametrize(
    "bad", [{"latency": -1.0}, {"imbalance": 0.5}, {"reserve_bytes": 80e9}, {"reserve_bytes": float("nan")}]
)
def test_assumptions_that_cannot_be(bad):
    with pytest.raises(UsageError, match="busiest experts"):
        on(**bad)


def test_layouts_are_at_least_one():
    for bad in ((0,), (1, 0), (1, 1, 0), (1, 2, 1, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            Layout(*bad)


def test_the_fewest_gpus_that_hold_the_model():
    assert smallest_that_fits(on(), 4096).layout.gpus == 2
    assert smallest_that_fits(on(), 128_000).layout.gpus == 3
    assert smallest_that_fits(Replica(INT4, H100), 4096).layout.gpus == 1
    with pytest.raises(UsageError, match="holds it with one request of 4096"):
        smallest_that_fits(on(reserve_bytes=79.999e9), 4096)


def test_a_model_without_attention_has_no_capacity():
    with pytest.raises(UsageError, match="without attention"):
        Replica(from_parameters(7e9), H100).capacity(10)


def test_layouts_cover_every_division_of_the_gpus():
    found = list(layouts(MODEL, 8))
    assert len(found) == len(set(found))
    assert {(x.tensor, x.pipeline, x.expert) for x in found} == {(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1)}
    assert Layout(2, 1, 4) in list(layouts(EXPERTS, 8))


DEGREES = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=60, deadline=None)
@given(tensor=DEGREES, pipeline=DEGREES, batch=st.integers(1, 300), context=st.integers(1, 20_000))
def test_more_gpus_hold_more_and_read_less(tensor, pipeline, batch, context):
    small, large = on(tensor, pipeline), on(2 * tensor, pipeline)
    deep = on(tensor, 2 * pipeline)
    for wider in (large, deep):
        assert wider.weight_bytes <= small.weight_bytes
        assert wider.capacity(context) >= small.capacity(context)
    step, faster = small.decode(batch, context), large.decode(batch, context)
    assert faster.moving <= step.moving
    assert faster.computing <= step.computing
    assert step.seconds >= max(step.moving, step.computing)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([MODEL, INT4, EXPERTS]), gpu=st.sampled_from(GPUS), tensor=DEGREES,
    pipeline=st.sampled_from([1, 2, 4]), expert=DEGREES, batch=st.integers(1, 200), context=st.integers(0, 5000),
)  # fmt: skip
def test_time_grows_with_what_is_asked(shape, gpu, tensor, pipeline, expert, batch, context):
    layout = Layout(tensor, pipeline, expert)
    if misfit(shape, layout):
        return
    replica = Replica(shape, gpu, layout)
    step = replica.decode(batch, context)
    assert step.seconds <= replica.decode(batch + 1, context).seconds * (1 + 1e-12)
    assert step.seconds <= replica.decode(batch, context + 1).seconds * (1 + 1e-12)
    assert step.seconds <= replace(replica, latency=1e-4).decode(batch, context).seconds
    # All the GPUs together never beat the sum of their ceilings.
    whole = shape.decode(batch, context)
    assert step.seconds * layout.gpus >= whole.flops / gpu.fp16_flops * (1 - 1e-9)


def test_windows_bound_the_cache():
    windowed = replace(
        MODEL, ops=tuple(replace(op, window=128) if isinstance(op, Attention) else op for op in MODEL.ops)
    )
    assert Replica(windowed, H100, Layout(8)).kv_bytes(4096) == on(8).kv_bytes(128)
