"""The report of an optimization run: what was done, what was measured, and the verdict with its evidence.

`Report` is data (pydantic, no unknown fields, a schema version) and nothing here measures or judges. JSON is the form
that machines read and that round-trips exactly; Markdown and HTML are rendered from the same data by
`optimizer.report_html`, and `Report.table` gives the rows that the terminal, Markdown and HTML share.

Conventions: times in seconds, sizes in bytes (GB = 1e9), rates per second. `None` is "not measured"; a NaN was
measured and is shown as NaN (in JSON as the string "NaN", which strict parsers accept). A report says "passed" only
if it holds at least one floor and every floor passed; a run without its gate says "ungated".
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from optimizer.errors import ArtifactError, OutputError, UsageError
from optimizer.plan_entry import PlanEntry
from optimizer.report_attribution import Attribution
from optimizer.report_diagnosis import BoundEntry
from optimizer.report_forms import FormEntry
from optimizer.report_units import (
    BYTES,
    COUNT,
    MISSING,
    NONE,
    NUMBER,
    PERCENT,
    RATIO,
    SECONDS,
    TOKENS_PER_SECOND,
    Unit,
    interval,
)

SCHEMA_VERSION = 1

Count = Annotated[int, Field(ge=0)]
VerdictName = Literal["passed", "failed", "ungated"]
_Row = tuple[tuple[str, ...], str, str, str, str]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class ModelEntry(_Entry):
    """The model that was optimized; `source_digest` is the digest of its weights where they were read from files."""

    name: str
    architecture: str
    parameters: Count
    dtype: str
    source_digest: str | None = None


class Machine(_Entry):
    """Where everything was measured. `cores` are the CPU cores in use, `memory_bytes` the device's memory."""

    device: str
    kind: Literal["cpu", "cuda"]
    cores: Count
    memory_bytes: Count
    isa: str
    os: str
    python: str


class BandwidthPoint(_Entry):
    """Read bandwidth over a working set of this size."""

    working_set_bytes: Count
    bytes_per_second: float


class Ceilings(_Entry):
    """What this machine was measured to reach, in the same run; `matmul_flops_per_second` is keyed by dtype."""

    read_bandwidth: list[BandwidthPoint] = []
    copy_bytes_per_second: float | None = None
    matmul_flops_per_second: dict[str, float] = {}
    launch_seconds: float | None = None


class Skipped(_Entry):
    """A layer that a pass left alone, and why."""

    name: str
    reason: str


class PassEntry(_Entry):
    """What one pass did. `expected` is the declared number of sites, None where none is declared."""

    name: str
    required: bool
    matched: Count
    expected: Count | None = None
    skipped: list[Skipped] = []
    seconds: float
    bytes_before: Count
    bytes_after: Count
    notes: str = ""


class LayerEntry(_Entry):
    """One linear layer, weight `[N, K]`. Errors are relative Frobenius norms: ‖Ŵ−W‖/‖W‖ and ‖Ŷ−Y‖/‖Y‖.

    `method` found its weights; `tokens` is how many calibration tokens reached it.
    """

    name: str
    kind: str
    shape: list[Count]
    format: str
    kernel: str
    bytes_before: Count
    bytes_after: Count
    weight_error: float | None = None
    output_error: float | None = None
    method: str | None = None
    tokens: Count | None = None


class QualityEntry(_Entry):
    """One metric of one task, baseline and optimized on the same samples.

    `ratio` is optimized / baseline as measured, whatever the direction: above 1 is better only if `higher_is_better`.
    `samples_planned` is more than `samples` where the evaluation stopped early, its answer being clear.
    `loss` is how much worse the optimized model is, each bound with the one-sided error rate `loss_alpha`.
    """

    task: str
    metric: str
    filter: str | None = None
    higher_is_better: bool
    baseline: float
    optimized: float
    ratio: float
    ratio_low: float | None = None
    ratio_high: float | None = None
    p_value: float | None = None
    samples: Count
    samples_planned: Count | None = None
    flips_to_wrong: Count | None = None
    flips_to_right: Count | None = None
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    loss_alpha: float | None = None

    @property
    def floor_names(self) -> tuple[str, str]:
        """The names a floor on this entry may have: `quality.<task>.<metric>[,<filter>].recovery`.

        Where lower is better the last word is `ratio`; the filter is named where a metric has several.
        """
        last = "recovery" if self.higher_is_better else "ratio"
        stem = f"quality.{self.task}.{self.metric}"
        return f"{stem}.{last}", f"{stem},{self.filter}.{last}"

    @property
    def label(self) -> str:
        """`task/metric`, the filter where there is one, and the direction that is better: ↑ or ↓."""
        suffix = "" if self.filter in (None, "none") else f",{self.filter}"
        return f"{self.task}/{self.metric}{suffix} {'↑' if self.higher_is_better else '↓'}"


