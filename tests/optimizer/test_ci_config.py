"""The configuration of a CI job: what is accepted, what is refused and how, and the jobs it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from optimizer.ci_config import CiConfig, ConfigError, PlanSpec
from optimizer.errors import RecipeError
from tests.optimizer.small_jobs import recipe


def read(folder: Path, text: str | dict[str, Any]) -> CiConfig:
    file = folder / "optimizer.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return CiConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: x\nrecipe: default", "unknown key 'recipe'. Did you mean 'recipes'?"),
        ("models: x\nsinks: [{name: mlflow, projct: y}]", "unknown key 'sinks.0.projct'. Did you mean 'project'?"),
        ("models: x\nsinks: [{name: tensorboard}]", "'mlflow', 'wandb' or 'trackio'"),
        ("models: x\nsinks: [{name: wandb, uri: y}]", "only mlflow takes a uri"),
        ("recipes: default", "models: Field required"),
        ("models: []", "models"),
        ("models: ''", "models.0"),
        ("models: 5", "models"),
        ("models: x\nplan: {minutes: 5}", "which is not among the recipes"),
        ("models: x\nrecipes: auto\nplan: {minutes: 0}", "plan.minutes"),
        ("models: x\nrecipes: auto\nplan: {minutes: .nan}", "plan.minutes"),
        ("models: x\nrecipes: auto\nplan: {quality: 1.5}", "plan.quality"),
        ("models: x\nrecipes: auto\nplan: {goals: [fast]}", "is no condition"),
        ("models: x\nrecipes: auto\nplan: {goals: [decode.speed>=2]}", "Did you mean 'decode.speedup'"),
        ("models: x\nrecipes: auto\nplan: {goal: []}", "unknown key 'plan.goal'. Did you mean 'goals'?"),
        ("models: x\nprice_per_hour: 0", "price_per_hour"),
        ("models: x\nprice_per_hour: .inf", "price_per_hour"),
        ("models: x\nprice_per_hour: '2'", "price_per_hour"),
        ("models: x\nmodels: y", "the key 'models' occurs twice"),
        ("models: &a [x]\nrecipes: *a", "aliases are not allowed"),
        ("models: [x", "is not valid YAML"),
        ("- x", "is a mapping with the keys models, recipes"),
        ("", "is a mapping with the keys"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "optimizer.yaml" in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, Path("a\0b")):
        with pytest.raises(ConfigError, match="cannot be read"):
            CiConfig.from_yaml(path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        CiConfig.from_yaml(tmp_path / "bytes.yaml")


def test_paths_are_relative_to_the_file_and_names_stay_names(tmp_path: Path) -> None:
    for name in ("model", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.yaml").write_text(recipe().to_yaml(), encoding="utf-8")
    found = read(
        tmp_path, {"models": ["model", "org/name", "reference"], "recipes": ["mine.yaml"], "calibration": "c.txt"}
    )
    assert found.models == [str(tmp_path / "model"), "org/name", "reference"]
    assert Path(found.out) == tmp_path / "out/ci"
    assert Path(found.cache or "") == tmp_path / ".optimizer/baselines"
    assert found.calibration == str(tmp_path / "c.txt")
    assert [job.name for job in found.jobs()] == ["model-small", "org-name-small", "reference-small"]


def test_every_model_meets_every_recipe_in_a_folder_of_its_own(tmp_path: Path) -> None:
    inline, again = (recipe().model_dump(mode="json") for _ in range(2))  # YAML would write one object as an alias
    jobs = read(tmp_path, {"models": ["a/b", "a-b", "x" * 300], "recipes": ["default", inline, again]}).jobs()
    assert len(jobs) == 9
    assert len({str(job.folder).lower() for job in jobs}) == 9
    assert {job.folder.parent for job in jobs} == {tmp_path / "out/ci"}
    assert [job.name for job in jobs[:6]] == [
        "a-b-default", "a-b-small", "a-b-small-2", "a-b-default-2", "a-b-small-3", "a-b-small-4",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "..", ".", "a b\n;rm -rf ~", "$(id)", "\0", "漢字"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    given = recipe().model_dump(mode="json") | {"name": name}
    config = CiConfig(models=[name], recipes=[given], out=str(tmp_path))
    (job,) = config.jobs()
    assert job.folder.resolve().parent == tmp_path.resolve()
    assert set(job.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_auto_is_a_job_with_a_plan_that_holds_to_its_goals(tmp_path: Path) -> None:
    given = {"minutes": 3, "goals": ["decode.speedup>=2.5"], "quality": 0.9}
    config = read(tmp_path, {"models": "x", "recipes": ["default", "auto"], "plan": given})
    fixed, planned = config.jobs()
    assert (fixed.name, fixed.plan) == ("x-default", None)
    assert planned.name == "x-auto"
    assert planned.plan is not None
    assert planned.plan.model_dump() == given
    floors = {floor.metric: floor for floor in planned.recipe.floors}
    assert floors["decode.speedup"].at_least == 2.5
    assert floors["quality.reference_perplexity.byte_perplexity.ratio"].at_most == pytest.approx(1 / 0.9)
    (alone,) = read(tmp_path, "models: x\nrecipes: auto").jobs()
    assert alone.plan == PlanSpec(minutes=10)


def test_a_recipe_that_does_not_exist_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'default'"):
        read(tmp_path, "models: x\nrecipes: defualt").jobs()
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path, "models: x\nrecipes: none.yaml").jobs()
    given = recipe().model_dump(mode="json") | {"flors": []}
    with pytest.raises(RecipeError, match="Did you mean 'floors'"):
        read(tmp_path, {"models": "x", "recipes": given}).jobs()
