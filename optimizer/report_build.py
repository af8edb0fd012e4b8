"""Turns the outcome of a job into its report."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from optimizer import __version__
from optimizer.artifact import installed_versions
from optimizer.attribution import Loss
from optimizer.backends.linear import layer_kernel, linear_layers, stored_scheme, stored_weight
from optimizer.backends.paged_runner import PagedRunner
from optimizer.evals.arithmetic import cost_per_million_tokens
from optimizer.evals.break_even import BreakEven as WonBack
from optimizer.evals.ceilings import Ceilings as MeasuredCeilings
from optimizer.evals.gate import Floor, FloorVerdict
from optimizer.evals.quality import MetricComparison
from optimizer.evals.serving_report import ServingReport
from optimizer.evals.statistics import Interval
from optimizer.evals.timing import GenerationTiming
from optimizer.evals.timing import Ratio as TimingRatio
from optimizer.evals.workloads import RequestSpec
from optimizer.passes.base import Pass, PassReport
from optimizer.pipeline import Outcome, Speed
from optimizer.quant.weight import QuantizedWeight
from optimizer.report import (
    BandwidthPoint,
    BreakEven,
    Ceilings,
    Cost,
    Divergence,
    FloorEntry,
    GenerationStats,
    Latency,
    LayerEntry,
    Ledger,
    Machine,
    Memory,
    ModelEntry,
    PassEntry,
    Percentiles,
    QualityEntry,
    Ratio,
    Report,
    RooflinePoint,
    Serving,
    Skipped,
    SpeedCell,
)
from optimizer.report_attribution import AttemptEntry, Attribution, FindingEntry, LossEntry, MissedFloor
from optimizer.report_forms import FormEntry, FormScore
from optimizer.serving import latencies, len_of

if TYPE_CHECKING:
    from torch import device as Device


_OPTIMIZATION = frozenset({"calibration data", "compile"})
"""Phases, beside the passes, that are spent on the optimized model itself and not on its proof."""


def build_report(outcome: Outcome) -> Report:
    """The report of a finished job."""
    verdict = outcome.verdict
    missed = [floor.floor.metric for floor in verdict.floors if not floor.passed]
    speed = outcome.speed
    return Report(
        product_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict="passed" if verdict.passed else "failed",
        summary=_summary(outcome, missed),
        model=_model(outcome),
        recipe=outcome.recipe.model_dump(mode="json"),
        machine=machine_entry(outcome.runner.device, outcome.ceilings),
        ceilings=ceilings_entry(outcome.ceilings),
        versions=installed_versions(),
        passes=[_pass(step, report) for step, report in outcome.passes],
        layers=_layers(outcome),
        quality=[_quality(item, planned) for item, planned in _planned(outcome)],
        divergence=_divergence(outcome),
        forms=_forms(outcome),
        speed=[_cell(each) for each in (speed, *outcome.cells)],
        memory=Memory(
            weights_bytes_before=outcome.baseline_weight_bytes,
            weights_bytes_after=outcome.weight_bytes,
            kv_bytes_per_token_before=outcome.runner.original_kv_bytes_per_token,
            kv_bytes_per_token_after=outcome.runner.kv_bytes_per_token,
            peak_rss_bytes=peak_rss_bytes(),
        ),
        roofline=[point for each in (speed, *outcome.cells) for point in _points(each)],
        serving=_serving(outcome),
        ledger=_ledger(outcome),
        floors=[_floor(item) for item in verdict.floors],
        attribution=_attribution(outcome),
        costs=[Cost(phase=name, seconds=seconds) for name, seconds in outcome.costs.items()],
        break_even=break_even(speed, outcome.costs, outcome.recipe.price_per_hour),
        warnings=_warnings(outcome),
    )


def break_even(speed: Speed, costs: Mapping[str, float], price_per_hour: float | None) -> BreakEven:
    """When what the phases of the run cost is won back on the workload that was measured."""
    spent = sum(
        seconds for name, seconds in costs.items() if name.startswith(("pass ", "export ")) or name in _OPTIMIZATION
    )
    tokens = speed.workload.batch * speed.workload.output
    before, after = (timing.e2e.median / tokens for timing in (speed.baseline, speed.optimized))
    alone, run = (WonBack(seconds, before, after, speed.throughput.low) for seconds in (spent, sum(costs.values())))
    priced: dict[str, float] = {}
    if price_per_hour is not None:
        priced = {
            "cost": run.seconds / 3600 * price_per_hour,
            "cost_per_million_tokens_before": cost_per_million_tokens(price_per_hour, 1 / before),
            "cost_per_million_tokens_after": cost_per_million_tokens(price_per_hour, 1 / after),
        }
    return BreakEven(
        optimization_seconds=spent,
        run_seconds=run.seconds,
        seconds_per_token_before=before,
        seconds_per_token_after=after,
        tokens=alone.tokens,
        tokens_at_worst=alone.tokens_at_worst,
        tokens_of_run=run.tokens,
        **priced,
    )


def peak_rss_bytes() -> int:
    """The most memory this process has had resident (Linux counts kilobytes, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _summary(outcome: Outcome, missed: list[str]) -> str:
    speed, size = outcome.speed, outcome.weight_bytes / outcome.baseline_weight_bytes
    gain = f"decode at {speed.decode.median:.2f}× the speed, weights {size:.2f}× the size"
    found = _attribution(outcome)
    if missed:
        why = "" if found is None else f" {found.conclusion[0].upper()}{found.conclusion[1:]}."
        return (
            f"Not released: {len(missed)} of {len(outcome.verdict.floors)} floors missed ({', '.join(missed)}); {gain}."
            + why
        )
    why = "" if found is None else f" It {found.conclusion}."
    return f"All {len(outcome.verdict.floors)} floors held: {gain}.{why}"


def _model(outcome: Outcome) -> ModelEntry:
    model: Any = outcome.source.model
    return ModelEntry(
        name=outcome.source.name,
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(outcome.runner.dtype).removeprefix("torch."),
        source_digest=outcome.source.digest,
    )


def machine_entry(device: Device, measured: MeasuredCeilings) -> Machine:
    """The machine of a device whose ceilings were measured."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return Machine(
        device=measured.device,
        kind="cuda" if device.type == "cuda" else "cpu",
        cores=measured.cores,
        memory_bytes=memory,
        isa=measured.isa,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def ceilings_entry(measured: MeasuredCeilings) -> Ceilings:
    """Measured ceilings as a report holds them."""
    return Ceilings(
        read_bandwidth=[
            BandwidthPoint(working_set_bytes=size, bytes_per_second=rate)
            for size, rate in sorted(measured.read_bandwidth.items())
        ],
        copy_bytes_per_second=measured.copy_bandwidth,
        matmul_flops_per_second=dict(measured.matmul_flops),
        launch_seconds=measured.launch_seconds,
    )


def _pass(step: Pass, report: PassReport) -> PassEntry:
    return PassEntry(
        name=report.name,
        required=step.required,
        matched=report.matched,
        expected=report.expected,
        skipped=[Skipped(name=skip.name, reason=skip.reason) for skip in report.skipped],
        seconds=report.seconds,
        bytes_before=report.bytes_before,
        bytes_after=report.bytes_after,
        notes="; ".join(report.notes),
    )


def _layers(outcome: Outcome) -> list[LayerEntry]:
    """Every linear layer as it is deployed; the quantizing pass adds what it changed."""
    changes = {change.name: change for _, report in outcome.passes for change in report.layers}
    entries = []
    for name, module in linear_layers(outcome.runner.model).items():
        change, weight = changes.get(name), stored_weight(module)
        quantized = isinstance(weight, QuantizedWeight)
        scheme = stored_scheme(module)
        shape = list(weight.q.shape if isinstance(weight, QuantizedWeight) else weight.shape)
        dense = 0 if isinstance(weight, QuantizedWeight) else weight.numel() * weight.element_size()
        entries.append(
            LayerEntry(
                name=name,
                kind="linear",
                shape=shape,
                format=scheme.name if scheme else str(weight.dtype)[6:],  # type: ignore[union-attr]
                kernel=outcome.runner.ledger.kernels.get(name) or layer_kernel(module),
                bytes_before=change.bytes_before if change else dense,
                bytes_after=change.bytes_after if change else dense,
                weight_error=change.weight_error if change and quantized else None,
                output_error=change.output_error if change and quantized else None,
                method=change.method if change and quantized else None,
                tokens=change.tokens if change and quantized else None,
            )
        )
    return entries


def _planned(outcome: Outcome) -> list[tuple[MetricComparison, int]]:
    """Each comparison, with how many documents of the task were there to be used."""
    there = {metric.key: len(metric.documents) for metric in outcome.quality[0].metrics}
    return [(item, there[item.task, item.metric, item.filter]) for item in outcome.comparisons]


def _quality(item: MetricComparison, planned: int) -> QualityEntry:
    return QualityEntry(
        task=item.task,
        metric=item.metric,
        filter=item.filter,
        higher_is_better=item.higher_is_better,
        baseline=item.baseline,
        optimized=item.optimized,
        ratio=item.ratio.value,
        ratio_low=item.ratio.low,
        ratio_high=item.ratio.high,
        p_value=None if item.flips is None else item.flips.p_value,
        samples=item.samples,
        samples_planned=planned,
        flips_to_wrong=None if item.flips is None else item.flips.lost,
        flips_to_right=None if item.flips is None else item.flips.gained,
        loss=None if item.loss is None else item.loss.value,
        loss_low=None if item.loss is None else item.loss.low,
        loss_high=None if item.loss is None else item.loss.high,
        loss_alpha=None if item.loss is None else item.loss.alpha,
    )


def _forms(outcome: Outcome) -> list[FormEntry]:
    """Each form of the model with what was measured of it."""
    own = [FormScore(label=_label(item), value=item.baseline) for item in outcome.comparisons]
    return [
        FormEntry(
            name=form.name,
            runtime=form.runtime,
            released=form.runner is outcome.runner,
            bytes=form.bytes,
            build_seconds=form.build_seconds,
            ttft_seconds=None if form.timing is None else form.timing.ttft.p50,
            tpot_seconds=None if form.timing is None else form.timing.tpot.p50,
            scores=[_score(item) for item in form.comparisons] if index else own,
            reason=form.reason,
            notes=list(form.notes),
        )
        for index, form in enumerate(outcome.forms)
    ]


def _label(item: MetricComparison) -> str:
    return _quality(item, item.samples).label


def _score(item: MetricComparison) -> FormScore:
    ratio = item.ratio
    return FormScore(
        label=_label(item), value=item.optimized, ratio=ratio.value, ratio_low=ratio.low, ratio_high=ratio.high
    )


def _divergence(outcome: Outcome) -> list[Divergence]:
    found = outcome.divergence
    if found is None:
        return []
    figures = {
        "KL, mean, nats a token": found.mean,
        "KL, 99th percentile of tokens, nats": found.p99,
        "Same most likely token": found.top1_agreement,
    }
    return [
        Divergence(
            name=name, value=at.value, low=at.low, high=at.high, tokens=found.tokens, documents=found.documents
        )
        for name, at in figures.items()
    ]  # fmt: skip


def _cell(speed: Speed) -> SpeedCell:
    return SpeedCell(
        batch=speed.workload.batch,
        prompt=speed.workload.prompt,
        output=speed.workload.output,
        baseline=_stats(speed, speed.baseline, "baseline"),
        optimized=_stats(speed, speed.optimized, "optimized"),
        decode_speedup=_ratio(speed.decode),
        ttft_speedup=_ratio(speed.ttft),
        throughput_speedup=_ratio(speed.throughput),
    )


def _stats(speed: Speed, timing: GenerationTiming, variant: str) -> GenerationStats:
    return GenerationStats(
        ttft_seconds=Percentiles(p50=timing.ttft.p50, p95=timing.ttft.p95),
        tpot_seconds=Percentiles(p50=timing.tpot.p50, p95=timing.tpot.p95, p99=timing.tpot.p99),
        tokens_per_second=timing.tokens_per_second,
        mbu=speed.phases["decode", variant].mbu,
        mfu=speed.phases["prefill", variant].mfu,
    )


def _ratio(ratio: TimingRatio) -> Ratio:
    return Ratio(value=ratio.median, low=ratio.low, high=ratio.high)


def _points(speed: Speed) -> list[RooflinePoint]:
    return [
        RooflinePoint(
            label=f"B{speed.workload.batch} · {speed.workload.prompt}→{speed.workload.output}",
            phase="prefill" if phase == "prefill" else "decode",
            variant="baseline" if variant == "baseline" else "optimized",
            intensity=at.cost.flops / at.cost.required_bytes,
            achieved_flops=at.cost.flops / at.seconds,
            attainable_flops=min(at.peak_flops, at.cost.flops / at.cost.required_bytes * at.bandwidth),
        )
        for (phase, variant), at in speed.phases.items()
    ]


def _ledger(outcome: Outcome) -> Ledger:
    steps, kernels = outcome.runner.ledger.steps, outcome.runner.ledger.kernel_counts()
    runner, notes = outcome.runner, dict(outcome.runner.ledger.notes)
    if isinstance(runner, PagedRunner) and runner.speculation is not None:
        notes["speculation"] = runner.speculation.summary
    return Ledger(
        compiled=steps["compiled"], eager=steps["eager"], replayed=steps["replayed"], kernels=kernels, notes=notes
    )


def _serving(outcome: Outcome) -> Serving | None:
    return None if outcome.served is None else serving_entry(*outcome.served)


def serving_entry(found: ServingReport, shape: RequestSpec) -> Serving:
    """What clients saw, as a report holds it; `shape` is that of their requests."""
    return Serving(
        workload=str(shape),
        requests=len_of(found),
        ttft_slo_seconds=found.slo.ttft_seconds,
        tpot_slo_seconds=found.slo.tpot_seconds,
        met_share=found.met_share.value,
        met_share_low=found.met_share.low,
        met_share_high=found.met_share.high,
        tokens_per_second=found.tokens_per_second,
        goodput_tokens_per_second=found.goodput_tokens_per_second,
        latencies=[
            Latency(name=name.upper(), **{level: _finite(getattr(q, level)) for level in ("p50", "p95", "p99")})
            for name, q in latencies(found).items()
        ],
    )


def _finite(interval: Interval | None) -> float | None:
    return interval.value if interval is not None and math.isfinite(interval.value) else None


def _attribution(outcome: Outcome) -> Attribution | None:
    found = outcome.refusal
    if found is None:
        return None
    return Attribution(
        metric=found.floor.metric,
        rule=_rule(found.floor),
        refused=[MissedFloor(metric=v.floor.metric, reason=v.reason) for v in found.verdict.floors if not v.passed],
        documents=found.documents,
        whole=_loss(found.whole),
        findings=[
            FindingEntry(
                kind=f.kind, names=list(f.names), without=_loss(f.without), alone=_loss(f.alone), guilty=f.guilty
            )
            for f in found.findings
        ],
        attempts=[
            AttemptEntry(
                reverted=[revert.what for revert in attempt.reverts],
                confidence=attempt.confidence,
                passed=attempt.passed,
                decode_speedup=attempt.speedup,
                missed=[v.reason for v in attempt.verdict.floors if not v.passed]
                if attempt.verdict
                else [attempt.error],
            )
            for attempt in found.attempts
        ],
        reverted=[revert.what for revert in found.chosen],
        proposed=[revert.what for revert in found.proposed],
        notes=list(found.notes),
        candidates=found.candidates,
        seconds=found.seconds,
        complete=found.complete,
    )


def _loss(found: Loss | None) -> LossEntry | None:
    if found is None:
        return None
    return LossEntry(value=found.value, low=found.low, high=found.high, holds=found.holds, error=found.error)


def _floor(item: FloorVerdict) -> FloorEntry:
    floor, measured = item.floor, item.measurement
    return FloorEntry(
        metric=floor.metric,
        rule=_rule(floor),
        threshold=floor.limit,
        unit=measured.unit if measured else "",
        value=measured.value if measured else None,
        low=measured.low if measured else None,
        high=measured.high if measured else None,
        samples=measured.samples if measured else None,
        samples_needed=item.items_needed,
        passed=item.passed,
        reason=item.reason,
    )


def _rule(floor: Floor) -> str:
    """The condition in words: `≥ 0.97, whole interval`."""
    sign = "≥" if floor.at_least is not None else "≤"
    return f"{sign} {floor.limit:g}" + (", whole interval" if floor.bound == "interval" else "")


def _warnings(outcome: Outcome) -> list[str]:
    """What a reader should know before believing the figures."""
    from optimizer.backends.kernels.build import cpu_kernels

    found = []
    if outcome.runner.device.type == "cpu" and not cpu_kernels().loaded:
        found.append(f"The compiled CPU kernels did not run, the slow references did: {cpu_kernels().reason}.")
    slow = sum(n for kernel, n in outcome.runner.ledger.kernel_counts().items() if kernel.endswith("[reference]"))
    if outcome.runner.device.type == "cuda" and slow:
        found.append(f"{slow} layers ran on reference kernels, which are right and not fast.")
    if outcome.non_finite:
        found.append(f"{outcome.non_finite} log-likelihoods of the optimized model were NaN or infinite: it is broken.")
    if outcome.runner.ledger.steps["eager"]:
        found.append(f"{outcome.runner.ledger.steps['eager']} decode steps ran eagerly.")
    return found
