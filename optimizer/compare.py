"""Measures several variants of a model side by side: quality, speed, size, serving, layer by layer.

All that run here are in memory at once, since only what is timed in the same rounds can be compared; an endpoint is
timed apart, by its own streams. Quality is paired document by document with the first variant. A plain model is
evaluated in float32 arithmetic where this processor has no bfloat16 matrix instructions, as `optimizer run` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from optimizer import __version__
from optimizer.artifact import installed_versions
from optimizer.backends.linear import linear_layers, stored_scheme, weight_bytes
from optimizer.backends.runner import BaseRunner
from optimizer.calibration import _built_in
from optimizer.compare_quality import measure_quality, metric_entries
from optimizer.compare_report import (
    Comparison,
    LayerError,
    VariantEntry,
)
from optimizer.compare_report import Workload as WorkloadEntry
from optimizer.documents import differing_documents
from optimizer.errors import OptimizerError, UsageError
from optimizer.evals import arithmetic
from optimizer.evals.ceilings import Ceilings, measure_ceilings
from optimizer.evals.timing import Workload, measure_generation, ratio
from optimizer.layer_errors import layer_differences, place
from optimizer.passes.calibration import FEWEST_TOKENS, calibrate_on
from optimizer.pipeline import WINDOW, Phase, check_workload, phases_of
from optimizer.progress import Progress
from optimizer.recipe import ServingSpec
from optimizer.report import Ceilings as CeilingsEntry
from optimizer.report import Cost, GenerationStats, Percentiles, Ratio, RooflinePoint
from optimizer.report_build import ceilings_entry, machine_entry, serving_entry
from optimizer.serving import paged, serve
from optimizer.variants import Options, Variant, open_variants

DEFAULT_TASKS = ("reference_perplexity", "reference_next_line", "reference_cloze")
AS_TEXT = "It takes no token ids: prompts were sent as text, which its tokenizer may cut into other tokens."
PASSAGE = 256  # tokens that the output errors of layers are measured on


@dataclass(frozen=True)
class Settings:
    """What is measured. `limit` takes the first documents of each task; no `tasks`, no quality.

    `serving` replays requests that come and go; `price_per_hour` turns throughput into a cost. `tokenizer` is a folder
    with the tokenizer of endpoints, by default the first local variant's.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: int | None = None
    workload: Workload = field(default_factory=lambda: Workload(1, 128, 64))
    repeats: int = 5
    batch_size: int = 16
    serving: ServingSpec | None = None
    price_per_hour: float | None = None
    tokenizer: str | None = None
    layers: bool = True
    confidence: float = 0.95
    seed: int = 1234
    options: Options = field(default_factory=Options)


def compare_variants(names: Sequence[str], settings: Settings, progress: Progress | None = None) -> Comparison:
    """Open and measure the variants `names`, the first being what the others are compared with.

    Raises a subclass of `OptimizerError` for a variant that cannot be opened, evaluated or timed: a comparison with a
    hole in it is not made. What a variant cannot do at all, as serving without a paged cache, is noted instead.
    """
    progress = progress or Progress()
    if settings.price_per_hour is not None and not 0 < settings.price_per_hour < float("inf"):
        raise UsageError(f"price {settings.price_per_hour!r} must be a positive amount per hour")
    with progress.phase("load"):
        variants = open_variants(names, settings.options, progress.update)
    local = {v.name: v.runner for v in variants if v.runner is not None}
    tokenizer = _shared_tokenizer(local, settings)
    for runner in local.values():
        check_workload("workload", runner.max_context, settings.workload)
    entries = {variant.name: _describe(variant, settings.workload) for variant in variants}
    quality = measure_quality(variants, tokenizer, settings, progress) if settings.tasks else {}
    metrics = metric_entries(quality, settings)
    documents, tasks = differing_documents({name: result.items for name, result in quality.items()})
    ceilings = _speed(variants, entries, settings, progress)
    _endpoint_speed(variants, entries, tokenizer, settings, progress)
    if settings.serving is not None:
        _serving(local, entries, settings.serving, progress)
        _endpoint_serving(variants, entries, tokenizer, settings.serving, progress)
    layers, notes, tokens = _layers(local, progress) if settings.layers else ([], [], 0)
    for name, result in quality.items():
        entries[name].non_finite = result.non_finite
    _costs(entries, settings.price_per_hour)
    first = next(iter(local.values()), None)
    return Comparison(
        product_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=None if first is None or ceilings is None else machine_entry(first.device, ceilings),
        ceilings=CeilingsEntry() if ceilings is None else ceilings_entry(ceilings),
        versions=installed_versions(),
        workload=WorkloadEntry(
            batch=settings.workload.batch, prompt=settings.workload.prompt, output=settings.workload.output,
            repeats=settings.repeats,
        ),
        limit=settings.limit,
        seeds={"evaluation": settings.seed, "prompts": 0},
        confidence=settings.confidence,
        price_per_hour=settings.price_per_hour,
        variants=list(entries.values()),
        quality=metrics, tasks=tasks, documents=documents,
        layers=layers, layer_notes=notes, tokens=tokens,
        costs=[Cost(phase=name, seconds=seconds) for name, seconds in progress.seconds.items()],
        warnings=_warnings(list(entries.values())),
    )  # fmt: skip


