"""The job, end to end: load, measure the baseline, run the passes, measure what will be deployed, judge, report.

Quality is measured on the runner that will serve, against the original model in float32 arithmetic where this
processor has no bfloat16 matrix instructions (the same weights, exactly, and ten times faster there) and in its own
type elsewhere. Speed is measured against Hugging Face `generate` on the original model in its own type, both in one
process and interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from optimizer.backends.capture import compile_ahead
from optimizer.backends.linear import weight_bytes
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.runner import BaseRunner, EagerRunner
from optimizer.checkpoint import check_layout, find_layout
from optimizer.errors import DeviceError, UsageError
from optimizer.evals.architecture import from_module
from optimizer.evals.ceilings import Ceilings, measure_ceilings
from optimizer.evals.divergence import Divergence, divergence_evidence, held_out_rows, measure_divergence
from optimizer.evals.gate import Measurement, Verdict, judge
from optimizer.evals.quality import MetricComparison, QualityResult, compare, evaluate, evidence
from optimizer.evals.roofline import Roofline, StepCost
from optimizer.evals.sequential import restrict
from optimizer.evals.serving_report import ServingReport
from optimizer.evals.timing import (
    GenerationTiming,
    Ratio,
    Summary,
    Workload,
    measure_generation,
    ratio,
    time_interleaved,
)
from optimizer.evals.workloads import RequestSpec
from optimizer.export_forms import ExportedRunner, Form
from optimizer.export_job import check_export, exported_forms, pytorch_form
from optimizer.passes.base import Context, Pass, PassReport, transaction, view
from optimizer.passes.blocks import in_float32
from optimizer.passes.calibration import Calibration
from optimizer.passes.decode import Decode
from optimizer.passes.quantize import Quantize
from optimizer.progress import Progress
from optimizer.quality_looks import evaluate_by_looks, floors_of
from optimizer.recipe import Recipe
from optimizer.serving import serve, serving_evidence
from optimizer.source import Source

if TYPE_CHECKING:
    from optimizer.refusal import Refusal

WINDOW = 512
"""Tokens of context that an evaluation window holds at most."""


@dataclass(frozen=True)
class Phase:
    """One phase of generation on the roofline: what it must do, how long it took, and what it could reach."""

    cost: StepCost
    seconds: float
    peak_flops: float
    bandwidth: float

    @property
    def mfu(self) -> float:
        """Share of the measured matrix-multiply rate."""
        return self.cost.flops / (self.seconds * self.peak_flops)

    @property
    def mbu(self) -> float:
        """Share of the measured read bandwidth (at this working set) that the bytes which must be read come to."""
        return self.cost.required_bytes / (self.seconds * self.bandwidth)

    @property
    def floor_seconds(self) -> float:
        """The least time on the measured roofline: computing, or reading what must be read, whichever takes longer."""
        return Roofline(self.peak_flops, self.bandwidth).seconds(self.cost.flops, self.cost.required_bytes)


@dataclass(frozen=True)
class Speed:
    """One workload served by both: timings, paired ratios, and each phase on the roofline."""

    workload: Workload
    baseline: GenerationTiming
    optimized: GenerationTiming
    decode: Ratio
    ttft: Ratio
    throughput: Ratio
    phases: dict[tuple[str, str], Phase]  # (phase, variant)
    others: Mapping[str, GenerationTiming] = field(default_factory=dict)  # what else ran in the same rounds


@dataclass(frozen=True)
class Baseline:
    """What is measured once of the original, for every run that is compared with it: its quality, and this machine.

    It belongs to one model and to the recipes that share its `evaluation` and workload batch.
    """

    quality: QualityResult
    ceilings: Ceilings


@dataclass(frozen=True)
class Outcome:
    """Everything the job found; `optimizer.api` turns it into a report and an artifact."""

    recipe: Recipe
    source: Source
    runner: BaseRunner
    passes: tuple[tuple[Pass, PassReport], ...]
    comparisons: tuple[MetricComparison, ...]
    speed: Speed
    ceilings: Ceilings
    evidence: dict[str, Measurement]
    verdict: Verdict
    baseline_weight_bytes: int
    weight_bytes: int
    non_finite: int
    costs: dict[str, float]
    quality: tuple[QualityResult, QualityResult]  # of the baseline, of the optimized model
    cells: tuple[Speed, ...] = ()
    divergence: Divergence | None = None
    served: tuple[ServingReport, RequestSpec] | None = None
    baseline: Baseline | None = None
    refusal: Refusal | None = None
    forms: tuple[Form, ...] = ()  # the original, PyTorch's runner, and each export, where the recipe exports


def choose_device(name: str | None) -> torch.device:
    """`None` or "auto" takes the GPU if there is one; naming one that is absent is an error."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}. Use cpu, cuda or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported. Use cpu, cuda or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {name!r} was asked for, but PyTorch sees no CUDA device. Use --device cpu.")
    return device


