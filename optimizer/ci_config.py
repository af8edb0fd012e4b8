"""`optimizer.yaml`: what `optimizer ci` runs. Read as strictly as a recipe.

    models: [reference]              # folders, hub ids or `reference`; one may stand alone
    recipes: [default, my-recipe.yaml]   # built-in names, files, or a recipe written out here
    out: out/ci
    cache: .optimizer/baselines
    plan: {minutes: 10, goals: [decode.speedup>=3]}   # of the recipe `auto`, where it is among them
    sinks: [{name: mlflow, project: my-model}]

Paths are relative to the folder of the file. Every model is optimized by every recipe: one job each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from optimizer.errors import UsageError
from optimizer.recipe import Recipe, _explain, _Loader, _Strict

REFERENCE = "reference"  # as in `optimizer.source`, which is heavy
AUTO, MINUTES = "auto", 10.0  # as in `optimizer.plan_command`, likewise
SLUG = 60
"""The most characters of a model's or recipe's name that a job's name keeps."""


class ConfigError(UsageError):
    """The configuration of a CI job is malformed, or names a key or value that does not exist."""


class SinkSpec(_Strict):
    """Where results are sent as well. What else a tracker needs (keys, hosts, modes) it reads from its environment.

    `project` is the tracker's project or experiment, `uri` MLflow's tracking URI.
    """

    name: Literal["mlflow", "wandb", "trackio"]
    project: str = Field(default="optimizer", min_length=1)
    uri: str | None = None

    @field_validator("uri")
    @classmethod
    def _only_mlflow(cls, uri: str | None, info: Any) -> str | None:
        if uri is not None and info.data.get("name") != "mlflow":
            raise ValueError("only mlflow takes a uri; the others are set by their environment variables")
        return uri


class PlanSpec(_Strict):
    """How the recipe `auto` is made: see `optimizer plan`, whose options these are."""

    minutes: float = Field(default=MINUTES, gt=0)
    goals: list[str] = Field(default=[])
    quality: float | None = Field(default=None, gt=0, le=1)

    @field_validator("goals")
    @classmethod
    def _conditions(cls, goals: list[str]) -> list[str]:
        from optimizer.plan import parse_goal

        for goal in goals:
            parse_goal(goal)  # a `UsageError`, which is a `ValueError`
        return goals


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return [value] if isinstance(value, str | dict) else value


@dataclass(frozen=True)
class Job:
    """One model and one recipe; its report and artifact go to `folder`.

    With a `plan` the recipe is what the plan holds to, and its passes are still to be found.
    """

    name: str
    model: str
    recipe: Recipe
    folder: Path
    plan: PlanSpec | None = None


class CiConfig(_Strict):
    """Models × recipes, where results go, and what a pull request is told; see the module's example."""

    models: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(min_length=1)]
    recipes: Annotated[list[str | dict[str, Any]], BeforeValidator(_listed), Field(min_length=1)] = Field(
        default=["default"]
    )
    out: str = Field(default="out/ci", min_length=1)
    cache: str | None = ".optimizer/baselines"
    device: str = "auto"
    calibration: str | None = None
    title: str = Field(default="Model optimization", min_length=1, max_length=200)
    price_per_hour: float | None = Field(default=None, gt=0)
    plan: PlanSpec | None = None
    sinks: list[SinkSpec] = Field(default=[])

    @model_validator(mode="after")
    def _plan_of_auto(self) -> CiConfig:
        if self.plan is not None and AUTO not in self.recipes:
            raise ValueError(
                f"`plan` is how the recipe `{AUTO}` is made, which is not among the recipes. Add it there."
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> CiConfig:
        """Read a file and make its paths relative to the caller's folder. Raises `ConfigError`."""
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, ValueError) as error:  # ValueError: a path with a NUL, a date out of range
            raise ConfigError(f"{path} cannot be read: {error}. Write one; docs/ci.md shows how.") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}.") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: the configuration is a mapping with the keys {', '.join(cls.model_fields)}.")
        try:
            found = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{path}: " + "; ".join(_explain(item, cls) for item in error.errors())) from None
        return found._beside(path.parent)

    def _beside(self, folder: Path) -> CiConfig:
        """The same with every path seen from `folder`."""

        def there(name: str) -> str:
            return str(folder / Path(name).expanduser())

        return self.model_copy(
            update={
                "models": [there(m) if m != REFERENCE and _exists(folder, m) else m for m in self.models],
                "recipes": [
                    there(item) if isinstance(item, str) and Path(item).suffix in (".yaml", ".yml") else item
                    for item in self.recipes
                ],
                "out": there(self.out),
                "cache": None if self.cache is None else there(self.cache),
                "calibration": None if self.calibration is None else there(self.calibration),
            }
        )

    def jobs(self) -> list[Job]:
        """Every model with every recipe, under names that can be folders. Raises `RecipeError`."""
        recipes = [self._recipe(item) for item in self.recipes]
        pairs = [(model, *recipe) for model in self.models for recipe in recipes]
        names = _unique(f"{_slug(_short(model))}-{_slug(recipe.name)}" for model, recipe, _ in pairs)
        return [
            Job(name, model, recipe, Path(self.out) / name, plan)
            for name, (model, recipe, plan) in zip(names, pairs, strict=True)
        ]

    def _recipe(self, item: str | dict[str, Any]) -> tuple[Recipe, PlanSpec | None]:
        """One of `recipes`, and how its passes are found if it does not say."""
        if item != AUTO:
            return Recipe.load(item) if isinstance(item, str) else Recipe.from_dict(item), None
        from optimizer.plan import parse_goal
        from optimizer.plan_command import base_recipe

        plan = self.plan or PlanSpec()
        return base_recipe(goals=[parse_goal(goal) for goal in plan.goals], quality=plan.quality), plan


def _exists(folder: Path, name: str) -> bool:
    try:
        return (folder / Path(name).expanduser()).exists()
    except (OSError, ValueError, RuntimeError):  # too long for the file system, a NUL, no such user
        return False


def _short(model: str) -> str:
    """A folder by its own name; a hub id whole."""
    return Path(model).resolve().name if _exists(Path(), model) else model


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)[:SLUG].strip("-.") or "unnamed"


def _unique(names: Iterator[str]) -> Iterator[str]:
    """The names, a later one of the same spelling (also by a file system that ignores case) with a number."""
    seen: set[str] = set()
    for name in names:
        number, free = 1, name
        while free.lower() in seen:
            number += 1
            free = f"{name}-{number}"
        seen.add(free.lower())
        yield free
