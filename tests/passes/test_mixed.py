"""The mix that is chosen keeps the quality asked for, is the cheapest that was measured to, and is what is shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import DataError, RecipeError
from optimizer.passes.base import Context, PassReport, view
from optimizer.passes.calibration import Calibration
from optimizer.passes.mixed import Mixed
from tests.passes.small_architectures import ARCHITECTURES


def calibration(rows: int = 16) -> Calibration:
    generator = torch.Generator().manual_seed(3)
    return Calibration(tuple(torch.randint(3, 300, (48,), generator=generator) for _ in range(rows)))


def sharpened(name: str = "llama") -> Any:
    """A model whose predictions depend on its weights: a random one is near uniform whatever is done to it."""
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight * 8)
    return model


def run(model: Any, time: Any = None, rows: int = 16, **options: Any) -> tuple[Any, PassReport]:
    step = Mixed(choices=("int4-g32", "int8"), **options)
    context, copy = Context(calibration=calibration(rows), time=time), view(model)
    step.check(copy, context)
    return copy, step.run(copy, context)


@torch.no_grad()
def perplexity(model: Any, rows: int = 16) -> float:
    held = calibration(rows).rows[::4]
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=row[None, :-1]).logits[0], row[1:], reduction="sum")
        for row in held
    ]
    return float(torch.stack(losses).sum().div(sum(len(row) - 1 for row in held)).exp())


def formats(model: Any) -> dict[str, str]:
    return {n: m.format.name for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("quality", [1.0, 1.0005, 1.002, 1.01, 100.0])
def test_the_quality_asked_for_is_kept(quality: float) -> None:
    model = sharpened()
    copy, report = run(model, quality=quality)
    assert perplexity(copy) / perplexity(model) <= quality * (1 + 1e-5)
    assert report.matched == len(formats(copy))
    assert {c.name: c.format for c in report.layers} == formats(copy)


def test_with_no_quality_to_keep_every_layer_takes_the_cheapest_format() -> None:
    copy, report = run(sharpened(), quality=1e9)
    assert set(formats(copy).values()) == {"int4-g32"}
    assert report.matched == report.expected == 14


def test_a_looser_floor_never_costs_more_bytes() -> None:
    sizes = [run(sharpened(), quality=quality)[1] for quality in (1.0, 1.001, 1.01, 1e9)]
    saved = [report.bytes_before - report.bytes_after for report in sizes]
    assert saved == sorted(saved)
    assert saved[0] < saved[-1]


def test_layers_that_are_served_merged_share_a_format() -> None:
    for quality in (1.0005, 1.001, 1.003):
        used = formats(run(sharpened(), quality=quality)[0])
        for block in (0, 1):
            for group in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            ):
                assert len({used.get(f"model.layers.{block}.{name}") for name in group}) == 1


def test_a_format_that_measures_slower_is_not_chosen_however_small() -> None:
    def clock(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: {"as it is": 3.0, "int8": 1.0, "int4-g32": 2.0}[name] for name in calls}

    copy, report = run(sharpened(), clock, quality=1e9)
    assert set(formats(copy).values()) == {"int8-channel"}
    assert any("measured milliseconds" in note for note in report.notes)


def test_the_model_given_stays_as_it_was() -> None:
    model = sharpened("gpt2")
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    run(model, quality=1.01)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ["int5"]}, r"'int5' is no format.*int4-g32"),
        ({"choices": []}, "one format or more"),
        ({"choices": ["int8", "int8"]}, "each once"),
        ({"quality": 0.99}, "at least 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"method": "awq"}, "Use rtn or gptq"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Mixed(**options)


def test_it_needs_rows_to_hold_out() -> None:
    with pytest.raises(DataError, match="at least two rows"):
        run(sharpened(), rows=1)
