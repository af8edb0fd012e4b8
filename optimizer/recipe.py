"""Recipes: what to do to a model, on which workload to measure it, and the floors it must clear.

A recipe is YAML with no surprises: an unknown key, pass or option is refused with the nearest valid name.

    name: my-recipe
    workload: {batch: 1, prompt: 128, output: 64}
    evaluation: {tasks: {reference_next_line: 300}}
    passes:
      - {name: quantize, bits: 4, group_size: 64}
      - {name: merge_linears}
      - {name: decode}
    floors:
      - {metric: quality.reference_next_line.acc.recovery, at_least: 0.97}
      - {metric: decode.speedup, at_least: 1.5}
"""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from optimizer.errors import RecipeError

if TYPE_CHECKING:
    from optimizer.passes.base import Pass


class _Strict(BaseModel):
    # Strict: "5" and true are no numbers. No NaN or infinity: neither is a limit, nor a share of anything.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CellSpec(_Strict):
    """One more shape that speed is measured at: `batch` rows of `context` tokens, and `output` new ones after them."""

    batch: int = Field(ge=1, le=1024)
    context: int = Field(ge=1)
    output: int = Field(default=16, ge=2)

    @property
    def name(self) -> str:
        """What a floor calls it: `decode.speedup@b8c512`."""
        return f"b{self.batch}c{self.context}"


class WorkloadSpec(_Strict):
    """The request that speed is measured on: `batch` rows of `prompt` tokens, `output` new tokens each.

    At each of `cells` everything about speed is measured again, under names that end in `@b<batch>c<context>`.
    """

    batch: int = Field(default=1, ge=1, le=1024)
    prompt: int = Field(default=128, ge=1)
    output: int = Field(default=64, ge=2)
    repeats: int = Field(default=5, ge=3, description="timed generations of each variant")
    cells: list[CellSpec] = []

    @model_validator(mode="after")
    def _distinct(self) -> WorkloadSpec:
        names = [cell.name for cell in self.cells]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the cell {twice} occurs twice")
        return self


class ServingSpec(_Strict):
    """Requests that come and go, served by an engine with continuous batching, and the objective they are held to.

    `preset` says how long prompts and outputs are. They arrive at `rate` a second (at random, or `burst` at a time);
    without one, `concurrency` clients each send a request when their last one ended.
    """

    preset: Literal["chat", "generation", "summarization", "reasoning"] = "chat"
    requests: int = Field(default=40, ge=1)
    rate: float | None = Field(default=None, gt=0)
    burst: int = Field(default=1, ge=1)
    concurrency: int = Field(default=4, ge=1)
    max_batch: int = Field(default=8, ge=1, le=256)
    ttft_ms: float = Field(default=1000.0, gt=0)
    tpot_ms: float = Field(default=50.0, gt=0)


class DivergenceSpec(_Strict):
    """Held-out text on which next-token distributions are compared: `documents` of at most `length` tokens each."""

    documents: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=2)


class EvaluationSpec(_Strict):
    """lm-eval tasks by name, each with how many items to use (null: all).

    `alpha` is the one-sided error rate of floors on a loss, `power` what the items that they need are computed for.
    With `sequential`, tasks whose floors all bound a loss are evaluated in `looks` parts and stop when that is clear.
    """

    tasks: dict[str, Annotated[int, Field(ge=1)] | None] = Field(min_length=1)
    batch_size: int = Field(default=16, ge=1)
    seed: int = 1234
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    alpha: float = Field(default=0.05, gt=0, le=0.5)
    power: float = Field(default=0.8, gt=0, lt=1)
    sequential: bool = False
    looks: int = Field(default=5, ge=2, le=20)
    divergence: DivergenceSpec | None = DivergenceSpec()


class ExportSpec(_Strict):
    """One thing that the optimized model becomes: `onnx` for ONNX Runtime, `tensorrt` engines, or an `aot` package.

    Each takes options of its own, those of `optimizer export`: `dtype` and `int8_inputs` (onnx), `dtype`, `targets` and
    `context` (tensorrt), `context` (aot). One that is not given has the default of that command.
    """

    to: Literal["onnx", "tensorrt", "aot"] = "onnx"
    dtype: Literal["float32", "float16"] | None = None
    int8_inputs: bool | None = None
    targets: list[str] | None = Field(default=None, min_length=1)
    context: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _options_of_its_own(self) -> ExportSpec:
        taken = {"onnx": ("dtype", "int8_inputs"), "tensorrt": ("dtype", "targets", "context"), "aot": ("context",)}
        if wrong := [name for name in self.given if name not in ("to", *taken[self.to])]:
            raise ValueError(f"{self.to} takes no {', '.join(wrong)}; it takes {', '.join(taken[self.to])}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """What it says, without what it leaves to the default."""
        return {name: value for name, value in self if value is not None}

    @model_serializer(mode="plain")
    def _given(self) -> dict[str, Any]:
        return self.given


class CalibrationSpec(_Strict):
    """How much calibration data is used: `samples` rows of at most `length` tokens, `packed` or one document each."""

    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    packed: bool = True


class FloorSpec(_Strict):
    """One condition of release. `bound: interval` judges the unfavourable end of the confidence interval."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    bound: Literal["interval", "value"] = "interval"

    @model_validator(mode="after")
    def _one_side(self) -> FloorSpec:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"floor {self.metric!r} needs exactly one of at_least and at_most")
        return self


