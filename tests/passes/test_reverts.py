"""Taking passes back: what can be, in which words, and the recipe that it makes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from optimizer.passes.decode import Decode
from optimizer.passes.registry import PASSES, build_pass
from optimizer.passes.reverts import (
    GENTLER,
    LAYERED,
    SERVING,
    SETTINGS,
    Revert,
    gentler,
    reverted,
    suspects,
    time_suspects,
    without_layers,
)
from optimizer.recipe import Recipe, builtin

W8A8 = {"name": "quantize", "activations": "int8-token", "smooth": True, "alpha": 0.5}
KV8 = {"name": "decode", "int8_inputs": True, "cache": "paged", "kv": "int8", "max_context": 64}


def names(found: list[Revert]) -> list[str]:
    return [revert.name for revert in found]


def build(specs: list[dict[str, Any]]) -> list[Any]:
    return [build_pass(spec["name"], {k: v for k, v in spec.items() if k != "name"}) for spec in specs]


def test_the_tables_name_passes_and_options_that_exist() -> None:
    for name in (*SETTINGS, *GENTLER, *SERVING, *LAYERED):
        assert name in PASSES
    for name, settings in SETTINGS.items():
        options = {field.name for field in dataclasses.fields(PASSES[name])}
        for setting in settings:
            assert {setting.option, *setting.plain} <= options
    for name, steps in GENTLER.items():
        options = {field.name for field in dataclasses.fields(PASSES[name])}
        assert all({*now, *then} <= options for now, then in steps)


@pytest.mark.parametrize("recipe", builtin())
def test_every_built_in_recipe_can_be_taken_back_pass_by_pass_and_altogether(recipe: str) -> None:
    passes = Recipe.load(recipe).passes
    found = [*suspects(passes), *time_suspects(passes, serving=False)]
    for place in range(len(passes)):
        found += gentler(passes, place)
    for revert in found:
        made = reverted(passes, [revert])
        assert made != passes
        build(made)
    plain = reverted(passes, suspects(passes))
    assert {spec["name"] for spec in plain} <= set(SERVING)
    assert suspects(plain) == []


def test_settings_are_suspects_of_their_own() -> None:
    passes = [W8A8, {"name": "merge_linears"}, KV8]
    assert names(suspects(passes)) == [
        "quantize", "quantize.activations", "merge_linears", "decode.int8_inputs", "decode.kv",
    ]  # fmt: skip
    assert names(suspects([{"name": "quantize"}, {"name": "decode"}])) == ["quantize"]


def test_a_second_pass_of_a_kind_has_a_name_of_its_own() -> None:
    passes = [{"name": "quantize", "targets": ["q_proj"]}, {"name": "quantize", "ignore": ["q_proj", "lm_head"]}]
    first, second = suspects(passes)
    assert (first.name, second.name) == ("quantize", "quantize.2")
    assert reverted(passes, [second]) == passes[:1]
    assert reverted(passes, [first]) == passes[1:]


def test_smoothing_goes_with_the_rounded_inputs_that_it_serves() -> None:
    (revert,) = [r for r in suspects([W8A8]) if r.name == "quantize.activations"]
    (step,) = build(reverted([W8A8], [revert]))
    assert (step.activations, step.smooth, step.alpha, step.bits) == ("none", False, None, 8)


def test_reverts_of_one_pass_add_up_and_the_recipe_stays_as_it_was() -> None:
    before = [{"name": "quantize", "bits": 4, "group_size": -1, "ignore": ["head"]}]
    kept = without_layers(before, 0, ["a.down_proj", "b.down_proj"])
    made = reverted(before, [kept, gentler(before, 0)[0]])
    assert made == [
        {"name": "quantize", "bits": 4, "group_size": 128, "ignore": ["head", "a.down_proj", "b.down_proj"]}
    ]
    assert before == [{"name": "quantize", "bits": 4, "group_size": -1, "ignore": ["head"]}]
    assert reverted([{"name": "quantize"}], [without_layers([{"name": "quantize"}], 0, ["x"])]) == [
        {"name": "quantize", "ignore": ["lm_head", "x"]}
    ]


def test_gentler_settings_come_smallest_first_and_end() -> None:
    spec: dict[str, Any] = {"name": "quantize", "bits": 4, "group_size": -1}
    said = []
    while steps := gentler([spec], 0):
        said.append(steps[0].what)
        (spec,) = reverted([spec], steps[:1])
    assert said == [
        "quantize.group_size -1 → 128",
        "quantize.group_size 128 → 64",
        "quantize.group_size 64 → 32",
        "quantize.bits 4 → 8, quantize.group_size 32 → -1",
    ]
    assert gentler([{"name": "mixed", "choices": ["int8"]}], 0) == []
    assert gentler([{"name": "mixed"}], 0)[0].options == {"choices": ("int8",)}


def test_the_paged_cache_goes_only_where_nothing_rests_on_it() -> None:
    assert "decode.cache" in names(time_suspects([KV8], serving=False))
    assert "decode.cache" not in names(time_suspects([KV8], serving=True))
    assert "decode.cache" not in names(time_suspects([KV8, {"name": "speculate"}], serving=False))
    (revert,) = [r for r in time_suspects([KV8], serving=False) if r.name == "decode.cache"]
    (step,) = build(reverted([KV8], [revert]))
    assert step == Decode(max_context=64, int8_inputs=True)


def test_the_page_lists_the_settings_that_are_suspects() -> None:
    page = (Path(__file__).parents[2] / "docs/attribution.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- suspects -->") : page.index("<!-- end of suspects -->")]
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert rows == {f"{name}.{s.option}": s.word for name, settings in SETTINGS.items() for s in settings}
