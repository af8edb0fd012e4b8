"""Diagnosis of a model that runs: where prefill and decode spend their time, what binds them, and what to do next.

Times are those of `timing.measure_generation`, the same TTFT and TPOT that a benchmark reports, taken without a
profiler. A second generation under `torch.profiler` says how such a step divides (`trace`), and is stretched to the
first: the profiler's own time is never reported as the model's. Kernels and layers are placed on the measured roofline
(`placement`), the phase is judged (`verdicts`), and what would help is predicted (`interventions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from optimizer.errors import UsageError
from optimizer.evals.architecture import from_module
from optimizer.evals.ceilings import Ceilings
from optimizer.evals.crossovers import Crossover, binding, crossovers
from optimizer.evals.interventions import Intervention, Situation, interventions
from optimizer.evals.linear_probe import linears_at, linears_of
from optimizer.evals.memory_probe import MemoryKind, Probe, probe_memory, working_sets
from optimizer.evals.placement import Placed, place
from optimizer.evals.profiling import event_seconds, named_kernels
from optimizer.evals.recorded import PROFILED_TOKENS, Recorded, record_steps
from optimizer.evals.roofline import ModelShape, Precision, Roofline, StepCost
from optimizer.evals.runner import Runner
from optimizer.evals.timing import GenerationTiming, Summary, Workload, measure_generation
from optimizer.evals.trace import TERM_NAMES, scaled
from optimizer.evals.verdicts import Facts, Phase, Verdict, judge_phase

LEAST_OUTPUT = 4

BOX_SECONDS = 10.0
"""What the repetitions of one part may take: timing a phase, recording it, or a sweep. One of each is always made."""


@dataclass(frozen=True)
class PhaseDiagnosis:
    """One phase of a workload.

    `tokens_or_context` is the prompt length of a prefill, or the tokens a row that a decode step sees. `terms` are
    seconds and sum to `seconds`, the unprofiled time of the step; `profiled_seconds` is what it took while it was
    recorded, and `spread` are the 10th and 90th percentiles without. `binds` names the term that comes first,
    `unclassified` what no pattern of `trace.TERMS` matches.
    """

    phase: Literal["prefill", "decode"]
    batch: int
    tokens_or_context: int
    seconds: float
    terms: Mapping[str, float]
    verdict: Verdict
    why: str
    floor_seconds: float
    mfu: float
    mbu: float
    kernels: tuple[Placed, ...]
    layers: tuple[Placed, ...]
    binds: str
    profiled_seconds: float
    spread: tuple[float, float]
    memory: MemoryKind | None = None
    unclassified: tuple[str, ...] = ()

    @property
    def attained(self) -> float:
        """The floor over the time: 1 is the machine's limit."""
        return self.floor_seconds / self.seconds


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a runner on a workload."""

    phases: tuple[PhaseDiagnosis, ...]
    crossovers: tuple[Crossover, ...]
    interventions: tuple[Intervention, ...]
    ceilings: Ceilings
    roofline: Roofline
    workload: Workload

    @property
    def prefill(self) -> PhaseDiagnosis:
        """The first token."""
        return self.phases[0]

    @property
    def decode(self) -> PhaseDiagnosis:
        """Each later token."""
        return self.phases[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = asdict(self) | {"ceilings": self.ceilings.to_dict()}
        for phase, found in zip(plain["phases"], self.phases, strict=True):
            phase["attained"] = found.attained
        return plain


def diagnose(
    runner: Runner,
    ceilings: Ceilings,
    workload: Workload,
    *,
    context: int | None = None,
    shape: ModelShape | None = None,
    probe: Probe | None = None,
    timing: GenerationTiming | None = None,
    sweep: bool = True,
    repeats: int = 5,
    box_seconds: float = BOX_SECONDS,
    seed: int = 0,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    progress: Callable[[str, float, float], None] = lambda *_: None,
) -> Diagnosis:
    """Diagnose the prefill and the decode step of `workload` by a runner.

    `context` is what a decode step sees, where that is not the workload's own prompt and half its output. `shape`
    counts what the model must do, and is read from `runner.model` unless given. `probe` is the operation
    that a memory-bound step rests on; without it the model's linears are run, or nothing without `sweep`. What is
    compiled meanwhile names its kernels; a step compiled before does not, and what its kernels take is then part of
    `launch`.

    `timing` is that of the workload, if it has been measured already. Otherwise generations are timed `repeats` times,
    and recorded a few times more; of long ones only as many as `box_seconds` hold, for each phase and each of the two,
    and one at least. `stage` is entered with the name of each of these, `progress` told how many are done.

    Raises:
        UsageError: a workload longer than the runner's context, or neither a shape nor a model to read it from.
    """
    model = getattr(runner, "model", None)
    if shape is None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"{type(runner).__name__} has no .model to read a shape from; pass shape=")
        shape = _shape_of(runner, model)
    middle = workload.prompt + workload.output // 2
    context = middle if context is None else context
    if context < 1 or workload.output < LEAST_OUTPUT:
        raise UsageError(
            f"context={context!r} must be at least 1 and output={workload.output} at least {LEAST_OUTPUT}: the steps "
            "that are looked at come after a prompt and two tokens"
        )
    if not box_seconds >= 0:
        raise UsageError(f"box_seconds={box_seconds!r} is the time of repetitions; it must be a number of at least 0")
    roofline_peak = peak_flops(runner, ceilings)
    jobs: dict[Phase, Workload] = {"prefill": workload, "decode": workload}
    if context != middle:  # the first token of one workload, the later ones of another
        output = min(workload.output, PROFILED_TOKENS)
        jobs["prefill"] = Workload(workload.batch, workload.prompt, 2)
        jobs["decode"] = Workload(workload.batch, max(1, context - output // 2), output)
    timings = {} if timing is None else {timing.workload: timing}
    per_event = event_seconds()
    situations, phases = [], []
    with named_kernels():
        for phase, job in jobs.items():
            if job not in timings:
                with stage(f"time generations of {job.batch} × {job.prompt} + {job.output} tokens"):
                    timings[job] = measure_generation(
                        {"runner": runner}, job, repeats=repeats, seed=seed, box_seconds=box_seconds,
                        progress=partial(progress, "generations"),
                    )["runner"]  # fmt: skip
            with stage(f"record {phase}"):
                recorded = record_steps(
                    runner, phase, timings[job], shape, model, per_event, seed=seed, box_seconds=box_seconds
                )
            times = timings[job].ttft if phase == "prefill" else timings[job].tpot
            facts = _facts(phase, recorded, times, job, context, shape, ceilings, roofline_peak)
            with stage(f"judge {phase}"):
                found = _diagnosed(
                    facts, shape, model if sweep else None, probe, (recorded.seconds, times), runner.device,
                    ceilings.bandwidth, box_seconds,
                )  # fmt: skip
            phases.append(found)
            seconds_of = {layer.name: layer.seconds for layer in found.layers}
            situations.append(Situation(facts, shape, ceilings.matmul_flops, seconds_of))
    decode = situations[1].facts
    return Diagnosis(
        tuple(phases),
        tuple(crossovers(shape, decode.roofline, batch=workload.batch, context=context)),
        interventions(situations, workload.output),
        ceilings,
        decode.roofline,
        workload,
    )


def peak_flops(runner: Runner, ceilings: Ceilings) -> float:
    """The highest measured multiply rate of the types a runner computes in: its activations, and int8 kernels'."""
    names = {str(getattr(runner, "dtype", "float32")).removeprefix("torch."), "float32"}
    kernels = getattr(getattr(runner, "ledger", None), "kernels", {}).values()
    names |= {"int8"} if any("[int8" in kernel for kernel in kernels) else set()
    rates = [rate for name, rate in ceilings.matmul_flops.items() if name in names]
    return max(rates or ceilings.matmul_flops.values())


