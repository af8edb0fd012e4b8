"""The steps of a phase as `torch.profiler` records them: split into terms, the least disturbed of them averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimizer.evals.profiling import record
from optimizer.evals.roofline import ModelShape
from optimizer.evals.runner import Runner
from optimizer.evals.timing import GenerationTiming
from optimizer.evals.trace import Overheads, Split, call_seconds, merged, split, windows
from optimizer.evals.verdicts import Phase

PROFILED_TOKENS = 16
"""Tokens of a profiled generation: steps enough to choose the undisturbed quarter of them."""

PROFILED_ROUNDS = {"prefill": 5, "decode": 2}


@dataclass(frozen=True)
class Recorded:
    """A recorded step by terms, the seconds of the shortest one, and what a call and recording an event cost."""

    split: Split
    seconds: float
    overheads: Overheads


def record_steps(
    runner: Runner, phase: Phase, timing: GenerationTiming, shape: ModelShape, model: nn.Module | None,
    per_event: float, *, seed: int, box_seconds: float,
) -> Recorded:  # fmt: skip
    """The least disturbed quarter of the profiled steps of a phase: neighbours only ever slow a step down.

    `timing` gives the workload, and how many generations of it `box_seconds` hold.
    """
    job = timing.workload
    generator = torch.Generator().manual_seed(seed)
    lowest = min(1, runner.vocab_size - 1)
    prompts = torch.randint(lowest, runner.vocab_size, (job.batch, job.prompt), generator=generator)
    tokens: Tensor = prompts.to(runner.device)
    output = 1 if phase == "prefill" else min(job.output, PROFILED_TOKENS)
    each = timing.ttft.median + (output - 1) * timing.tpot.median
    rounds = max(1, min(PROFILED_ROUNDS[phase], int(box_seconds / each)))
    events = record(runner, tokens, output, model, frozenset(op.name for op in shape.ops), rounds)
    overheads = Overheads(per_event, call_seconds(events) or 0.0)
    spans = windows(events, first=phase == "prefill")
    steps = sorted((split(events, start, end, overheads) for start, end in spans), key=lambda one: one.seconds)
    return Recorded(merged(steps[: max(1, len(steps) // 4)]), min(end - start for start, end in spans), overheads)