def run(
    source: Source,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
    baseline: Baseline | Callable[[BaseRunner], Baseline] | None = None,
) -> Outcome:
    """Carry out `recipe` on a loaded model, with `calibration` for the passes that calibrate.

    The caller's model stays as it was unless `inplace`: then it becomes the optimized one, whatever the verdict.
    `baseline` is what `measure_baseline` found of this model for this evaluation, or a function that gives it for the
    original's runner, called once every pass has been checked; without it, it is measured now.
    """
    progress = progress or Progress()
    original = original_runner(source)
    model = source.model
    workload = Workload(recipe.workload.batch, recipe.workload.prompt, recipe.workload.output)
    context = make_context(source, recipe, calibration, progress)
    passes = recipe.build_passes()
    cells = {cell.name: Workload(cell.batch, cell.context, cell.output) for cell in recipe.workload.cells}
    longest = min([p.max_context for p in passes if isinstance(p, Decode) and p.max_context] + [original.max_context])
    check_workload("workload", original.max_context, workload)
    for name, cell in cells.items():
        check_workload(f"workload cell {name}", longest, cell)
    if recipe.serving is not None and not any(isinstance(p, Decode) and p.cache == "paged" for p in passes):
        raise UsageError("serving: requests that come and go need the pass `decode` with `cache: paged`. Add it.")
    check_export(recipe, passes, model)
    # A second pass of a kind may rest on what the first did, so it is checked when its turn comes.
    for step in {step.name: step for step in reversed(passes)}.values():
        step.check(model, context)
        if isinstance(step, Quantize):
            layers, _ = step.layers(model)
            check_layout(recipe.layout, {n: (step.scheme, m.out_features, m.in_features) for n, m in layers.items()})
    if baseline is None:
        baseline = measure_baseline(original, recipe, progress)
    elif not isinstance(baseline, Baseline):
        baseline = baseline(original)
    before, ceilings = baseline.quality, baseline.ceilings
    # Another view keeps the original intact for the timed comparison.
    optimized = view(model)
    reports = apply_passes(optimized, passes, context, progress)
    runner = context.make_runner(optimized, source.tokenizer)
    forms: list[Form] = []
    if recipe.export is not None:
        forms = exported_forms(optimized, source.tokenizer, recipe, progress)
        runner = forms[0].runner or runner
        forms = [pytorch_form(optimized, source.tokenizer, recipe, progress), *forms]
    others = {form.name: form.runner for form in forms if form.runner not in (None, runner)}
    with progress.phase("compile"):
        if hasattr(runner, "warm_up"):
            for shape in (workload, *cells.values()):
                runner.warm_up(shape.batch, shape.prompt + shape.output)
        if isinstance(runner, PagedRunner) and runner.options.capture == "ahead":
            compile_ahead(runner, progress.update)
    spec = recipe.evaluation
    with progress.phase("optimized quality"):
        after = _quality(runner, recipe, progress, before)
        paired = restrict(before, after)
        comparisons = compare(paired, after, confidence=spec.confidence, seed=recipe.seed, alpha=spec.alpha)
    for name, other in others.items():
        with progress.phase(f"quality of {name}"):
            forms = [_scored(form, other, recipe, progress, before) if form.name == name else form for form in forms]
    divergence = None
    if spec.divergence is not None:
        with progress.phase("divergence"):
            divergence = _divergence(_reference(original), runner, recipe, progress)
    with progress.phase("speed"):
        speed = measure_speed(original, runner, workload, ceilings, recipe, progress, others)
        at = {name: measure_speed(original, runner, cell, ceilings, recipe, progress) for name, cell in cells.items()}
    held = runner.weight_bytes if isinstance(runner, ExportedRunner) else weight_bytes(optimized)
    sizes = weight_bytes(model), held
    found = evidence(comparisons, power=spec.power, alpha=spec.alpha)
    found |= _speed_evidence(speed) | _size_evidence(*sizes)
    found |= {f"{metric}@{name}": m for name, each in at.items() for metric, m in _speed_evidence(each).items()}
    found |= {} if divergence is None else divergence_evidence(divergence)
    found["kv.ratio"] = Measurement(runner.kv_bytes_per_token / runner.original_kv_bytes_per_token)
    served = None
    if recipe.serving is not None:
        with progress.phase("serving"):
            served = serve(runner, recipe.serving, seed=recipe.seed, progress=progress.update)
        found |= serving_evidence(served[0])
    found["steps.eager"] = Measurement(float(runner.ledger.steps["eager"]))
    outcome = Outcome(
        recipe, source, runner, tuple(zip(passes, reports, strict=True)), tuple(comparisons), speed, ceilings, found,
        judge(floors_of(recipe), found), *sizes, after.non_finite, dict(progress.seconds), (before, after),
        tuple(at.values()), divergence, served, baseline, forms=_timed(forms, runner, sizes[0], comparisons, speed),
    )  # fmt: skip
    if inplace:
        replace_model(model, optimized)
    return outcome


