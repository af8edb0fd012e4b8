"""What an automatic plan measures with: the model itself, on this machine, each thing once.

Records of what was measured go into a work folder, one JSON document each, written whole or not at all; a search that
was killed finds them and goes on. The folder belongs to one model, workload, evaluation, calibration, machine and set
of versions: anything else has a folder of its own. A prediction is kept before its candidate is measured.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from optimizer.artifact import installed_versions
from optimizer.backends.compiled import bucket
from optimizer.backends.linear import QuantizedLinear, linear_layers
from optimizer.backends.runner import BaseRunner
from optimizer.candidates import CACHES, WEIGHTS, CacheOption, Candidate, WeightOption
from optimizer.checkpoint import check_layout, find_layout
from optimizer.evals.architecture import from_module
from optimizer.evals.ceilings import Ceilings, describe
from optimizer.evals.gate import Measurement
from optimizer.evals.power import Sampling
from optimizer.evals.predict import Bottleneck, LinearTimes, StepTimes
from optimizer.evals.quality import MetricResult, QualityResult
from optimizer.evals.roofline import ModelShape, Precision, Roofline
from optimizer.evals.timing import Workload, measure_generation
from optimizer.linear_times import Kind, kinds_of, served, time_kinds
from optimizer.passes.base import Context, view
from optimizer.passes.calibration import Calibration
from optimizer.passes.quantize import Quantize
from optimizer.passes.registry import build_pass
from optimizer.pipeline import (
    Baseline,
    Outcome,
    apply_passes,
    check_workload,
    matmul_peak,
    measure_baseline,
    original_runner,
    run,
)
from optimizer.plan import Attempt, Start
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import Source
from optimizer.work_folder import WorkFolder

SCALE_BITS = 32
"""Bits of the scale that a head's vector shares where keys and values are rounded (`optimizer.quant.kv`)."""

KEPT_DECODE = ("max_context", "compile", "block_size", "cache_tokens", "chunk")
"""Options of the base recipe's `decode` that are not the plan's to choose."""


@dataclass
class Records:
    """JSON documents by name: in a work folder, or in memory where there is none."""

    folder: WorkFolder | None = None
    _memory: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The document, or None."""
        return self._memory.get(name) if self.folder is None else self.folder.read_record(f"{name}.json")

    def put(self, name: str, document: Any) -> None:
        """Keep a document."""
        if self.folder is None:
            self._memory[name] = document
        else:
            self.folder.write_record(f"{name}.json", document)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The document, made and kept if there is none."""
        found = self.get(name)
        if found is None:
            found = make()
            self.put(name, found)
        return found