def _shared_tokenizer(local: Mapping[str, BaseRunner], settings: Settings) -> Any:
    """The tokenizer of endpoints; None where there is none to be had, which only an endpoint minds."""
    from pathlib import Path

    from optimizer.source import load_tokenizer, resolve

    if settings.tokenizer is not None:
        return load_tokenizer(Path(resolve(settings.tokenizer)[0]))
    for name, runner in local.items():
        if runner.tokenizer is None:
            raise UsageError(f"{name} has no tokenizer, which the evaluation needs. Save one into its folder.")
    return next((runner.tokenizer for runner in local.values()), None)


def _describe(variant: Variant, workload: Workload) -> VariantEntry:
    """What can be said without running it."""
    entry = VariantEntry(
        name=variant.name, given=variant.given, kind=variant.kind, recipe=variant.recipe, verdict=variant.verdict,
        digest=variant.digest, stored_bytes=variant.stored_bytes, notes=list(variant.notes),
    )  # fmt: skip
    if (runner := variant.runner) is None:
        return entry
    model: Any = _module(runner)
    held = runner.bytes_per_step(1, 0) if model is None else weight_bytes(model)
    per_token = int(runner.kv_bytes_per_token)
    tokens = workload.batch * (workload.prompt + workload.output)
    entry.architecture = type(model).__name__ if model is not None else (runner.config.architectures or [""])[0]
    entry.format = "" if model is None else _formats(model, runner.dtype)
    entry.kernels = dict(runner.ledger.kernel_counts())
    entry.weights_bytes, entry.kv_bytes_per_token = held, per_token
    entry.memory_bytes = held + tokens * per_token
    return entry


def _module(runner: BaseRunner) -> Any:
    """The runner's PyTorch module; None for what was exported, which has none."""
    return getattr(runner, "model", None)


def _formats(model: Any, dtype: torch.dtype) -> str:
    """The formats of the linear layers, most frequent first."""
    plain = str(dtype).removeprefix("torch.")
    schemes = [stored_scheme(module) for module in linear_layers(model).values()]
    counts = Counter(plain if scheme is None else scheme.name for scheme in schemes)
    return ", ".join(f"{name} ×{count}" if len(counts) > 1 else name for name, count in counts.most_common())