def make_context(source: Source, recipe: Recipe, calibration: Calibration | None, progress: Progress) -> Context:
    """What the passes of one application of the recipe share."""
    return Context(
        tokenizer=source.tokenizer, batch=recipe.workload.batch, progress=progress.update, calibration=calibration,
        scale_dtype=find_layout(recipe.layout).scale_dtype, time=partial(_median_seconds, device=source.model.device),
    )  # fmt: skip


def replace_model(model: Any, optimized: Any) -> None:
    """Make the caller's model the optimized one: its modules, and what a pass changed in the configuration."""
    vars(model).update(vars(optimized))


def original_runner(source: Source) -> EagerRunner:
    """The model as it was given, run as its users run it. `UsageError` where it has no tokenizer."""
    if source.tokenizer is None:
        raise UsageError(f"{source.name} has no tokenizer, which the evaluation needs. Pass tokenizer=.")
    return EagerRunner(view(source.model), source.tokenizer)  # a view: a runner puts its model in eval mode


def reference_runner(source: Source) -> BaseRunner:
    """The original as quality is compared with: in the arithmetic that the module's docstring gives."""
    return _reference(original_runner(source))


def measure_baseline(original: BaseRunner, recipe: Recipe, progress: Progress) -> Baseline:
    """Evaluate the original on the recipe's tasks, and measure what its device reaches."""
    with progress.phase("baseline quality"):
        quality = _quality(_reference(original), recipe, progress)
    with progress.phase("measure ceilings"):
        ceilings = measure_ceilings(original.device, progress=lambda share: progress.update("probes", share, 1))
    return Baseline(quality, ceilings)


def apply_passes(model: Any, passes: Iterable[Pass], context: Context, progress: Progress) -> list[PassReport]:
    """Run passes in order; one that fails leaves the model as it found it and ends the job."""
    reports = []
    for step in passes:
        step.check(model, context)
        with progress.phase(f"pass {step.name}"), transaction(model):
            reports.append(step.run(model, context))
    return reports


