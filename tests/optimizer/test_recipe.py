"""Recipes: what is accepted, and that every slip is refused with its place, its value and the nearest valid name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimizer.errors import RecipeError, UsageError
from optimizer.passes.decode import Decode
from optimizer.passes.quantize import Quantize
from optimizer.recipe import Recipe, builtin

VALID: dict[str, Any] = {
    "name": "mine",
    "workload": {"batch": 2, "prompt": 16, "output": 8},
    "evaluation": {"tasks": {"reference_perplexity": 3, "reference_cloze": None}},
    "passes": [{"name": "quantize", "bits": 4, "group_size": 64}, {"name": "decode", "compile": False}],
    "floors": [{"metric": "decode.speedup", "at_least": 1}],
}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    """`VALID` with one place set to another value."""
    data = copy.deepcopy(VALID)
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


def from_text(folder: Path, text: str) -> Recipe:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return Recipe.from_yaml(folder / "r.yaml")


def test_a_valid_recipe_becomes_passes_with_their_options() -> None:
    recipe = Recipe.from_dict(VALID)
    assert recipe.build_passes() == [Quantize(bits=4, group_size=64), Decode(compile=False)]
    assert (recipe.workload.batch, recipe.workload.repeats, recipe.seed) == (2, 5, 0)
    assert recipe.evaluation.tasks == {"reference_perplexity": 3, "reference_cloze": None}
    assert recipe.floors[0].at_least == 1.0
    assert recipe.floors[0].bound == "interval"


@pytest.mark.parametrize(
    ("path", "place", "nearest"),
    [
        (("florrs",), "'florrs'", "'floors'"),
        (("workload", "bacth"), "'workload.bacth'", "'batch'"),
        (("evaluation", "batchsize"), "'evaluation.batchsize'", "'batch_size'"),
        (("floors", 0, "atleast"), "'floors.0.atleast'", "'at_least'"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_valid_one(
    path: tuple[Any, ...], place: str, nearest: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed(*path, value=1))
    assert f"unknown key {place}. Did you mean {nearest}?" in str(caught.value)


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'workload\.zzz'\. Keys: batch, prompt, output, repeats"):
        Recipe.from_dict(changed("workload", "zzz", value=1))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"name": "quantise"}], "unknown pass 'quantise'. Did you mean 'quantize'?"),
        ([{"name": "quantize", "group": 64}], "quantize: unknown option 'group'. Did you mean 'group_size'?"),
        ([{"name": "quantize", "bits": "4"}], "quantize.bits: '4' is not of type int"),
        ([{"name": "quantize", "bits": True}], "quantize.bits: True is not of type int"),
        ([{"name": "decode", "compile": "no"}], "decode.compile: 'no' is not of type bool"),
        ([{"bits": 4}], "passes.0: a pass needs a name"),
        ([{"name": 4}], "passes.0: a pass needs a name"),
        ([{"name": ["quantize"]}], "passes.0: a pass needs a name"),
        ([{"name": None}], "passes.0: a pass needs a name"),
        (["quantize"], "passes.0: "),
        ({"name": "quantize"}, "passes: "),
        ([], "passes: "),
    ],
)
def test_a_wrong_pass_is_refused_with_the_remedy(passes: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed("passes", value=passes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [("bits", 3, "Invalid bits 3"), ("group_size", 0, "Invalid group size 0"), ("group_size", 48, "32, 64, 128, -1")],
)
def test_a_format_that_does_not_exist_is_refused_before_any_work(option: str, value: int, rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Recipe.from_dict(changed("passes", value=[{"name": "quantize", option: value}]))


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        ({"metric": "decode.mbu"}, "floor 'decode.mbu' needs exactly one of at_least and at_most"),
        ({"metric": "decode.mbu", "at_least": 1, "at_most": 2}, "needs exactly one of at_least and at_most"),
        ({"metric": "decode.mbu", "at_least": float("nan")}, "floors.0.at_least: Input should be a finite number"),
        ({"metric": "decode.mbu", "at_most": float("inf")}, "floors.0.at_most: Input should be a finite number"),
        ({"metric": "decode.mbu", "at_least": "1.5"}, "floors.0.at_least: "),
        ({"metric": "decode.mbu", "at_least": True}, "floors.0.at_least: "),
        ({"metric": "decode.mbu", "at_least": 1, "bound": "low"}, "floors.0.bound: "),
        ({"at_least": 1}, "floors.0.metric: Field required"),
        ("decode.mbu", "floors.0: "),
    ],
)
def test_a_wrong_floor_is_refused(floor: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed("floors", value=[floor]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), 5),
        (("name",), None),
        (("seed",), "0"),
        (("seed",), 1.5),
        (("workload",), []),
        (("workload", "batch"), 0),
        (("workload", "batch"), True),
        (("workload", "batch"), "1"),
        (("workload", "batch"), 1.0),
        (("workload", "output"), 1),
        (("workload", "repeats"), 2),
        (("evaluation",), None),
        (("evaluation", "tasks"), {}),
        (("evaluation", "tasks"), ["reference_cloze"]),
        (("evaluation", "tasks", "reference_cloze"), 0),
        (("evaluation", "tasks", "reference_cloze"), "all"),
        (("evaluation", "confidence"), 1.0),
        (("floors",), []),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_at_its_place(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed(*path, value=value))
    assert ".".join(map(str, path)) in str(caught.value)


def test_every_problem_is_named_at_once() -> None:
    data = changed("workload", "batch", value=0)
    data["evaluation"]["batch_sise"] = 1
    with pytest.raises(RecipeError, match=r"workload\.batch.*evaluation\.batch_sise"):
        Recipe.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "default", 5, [VALID]])
def test_a_recipe_that_is_no_mapping_is_refused_with_its_keys(data: Any) -> None:
    with pytest.raises(RecipeError, match="a recipe is a mapping with the keys name, description"):
        Recipe.from_dict(data, "mine.yaml")


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(RecipeError):
        Recipe.from_dict({**VALID, 1: 2})


@pytest.mark.parametrize("name", list(builtin()))
def test_built_in_recipes_load_by_name(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert recipe.build_passes()


def test_default_comes_first_among_the_built_in_ones() -> None:
    assert next(iter(builtin())) == "default"
    assert len(builtin()) >= 3


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'int4-rnt'\. Did you mean 'int4-rtn'\? Built in: default"):
        Recipe.load("int4-rnt")


@pytest.mark.parametrize("missing", ["no/such.yaml", "such.yml"])
def test_a_missing_file_is_refused_with_the_built_in_names(missing: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read.*Built-in recipes: default"):
        Recipe.load(missing)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        Recipe.load(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path)


def test_a_recipe_object_passes_through_and_a_path_is_read(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(VALID)
    assert Recipe.load(recipe) is recipe
    (tmp_path / "plain").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "plain") == recipe
    assert Recipe.load(str(tmp_path / "plain")) == recipe


@pytest.mark.parametrize("recipe", [VALID, *builtin()])
def test_writing_and_reading_a_recipe_gives_the_same_one(recipe: Any, tmp_path: Path) -> None:
    original = Recipe.from_dict(recipe) if isinstance(recipe, dict) else Recipe.load(recipe)
    again = from_text(tmp_path, original.to_yaml())
    assert again == original
    assert again.to_yaml() == original.to_yaml()
    written = yaml.safe_load(original.to_yaml())
    assert written["evaluation"]["confidence"] == 0.95  # defaults are written out
    assert all(floor["bound"] in ("interval", "value") for floor in written["floors"])


@pytest.mark.parametrize(
    "text",
    [
        "name: [",
        "name: \x07",
        "\tname: x",
        "name: 2026-99-99",
        "seed: " + "9" * 5000,
        "[" * 3000,
        "{[1]: 2}",
        "a: b: c",
        "--- 1\n--- 2",
    ],
    ids=["open bracket", "control", "tab", "no date", "huge number", "deep", "list as key", "colons", "two documents"],
)
def test_bad_yaml_is_a_recipe_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        from_text(tmp_path, text)


def test_a_file_that_is_not_text_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/name:os.system", "!!python/object/new:type", "!run"]
)
def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(tag: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    with pytest.raises(RecipeError, match="not valid YAML"):
        from_text(tmp_path, f"name: {tag} ['{target}']\n")
    assert not target.exists()


def test_an_alias_is_refused_so_a_small_file_cannot_grow(tmp_path: Path) -> None:
    levels = [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="line 2: aliases are not allowed"):
        from_text(tmp_path, "\n".join(["b0: &b0 [x, x]", *levels]))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    text = Recipe.from_dict(VALID).to_yaml() + "seed: 1\n"
    with pytest.raises(RecipeError, match="the key 'seed' occurs twice"):
        from_text(tmp_path, text)


def test_a_long_wrong_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed("name", value=["x" * 100_000] * 100))
    assert len(str(caught.value)) < 1000


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_dict(VALID).name = "other"  # type: ignore[misc]


def test_cells_are_named_by_batch_and_context() -> None:
    data = changed("workload", "cells", value=[{"batch": 1, "context": 128}, {"batch": 8, "context": 512, "output": 4}])
    data["floors"] = [{"metric": "decode.attainable@b8c512", "at_least": 0.2}]
    assert [cell.name for cell in Recipe.from_dict(data).workload.cells] == ["b1c128", "b8c512"]


@pytest.mark.parametrize("cells", [[], [{"batch": 8, "context": 256}]])
def test_a_floor_on_a_cell_that_is_not_measured_is_refused(cells: Any) -> None:
    data = changed("workload", "cells", value=cells)
    data["floors"] = [{"metric": "decode.speedup@b8c512", "at_least": 1}]
    with pytest.raises(RecipeError, match=r"names a cell that is not measured; workload\.cells has (none|b8c256)"):
        Recipe.from_dict(data)


def test_a_cell_given_twice_is_refused() -> None:
    cells = [{"batch": 8, "context": 256}, {"batch": 8, "context": 256, "output": 4}]
    with pytest.raises(RecipeError, match="b8c256 occurs twice"):
        Recipe.from_dict(changed("workload", "cells", value=cells))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("evaluation", "alpha"), 0.0),
        (("evaluation", "alpha"), 0.6),
        (("evaluation", "power"), 1.0),
        (("evaluation", "looks"), 1),
        (("evaluation", "sequential"), "yes"),
        (("evaluation", "divergence"), {"documents": 0}),
        (("evaluation", "divergence"), {"length": 1}),
        (("workload", "cells"), [{"batch": 0, "context": 1}]),
        (("workload", "cells"), [{"batch": 1}]),
        (("price_per_hour",), 0),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_at_its_place(path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(RecipeError, match=".".join(path)):
        Recipe.from_dict(changed(*path, value=value))


def test_the_divergence_can_be_left_out() -> None:
    assert Recipe.from_dict(changed("evaluation", "divergence", value=None)).evaluation.divergence is None
    assert Recipe.from_dict(VALID).evaluation.divergence is not None


def test_a_floor_on_a_divergence_that_is_left_out_is_refused() -> None:
    data = changed("evaluation", "divergence", value=None)
    data["floors"] = [{"metric": "quality.kl.mean", "at_most": 0.01}]
    with pytest.raises(RecipeError, match=r"'quality\.kl\.mean' needs evaluation\.divergence"):
        Recipe.from_dict(data)
