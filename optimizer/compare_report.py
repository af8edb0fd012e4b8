"""The comparison of several variants: data that `optimizer.compare` fills and three renderings read.

Conventions are those of `optimizer.report`: seconds, bytes (GB = 1e9), rates per second; `None` is "not measured", a
NaN was measured. The first variant is the one that all others are compared with. `Comparison.save` writes one form by
the extension of the file; JSON round-trips exactly.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from optimizer.errors import ArtifactError
from optimizer.report import (
    Ceilings,
    Cost,
    GenerationStats,
    Machine,
    Ratio,
    RooflinePoint,
    Serving,
    save_as,
)

SCHEMA_VERSION = 1
KIND = "comparison"

Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class Workload(_Entry):
    """What generation was timed on: `batch` rows of `prompt` tokens in and `output` out, `repeats` rounds."""

    batch: Count
    prompt: Count
    output: Count
    repeats: Count

    @property
    def label(self) -> str:
        """For example `B1 · 128→64`."""
        return f"B{self.batch} · {self.prompt}→{self.output}"


class VariantEntry(_Entry):
    """One variant: what it is, how large, and how fast.

    `stored_bytes` are its weight files; `weights_bytes` what it holds of them in memory; `memory_bytes` adds the keys
    and values of the timed workload. Speed-ups are over the first variant, from the same rounds, above 1 is faster.
    `decode_tokens_per_second` leaves prefill out. `cost_per_million_tokens` is at the price that was given.
    """

    name: str
    given: str
    kind: str
    architecture: str | None = None
    format: str | None = None
    kernels: dict[str, Count] = {}
    recipe: str | None = None
    verdict: str | None = None
    digest: str | None = None
    stored_bytes: Count | None = None
    weights_bytes: Count | None = None
    kv_bytes_per_token: Count | None = None
    memory_bytes: Count | None = None
    speed: GenerationStats | None = None
    decode_tokens_per_second: float | None = None
    decode_speedup: Ratio | None = None
    ttft_speedup: Ratio | None = None
    throughput_speedup: Ratio | None = None
    cost_per_million_tokens: float | None = None
    roofline: list[RooflinePoint] = []
    serving: Serving | None = None
    non_finite: Count = 0
    notes: list[str] = []


class Score(_Entry):
    """What one variant reached on a metric; ratio (over the first variant), p-value and flips are paired, or None."""

    variant: str
    value: float
    stderr: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    p_value: float | None = None
    flips_to_wrong: Count | None = None
    flips_to_right: Count | None = None


class MetricEntry(_Entry):
    """One metric of one task over all variants. `headline` marks the one that stands for its task in charts."""

    task: str
    metric: str
    filter: str | None = None
    higher_is_better: bool
    samples: Count
    headline: bool = False
    scores: list[Score]

    @property
    def label(self) -> str:
        """`task/metric`, the filter where there is one, and the direction that is better."""
        suffix = "" if self.filter in (None, "none") else f",{self.filter}"
        return f"{self.task}/{self.metric}{suffix} {'↑' if self.higher_is_better else '↓'}"


class Answer(_Entry):
    """What a variant answered; `right` is None where there is no right answer, `differs` is from the first variant."""

    variant: str
    text: str
    right: bool | None = None
    differs: bool = False


class Document(_Entry):
    """A document that not all variants answered alike; `change` orders likelihoods, the largest first."""

    task: str
    document: str
    context: str
    gold: str | None = None
    change: float = 0.0
    answers: list[Answer]


class TaskDocuments(_Entry):
    """How many documents of a task were answered differently, of how many; not all need be listed."""

    task: str
    total: Count
    differing: Count
    listed: Count


class LayerError(_Entry):
    """How far a layer's weight `[N, K]` is from the first variant's.

    `weight_error` is ‖Ŵ−W‖/‖W‖ (Frobenius), `output_error` ‖X(Ŵ−W)ᵀ‖/‖XWᵀ‖ over the inputs that the first variant
    saw on a passage of text. `layer` is None outside the blocks.
    """

    variant: str
    name: str
    layer: Count | None = None
    projection: str
    weight_error: float
    output_error: float | None = None


class Comparison(_Entry):
    """Everything a comparison found. `created` is ISO 8601 in UTC; `tokens` fed the output errors of `layers`."""

    schema_version: Literal[1] = 1
    kind: Literal["comparison"] = "comparison"
    product_version: str
    created: str
    machine: Machine | None = None
    ceilings: Ceilings = Ceilings()
    versions: dict[str, str] = {}
    workload: Workload
    limit: Count | None = None
    seeds: dict[str, int] = {}
    confidence: float = 0.95
    price_per_hour: float | None = None
    variants: list[VariantEntry] = Field(min_length=2)
    quality: list[MetricEntry] = []
    tasks: list[TaskDocuments] = []
    documents: list[Document] = []
    layers: list[LayerError] = []
    layer_notes: list[str] = []
    tokens: Count = 0
    costs: list[Cost] = []
    warnings: list[str] = []

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"two variants have one name among {names}; each needs its own")
        used = {score.variant for metric in self.quality for score in metric.scores}
        used |= {answer.variant for document in self.documents for answer in document.answers}
        if unknown := sorted((used | {layer.variant for layer in self.layers}) - set(names)):
            raise ValueError(f"{unknown} are named but are no variants of {names}")
        return self

    @property
    def baseline(self) -> VariantEntry:
        """The variant that all others are compared with."""
        return self.variants[0]

    def variant(self, name: str) -> VariantEntry:
        """A variant by its name."""
        return next(variant for variant in self.variants if variant.name == name)

    def headlines(self) -> list[MetricEntry]:
        """The metric that stands for each task."""
        return [metric for metric in self.quality if metric.headline]

    def to_json(self) -> str:
        """The comparison as indented JSON; `from_json` gives the same back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """Read what `to_json` wrote. Raises `ArtifactError` for another schema version or anything malformed."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the comparison is not JSON: {error}; write it again with Comparison.save") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if type(version) is not int or version != SCHEMA_VERSION or raw.get("kind") != KIND:
            raise ArtifactError(
                f"this is no comparison of schema_version {SCHEMA_VERSION} (it says {version!r:.40}); "
                "use the product version that wrote it"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"the comparison does not fit its schema: {error}; write it again") from error

    def to_markdown(self) -> str:
        """The summary as GitHub-flavoured Markdown."""
        from optimizer.compare_html import render_markdown

        return render_markdown(self)

    def to_html(self) -> str:
        """One self-contained page; see `optimizer.compare_html`."""
        from optimizer.compare_html import render_html

        return render_html(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write atomically as HTML, Markdown or JSON, by the extension of `path`; returns the path.

        Raises `UsageError` for another extension and `OutputError` where the file cannot be written.
        """
        return save_as(path, {".html": self.to_html, ".md": self.to_markdown, ".json": self.to_json}, "a comparison")


def pareto(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names on the front of `(benefit, benefit)`, both better where higher: nothing beats them on both.

    Of points that are equal all are on the front; one that is not finite is never.
    """
    finite = {name: p for name, p in points.items() if all(map(math.isfinite, p))}

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in finite.values())

    return {name for name, point in finite.items() if not beaten(point)}