def measure_speed(
    baseline: BaseRunner,
    optimized: BaseRunner,
    workload: Workload,
    ceilings: Ceilings,
    recipe: Recipe,
    progress: Progress,
    others: Mapping[str, BaseRunner] | None = None,
) -> Speed:
    """Time both runners, and `others`, interleaved; place prefill and decode of both on the measured roofline."""
    runners = {"baseline": baseline, "optimized": optimized}
    timings = measure_generation(
        runners | dict(others or {}),
        workload,
        repeats=recipe.workload.repeats,
        seed=recipe.seed,
        progress=lambda done, total: progress.update("rounds", done, total),
    )
    a, b = timings["baseline"], timings["optimized"]
    phases: dict[tuple[str, str], Phase] = {}
    for variant, runner in runners.items():
        found = phases_of(runner, timings[variant], ceilings)
        phases |= {(name, variant): phase for name, phase in found.items()}
    paired = partial(ratio, confidence=recipe.evaluation.confidence)
    return Speed(
        workload, a, b, paired(a.tpot_rounds, b.tpot_rounds), paired(a.ttft_rounds, b.ttft_rounds),
        paired(a.e2e_rounds, b.e2e_rounds), phases, {name: timings[name] for name in others or ()},
    )  # fmt: skip


def phases_of(runner: BaseRunner, timing: GenerationTiming, ceilings: Ceilings) -> dict[str, Phase]:
    """Prefill and decode of the workload that was timed, on the measured roofline; `runner` has a PyTorch module."""
    shape, workload = from_module(runner.model), timing.workload
    peak = matmul_peak(ceilings, runner.dtype)
    costs = {
        "prefill": (shape.prefill(workload.batch, workload.prompt), timing.ttft.median),
        "decode": (shape.decode(workload.batch, workload.prompt + workload.output // 2), timing.tpot.median),
    }
    return {
        phase: Phase(cost, seconds, peak, ceilings.bandwidth(max(cost.required_bytes, 1)))
        for phase, (cost, seconds) in costs.items()
    }


def _median_seconds(calls: Mapping[str, Callable[[], object]], *, device: torch.device) -> dict[str, float]:
    """The median seconds of each call, interleaved."""
    return {name: Summary.of(s).median for name, s in time_interleaved(calls, repeats=15, device=device).items()}


def matmul_peak(ceilings: Ceilings, dtype: torch.dtype) -> float:
    """The matrix-multiply rate that a model in `dtype` can use: its own, or float32's where that is higher."""
    name = str(dtype).removeprefix("torch.")
    return max(rate for found, rate in ceilings.matmul_flops.items() if found in (name, "float32"))


def check_workload(name: str, max_context: int, workload: Workload) -> None:
    """`UsageError` for a workload longer than `max_context` positions; `name` says which it is."""
    if workload.prompt + workload.output > max_context:
        raise UsageError(
            f"{name}: prompt {workload.prompt} + output {workload.output} exceed the model's "
            f"{max_context} positions. Shorten the workload in the recipe."
        )


def _reference(baseline: BaseRunner) -> BaseRunner:
    """The original model in the arithmetic that is both exact and fast here: see the module's docstring."""
    slow = baseline.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if slow and baseline.dtype in (torch.bfloat16, torch.float16):
        return EagerRunner(in_float32(baseline.model), baseline.tokenizer)
    return baseline


def _quality(
    runner: BaseRunner, recipe: Recipe, progress: Progress, before: QualityResult | None = None
) -> QualityResult:
    """Evaluate the tasks of the recipe on one runner; it generates in the batch of the workload, as deployed.

    Of a sequential recipe, tasks stop where the comparison with `before` is clear.
    """
    spec = recipe.evaluation
    measure = partial(
        evaluate, runner, runner.tokenizer, batch_size=_rows(spec.batch_size, runner),
        generate_batch=recipe.workload.batch, max_length=WINDOW, seed=spec.seed, progress=progress.update,
    )  # fmt: skip
    if spec.sequential:
        return evaluate_by_looks(measure, recipe, before)
    limits = {task: limit for task, limit in spec.tasks.items() if limit is not None}
    return measure(list(spec.tasks), limit=limits or None)


def _scored(form: Form, runner: BaseRunner, recipe: Recipe, progress: Progress, before: QualityResult) -> Form:
    """The form with its quality, paired with the original's."""
    spec, after = recipe.evaluation, _quality(runner, recipe, progress, before)
    found = compare(
        restrict(before, after), after, confidence=spec.confidence, seed=recipe.seed, alpha=spec.alpha
    )  # fmt: skip
    broken = (f"{after.non_finite} log-likelihoods were NaN or infinite",) if after.non_finite else ()
    return replace(form, comparisons=tuple(found), notes=form.notes + broken)


def _timed(
    forms: Sequence[Form], released: BaseRunner, original_bytes: int, comparisons: Sequence[MetricComparison],
    speed: Speed,
) -> tuple[Form, ...]:  # fmt: skip
    """The forms with what was measured of them, the original first; nothing where the recipe does not export."""
    if not forms:
        return ()
    found = [Form("original", "Hugging Face generate", original_bytes, timing=speed.baseline)]
    for form in forms:
        if form.runner is released:
            form = replace(form, timing=speed.optimized, comparisons=tuple(comparisons))
        found.append(replace(form, timing=speed.others.get(form.name, form.timing)))
    return tuple(found)


def _divergence(reference: BaseRunner, runner: BaseRunner, recipe: Recipe, progress: Progress) -> Divergence:
    spec, text = recipe.evaluation, recipe.evaluation.divergence
    assert text is not None
    length = min(text.length, reference.max_context, runner.max_context, WINDOW)
    rows = held_out_rows(runner.tokenizer, text.documents, length)
    return measure_divergence(
        reference, runner, rows, batch_size=_rows(spec.batch_size, runner), confidence=spec.confidence,
        seed=recipe.seed, progress=progress.update,
    )  # fmt: skip


def _rows(wanted: int, runner: BaseRunner) -> int:
    """How many rows are evaluated at once: those that are wanted, or as many as the runner takes."""
    return min(wanted, runner.max_batch or wanted)


def _speed_evidence(speed: Speed) -> dict[str, Measurement]:
    """What the gate may judge of speed."""

    def paired(r: Ratio) -> Measurement:
        return Measurement(r.median, r.low, r.high, r.n, "×")

    def attained(phase: Phase, rounds: Sequence[float]) -> Measurement:
        share = ratio([phase.floor_seconds] * len(rounds), rounds)
        return Measurement(share.median, share.low, share.high, share.n)

    after = speed.optimized
    decode, prefill = speed.phases["decode", "optimized"], speed.phases["prefill", "optimized"]
    return {
        "decode.speedup": paired(speed.decode),
        "ttft.speedup": paired(speed.ttft),
        "throughput.speedup": paired(speed.throughput),
        "decode.mbu": Measurement(decode.mbu),
        "prefill.mfu": Measurement(prefill.mfu),
        "decode.attainable": attained(decode, after.tpot_rounds),
        "prefill.attainable": attained(prefill, after.ttft_rounds),
        "ttft.seconds": Measurement(after.ttft.median, samples=after.ttft.n, unit="s"),
        "tpot.seconds": Measurement(after.tpot.median, samples=after.tpot.n, unit="s"),
        "throughput.tokens_per_second": Measurement(after.tokens_per_second, samples=after.e2e.n, unit="tok/s"),
    }


def _size_evidence(before: int, after: int) -> dict[str, Measurement]:
    return {
        "weights.bytes": Measurement(float(after), unit="B"),
        "weights.ratio": Measurement(after / before),
    }