class Divergence(_Entry):
    """One figure of the next-token distributions compared on held-out text, with its interval over documents."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    tokens: Count
    documents: Count


class Percentiles(_Entry):
    """Percentiles of a time, in seconds."""

    p50: float
    p95: float | None = None
    p99: float | None = None


class GenerationStats(_Entry):
    """Generation as a user sees it. TTFT has p50 and p95, TPOT p50, p95 and p99; MBU and MFU are fractions of 1."""

    ttft_seconds: Percentiles
    tpot_seconds: Percentiles
    tokens_per_second: float
    mbu: float | None = None
    mfu: float | None = None


class Ratio(_Entry):
    """A speed-up measured side by side, with its interval; above 1 is faster."""

    value: float
    low: float | None = None
    high: float | None = None


class SpeedCell(_Entry):
    """One workload: `batch` rows, `prompt` tokens in, `output` tokens out."""

    batch: Count
    prompt: Count
    output: Count
    baseline: GenerationStats
    optimized: GenerationStats
    decode_speedup: Ratio
    ttft_speedup: Ratio
    throughput_speedup: Ratio

    @property
    def label(self) -> str:
        """For example `B1 · 128→64`."""
        return f"B{self.batch} · {self.prompt}→{self.output}"


class Memory(_Entry):
    """Bytes of the weights, and of the key-value cache per token, before and after."""

    weights_bytes_before: Count
    weights_bytes_after: Count
    kv_bytes_per_token_before: Count
    kv_bytes_per_token_after: Count
    peak_rss_bytes: Count | None = None


class RooflinePoint(_Entry):
    """A measured phase on the roofline: intensity in FLOP/byte, rates in FLOP/s."""

    label: str
    phase: Literal["prefill", "decode"]
    variant: Literal["baseline", "optimized"]
    intensity: float
    achieved_flops: float
    attainable_flops: float


class Latency(_Entry):
    """Percentiles in seconds of one latency of the served requests; None where they were too few to tell."""

    name: str
    p50: float | None
    p95: float | None
    p99: float | None


class Serving(_Entry):
    """What the clients of requests that came and went saw, and the share of them whose TTFT and TPOT met the SLO."""

    workload: str
    requests: Count
    ttft_slo_seconds: float
    tpot_slo_seconds: float
    met_share: float
    met_share_low: float
    met_share_high: float
    tokens_per_second: float
    goodput_tokens_per_second: float
    latencies: list[Latency]


class Ledger(_Entry):
    """How many steps ran compiled, eager and replayed, and the number of layers that each kernel served."""

    compiled: Count = 0
    eager: Count = 0
    replayed: Count = 0
    kernels: dict[str, Count] = {}
    notes: dict[str, str] = {}


class FloorEntry(_Entry):
    """One floor and its evidence: `rule` in words, `threshold` its number, `value` None when not measured.

    `metric` also says which row of `Report.table` it judges: `ttft.speedup`, `decode.speedup`, `throughput.speedup`,
    `decode.mbu`, `weights.ratio`, `kv.ratio`, or one of `QualityEntry.floor_names`. Any other floor gets its own row.
    `samples_needed` is how many a model without loss needs to pass, where that can be said.
    """

    metric: str
    rule: str
    threshold: float | None = None
    unit: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    samples: Count | None = None
    samples_needed: Count | None = None
    passed: bool
    reason: str = ""

    @property
    def measured(self) -> str:
        """The value with its interval and unit."""
        space = "" if self.unit in ("", RATIO.rungs[0][1]) else " "
        unit = Unit(((1.0, space + self.unit),), digits=4)
        return interval(unit, self.value, self.low, self.high)


class Cost(_Entry):
    """Wall-clock time of one phase of the run."""

    phase: str
    seconds: float


class BreakEven(_Entry):
    """When the run has paid for itself on the workload, prefill included. `tokens` None is never.

    `optimization_seconds` were spent on calibration, passes and compilation, `run_seconds` on everything, the proof
    included; `tokens_of_run` wins those back, and `tokens_at_worst` the optimization alone at the pessimistic end of
    the speed-up. With a price of the device an hour, `cost` is the run's, in the price's currency.
    """

    optimization_seconds: float
    run_seconds: float
    seconds_per_token_before: float
    seconds_per_token_after: float
    tokens: Count | None
    tokens_at_worst: Count | None
    tokens_of_run: Count | None
    cost: float | None = None
    cost_per_million_tokens_before: float | None = None
    cost_per_million_tokens_after: float | None = None

    def lines(self) -> list[tuple[str, str]]:
        """What it says, as `(name, text)`."""

        def count(tokens: int | None) -> str:
            return "never: not faster" if tokens is None else f"{COUNT.format(tokens)} tokens"

        found = [
            ("Calibration, passes, compilation", SECONDS.format(self.optimization_seconds)),
            ("The whole run, its proof included", SECONDS.format(self.run_seconds)),
            ("Seconds a token, prefill included", "{} → {}".format(
                *SECONDS.pair(self.seconds_per_token_before, self.seconds_per_token_after))),
            ("Optimization won back after", count(self.tokens)),
            ("at the pessimistic end of the speed-up", count(self.tokens_at_worst)),
            ("The whole run won back after", count(self.tokens_of_run)),
        ]  # fmt: skip
        if self.cost is not None:
            prices = (self.cost_per_million_tokens_before, self.cost_per_million_tokens_after)
            found.append(("Price of the run", NUMBER.format(self.cost)))
            found.append(("Price of a million tokens", "{} → {}".format(*NUMBER.pair(*prices))))
        return found


@dataclass(frozen=True)
class TableRow:
    """One row of the final table, every cell already formatted; `verdict` is pass, FAIL, ungated or `–` (no floor)."""

    metric: str
    before: str
    after: str
    ratio: str
    floor: str
    verdict: str


class Report(_Entry):
    """Everything a run found. `speed[0]` is the workload the recipe is for; `created` is ISO 8601 in UTC."""

    schema_version: Literal[1] = 1
    product_version: str
    created: str
    verdict: VerdictName
    summary: str
    model: ModelEntry
    recipe: dict[str, JsonValue]
    machine: Machine
    ceilings: Ceilings = Ceilings()
    versions: dict[str, str] = {}
    passes: list[PassEntry] = []
    layers: list[LayerEntry] = []
    quality: list[QualityEntry] = []
    divergence: list[Divergence] = []
    speed: list[SpeedCell] = []
    memory: Memory
    forms: list[FormEntry] = []
    roofline: list[RooflinePoint] = []
    serving: Serving | None = None
    plan: PlanEntry | None = None
    diagnosis: list[BoundEntry] = []
    ledger: Ledger = Ledger()
    floors: list[FloorEntry] = []
    attribution: Attribution | None = None
    costs: list[Cost] = []
    break_even: BreakEven | None = None
    warnings: list[str] = []

    @field_validator("created")
    @classmethod
    def _created_is_utc(cls, value: str) -> str:
        if datetime.fromisoformat(value).utcoffset() != timedelta(0):
            raise ValueError(f"created is {value!r}; give an ISO 8601 time in UTC, such as 2026-01-31T12:00:00+00:00")
        return value

    @model_validator(mode="after")
    def _verdict_follows_floors(self) -> Self:
        if "\n" in self.summary:
            raise ValueError("summary has a line break; give one line")
        if not isinstance(self.recipe.get("name"), str):
            raise ValueError(f"recipe has no name among its keys {sorted(self.recipe)}; add one")
        missed = [floor.metric for floor in self.floors if not floor.passed]
        if self.verdict == "passed" and (missed or not self.floors):
            why = f"missed {missed}" if missed else "no floor was judged, which is 'ungated'"
            raise ValueError(f"verdict is 'passed', but {why}")
        if self.verdict == "failed" and not missed:
            raise ValueError("verdict is 'failed', but no floor was missed; an execution error is not a verdict")
        return self

    @property
    def recipe_name(self) -> str:
        """The name of the recipe."""
        return str(self.recipe["name"])

    @property
    def failed_floors(self) -> list[FloorEntry]:
        """The floors that were missed."""
        return [floor for floor in self.floors if not floor.passed]

    def table(self) -> list[TableRow]:
        """The final table: quality, TTFT, TPOT, throughput, MBU, memory; then every floor that has no row there."""
        floors = list(self.floors)
        rows = []
        for names, metric, before, after, ratio in self._measured_rows():
            floor = next((floor for floor in floors if floor.metric in names), None)
            if floor is not None:
                floors.remove(floor)
            rows.append(TableRow(metric, before, after, ratio, *self._judged(floor)))
        return rows + [TableRow(floor.metric, NONE, floor.measured, NONE, *self._judged(floor)) for floor in floors]

    def _judged(self, floor: FloorEntry | None) -> tuple[str, str]:
        if floor is None:
            return NONE, "ungated" if self.verdict == "ungated" else NONE
        return floor.rule, "FAIL" if not floor.passed else "ungated" if self.verdict == "ungated" else "pass"

    def _measured_rows(self) -> list[_Row]:
        """Rows of `(names of the floors on it, metric, before, after, ratio)`."""
        rows: list[_Row] = [
            (
                q.floor_names,
                q.label,
                *NUMBER.pair(q.baseline, q.optimized),
                interval(NUMBER, q.ratio, q.ratio_low, q.ratio_high),
            )
            for q in self.quality
        ] or [((), "Quality", MISSING, MISSING, MISSING)]
        rows += _speed_rows(self.speed[0]) if self.speed else [((k,), n, MISSING, MISSING, MISSING) for k, n in _SPEED]
        memory = self.memory
        weights = (memory.weights_bytes_before, memory.weights_bytes_after)
        kv = (memory.kv_bytes_per_token_before, memory.kv_bytes_per_token_after)
        rows.append((("weights.ratio",), "Weights", *BYTES.pair(*weights), _times(*reversed(weights))))
        rows.append((("kv.ratio",), "KV cache per token", *BYTES.pair(*kv), _times(*reversed(kv))))
        return rows

    def to_json(self) -> str:
        """The report as JSON, indented, in the order of the fields; `from_json` gives the same report back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read what `to_json` wrote. Raises `ArtifactError` for another schema version or anything malformed."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"the report is not JSON: {error}; write it again with Report.save") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ArtifactError(
                f"the report has schema_version {version!r}, this version reads {SCHEMA_VERSION}; "
                "use the product version that wrote it"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(
                f"the report does not fit its schema: {error}; write it again with Report.save"
            ) from error

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        from optimizer.report_html import render_markdown

        return render_markdown(self)

    def to_html(self) -> str:
        """The report as one self-contained HTML page; see `optimizer.report_html`."""
        from optimizer.report_html import render_html

        return render_html(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write atomically as HTML, Markdown or JSON, by the extension of `path`; returns the path.

        Raises `UsageError` for another extension and `OutputError` where the file cannot be written.
        """
        return save_as(path, {".html": self.to_html, ".md": self.to_markdown, ".json": self.to_json}, "a report")


_SPEED = (
    ("ttft.speedup", "TTFT"),
    ("decode.speedup", "TPOT"),
    ("throughput.speedup", "Throughput"),
    ("decode.mbu", "MBU"),
)


def _speed_rows(cell: SpeedCell) -> list[_Row]:
    before, after, name = cell.baseline, cell.optimized, dict(_SPEED)
    table: tuple[tuple[str, Unit, float | None, float | None, Ratio | None], ...] = (
        ("ttft.speedup", SECONDS, before.ttft_seconds.p50, after.ttft_seconds.p50, cell.ttft_speedup),
        ("decode.speedup", SECONDS, before.tpot_seconds.p50, after.tpot_seconds.p50, cell.decode_speedup),
        (
            "throughput.speedup",
            TOKENS_PER_SECOND,
            before.tokens_per_second,
            after.tokens_per_second,
            cell.throughput_speedup,
        ),
        ("decode.mbu", PERCENT, before.mbu, after.mbu, None),
    )
    return [
        ((key,), f"{name[key]} · {cell.label}", *unit.pair(b, a), _times(a, b) if r is None else speedup(r))
        for key, unit, b, a, r in table
    ]


def speedup(ratio: Ratio) -> str:
    """A speed-up with its interval: `2.41× [2.35, 2.47]`."""
    return interval(RATIO, ratio.value, ratio.low, ratio.high)


def _times(numerator: float | None, denominator: float | None) -> str:
    if numerator is None or denominator is None:
        return MISSING
    return RATIO.format(numerator / denominator) if denominator else NONE


def save_as(path: str | os.PathLike[str], writers: Mapping[str, Callable[[], str]], what: str) -> Path:
    """Write `what` atomically by the extension of `path`, which `writers` are named by; see `Report.save`."""
    path = Path(path)
    write = writers.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"{what} cannot be saved as {path.name!r}; use one of the extensions {', '.join(writers)}")
    _write_atomically(path, write())
    return path


def _write_atomically(path: Path, text: str) -> None:
    """All or nothing: written beside `path`, flushed to the disk, then renamed over it."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        remedy = "choose a file name in a folder that exists and can be written"
        raise OutputError(f"the report cannot be written to {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; never there if it could not be opened
            staged.unlink()
