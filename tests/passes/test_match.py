"""Patterns select what they say, as compressed-tensors would, and a slip of the pen is an error with a suggestion."""

from __future__ import annotations

import pytest
from compressed_tensors.utils import match_named_modules
from torch import nn

from optimizer.errors import RecipeError
from optimizer.passes.match import check_patterns, matches

MODEL = nn.ModuleDict(
    {
        "layer": nn.ModuleDict({"q_proj": nn.Linear(2, 2), "down_proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}),
        "lm_head": nn.Linear(2, 2),
    }
)
LAYERS = {name: module for name, module in MODEL.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("Linear", ["layer.q_proj", "layer.down_proj", "lm_head"]),
        ("layer.q_proj", ["layer.q_proj"]),
        (r"re:.*_proj", ["layer.q_proj", "layer.down_proj"]),
        (r"re:layer\.q", ["layer.q_proj"]),
        (r"re:q_proj", []),  # from the start of the name
        (r"re:.*(q|down)_proj$", ["layer.q_proj", "layer.down_proj"]),
        ("LINEAR", []),
        ("proj", []),
    ],
)
def test_patterns_mean_what_they_mean_to_compressed_tensors(pattern: str, names: list[str]) -> None:
    assert [name for name, module in LAYERS.items() if matches(name, module, [pattern])] == names
    assert [name for name, _ in match_named_modules(MODEL, [pattern]) if name in LAYERS] == names


def test_the_last_part_of_a_name_is_enough() -> None:
    assert matches("model.layers.0.q_proj", nn.Linear(2, 2), ["q_proj"])
    assert not matches("model.q_proj.inner", nn.Linear(2, 2), ["q_proj"])


def test_base_classes_match_and_others_do_not() -> None:
    class Special(nn.Linear):
        pass

    assert matches("a", Special(2, 2), ["Special"])
    assert matches("a", Special(2, 2), ["Linear"])
    assert not matches("a", nn.Linear(2, 2), ["Special"])
    assert not matches("a", nn.Linear(2, 2), [])


def test_a_pattern_without_a_layer_names_the_nearest() -> None:
    check_patterns(LAYERS, ["q_proj", "re:.*head"], "targets")
    with pytest.raises(RecipeError, match=r"ignore: 'q_porj' matches no layer\. Nearest names: .*q_proj"):
        check_patterns(LAYERS, ["q_porj"], "ignore")
    with pytest.raises(RecipeError, match="matches no layer"):
        check_patterns({}, ["x"], "targets")


@pytest.mark.parametrize("pattern", ["re:(", "re:[a", "re:*"])
def test_a_bad_regular_expression_is_quoted(pattern: str) -> None:
    with pytest.raises(RecipeError, match="is not a regular expression"):
        check_patterns(LAYERS, [pattern], "targets")
