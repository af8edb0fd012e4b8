"""The benchmark behind the GPU claims runs: its code, on shapes and a device that say nothing of speed."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.gpu import claims, kernels, models
from benchmarks.gpu.bench import Bench


@pytest.fixture
def bench() -> Bench:
    small = Bench(torch.device("cpu"), shrink=32, repeats=1)
    kernels.ceilings(small)
    return small


@pytest.mark.parametrize("part", [kernels.gemv, kernels.gemm, kernels.prefill, kernels.attention, kernels.elementwise])
def test_the_kernels_are_measured_beside_what_they_replace(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", [models.steps, models.quantizers])
def test_whole_models_are_measured(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


def test_each_claim_rests_on_one_row():
    names = [name for _, name, _, _ in claims.CLAIMS]
    assert len(set(names)) == len(names)