def _speed(
    variants: Sequence[Variant], entries: dict[str, VariantEntry], settings: Settings, progress: Progress
) -> Ceilings | None:
    """Time the local variants in the same rounds, and place each on the roofline of this machine."""
    local: dict[str, BaseRunner] = {v.name: v.runner for v in variants if v.runner is not None}
    if not local:
        return None
    workload, device = settings.workload, next(iter(local.values())).device
    with progress.phase("measure ceilings"):
        ceilings = measure_ceilings(device, progress=lambda share: progress.update("probes", share, 1))
    with progress.phase("compile"):
        for runner in local.values():
            if hasattr(runner, "warm_up"):
                runner.warm_up(workload.batch, workload.prompt + workload.output)
    with progress.phase("speed"):
        timings = measure_generation(
            local, workload, repeats=settings.repeats,
            progress=lambda done, total: progress.update("rounds", done, total),
        )  # fmt: skip
    first = variants[0].name
    for name, timing in timings.items():
        entry = entries[name]
        phases = {} if _module(local[name]) is None else phases_of(local[name], timing, ceilings)
        entry.speed = GenerationStats(
            ttft_seconds=Percentiles(p50=timing.ttft.p50, p95=timing.ttft.p95),
            tpot_seconds=Percentiles(p50=timing.tpot.p50, p95=timing.tpot.p95, p99=timing.tpot.p99),
            tokens_per_second=timing.tokens_per_second, mbu=phases["decode"].mbu if phases else None,
            mfu=phases["prefill"].mfu if phases else None,
        )  # fmt: skip
        entry.decode_tokens_per_second = timing.decode_tokens_per_second
        entry.roofline = [_point(workload, phase, at, name == first) for phase, at in phases.items()]
        if first in timings and name != first:
            base = timings[first]
            entry.decode_speedup = _ratio(base.tpot_rounds, timing.tpot_rounds)
            entry.ttft_speedup = _ratio(base.ttft_rounds, timing.ttft_rounds)
            entry.throughput_speedup = _ratio(base.e2e_rounds, timing.e2e_rounds)
    return ceilings


def _ratio(before: Sequence[float], after: Sequence[float]) -> Ratio:
    found = ratio(before, after)
    return Ratio(value=found.median, low=found.low, high=found.high)


def _point(workload: Workload, phase: str, at: Phase, baseline: bool) -> RooflinePoint:
    intensity = at.cost.flops / at.cost.required_bytes
    return RooflinePoint(
        label=f"B{workload.batch} · {workload.prompt}→{workload.output}",
        phase="prefill" if phase == "prefill" else "decode",
        variant="baseline" if baseline else "optimized",
        intensity=intensity,
        achieved_flops=at.cost.flops / at.seconds,
        attainable_flops=min(at.peak_flops, intensity * at.bandwidth),
    )


def _endpoint_speed(
    variants: Sequence[Variant],
    entries: dict[str, VariantEntry],
    tokenizer: Any,
    settings: Settings,
    progress: Progress,
) -> None:
    """Stream from each endpoint; its times are its client's, and paired with nobody's."""
    for variant in variants:
        if variant.endpoint is None:
            continue
        from optimizer.endpoint_lm import takes_tokens, time_endpoint

        workload, entry = settings.workload, entries[variant.name]
        with progress.phase(f"stream from {variant.name}"):
            prompts: list[Any] = _prompts(tokenizer, workload.prompt)
            if not takes_tokens(variant.endpoint, prompts[0]):
                prompts = [tokenizer.decode(prompt) for prompt in prompts]
                entry.notes.append(AS_TEXT)
            timing = time_endpoint(
                variant.endpoint, prompts, workload, repeats=settings.repeats,
                progress=lambda done, total: progress.update("rounds", done, total),
            )  # fmt: skip
        entry.speed = GenerationStats(
            ttft_seconds=Percentiles(p50=timing.ttft.p50, p95=timing.ttft.p95),
            tpot_seconds=Percentiles(p50=timing.tpot.p50, p95=timing.tpot.p95, p99=timing.tpot.p99),
            tokens_per_second=timing.tokens_per_second,
        )
        entry.decode_tokens_per_second = workload.batch / timing.tpot.median if timing.tpot.median else None
        if not timing.exact:
            entry.notes.append("Its chunks hold several tokens: TPOT is each request's mean gap.")


