"""The benchmark behind the GPU claims runs: its code, on shapes and a device that say nothing of speed."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.gpu import caches, claims, kernels, models
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.decoding import Decoding, fill, idle_share
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.passes.base import view
from tests.backends.decoder_models import llama


@pytest.fixture
def bench() -> Bench:
    small = Bench(torch.device("cpu"), shrink=32, repeats=1)
    kernels.ceilings(small)
    return small


MODELS = [models.steps, models.contexts, models.quantizers]
KERNELS = [
    kernels.gemv, kernels.gemm, kernels.prefill, kernels.attention, kernels.elementwise, caches.attention, caches.write,
]  # fmt: skip


@pytest.mark.parametrize("part", KERNELS)
def test_the_kernels_are_measured_beside_what_they_replace(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


@pytest.mark.slow
# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("part", MODELS)
def test_whole_models_are_measured(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


def test_every_part_can_be_chosen_and_is_tried_here():
    assert list(PARTS.values()) == [*KERNELS[:4], *KERNELS[5:], KERNELS[4], *MODELS]


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_a_step_behind_a_context_that_was_never_run(kind):
    runner = PagedRunner(view(llama()), compile=False, options=PagedOptions(kv=kind, block_size=8, cache_tokens=400))
    fill(runner.cache.storage)
    stored = [t.float() for layer in runner.cache.storage.layers for t in layer.tensors]
    assert all(bool(t.isfinite().all()) and float((t != 0).float().mean()) > 0.9 for t in stored)
    rows = [Decoding(runner, context) for context in (16, 128)]
    for row in (*rows, *rows):
        row.turn(9)
    assert [row.row.length for row in rows] == [16, 128]
    assert runner.ledger.steps["eager"] == 4 * 9
    assert not runner.ledger.steps["prefill"]
    rows[1].take_over()
    rows[1].go_on(1)
    logits, _ = rows[1].step()
    assert bool(logits.isfinite().all())
    assert int(rows[1].step.positions) == 130


def test_idle_time_is_what_no_kernel_covers():
    assert idle_share([(0, 4), (2, 3), (6, 8), (7, 10)]) == pytest.approx(0.2)
    assert idle_share([(5, 6)]) == 0


def test_each_claim_rests_on_one_row():
    names = [name for _, name, _, _ in claims.CLAIMS]
    assert len(set(names)) == len(names)