@dataclass
class ModelBench:
    """A `plan.Bench` of a loaded model. `recipe` gives workload, evaluation, layout, calibration, floors and seed.

    `measure` finds the baseline of the original, for example one that an earlier run kept.
    """

    source: Source
    recipe: Recipe
    calibration: Calibration | None
    progress: Progress
    records: Records
    measure: Callable[[BaseRunner], Baseline] | None = None
    best: tuple[Candidate, Outcome] | None = None
    _latest: Outcome | None = None
    _baseline: Baseline | None = None

    def __post_init__(self) -> None:
        spec = self.recipe.workload
        self.workload = Workload(spec.batch, spec.prompt, spec.output)
        self.original = original_runner(self.source)
        check_workload("workload", self.original.max_context, self.workload)
        self.shape: ModelShape = from_module(self.source.model)
        given: Mapping[str, Any] = next((p for p in self.recipe.passes if p.get("name") == "decode"), {})
        self.decode = {key: given[key] for key in KEPT_DECODE if key in given}

    def state(self) -> dict[str, Any]:
        """What the measurements are of: whatever could change one of them."""
        spec = self.recipe.model_dump(mode="json", include={"workload", "evaluation", "layout", "seed"})
        return {
            "model": self.source.digest,
            **spec,
            "decode": self.decode,
            "calibration": None if self.calibration is None else self.calibration.digest,
            "versions": installed_versions(),
            "machine": list(describe(self.original.device)),
            "threads": torch.get_num_threads(),
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of the state."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()

    def resumable(self, folder: Path) -> AbstractContextManager[None]:
        """Keep the records of this state in a folder of their own under `folder`, and lock it meanwhile."""
        work = WorkFolder(folder.absolute() / self.digest[:16])
        self.records = Records(work)
        return work.opened(self.state())

    @property
    def baseline(self) -> Baseline:
        """Quality of the original and the ceilings of the machine, measured once."""
        if self._baseline is None:
            measure = self.measure or partial(measure_baseline, recipe=self.recipe, progress=self.progress)
            self._baseline = _baseline(self.records.once("baseline", lambda: _stored(measure(self.original))))
        return self._baseline

    def start(self) -> Start:
        """As `Bench`: the original as its users run it and compiled, timed interleaved, and what each consists of."""
        found = self.records.once("start", lambda: self.time_candidate(unquantized(CACHES[0])))
        self.records.once("plain", self._time_plain)
        eager, plain = _times(found["eager"]), _times(found["compiled"])
        w, ceilings = self.workload, self.baseline.ceilings
        peak = matmul_peak(ceilings, self.original.dtype)
        prefill = self.shape.prefill(w.batch, w.prompt)
        decode = self.shape.decode(w.batch, w.prompt + w.output // 2)
        once, step = (Roofline(peak, ceilings.bandwidth(cost.required_bytes)) for cost in (prefill, decode))
        return Start(
            eager,
            plain,
            Bottleneck.of("decode", decode, eager.tpot, step, launch_seconds=eager.tpot - plain.tpot),
            (Bottleneck.of("prefill", prefill, plain.ttft, once), Bottleneck.of("decode", decode, plain.tpot, step)),
        )

    def paged_anchor(self) -> StepTimes:
        """As `Bench`."""
        exact = next(option for option in CACHES if option.decode and option.bits is None)
        found = self.records.once("paged", lambda: self.time_candidate(unquantized(exact)))
        return self.on_clock_of_start(found)

    def on_clock_of_start(self, found: Mapping[str, Mapping[str, float]]) -> StepTimes:
        """What `time_candidate` found, as it would have been when the original was timed at the start."""
        return _times(self.records.get("start")["eager"]) * (_times(found["compiled"]) / _times(found["eager"]))

    def cache_seconds(self, cache: CacheOption) -> float:
        """As `Bench`."""
        assert cache.bits is not None
        w = self.workload
        rounded = self.shape.cached_as(self._kv(cache.bits))
        before, after = (shape.decode(w.batch, w.prompt + w.output // 2) for shape in (self.shape, rounded))
        return (before.kv_bytes - after.kv_bytes) / self.baseline.ceilings.bandwidth(before.required_bytes)

    def _kv(self, bits: int) -> Precision:
        return Precision(bits, None, SCALE_BITS)

    def time_candidate(self, candidate: Candidate, ignore: Sequence[str] = ()) -> dict[str, dict[str, float]]:
        """Step times of a candidate (`compiled`) and of the original (`eager`), interleaved."""
        with self.progress.phase(f"time {candidate.name}"):
            model, context = self.applied(self.candidate_recipe(candidate, ignore).passes)
            runner = context.make_runner(model, self.source.tokenizer)
            if hasattr(runner, "warm_up"):
                runner.warm_up(self.workload.batch, self.workload.prompt + self.workload.output)
            found = measure_generation(
                {"eager": self.original, "compiled": runner}, self.workload, repeats=self.recipe.workload.repeats,
                seed=self.recipe.seed,
                progress=lambda done, total: self.progress.update("rounds", done, total),
            )  # fmt: skip
        return {name: {"ttft": timing.ttft.median, "tpot": timing.tpot.median} for name, timing in found.items()}

    @property
    def _fuses(self) -> bool:
        return self.original.device.type == "cuda"  # on a CPU the sites are left to Inductor

    def applied(self, passes: Sequence[Mapping[str, Any]]) -> tuple[Any, Context]:
        """A view of the model with the passes carried out, and the context that makes its runner."""
        model, context = view(self.source.model), self._context()
        built = [build_pass(p["name"], {k: v for k, v in p.items() if k != "name"}) for p in passes]
        apply_passes(model, built, context, Progress())
        return model, context

    def _context(self) -> Context:
        return Context(
            tokenizer=self.source.tokenizer, batch=self.workload.batch, calibration=self.calibration,
            scale_dtype=find_layout(self.recipe.layout).scale_dtype,
        )  # fmt: skip

    def linears(self, weights: WeightOption) -> Sequence[LinearTimes]:
        """As `Bench`. The model is quantized by rounding, whatever the method: the kernels are the same."""
        assert weights.quantize is not None
        step = build_pass("quantize", dict(weights.quantize))
        assert isinstance(step, Quantize)
        step.check(self.source.model, self._context())
        layers, _ = step.layers(self.source.model)
        check_layout(self.recipe.layout, {n: (step.scheme, m.out_features, m.in_features) for n, m in layers.items()})
        key = _digest({**weights.kernels, "int8_inputs": weights.int8_inputs})
        found = [
            _linear_times(kind) for kind in self.records.once(f"linears-{key}", lambda: self._time_linears(weights))
        ]
        drift = self._drift(found)
        return [replace(kind, plain=kind.plain * drift, quantized=kind.quantized * drift) for kind in found]

    def _drift(self, found: Sequence[LinearTimes]) -> StepTimes:
        """How much faster the unquantized layers were right after the whole unquantized step was timed."""
        then = {(kind.kind, kind.shape): kind.plain for kind in map(_linear_times, self.records.get("plain") or ())}
        pairs = [(then[kind.kind, kind.shape], kind.plain) for kind in found if (kind.kind, kind.shape) in then]
        if not pairs:
            return StepTimes(1.0, 1.0)
        before, now = (
            StepTimes(sum(t.ttft for t in side), sum(t.tpot for t in side)) for side in zip(*pairs, strict=True)
        )
        return before / now

    def _time_plain(self) -> list[dict[str, Any]]:
        """The linear layers as they are."""
        with self.progress.phase("time the layers as they are"), torch.inference_mode():
            return self._time(kinds_of(self._products, self._products, nn.Module))

    @cached_property
    def _products(self) -> dict[tuple[str, ...], nn.Module]:
        return served(self.applied([*_MERGED, {"name": "decode", "compile": False}])[0])

    def _time_linears(self, weights: WeightOption) -> list[dict[str, Any]]:
        """The linear layers as a step would run them, each kind beside what it is unquantized."""
        with self.progress.phase(f"time the layers, {weights.name}"), torch.inference_mode():
            rounding = {"name": "quantize", **weights.kernels}
            decode = {"name": "decode", "compile": False, "int8_inputs": weights.int8_inputs}
            quantized = served(self.applied([rounding, *_MERGED, decode])[0])
            return self._time(kinds_of(self._products, quantized, QuantizedLinear))

    def _time(self, kinds: Sequence[Kind]) -> list[dict[str, Any]]:
        """Each kind that is reported, in prefill and in a decode step of the workload."""
        device, dtype, w = self.original.device, self.original.dtype, self.workload
        prefill = time_kinds(kinds, w.batch, w.prompt, device=device, dtype=dtype, repeats=1)
        decode = time_kinds(kinds, bucket(w.batch), 1, device=device, dtype=dtype, repeats=5)
        return [
            {
                "kind": kind.name,
                "layers": list(kind.layers),
                "shape": list(kind.shape),
                "plain": {"ttft": once.plain, "tpot": step.plain},
                "quantized": {"ttft": once.quantized, "tpot": step.quantized},
            }
            for kind, once, step in zip(kinds, prefill, decode, strict=True)
            if kind.reported
        ]

    def candidate_recipe(self, candidate: Candidate, ignore: Sequence[str]) -> Recipe:
        """The base recipe with the candidate's passes."""
        left = ["lm_head", *_patterns(ignore, linear_layers(self.source.model))]
        passes = candidate.passes(left, decode=self.decode, fuse=self._fuses)
        kept = f"; {len(ignore)} layers stay as they are" if ignore else ""
        update = {"name": "auto", "description": f"Planned: {candidate.name}{kept}.", "passes": passes}
        return Recipe.from_dict(self.recipe.model_dump() | update)

    def known(self, candidate: Candidate, ignore: Sequence[str]) -> bool:
        """As `Bench`."""
        return self.records.get(f"try-{self._key(candidate, ignore)}") is not None

    def _key(self, candidate: Candidate, ignore: Sequence[str]) -> str:
        return _digest(self.candidate_recipe(candidate, ignore).passes)

    def attempt(self, candidate: Candidate, ignore: Sequence[str], predicted: StepTimes) -> tuple[StepTimes, Attempt]:
        """As `Bench`: the whole job, judged later."""
        recipe, key = self.candidate_recipe(candidate, ignore), self._key(candidate, ignore)
        self._latest = None
        found = self.records.get(f"try-{key}")
        if found is None:
            self.records.put(f"prediction-{key}", {"candidate": candidate.name, "predicted": asdict(predicted)})
            began = time.monotonic()
            self._latest = self.carry_out(recipe)
            found = {
                "candidate": candidate.name,
                "passes": recipe.passes,
                "predicted": asdict(predicted),
                "measured": asdict(_measured(self._latest, self.start().eager)),
                "seconds_as_they_were": _absolute(self._latest),
                "quantize_seconds": sum(r.seconds for _, r in self._latest.passes if r.name == "quantize"),
                "evidence": {name: asdict(m) for name, m in self._latest.evidence.items()},
                "bottlenecks": [asdict(b) for b in _after(self._latest)],
                "seconds": time.monotonic() - began,
            }
            self.records.put(f"try-{key}", found)
        evidence = {name: _measurement(m) for name, m in found["evidence"].items()}
        bottlenecks = tuple(Bottleneck(**b) for b in found["bottlenecks"])
        return _times(found["predicted"]), Attempt(
            _times(found["measured"]), evidence, found["seconds"], found["quantize_seconds"], bottlenecks
        )

    def carry_out(self, recipe: Recipe) -> Outcome:
        """The whole job with the baseline that was measured already."""
        calibrates = any(getattr(step, "calibrates", False) for step in recipe.build_passes())
        return run(
            self.source, recipe, calibration=self.calibration if calibrates else None, progress=self.progress,
            baseline=self.baseline,
        )  # fmt: skip

    def keep(self, candidate: Candidate) -> None:
        """As `Bench`: holds on to the runner, so that the best need not be made again."""
        self.best = None if self._latest is None else (candidate, self._latest)


_MERGED: list[dict[str, Any]] = [{"name": "merge_linears", "required": False}]


def unquantized(cache: CacheOption) -> Candidate:
    """The candidate that changes no weight."""
    return next(Candidate(option, cache) for option in WEIGHTS if option.quantize is None)


def _patterns(names: Sequence[str], layers: Mapping[str, object]) -> list[str]:
    """The names for `ignore`: only their last part where every layer that ends in it is meant."""
    chosen = set(names)

    def whole(last: str) -> bool:
        return all(name in chosen for name in layers if name.rpartition(".")[2] == last)

    return list(dict.fromkeys(last if whole(last := name.rpartition(".")[2]) else name for name in names))


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _linear_times(plain: Mapping[str, Any]) -> LinearTimes:
    n, k = plain["shape"]
    return LinearTimes(
        plain["kind"], tuple(plain["layers"]), (n, k), _times(plain["plain"]), _times(plain["quantized"])
    )  # fmt: skip


def _times(plain: Mapping[str, float]) -> StepTimes:
    return StepTimes(plain["ttft"], plain["tpot"])


def _measurement(plain: dict[str, Any]) -> Measurement:
    """What a record keeps of one, as it was."""
    sampling = plain.get("sampling")
    return Measurement(**plain | {"sampling": None if sampling is None else Sampling(**sampling)})


def _measured(outcome: Outcome, eager: StepTimes) -> StepTimes:
    """The times that the paired speed-ups make of those of the original at the start."""
    return eager / StepTimes(outcome.speed.ttft.median, outcome.speed.decode.median)


def _absolute(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Medians of both models as the clock gave them in this try."""
    both = {"original": outcome.speed.baseline, "candidate": outcome.speed.optimized}
    return {name: {"ttft": timing.ttft.median, "tpot": timing.tpot.median} for name, timing in both.items()}


def _after(outcome: Outcome) -> list[Bottleneck]:
    """What each phase of the optimized model consists of."""
    phases = outcome.speed.phases
    return [
        Bottleneck.of(name, at.cost, at.seconds, Roofline(at.peak_flops, at.bandwidth))
        for name, at in ((name, phases[name, "optimized"]) for name in ("prefill", "decode"))
    ]


def _stored(baseline: Baseline) -> dict[str, Any]:
    """A baseline as plain data, without lm-eval's own document; `_baseline` reverses it."""
    metrics = [asdict(metric) for metric in baseline.quality.metrics]
    return {
        "metrics": metrics, "non_finite": baseline.quality.non_finite, "ceilings": baseline.ceilings.to_dict(),
    }  # fmt: skip


def _baseline(plain: Mapping[str, Any]) -> Baseline:
    metrics = tuple(
        MetricResult(**cast(Any, {k: tuple(v) if isinstance(v, list) else v for k, v in metric.items()}))
        for metric in plain["metrics"]
    )
    return Baseline(QualityResult(metrics, plain["non_finite"]), Ceilings.from_dict(plain["ceilings"]))
