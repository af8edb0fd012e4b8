"""Recipe entries become passes, and anything unknown or of a wrong type is refused with the nearest valid name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from optimizer.errors import RecipeError, UsageError
from optimizer.passes.base import Pass
from optimizer.passes.registry import _TYPES, PASSES, build_pass


def test_options_reach_the_pass() -> None:
    built = build_pass(
        "quantize", {"bits": 4, "group_size": 128, "symmetric": False, "ignore": ["lm_head", "re:.*down"]}
    )
    assert isinstance(built, PASSES["quantize"])
    assert built.format.name == "int4-g128-asym"
    assert build_pass("decode", {"max_context": None}) == build_pass("decode", {})


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_satisfies_the_protocol_and_can_be_described(name: str) -> None:
    built = build_pass(name, {})
    assert isinstance(built, Pass)
    assert built.name == name
    for option in dataclasses.fields(PASSES[name]):
        assert not option.init or str(option.type) in _TYPES, f"{name}.{option.name} cannot be checked"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quantise", {}, r"unknown pass 'quantise'\. Did you mean 'quantize'\?.*merge_linears"),
        ("zzz", {}, r"unknown pass 'zzz'\. Passes: "),
        ("quantize", {"group_sise": 32}, r"unknown option 'group_sise'\. Did you mean 'group_size'\?"),
        ("quantize", {"format": "int4"}, "unknown option 'format'"),  # derived, not given
        ("quantize", {"name": "x"}, "unknown option 'name'"),
        ("quantize", {"bits": "4"}, r"quantize\.bits: '4' is not of type int"),
        ("quantize", {"bits": True}, r"quantize\.bits: True is not of type int"),
        ("quantize", {"bits": 4.0}, r"quantize\.bits: 4\.0"),
        ("quantize", {"symmetric": 1}, r"quantize\.symmetric: 1 is not of type bool"),
        ("quantize", {"targets": "Linear"}, r"quantize\.targets: 'Linear' is not of type Sequence\[str\]"),
        ("quantize", {"ignore": ["lm_head", 3]}, r"quantize\.ignore"),
        ("quantize", {"ignore": None}, r"quantize\.ignore"),
        ("decode", {"max_context": True}, r"decode\.max_context"),
        ("decode", {"max_context": 1.5}, r"decode\.max_context"),
    ],
)
def test_a_wrong_entry_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_pass(name, options)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="Invalid bits 3"):
        build_pass("quantize", {"bits": 3})
    with pytest.raises(UsageError, match="Invalid group size 100"):
        build_pass("quantize", {"group_size": 100})
