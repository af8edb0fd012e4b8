"""What is proposed and what it is predicted to gain, against Amdahl's law by hand."""

from __future__ import annotations

import pytest

from optimizer.evals import interventions as module
from optimizer.evals.interventions import CANDIDATES, Situation, interventions
from optimizer.evals.roofline import Attention, Load, ModelShape, Precision, Roofline, Weights
from optimizer.evals.trace import Overheads, Split
from optimizer.evals.verdicts import Facts
from optimizer.recipe import Recipe

MACHINE = Roofline(peak_flops=1e11, bandwidth=1e10)
SHAPE = ModelShape(
    "m", (Weights("w", "linear", 1000, 50_000, 1e8, int(1e8), 0), Attention("a", 1, 1, 64, kv=Precision(16)))
)


SMALL = ModelShape("s", (Weights("w", "linear", 10, 50, 1000, 1000, 0),))


def situation(phase="decode", shape=SHAPE, context=0, compiled=False, rates=None, layers=None, tokens=1, **ms):
    terms = {term: value / 1e3 for term, value in ms.items()}
    found = Split(sum(terms.values()), terms, compiled=compiled)
    cost = shape.step(Load(1, tokens, context))
    return Situation(Facts(phase, found, cost, MACHINE, Overheads(), compiled), shape, rates or {}, layers or {})


def proposed(*situations, output=64):
    return {(i.phase, i.name): i for i in interventions(situations, output)}


