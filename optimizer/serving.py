"""Serve a workload of requests that come and go, on the engine of a paged runner, and say what their clients saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.runner import BaseRunner
from optimizer.backends.schedule import Limits
from optimizer.calibration import load_calibration
from optimizer.errors import UsageError
from optimizer.evals.gate import Measurement
from optimizer.evals.serving import replay
from optimizer.evals.serving_report import Quantiles, ServingReport, Slo
from optimizer.evals.statistics import Interval
from optimizer.evals.workloads import PRESETS, Burst, Closed, Poisson, RequestSpec, schedule_requests
from optimizer.passes.base import view
from optimizer.recipe import CalibrationSpec, ServingSpec

if TYPE_CHECKING:
    from optimizer.evals.workloads import ArrivalProcess

WARM_UP = 4  # requests of a replay that is not counted: it compiles the buckets


def serve(
    runner: BaseRunner, spec: ServingSpec, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> tuple[ServingReport, RequestSpec]:
    """Replay `spec.requests` requests like the preset's, scaled to the runner's context; the report, and their shape.

    Prompts are passages of the built-in text in the runner's own tokens. Raises `UsageError` for a runner without an
    engine.
    """
    if not isinstance(runner, PagedRunner):
        raise UsageError(
            f"serving needs requests that join and leave, and {type(runner).__name__} runs batches in lockstep. Use "
            "`decode: {cache: paged}`, on a model whose attention can read blocks."
        )
    shape = PRESETS[spec.preset].scaled_to(min(runner.max_context, runner.cache.capacity))
    process: ArrivalProcess = Closed(spec.concurrency)
    if spec.rate is not None:
        process = Burst(spec.burst, spec.burst / spec.rate) if spec.burst > 1 else Poisson(spec.rate)
    longest = int(shape.prompt.most) + 1
    rows = load_calibration(
        None, runner.tokenizer, runner.config, CalibrationSpec(samples=4 * spec.requests, length=max(8, longest))
    ).rows
    corpus = [int(token) for row in rows for token in row]
    limits = Limits(spec.max_batch, runner.options.chunk)
    runner.close()
    for batch in (1 << i for i in range(spec.max_batch.bit_length())):
        runner.warm_up(batch)
    runner.reset(1)
    warm_up = schedule_requests(shape, Closed(spec.max_batch), corpus, max(WARM_UP, spec.max_batch), seed=seed + 1)
    replay(Engine(runner, limits), warm_up)
    if progress is not None:
        progress("requests", 0, spec.requests)
    schedule = schedule_requests(shape, process, corpus, spec.requests, seed=seed)
    records = replay(Engine(runner, limits), schedule)
    return ServingReport.of(records, Slo(spec.ttft_ms / 1e3, spec.tpot_ms / 1e3)), shape


def paged(runner: BaseRunner, kv: str | None = None) -> PagedRunner:
    """The runner if it is paged, and keeps keys and values as `kv` says; else one over the same model that does."""
    if isinstance(runner, PagedRunner) and kv in (None, runner.options.kv):
        return runner
    kind: Any = kv
    options = replace(runner.options, kv=kind) if isinstance(runner, PagedRunner) else PagedOptions(kind)
    return PagedRunner(view(runner.model), runner.tokenizer, max_context=runner.max_context, options=options)


def serving_evidence(report: ServingReport) -> dict[str, Measurement]:
    """What the gate may judge; a percentile that the requests are too few for is missing, and so fails its floor."""
    found = {
        "serving.met_share": _measured(report.met_share, len_of(report)),
        "serving.tokens_per_second": Measurement(report.tokens_per_second, unit="tok/s"),
        "serving.goodput_tokens_per_second": Measurement(report.goodput_tokens_per_second, unit="tok/s"),
        "serving.goodput_requests_per_second": Measurement(report.goodput_requests_per_second, unit="1/s"),
    }
    for name, quantiles in latencies(report).items():
        for level in ("p50", "p95", "p99"):
            interval: Interval | None = getattr(quantiles, level)
            if interval is not None:
                found[f"serving.{name}_{level}_seconds"] = _measured(interval, quantiles.samples, "s")
    return found


def latencies(report: ServingReport) -> dict[str, Quantiles]:
    """The latencies of a report by name."""
    return {"ttft": report.ttft, "tpot": report.tpot, "itl": report.itl, "e2e": report.e2e}


def len_of(report: ServingReport) -> int:
    """How many requests were sent."""
    return report.finished + report.cancelled + report.unfinished


def _measured(interval: Interval, samples: int, unit: str = "") -> Measurement:
    return Measurement(interval.value, interval.low, interval.high, samples, unit)


def describe(report: ServingReport, shape: RequestSpec) -> list[str]:
    """Lines for a person."""
    lines = [
        f"{len_of(report)} requests like {shape}: {report.tokens_per_second:.1f} tok/s, "
        f"{report.requests_per_second:.2f} requests/s, at most {report.peak_concurrency} at once",
        f"SLO (TTFT {report.slo.ttft_seconds * 1e3:g} ms, TPOT {report.slo.tpot_seconds * 1e3:g} ms): met by "
        f"{report.met_share.value:.0%} [{report.met_share.low:.0%}, {report.met_share.high:.0%}]; goodput "
        f"{report.goodput_tokens_per_second:.1f} tok/s, {report.goodput_requests_per_second:.2f} requests/s",
    ]
    for name, quantiles in latencies(report).items():
        shown = ", ".join(
            f"{level} {interval.value * 1e3:.2f} ms"
            for level in ("p50", "p95", "p99")
            if (interval := getattr(quantiles, level)) is not None
        )
        lines.append(f"{name.upper()}: {shown or 'not measured'}")
    return lines