def _shape_of(runner: Runner, model: nn.Module) -> ModelShape:
    """The shape of the model, with keys and values in the bytes that the runner keeps them in."""
    shape = from_module(model)
    kept, plain = getattr(runner, "kv_bytes_per_token", None), shape.kv_bytes_per_token
    if not kept or not plain or kept == plain:
        return shape
    return shape.cached_as(Precision(max(1, round(8 * shape.element_bytes * kept / plain))))


def _facts(
    phase: Phase, recorded: Recorded, times: Summary, job: Workload, context: int, shape: ModelShape,
    ceilings: Ceilings, peak: float,
) -> Facts:  # fmt: skip
    """A phase as it runs unprofiled, with what it must do and the roofline at its working set."""
    found = scaled(recorded.split, times.median)
    cost = shape.prefill(job.batch, job.prompt) if phase == "prefill" else shape.decode(job.batch, context)
    roofline = Roofline(peak, ceilings.bandwidth(max(cost.required_bytes, 1)))
    return Facts(phase, found, cost, roofline, recorded.overheads, found.compiled)


def _diagnosed(
    facts: Facts, shape: ModelShape, model: nn.Module | None, probe: Probe | None, measured: tuple[float, Summary],
    device: torch.device, bandwidth: Callable[[float], float], box_seconds: float,
) -> PhaseDiagnosis:  # fmt: skip
    """Place, judge, and put together."""
    cost, seconds, load = facts.cost, facts.seconds, facts.cost.load
    kernels, layers = place(facts.split, shape, cost, facts.roofline, bandwidth)

    def sweep() -> MemoryKind:
        used = probe or Probe(linears_at(model, load.batch * load.tokens, device), int(cost.required_bytes))
        return probe_memory(used.operation_at, working_sets(used.working_set), device=device, box_seconds=box_seconds)

    able = probe is not None or (facts.largest == "matmul" and model is not None and linears_of(model))
    verdict, why, memory = judge_phase(facts, sweep if able else None)
    if verdict == "memory: irregular access" and probe is None:  # dense weights lie together
        verdict = "implementation"
        why += "; these weights do lie together, so it is the kernel"
    if verdict == "implementation" and (worst := _worst(kernels)):
        why += f"; most is lost in {worst.name}, {worst.seconds / seconds:.0%} of the step at {worst.attainable:.0%}"
    unclassified = tuple(kernel.name for kernel in kernels if kernel.term == "unclassified")
    return PhaseDiagnosis(
        facts.phase, load.batch, load.tokens if facts.phase == "prefill" else load.context, seconds,
        {term: facts.split.terms.get(term, 0.0) for term in TERM_NAMES}, verdict, why, facts.floor_seconds,
        cost.flops / (seconds * facts.roofline.peak_flops),
        cost.required_bytes / (seconds * facts.roofline.bandwidth), tuple(kernels), tuple(layers),
        _binds(verdict, cost, facts.roofline), measured[0], (measured[1].p10, measured[1].p90), memory, unclassified,
    )  # fmt: skip


def _worst(kernels: list[Placed]) -> Placed | None:
    """The kernel that takes the most time beyond what its roofline asks."""
    known = [kernel for kernel in kernels if kernel.attainable is not None]
    return max(known, key=lambda kernel: kernel.seconds * (1 - (kernel.attainable or 0.0)), default=None)


def _binds(verdict: Verdict, cost: StepCost, roofline: Roofline) -> str:
    """The term that comes first: the one the verdict names, or the one that sets the floor."""
    named = {"host-bound": "host", "launch-bound": "launch", "communication-bound": "communication"}
    return named.get(verdict, "latency" if verdict == "latency-bound" else binding(cost, roofline))