def _prompts(tokenizer: Any, length: int, count: int = 16) -> list[list[int]]:
    """At least `count` passages of the built-in text, `length` tokens each."""
    if tokenizer is None:
        raise UsageError("an endpoint needs a tokenizer: give --tokenizer FOLDER, or a local variant with the same one")
    count = max(count, -(-FEWEST_TOKENS // length))
    rows = calibrate_on(_built_in(), tokenizer, samples=count, length=length, vocabulary=len(tokenizer)).rows
    return [[int(token) for token in row[:length]] for row in rows]


def _serving(
    local: Mapping[str, BaseRunner], entries: dict[str, VariantEntry], spec: ServingSpec, progress: Progress
) -> None:
    """Replay the same requests on each variant in turn, through a paged cache."""
    for name, runner in local.items():
        with progress.phase(f"serving of {name}"):
            try:
                server = paged(runner)
                entries[name].serving = serving_entry(*serve(server, spec, progress=progress.update))
                server.close()
            except OptimizerError as error:
                entries[name].notes.append(f"Serving was not measured: {error}")


def _endpoint_serving(
    variants: Sequence[Variant],
    entries: dict[str, VariantEntry],
    tokenizer: Any,
    spec: ServingSpec,
    progress: Progress,
) -> None:
    """The same requests sent to each endpoint, of the lengths that the first local variant was sent."""
    context = next((variant.runner.max_context for variant in variants if variant.runner is not None), None)
    for variant in variants:
        if variant.endpoint is None:
            continue
        from optimizer.endpoint_serving import serve_remote

        with progress.phase(f"serving of {variant.name}"):
            corpus = [token for row in _prompts(tokenizer, WINDOW, 4 * spec.requests) for token in row]
            entry = entries[variant.name]
            decode = tokenizer.decode if AS_TEXT in entry.notes else None
            report, shape, errors = serve_remote(variant.endpoint, spec, corpus, context, decode=decode)
        entry.serving = serving_entry(report, shape)
        entry.notes.append("In serving, each chunk of a stream counts as a token.")
        if errors:
            entry.notes.append(f"{len(errors)} of {spec.requests} requests failed, first: {errors[0]}")


def _layers(local: Mapping[str, BaseRunner], progress: Progress) -> tuple[list[LayerError], list[str], int]:
    """Every layer of each local variant against the first local one's."""
    without = [f"{name} was exported: its layers cannot be read." for name, r in local.items() if _module(r) is None]
    local = {name: runner for name, runner in local.items() if _module(runner) is not None}
    if len(local) < 2:
        return [], without, 0
    (_, base), *others = local.items()
    length = min(PASSAGE, base.max_context)
    with progress.phase("layers"):
        tokens = torch.tensor([_prompts(base.tokenizer, length)[0]], device=base.device)
        found, notes = layer_differences(base, {name: runner.model for name, runner in others}, tokens)
    entries = []
    for variant, differences in found.items():
        for item in differences:
            layer, projection = place(item.name)
            entries.append(
                LayerError(
                    variant=variant,
                    name=item.name,
                    layer=layer,
                    projection=projection,
                    weight_error=item.weight,
                    output_error=item.output,
                )
            )
    return entries, [*notes, *without], tokens.numel()


def _costs(entries: Mapping[str, VariantEntry], price: float | None) -> None:
    """Cost per million output tokens at one kind of throughput: of serving where every variant served, else alone."""
    served = all(entry.serving is not None for entry in entries.values())
    for entry in entries.values():
        measured = entry.serving if served else entry.speed
        if price is not None and measured is not None and measured.tokens_per_second > 0:
            entry.cost_per_million_tokens = arithmetic.cost_per_million_tokens(price, measured.tokens_per_second)


def _warnings(entries: Sequence[VariantEntry]) -> list[str]:
    """What a reader should know before believing the figures."""
    found = [
        f"{entry.name}: {entry.non_finite} log-likelihoods were NaN or infinite: it is broken."
        for entry in entries
        if entry.non_finite
    ]
    slow = [e.name for e in entries if any(kernel.endswith("[reference]") for kernel in e.kernels)]
    if slow:
        found.append(f"Reference kernels, which are right and not fast, ran layers of {', '.join(slow)}.")
    return found