class Recipe(_Strict):
    """Passes in order, the workload, the evaluation, and the floors; see the module's example.

    `layout` is the format of the checkpoint that is written; with `export` an export is written instead, and judged. Of
    a list of exports the first is judged and released, and the others are measured where they can run here.
    `price_per_hour` of the device, in any currency, lets the report say what was paid and saved. When a floor is
    missed, up to `repair_minutes` are spent on finding out why and, with `repair`, on gating again without what carries
    the loss. With `diagnose` the report says what bound the original and what binds the optimized model.
    """

    name: str
    description: str = ""
    workload: WorkloadSpec = WorkloadSpec()
    serving: ServingSpec | None = None
    export: list[ExportSpec] | None = Field(default=None, min_length=1)
    evaluation: EvaluationSpec
    calibration: CalibrationSpec = CalibrationSpec()
    layout: str = "compressed-tensors"
    passes: list[dict[str, Any]] = Field(min_length=1)
    floors: list[FloorSpec] = Field(min_length=1)
    seed: int = 0
    repair: bool = True
    repair_minutes: float = Field(default=5.0, ge=0)
    diagnose: bool = False
    price_per_hour: float | None = Field(default=None, gt=0)

    @field_validator("export", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("export")
    @classmethod
    def _each_once(cls, value: list[ExportSpec] | None) -> list[ExportSpec] | None:
        names = [spec.to for spec in value or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} occurs twice")
        return value

    @model_validator(mode="after")
    def _measured_floors(self) -> Recipe:
        there = {cell.name for cell in self.workload.cells}
        for floor in self.floors:
            if floor.metric.startswith("quality.kl.") and self.evaluation.divergence is None:
                raise ValueError(f"the floor on {floor.metric!r} needs evaluation.divergence, which is null")
            _, at, cell = floor.metric.partition("@")
            if at and cell not in there:
                known = ", ".join(sorted(there)) or "none"
                raise ValueError(
                    f"the floor on {floor.metric!r} names a cell that is not measured; workload.cells has {known}"
                )
        return self

    @classmethod
    def from_dict(cls, data: Any, source: str = "recipe") -> Recipe:
        """Validate; every problem becomes a `RecipeError` that names the key and the remedy."""
        if not isinstance(data, dict):
            raise RecipeError(f"{source}: a recipe is a mapping with the keys {', '.join(cls.model_fields)}.")
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None
        recipe.build_passes()
        recipe.check_layout()
        return recipe

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file."""
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"recipe {path} cannot be read: {error}. Built-in recipes: {', '.join(builtin())}."
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number out of range
            raise RecipeError(f"recipe {path} is not valid YAML: {error}.") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def load(cls, recipe: str | Path | Recipe) -> Recipe:
        """A recipe object as it is, a built-in recipe by name, or a YAML file by path."""
        if isinstance(recipe, Recipe):
            return recipe
        if str(recipe) in builtin():
            return cls.from_yaml(builtin()[str(recipe)])
        if Path(recipe).suffix in (".yaml", ".yml") or Path(recipe).is_file():
            return cls.from_yaml(recipe)
        near = difflib.get_close_matches(str(recipe), builtin(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"unknown recipe {str(recipe)!r}.{hint} Built in: {', '.join(builtin())}; or give a .yaml file."
        )

    def updated(self, keys: Mapping[str, Any]) -> Recipe:
        """The recipe with these keys instead of its own, validated."""
        return Recipe.from_dict(self.model_dump() | dict(keys), f"recipe {self.name}") if keys else self

    def build_passes(self) -> list[Pass]:
        """The passes with their options; an unknown one raises `RecipeError`."""
        from optimizer.passes.registry import build_pass

        built = []
        for index, spec in enumerate(self.passes):
            if not isinstance(spec.get("name"), str):
                raise RecipeError(f"passes.{index}: a pass needs a name, got {reprlib.repr(spec)}.")
            built.append(build_pass(spec["name"], {key: value for key, value in spec.items() if key != "name"}))
        return built

    def check_layout(self) -> None:
        """`RecipeError` for a checkpoint format that there is none of."""
        from optimizer.layouts import LAYOUTS

        if self.layout not in LAYOUTS:
            near = difflib.get_close_matches(self.layout, LAYOUTS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown layout {self.layout!r}.{hint} Layouts: {', '.join(LAYOUTS)}.")

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Plain data only. A key given twice and an alias (which can grow a small file without end) are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[0])
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice!r} occurs twice")
        return mapping


def builtin() -> dict[str, Path]:
    """The built-in recipes by name, `default` first."""
    folder = Path(str(resources.files("optimizer.recipes")))
    found = sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != "default", path.stem))
    return {path.stem: path for path in found}


def serving_spec(**options: Any) -> ServingSpec:
    """A `ServingSpec`; a value that it cannot have is a `RecipeError`."""
    try:
        return ServingSpec(**options)
    except ValidationError as error:
        raise RecipeError("serving: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any, model: Any = Recipe) -> str:
    """One pydantic error of `model` in words: where, what, and for an unknown key the nearest that exists."""
    place = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return (
            f"{place}: {item['msg'].removeprefix('Value error, ')} (got {reprlib.repr(item['input'])})"
            if place
            else str(item["msg"])
        )
    for step in item["loc"][:-1]:
        if not isinstance(step, int):
            model = _model_of(model.model_fields[step].annotation)
    key, valid = str(item["loc"][-1]), list(model.model_fields)
    near = difflib.get_close_matches(key, valid, n=1)
    return f"unknown key {place!r}." + (f" Did you mean {near[0]!r}?" if near else "") + f" Keys: {', '.join(valid)}"


def _model_of(annotation: Any) -> Any:
    """The model class inside an annotation such as `list[FloorSpec]`."""
    origin = typing.get_origin(annotation)
    if origin in (list, types.UnionType, typing.Union):
        return _model_of(typing.get_args(annotation)[0])
    return annotation
