"""Diagnosis of a model that runs: where prefill and decode spend their time, what binds them, and what to do next.

Times are those of `timing.measure_generation`, the same TTFT and TPOT that a benchmark reports, taken without a
profiler. A second generation under `torch.profiler` says how such a step divides (`trace`), and is stretched to the
first: the profiler's own time is never reported as the model's. Kernels and layers are placed on the measured roofline
(`placement`), the phase is judged (`verdicts`), and what would help is predicted (`interventions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optimizer.errors import UsageError
from optimizer.evals.architecture import from_module
from optimizer.evals.ceilings import Ceilings
from optimizer.evals.crossovers import Crossover, binding, crossovers
from optimizer.evals.interventions import Intervention, Situation, interventions
from optimizer.evals.memory_probe import MemoryKind, Operation, Probe, probe_memory, working_sets
from optimizer.evals.placement import Placed, place
from optimizer.evals.profiling import event_seconds, named_kernels, record
from optimizer.evals.roofline import ModelShape, Precision, Roofline, StepCost
from optimizer.evals.runner import Runner
from optimizer.evals.timing import Summary, Workload, measure_generation
from optimizer.evals.trace import TERM_NAMES, Overheads, Split, call_seconds, merged, scaled, split, windows
from optimizer.evals.verdicts import Facts, Phase, Verdict, judge_phase

PROFILED_TOKENS = 16
"""Tokens of a profiled generation: steps enough to choose the undisturbed half of them."""

LEAST_OUTPUT = 4

PROBED_LAYERS = 64
"""Linears that the sweep over working sets runs at most."""


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
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Diagnose the prefill and the decode step of `workload` by a runner.

    `context` is what a decode step sees, where that is not the workload's own prompt and half its output. `shape`
    counts what the model must do, and is read from `runner.model` unless given. `probe` is the operation
    that a memory-bound step rests on; without it the model's linears are run. What is compiled meanwhile names its
    kernels; a step compiled before does not, and what its kernels take is then part of `launch`.

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
    roofline_peak = peak_flops(runner, ceilings)
    jobs: dict[Phase, Workload] = {"prefill": workload, "decode": workload}
    if context != middle:
        output = min(workload.output, PROFILED_TOKENS)
        jobs["decode"] = Workload(workload.batch, max(1, context - output // 2), output)
    per_event = event_seconds()
    situations, phases = [], []
    with named_kernels():
        for index, (phase, job) in enumerate(jobs.items()):
            times = _seconds(runner, job, phase, repeats, seed)
            average, wall, overheads = _recorded(runner, job, phase, shape, model, per_event, seed)
            facts = _facts(
                phase, scaled(average, times.median), job, context, shape, ceilings, roofline_peak, overheads
            )
            found = _diagnosed(facts, shape, model, probe, (wall, times), runner.device, ceilings.bandwidth)
            phases.append(found)
            seconds_of = {layer.name: layer.seconds for layer in found.layers}
            situations.append(Situation(facts, shape, ceilings.matmul_flops, seconds_of))
            if progress is not None:
                progress(index + 1, len(jobs))
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


def _seconds(runner: Runner, job: Workload, phase: Phase, repeats: int, seed: int) -> Summary:
    """The unprofiled times of the phase."""
    timing = measure_generation({"runner": runner}, job, repeats=repeats, seed=seed)["runner"]
    return timing.ttft if phase == "prefill" else timing.tpot


def _recorded(
    runner: Runner, job: Workload, phase: Phase, shape: ModelShape, model: nn.Module | None, per_event: float,
    seed: int,
) -> tuple[Split, float, Overheads]:  # fmt: skip
    """The least disturbed quarter of the profiled steps of a phase, the shortest step, and what calls and events cost.

    Neighbours only ever slow a step down.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(
        min(1, runner.vocab_size - 1), runner.vocab_size, (job.batch, job.prompt), generator=generator
    )
    tokens: Tensor = prompts.to(runner.device)
    layers = frozenset(op.name for op in shape.ops)
    output, rounds = (1, 5) if phase == "prefill" else (min(job.output, PROFILED_TOKENS), 2)
    events = record(runner, tokens, output, model, layers, rounds)
    overheads = Overheads(per_event, call_seconds(events) or 0.0)
    spans = windows(events, first=phase == "prefill")
    steps = sorted((split(events, start, end, overheads) for start, end in spans), key=lambda one: one.seconds)
    return merged(steps[: max(1, len(steps) // 4)]), min(end - start for start, end in spans), overheads


def _facts(
    phase: Phase, found: Split, job: Workload, context: int, shape: ModelShape, ceilings: Ceilings, peak: float,
    overheads: Overheads,
) -> Facts:  # fmt: skip
    """A phase with what it must do and the roofline at its working set."""
    cost = shape.prefill(job.batch, job.prompt) if phase == "prefill" else shape.decode(job.batch, context)
    roofline = Roofline(peak, ceilings.bandwidth(max(cost.required_bytes, 1)))
    return Facts(phase, found, cost, roofline, overheads, found.compiled)


def _diagnosed(
    facts: Facts, shape: ModelShape, model: nn.Module | None, probe: Probe | None, measured: tuple[float, Summary],
    device: torch.device, bandwidth: Callable[[float], float],
) -> PhaseDiagnosis:  # fmt: skip
    """Place, judge, and put together."""
    cost, seconds, load = facts.cost, facts.seconds, facts.cost.load
    kernels, layers = place(facts.split, shape, cost, facts.roofline, bandwidth)

    def sweep() -> MemoryKind:
        used = probe or Probe(linears_at(model, load.batch * load.tokens, device), int(cost.required_bytes))
        return probe_memory(used.operation_at, working_sets(used.working_set), device=device)

    able = probe is not None or (facts.largest == "matmul" and model is not None and _linears(model))
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


def _linears(model: nn.Module) -> list[nn.Module]:
    """The model's linears, quantized or not, that take one tensor and can be run by themselves."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return [m for m in found if _bytes_of(m) > 0][:PROBED_LAYERS]


def _bytes_of(module: nn.Module) -> int:
    stored = getattr(module, "weight_bytes", None)
    return int(stored) if stored else sum(p.nbytes for p in module.parameters(recurse=False))


def linears_at(model: nn.Module | None, tokens: int, device: torch.device) -> Callable[[int], Operation]:
    """The model's own linears on `tokens` rows, as many of them as make up a working set."""
    layers: list[Any] = [] if model is None else _linears(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if model is not None else None

    def operation_at(size: int) -> Operation:
        chosen: list[tuple[Any, Tensor]] = []
        held = 0
        for layer in layers:
            if chosen and held + _bytes_of(layer) > size:
                break
            chosen.append((layer, torch.randn(1, tokens, layer.in_features, dtype=dtype, device=device)))
            held += _bytes_of(layer)

        def run() -> None:
            with torch.no_grad():
                for layer, x in chosen:
                    layer(x)

        return Operation(run, held, held)

    return operation_at