def test_the_worked_step_of_the_iron_law(monkeypatch):
    # 120 tok/s, 50 % products, 35 % element-wise, 15 % launch. The example has compiling remove 70 % and 80 % of the
    # last two; the products take 70 % more than reading their bytes does, so that other kernels are no gain.
    monkeypatch.setattr(module, "COMPILE_REMOVES", {"elementwise": 0.7, "launch": 0.8})
    step = 1e3 / 120
    size = int(0.5 * step / 1e3 * 1e10 / 1.7)
    shape = ModelShape("w", (Weights("w", "linear", 1000, size // 2000, size, size, 0),))
    found = proposed(situation(shape=shape, matmul=0.5 * step, elementwise=0.35 * step, launch=0.15 * step))
    compiled = found["decode", "compile the step"]
    assert compiled.predicted_seconds == pytest.approx(1 / 189, rel=0.01)
    assert (
        compiled.predicted_gain
        == pytest.approx(1.58, rel=0.01)
        == pytest.approx(step / 1e3 / compiled.predicted_seconds, rel=0.01)
    )


def test_compiling_brings_kernels_at_half_their_roofline_and_a_cache_in_place():
    found = proposed(situation(context=99, matmul=50, attention=10, launch=20, elementwise=10, kv=10))
    left = {
        "matmul": 20,
        "attention": 3,
        "launch": 2,
        "elementwise": 2,
        "kv": 0.1,
    }  # of weights that take 10 ms to read
    assert found["decode", "compile the step"].predicted_seconds == pytest.approx(sum(left.values()) / 1e3, rel=1e-3)


def test_a_compiled_step_is_not_told_to_compile():
    names = {name for _, name in proposed(situation(shape=SMALL, matmul=5, elementwise=3, launch=2, compiled=True))}
    assert "compile the step" not in names
    assert "write the cache in place" not in names
    assert "fewer calls in the compiled step" in names


def test_smaller_weights_take_the_time_of_fewer_bytes():
    # 100 MB at 10 GB/s is 10 ms; at 12.5 ms the kernel reaches 80 %, which int8 with a 16-bit scale a row keeps.
    found = proposed(situation(matmul=12.5, launch=0.1))
    share = Precision(8, None, 16).bytes(1000, 50_000) / 1e8
    assert found["decode", "int8 weights"].predicted_seconds == pytest.approx((12.5 * share + 0.1) / 1e3, rel=1e-6)
    share = Precision(4, 128, 16).bytes(1000, 50_000) / 1e8
    assert found["decode", "int4 weights"].predicted_seconds == pytest.approx((12.5 * share + 0.1) / 1e3, rel=1e-6)


def test_layers_that_stay_as_they_are_keep_their_time():
    head = Weights("head", "lm_head", 1000, 50_000, 1e8, int(1e8), 0)
    shape = ModelShape("m", (*SHAPE.ops, head))
    found = proposed(situation(shape=shape, matmul=62.5, layers={"w": 12.5e-3, "head": 50e-3}))
    share = Precision(8, None, 16).bytes(1000, 50_000) / 1e8
    assert found["decode", "int8 weights"].predicted_seconds == pytest.approx((50 + 12.5 * share) / 1e3, rel=1e-6)


def test_weights_that_are_small_already_are_not_proposed_again():
    int8 = SHAPE.stored_as(Precision(8, None, 32))
    names = {name for _, name in proposed(situation(shape=int8, matmul=6))}
    assert "int8 weights" not in names
    assert "int4 weights" in names


def test_quantized_kernels_that_are_slow_stay_as_slow():
    int8 = SHAPE.stored_as(Precision(8, None, 32))
    now = int8.step(Load(1, 1)).weight_bytes / 1e10 / 0.2  # 20 % of the roofline
    found = proposed(situation(shape=int8, matmul=1e3 * now))
    share = Precision(4, 128, 16).bytes(1000, 50_000) / Precision(8, None, 32).bytes(1000, 50_000)
    assert found["decode", "int4 weights"].predicted_seconds == pytest.approx(now * share, rel=1e-6)
    found = proposed(situation(matmul=50))  # 16 bits at 20 %: other kernels, at half their roofline
    share = Precision(8, None, 16).bytes(1000, 50_000) / 1e8
    assert found["decode", "int8 weights"].predicted_seconds == pytest.approx(0.010 * share / 0.5, rel=1e-6)


def test_where_computing_binds_fewer_bytes_are_not_proposed():
    names = {name for _, name in proposed(situation("prefill", tokens=1000, matmul=1500))}
    assert not {"int8 weights", "int4 weights"} & names


def test_a_faster_type_is_proposed_where_it_was_measured_and_computing_binds():
    found = proposed(situation("prefill", tokens=1000, matmul=1250, rates={"int8": 2e11}))
    # 1,000 tokens of 100 MFLOP at 100 GFLOP/s take 1 s, so 80 % is reached; int8 halves it at the same 80 %.
    assert found["prefill", "int8 matrix multiplies"].predicted_seconds == pytest.approx(0.625)
    assert ("prefill", "fp8 matrix multiplies") not in found


def test_half_the_cache():
    found = proposed(situation(context=1_000_000, attention=32, matmul=10))  # 256 MB: 25.6 ms, 80 % reached
    saved = 256e6 * (1 - (8 + 16 / 64) / 16) / 1e10 / 0.8
    assert found["decode", "int8 keys and values"].predicted_seconds == pytest.approx(0.042 - saved, rel=1e-3)


def test_a_copied_cache_is_written_in_place():
    found = proposed(situation(context=99, kv=10, attention=10, matmul=10))
    assert found["decode", "write the cache in place"].predicted_seconds == pytest.approx(0.030 - 0.99 * 0.010)


def test_no_prediction_passes_the_floor():
    found = proposed(situation(host=100, matmul=10))
    assert found["decode", "take host work out of the loop"].predicted_seconds == pytest.approx(0.010, rel=1e-3)


def test_they_are_ranked_by_what_a_request_saves():
    prefill = situation("prefill", tokens=10, matmul=100, host=50)
    decode = situation(matmul=10, host=2)
    order = [i.phase for i in interventions([prefill, decode], 64) if i.name == "take host work out of the loop"]
    assert order == ["decode", "prefill"]  # 63 steps of 2 ms against one of 50 ms
    order = [i.phase for i in interventions([prefill, decode], 2) if i.name == "take host work out of the loop"]
    assert order == ["prefill", "decode"]


def test_a_step_at_its_limit_leaves_nothing_that_keeps_its_bytes():
    names = {name for _, name in proposed(situation(matmul=10.1))}
    assert names == {"int8 weights", "int4 weights"}


@pytest.mark.parametrize("row", [row for row in CANDIDATES if row.passes], ids=lambda row: row.name)
def test_a_recipe_takes_the_passes_as_they_are(row):
    recipe = {
        "name": "proposed", "evaluation": {"tasks": {"reference_perplexity": 1}},
        "passes": [dict(step) for step in row.passes],
        "floors": [{"metric": "weights.ratio", "at_most": 1.0}],
    }  # fmt: skip
    assert [step.name for step in Recipe.from_dict(recipe).build_passes()] == [step["name"] for step in row.passes]
