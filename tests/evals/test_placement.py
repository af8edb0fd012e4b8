"""Kernels and layers on the roofline, from splits that are made up."""

from __future__ import annotations

import pytest

from optimizer.evals.placement import floor_of, place
from optimizer.evals.roofline import Attention, Load, ModelShape, Precision, Roofline, Weights
from optimizer.evals.trace import Event, Split

MACHINE = Roofline(peak_flops=1e11, bandwidth=1e10)


def linear(name, rows, columns, kind="linear"):
    return Weights(name, kind, rows, columns, 2 * rows * columns, 2 * rows * columns, rows + columns)


SHAPE = ModelShape(
    "m",
    (
        linear("a", 64, 32), linear("b", 128, 64), linear("c", 64, 32), linear("head", 100, 32, "lm_head"),
        Weights("norm", "norm", 1, 32, 64, 160, 64),
        Attention("layers.0.attention", 2, 1, 16, kv=Precision(16)),
        Attention("layers.1.attention", 2, 1, 16, kv=Precision(16)),
    ),
)  # fmt: skip
COST = SHAPE.step(Load(1, 1, 10))


def placed(*work, layers=None):
    """Place events given as (name, term, seconds, shapes, layer)."""
    found = Split(1.0, layers=layers or {})
    for name, term, seconds, shapes, layer in work:
        dtypes = tuple("float" for _ in shapes)
        found.add(Event(name, 0.0, seconds, None, shapes, dtypes), term, seconds, layer)
    kernels, placed_layers = place(found, SHAPE, COST, MACHINE, lambda _: 1e10)
    return {k.name: k for k in kernels}, {one.name: one for one in placed_layers}


def test_products_are_told_by_the_module_they_ran_in():
    kernels, layers = placed(("aten::mm", "matmul", 1e-6, ((1, 32), (32, 64)), "c"))
    assert set(layers) == {"c"}
    assert layers["c"].bytes == 2 * 64 * 32
    assert layers["c"].attainable == pytest.approx(2 * 64 * 32 / 1e10 / 1e-6)
    assert kernels["aten::mm"].bytes == layers["c"].bytes


def test_in_a_compiled_step_by_their_weights_and_order():
    _, layers = placed(
        ("k", "matmul", 1e-6, ((1, 32), (64, 32)), None), ("k", "matmul", 2e-6, ((1, 64), (64, 128)), None),
        ("k", "matmul", 3e-6, ((1, 32), (64, 16)), None),  # two values a byte
        ("aoti_mm_out", "matmul", 4e-6, (), None),  # the only one that is left
    )  # fmt: skip
    assert {name: one.seconds for name, one in layers.items()} == {"a": 1e-6, "b": 2e-6, "c": 3e-6, "head": 4e-6}


def test_what_cannot_be_told_apart_is_left_out():
    kernels, layers = placed(("k", "matmul", 1e-6, (), None))  # one of four
    assert layers == {}
    assert kernels["k"].attainable is None


def test_attention_by_order_if_there_is_one_for_each_layer():
    attended = ("sdpa", "attention", 1e-6, (), None)
    _, layers = placed(attended, attended)
    assert set(layers) == {"layers.0.attention", "layers.1.attention"}
    assert placed(attended)[1] == {}


def test_an_elementwise_operation_moves_its_tensors():
    kernels, _ = placed(
        ("aten::mul", "elementwise", 1e-6, ((10, 10), (10, 10)), None),
        ("aten::copy_", "elementwise", 1e-6, ((10, 10), (10, 10)), None),
        ("cpp_fused_add", "elementwise", 1e-6, (), None),
    )
    assert kernels["aten::mul"].bytes == 3 * 400
    assert kernels["aten::copy_"].bytes == 2 * 400
    assert kernels["cpp_fused_add"].bytes is None
    assert kernels["aten::mul"].bytes_per_second == pytest.approx(1.2e9)


def test_a_module_without_products_is_charged_its_range():
    _, layers = placed(layers={"norm": 5e-6, "model.mlp": 1.0})
    assert layers["norm"].seconds == 5e-6
    assert layers["norm"].bytes == 64 + 64 * 2
    assert "model.mlp" not in layers  # not an operation of the shape


def test_floors_of_terms():
    weights = 2 * (2 * 64 * 32 + 128 * 64 + 100 * 32)
    assert floor_of(COST, "matmul", MACHINE) == pytest.approx(weights / 1e10)
    assert floor_of(COST, "attention", MACHINE) == pytest.approx(2 * 11 * 2 * 16 * 2 / 1e10)
    assert floor_of(COST, "elementwise", MACHINE) is None
