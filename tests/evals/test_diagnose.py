"""A planted bottleneck is named, on this machine as it is; and whole diagnoses of small models hold together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
import torch

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.runner import EagerRunner
from optimizer.errors import UsageError
from optimizer.evals.ceilings import measure_ceilings
from optimizer.evals.diagnose import diagnose, peak_flops
from optimizer.evals.timing import Workload, measure_generation
from tests.evals import planted
from tests.evals.planted import MIB, Planted
from tests.evals.small_runner import SmallRunner, small_model
from tests.evals.test_ceilings import MADE

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor, when it is first imported

STEPS = Workload(1, 4, 10)


@pytest.fixture(scope="module")
def ceilings():
    return measure_ceilings(seconds=0.4, working_sets=(MIB, 16 * MIB, 128 * MIB))


def phase(ceilings, name, plant, workload=STEPS, context=None):
    runner, shape, *probe = plant
    found = diagnose(
        runner, ceilings, workload, shape=shape, probe=probe[0] if probe else None, context=context, repeats=2
    )
    one = getattr(found, name)
    assert sum(one.terms.values()) == pytest.approx(one.seconds)
    return one


def test_hundreds_of_tiny_operations_are_launch_bound(ceilings):
    found = phase(ceilings, "decode", planted.launch_bound())
    assert (found.verdict, found.binds) == ("launch-bound", "launch")


def test_work_between_the_steps_is_host_bound(ceilings):
    found = phase(ceilings, "decode", planted.host_bound())
    assert (found.verdict, found.binds) == ("host-bound", "host")
    assert found.terms["host"] > 0.015


def test_a_large_product_is_compute_bound(ceilings):
    found = phase(ceilings, "prefill", planted.compute_bound(), Workload(1, 768, 4))
    assert (found.verdict, found.binds) in {("compute-bound", "compute"), ("near limit", "compute")}
    assert max(found.terms, key=found.terms.get) == "matmul"


def test_a_huge_context_is_bound_by_reading_the_cache(ceilings):
    found = phase(ceilings, "decode", planted.kv_bound(200_000), context=200_000)
    assert found.binds == "KV reads"
    assert found.tokens_or_context == 200_000
    assert max(found.terms, key=found.terms.get) == "attention"


# What follows compares bandwidths, which tests on the other cores take away: it wants a machine to itself.


@pytest.mark.slow
def test_reading_the_cache_saturates_the_memory(ceilings):
    found = phase(ceilings, "decode", planted.kv_bound(200_000), context=200_000)
    assert found.verdict in {"memory: bandwidth saturated", "near limit"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "verdicts"),
    [
        (planted.saturated, {"memory: bandwidth saturated", "near limit"}),
        (planted.irregular, {"memory: irregular access"}),
        (planted.locality_lost, {"memory: locality lost"}),
    ],
)
def test_the_kinds_of_memory_problems(ceilings, plant, verdicts):
    assert phase(ceilings, "decode", plant(), Workload(1, 4, 4)).verdict in verdicts


@pytest.fixture(scope="module")
def eager():
    return diagnose(EagerRunner(small_model(), None), MADE, Workload(2, 16, 8), context=100, repeats=2)


def test_an_eager_model_end_to_end(eager):
    decode, prefill = eager.decode, eager.prefill
    assert (prefill.batch, prefill.tokens_or_context) == (2, 16)
    assert (decode.batch, decode.tokens_or_context) == (2, 100)
    for one in eager.phases:
        assert sum(one.terms.values()) == pytest.approx(one.seconds)
        assert one.terms["matmul"] > 0
        assert one.terms["launch"] > 0
        assert one.unclassified == ()
        assert 0 < one.attained < 1
        assert sum(kernel.seconds for kernel in one.kernels) <= one.seconds * (1 + 1e-9)
    assert decode.verdict in {"launch-bound", "host-bound"}  # neighbours may hold the host up
    assert "compile the step" in {i.name for i in eager.interventions}
    assert {c.axis for c in eager.crossovers} == {"batch", "context", "prompt"}


def test_every_layer_of_an_eager_model_is_placed(eager):
    model = small_model()
    wanted = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    norms = {name for name, _ in model.named_modules() if name.endswith("norm")}
    for one in eager.phases:
        names = {layer.name for layer in one.layers}
        assert wanted | norms | {"layers.0.attention", "layers.1.attention"} <= names
    linears = [layer for layer in eager.decode.layers if layer.term == "linear"]
    assert sum(layer.seconds for layer in linears) <= eager.decode.terms["matmul"] * (1 + 1e-9)


def test_it_is_plain_data(eager):
    document = json.loads(json.dumps(eager.to_dict(), allow_nan=False))
    assert [one["phase"] for one in document["phases"]] == ["prefill", "decode"]
    assert document["phases"][1]["attained"] == eager.decode.attained


def test_a_compiled_step_names_its_kernels():
    runner = CompiledRunner(small_model())
    found = diagnose(runner, MADE, Workload(1, 16, 8), repeats=1).decode
    assert any(kernel.name.startswith("graph_") for kernel in found.kernels)
    assert {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} <= {layer.name for layer in found.layers}
    assert sum(found.terms.values()) == pytest.approx(found.seconds)
    assert found.unclassified == ()


def counted(batch, prompt, context, box_seconds, **options):
    """New tokens of each generation that a diagnosis asked for, and what it found."""
    runner, asked, stages = EagerRunner(small_model(), None), [], []
    generate = runner.generate

    def count(tokens, **given):
        asked.append(given["max_new_tokens"])
        return generate(tokens, **given)

    def stage(name):
        stages.append(name)
        return contextlib.nullcontext()

    runner.generate = count
    found = diagnose(
        runner, MADE, Workload(batch, prompt, 8), context=context, box_seconds=box_seconds, stage=stage, **options
    )
    return asked, found, stages


def test_a_large_workload_does_not_multiply_the_steps():
    small, _, _ = counted(1, 8, 40, 60.0)
    assert small == [2] * 6 + [1] * 5 + [8] * 6 + [8] * 2  # prompts are timed without the tokens after them
    large, _, _ = counted(8, 64, 400, 60.0)
    assert large == small
    least, found, stages = counted(8, 64, 400, 0.0)  # every step takes longer than that: one of each, after a warm-up
    assert least == [2] * 2 + [1] + [8] * 2 + [8]
    for one in found.phases:
        assert sum(one.terms.values()) == pytest.approx(one.seconds)
    assert stages == [
        "time generations of 8 × 64 + 2 tokens", "record prefill", "judge prefill",
        "time generations of 8 × 396 + 8 tokens", "record decode", "judge decode",
    ]  # fmt: skip


def test_one_workload_is_timed_once_for_both_phases_and_not_where_it_was_already():
    asked, found, _ = counted(1, 8, None, 60.0)
    assert asked == [8] * 6 + [1] * 5 + [8] * 2
    timing = measure_generation({"r": EagerRunner(small_model(), None)}, found.workload, repeats=2)["r"]
    asked, again, _ = counted(1, 8, None, 60.0, timing=timing, sweep=False)
    assert asked == [1] * 5 + [8] * 2
    assert (again.prefill.seconds, again.decode.seconds) == (timing.ttft.median, timing.tpot.median)
    assert again.prefill.memory is again.decode.memory is None


def test_the_model_is_left_as_it_was():
    model = small_model()
    runner = EagerRunner(model, None)
    state = torch.get_rng_state()
    diagnose(runner, MADE, Workload(1, 4, 4), repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_a_step_fails():
    model = small_model()
    runner = SmallRunner(model)
    calls = []

    def damage(logits):
        calls.append(logits)
        if len(calls) > 9:
            raise RuntimeError("broke")
        return logits

    runner.damage = damage
    with pytest.raises(RuntimeError, match="broke"):
        diagnose(runner, MADE, Workload(1, 4, 4), repeats=1)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_model_of_nans_is_diagnosed_like_any_other():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = diagnose(EagerRunner(model, None), MADE, Workload(1, 4, 4), repeats=1)
    assert math.isfinite(found.decode.seconds)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "workload", "message"),
    [
        ({"context": 0}, Workload(1, 4, 8), "context=0"),
        ({}, Workload(1, 4, 2), "output=2"),
        ({"box_seconds": math.nan}, Workload(1, 4, 8), "box_seconds=nan"),
        ({"box_seconds": -1.0}, Workload(1, 4, 8), "box_seconds=-1.0"),
        ({}, Workload(1, 600, 8), "exceed its max_context"),
        ({"context": 600}, Workload(1, 4, 8), "exceed its max_context"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(options, workload, message):
    with pytest.raises(UsageError, match=message):
        diagnose(EagerRunner(small_model(), None), MADE, workload, repeats=1, **options)


def test_a_runner_without_a_model_needs_a_shape():
    with pytest.raises(UsageError, match="pass shape="):
        diagnose(Planted(lambda: None), MADE, STEPS)


def test_the_peak_is_that_of_the_types_that_run():
    made = dataclasses.replace(MADE, matmul_flops={"float32": 1e11, "bfloat16": 2e11, "int8": 4e11})
    runner = EagerRunner(small_model().to(torch.bfloat16), None)
    assert peak_flops(runner, made) == 2e11
    runner.ledger.kernels["x"] = "w8a16_linear[int8 avx512]"
    assert peak_flops(runner, made) == 4e11
    assert peak_flops(Planted(lambda: None), made) == 1e11
