import json
import math
from dataclasses import replace

import pytest
import torch

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.ceilings import Ceilings, cache_bytes, describe, measure_ceilings

MADE = Ceilings(
    device="made up",
    cores=2,
    isa="AVX2",
    read_bandwidth={1 << 20: 100e9, 1 << 24: 60e9, 1 << 28: 20e9},
    copy_bandwidth=15e9,
    matmul_flops={"float32": 1e11, "bfloat16": 2e11},
    launch_seconds=2e-6,
    measured_at="2026-01-02T03:04:05+00:00",
    torch_version="2.13.0",
)


@pytest.mark.parametrize(
    ("working_set", "gigabytes"),
    [(1, 100), (1 << 20, 100), (1 << 22, 80), (1 << 24, 60), (1 << 27, 30), (1 << 28, 20), (1e15, 20)],
)
def test_bandwidth_is_linear_in_the_logarithm(working_set, gigabytes):
    assert MADE.bandwidth(working_set) == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize("working_set", [0, -1, math.nan])
def test_a_working_set_has_bytes(working_set):
    with pytest.raises(UsageError, match="must be positive"):
        MADE.bandwidth(working_set)


def test_peaks_by_name_or_dtype():
    assert MADE.peak_flops("bfloat16") == MADE.peak_flops(torch.bfloat16) == 2e11
    with pytest.raises(DeviceError, match="measured here: float32, bfloat16"):
        MADE.peak_flops(torch.int8)


def test_rooflines_use_memory_unless_told_the_working_set():
    assert MADE.memory_bandwidth == 20e9
    assert MADE.roofline("float32").ridge == pytest.approx(5)
    assert MADE.roofline("float32", 1 << 20).ridge == pytest.approx(1)


def test_a_round_trip_through_json_changes_nothing():
    assert Ceilings.from_dict(json.loads(json.dumps(MADE.to_dict()))) == MADE


@pytest.mark.parametrize("change", [{"extra": 1}, {"isa": None}])
def test_other_keys_are_refused(change):
    plain = {key: value for key, value in (MADE.to_dict() | change).items() if value is not None}
    with pytest.raises(UsageError, match=next(iter(change))):
        Ceilings.from_dict(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"read_bandwidth": {}},
        {"read_bandwidth": {1024: 0.0}},
        {"copy_bandwidth": math.nan},
        {"launch_seconds": -1.0},
        {"matmul_flops": {"float32": math.inf}},
    ],
)
def test_rates_are_positive_and_finite(change):
    with pytest.raises(UsageError, match="positive and finite"):
        replace(MADE, **change)


def test_the_cpu_is_measured_within_a_tiny_budget():
    state, threads, told = torch.get_rng_state(), torch.get_num_threads(), []
    sizes = [1 << 20, 1 << 18]
    measured = measure_ceilings("cpu", seconds=0.05, working_sets=sizes, progress=told.append)
    assert set(measured.read_bandwidth) == set(sizes)
    assert {"float32", "bfloat16"} <= measured.matmul_flops.keys()
    assert "float8_e4m3fn" not in measured.matmul_flops
    rates = [*measured.read_bandwidth.values(), *measured.matmul_flops.values(), measured.copy_bandwidth]
    assert all(1e6 < rate < 1e16 for rate in rates)
    assert 1e-9 < measured.launch_seconds < 1
    assert (measured.device, measured.cores, measured.isa) == describe("cpu")
    assert Ceilings.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_rates_follow_the_clock():
    """Every read of the clock is one second later, so a sample of n calls takes 1/n seconds a call."""
    now = iter(range(1, 1_000_000))
    measured = measure_ceilings("cpu", seconds=1.0, working_sets=[1 << 20], clock=lambda: float(next(now)))
    assert measured.read_bandwidth == {1 << 20: float(1 << 20)}
    assert measured.copy_bandwidth == float(1 << 20)
    assert measured.launch_seconds == 1.0
    assert set(measured.matmul_flops.values()) == {2.0 * 256**3}


@pytest.mark.parametrize(
    "options", [{"seconds": 0}, {"working_sets": []}, {"working_sets": [4096]}, {"working_sets": [12288]}]
)
def test_what_cannot_be_measured_is_refused(options):
    with pytest.raises(UsageError, match="ceilings"):
        measure_ceilings("cpu", **options)


def test_an_absent_device_is_refused():
    with pytest.raises(DeviceError, match="cannot be measured here"):
        measure_ceilings("meta")


def test_the_cache_of_this_machine_has_a_plausible_size():
    assert 1 << 15 <= cache_bytes("cpu") <= 1 << 32


@pytest.mark.gpu
def test_a_gpu_is_measured():
    measured = measure_ceilings("cuda", seconds=1.0)
    assert measured.isa.startswith("sm_")
    assert measured.memory_bandwidth > 1e11
    assert measured.peak_flops("bfloat16") > measured.peak_flops("float32")
