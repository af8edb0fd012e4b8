"""The split of hand-made traces, of which every microsecond is known."""

from __future__ import annotations

import pytest

from optimizer.evals.trace import (
    CALIBRATION,
    FORWARD,
    LAYER,
    START,
    TERM_NAMES,
    TOKEN,
    Event,
    Overheads,
    call_seconds,
    classify,
    merged,
    scaled,
    split,
    windows,
)

US = 1e-6


def events(*rows):
    """Events from (name, start µs, end µs, parent)."""
    return [Event(name, start * US, end * US, *rest) for name, start, end, *rest in rows]


def micros(found):
    return {term: pytest.approx(seconds / US) for term, seconds in found.terms.items() if seconds > 1e-12}


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("aten::mm", "matmul"), ("aten::addmm", "matmul"), ("aten::addmv_", "matmul"), ("aten::bmm", "matmul"),
        ("aten::_int_mm", "matmul"), ("aten::_weight_int4pack_mm", "matmul"), ("aoti_torch_cpu_mm_out", "matmul"),
        ("optimizer::dynamic_int8_linear", "matmul"), ("optimizer::w4a16_linear", "matmul"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNN", "matmul"), ("ampere_bf16_s16816gemm_bf16_128x64", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("optimizer::decode_attention", "attention"),
        ("void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("optimizer::kv_write", "kv"), ("optimizer::rope_kv_write", "kv"), ("aten::index_copy_", "kv"),
        ("graph_0_cpp_fused_cat_index_copy_mm_3", "kv"),
        ("graph_0_cpp_fused_add_dynamic_int8_linear_rsqrt_7", "elementwise"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_4", "elementwise"), ("triton_tem_fused_mm_2", "matmul"),
        ("aten::add_", "elementwise"), ("aten::rsqrt", "elementwise"), ("aten::silu", "elementwise"),
        ("aten::cat", "elementwise"), ("aten::argmax", "elementwise"), ("optimizer::rms_norm", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"), ("aten::copy_", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"), ("c10d::allreduce_", "communication"),
        ("aten::floor_divide", "elementwise"),
        ("aten::view", "launch"), ("aten::empty_strided", "launch"), ("aten::_to_copy", "launch"),
        ("detach_", "launch"),
        ("mylib::mystery", "unclassified"),
    ],
)  # fmt: skip
def test_the_table_knows_operations_and_kernels(name, term):
    assert classify(Event(name, 0, 1)) == term


@pytest.mark.parametrize(
    ("shapes", "term"),
    [
        ((((1, 2, 128, 64), (1, 2, 1, 64)), ()), "kv"),  # the cache and one more token
        ((((1, 6, 1, 32), (1, 6, 1, 32)), ()), "elementwise"),  # the halves of a rotary embedding
        ((), "elementwise"),
    ],
)
def test_a_concatenation_is_told_by_its_shapes(shapes, term):
    assert classify(Event("aten::cat", 0, 1, None, shapes)) == term


def test_every_moment_is_counted_once():
    trace = events(
        (FORWARD, 10, 90),
        ("aten::linear", 20, 60, 0),  # wraps a product: its own 10 µs are launch
        ("aten::mm", 25, 55, 1),
        ("aten::view", 60, 62, 0),
        ("aten::mul", 70, 80, 0),
    )
    found = split(trace, 0.0, 100 * US)
    # gaps inside the forward: 10-20, 62-70, 80-90; outside it 0-10 and 90-100
    assert micros(found) == {"matmul": 30, "elementwise": 10, "launch": 10 + 2 + 28, "host": 20}
    assert found.seconds == pytest.approx(100 * US)


def test_a_call_costs_something_whatever_it_does():
    trace = events((FORWARD, 0, 100), ("aten::mm", 0, 50, 0), ("aten::add", 50, 53, 0), ("aten::add", 53, 55, 0))
    found = split(trace, 0.0, 100 * US, Overheads(per_call=4 * US))
    assert micros(found) == {"matmul": 46, "launch": 4 + 3 + 2 + 45}  # nothing is left of the small ones


def test_in_a_compiled_step_calls_are_not_charged_and_the_wrapper_is_launch():
    trace = events(
        ("Torch-Compiled Region: 0/0", 0, 100),
        ("## Call CompiledFxGraph abc ##", 10, 90, 0),
        ("optimizer::decode_attention", 20, 50, 1),
        ("graph_0_cpp_fused_add_0", 50, 60, 1),
    )
    found = split(trace, 0.0, 120 * US, Overheads(per_call=4 * US))
    assert micros(found) == {"attention": 30, "elementwise": 10, "launch": 60, "host": 20}
    assert found.compiled
    assert not split(events((FORWARD, 0, 1)), 0.0, 1.0).compiled


def test_a_long_gap_is_the_hosts_even_within_a_forward():
    trace = events((FORWARD, 0, 3000), ("aten::mm", 0, 100, 0), ("aten::mm", 2900, 3000, 0))
    assert micros(split(trace, 0.0, 3000 * US)) == {"matmul": 200, "launch": 500, "host": 2300}


def test_without_a_forward_to_be_outside_of_short_gaps_are_launch():
    trace = events(("aten::add", 10, 20), ("aten::add", 30, 40), ("aten::add", 5040, 5050))
    found = split(trace, 10 * US, 5050 * US)
    assert micros(found) == {"elementwise": 30, "launch": 10 + 500, "host": 4500}


def test_the_profilers_own_time_is_taken_from_the_gaps():
    trace = events((FORWARD, 0, 100), ("aten::mm", 10, 50, 0), ("aten::mul", 60, 90, 0))
    found = split(trace, 0.0, 100 * US, Overheads(per_event=6 * US))
    assert micros(found) == {"matmul": 40, "elementwise": 30, "launch": 4 + 4 + 10}


def test_a_name_that_no_pattern_matches_is_kept():
    found = split(events((FORWARD, 0, 100), ("mylib::mystery", 0, 70, 0)), 0.0, 100 * US)
    assert micros(found) == {"unclassified": 70, "launch": 30}
    assert found.kernels["mylib::mystery"].term == "unclassified"
    assert set(found.terms) <= set(TERM_NAMES)


def test_a_range_around_the_window_does_not_hide_what_is_in_it():
    trace = events(("optimizer.decode", 0, 100), ("aten::mm", 10, 20, 0), ("aten::mm", 50, 80, 0))
    assert micros(split(trace, 40 * US, 90 * US)) == {"matmul": 30, "launch": 20}


def test_layers_run_in_ranges_of_their_own():
    trace = events((FORWARD, 0, 100), (f"{LAYER}a.b", 10, 50, 0), ("aten::mm", 20, 45, 1), ("aten::mm", 60, 70, 0))
    found = split(trace, 0.0, 100 * US, Overheads(per_event=2 * US))
    assert found.layers == {"a.b": pytest.approx(38 * US)}
    assert [layer for *_, layer in found.work] == ["a.b", None]


def test_on_a_device_work_is_what_its_kernels_take():
    trace = [
        *events((FORWARD, 0, 200), ("aten::mm", 10, 190, 0)),
        Event("nvjet_hsh_64x8", 50 * US, 80 * US, on_device=True),
        Event("ncclDevKernel_AllReduce", 70 * US, 100 * US, on_device=True),  # 10 µs of it beside the product
        Event("vectorized_elementwise_kernel", 120 * US, 300 * US, on_device=True),  # ends after the window
    ]
    found = split(trace, 0.0, 200 * US)
    assert micros(found) == {"matmul": 30, "communication": 20, "elementwise": 80, "launch": 70}
    assert found.seconds == pytest.approx(200 * US)


def test_an_idle_device_behind_an_idle_host_is_the_hosts():
    trace = [*events((FORWARD, 0, 20)), Event("nvjet_hsh_64x8", 10 * US, 30 * US, on_device=True)]
    found = split(trace, 0.0, 100 * US)
    assert micros(found) == {"matmul": 20, "host": 80}


def test_means_and_stretching_keep_the_sum():
    one = split(events((FORWARD, 0, 100), ("aten::mm", 0, 60, 0)), 0.0, 100 * US)
    two = split(events((FORWARD, 0, 200), ("aten::mm", 0, 80, 0)), 0.0, 200 * US)
    mean = merged([one, two])
    assert micros(mean) == {"matmul": 70, "launch": 80}
    assert mean.work[0][2] == pytest.approx(70 * US)
    assert mean.kernels["aten::mm"].calls == 1
    stretched = scaled(mean, 300 * US)
    assert micros(stretched) == {"matmul": 140, "launch": 160}
    assert sum(stretched.terms.values()) == pytest.approx(stretched.seconds) == pytest.approx(300 * US)


def test_windows_lie_between_tokens_of_one_generation():
    trace = events(
        (START, 0, 1), (TOKEN, 10, 11), (TOKEN, 20, 21), (TOKEN, 30, 31), (TOKEN, 40, 41),
        (START, 100, 101), (TOKEN, 110, 111),
    )  # fmt: skip
    assert windows(trace, first=True) == [pytest.approx((1 * US, 10 * US)), pytest.approx((101 * US, 110 * US))]
    assert windows(trace, first=False) == [pytest.approx((21 * US, 30 * US)), pytest.approx((31 * US, 40 * US))]


def test_what_a_call_costs_is_measured_in_the_same_trace():
    trace = events((CALIBRATION, 0, 50), ("aten::add_", 0, 3, 0), ("aten::add_", 5, 7, 0), ("aten::add_", 9, 29, 0))
    assert call_seconds(trace) == pytest.approx(3 * US)
    assert call_seconds(events(("aten::add_", 0, 3))) is None
