"""The only clock: how long things take, side by side, and how sure that is.

What is compared runs in one process, interleaved, in an order that rotates every round, so that a change of the
machine's clock or neighbours falls on all of them alike. Times are seconds. A `Stopwatch` marks moments: host time on
a CPU, events on the launching stream on a GPU, which wait for nothing and so disturb no pipelining.

Metrics: TTFT is request submitted → first token; TPOT is the gap between later tokens; E2E is request submitted →
all tokens on the host, E2E ≈ TTFT + (N − 1)·TPOT; throughput is output tokens per second over all sequences.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.runner import Runner

Clock = Callable[[], float]
T = TypeVar("T")

COLD_CACHES = 5  # inputs rotate over this many times the cache, so that weights are cold as in a real step


@dataclass(frozen=True, slots=True)
class Summary:
    """The distribution of `n` samples: the median and percentiles, linearly interpolated, in the samples' unit."""

    median: float
    p10: float
    p90: float
    p95: float
    p99: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise samples.

        Raises:
            UsageError: there are none, or one is not finite.
        """
        values = _finite("Summary.of", samples)
        median, p10, p90, p95, p99 = (float(v) for v in np.percentile(values, (50, 10, 90, 95, 99)))
        return cls(median, p10, p90, p95, p99, len(values))

    @property
    def p50(self) -> float:
        """The median."""
        return self.median


@dataclass(frozen=True, slots=True)
class Ratio:
    """Paired ratios: their median, spread (p10, p90), and a bootstrap interval [low, high] of the median."""

    median: float
    p10: float
    p90: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` prompts of `prompt` tokens, each continued by `output` tokens (at least 2: TPOT needs a gap)."""

    batch: int
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("output", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"workload {name}={value!r} must be an integer of at least {least}")


@dataclass(frozen=True, slots=True)
class GenerationTiming:
    """How fast a runner served a workload. `*_rounds` hold one value a round, paired with other runners' rounds."""

    workload: Workload
    ttft: Summary
    tpot: Summary
    e2e: Summary
    ttft_rounds: tuple[float, ...]
    tpot_rounds: tuple[float, ...]
    e2e_rounds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second over all sequences, prefill included, in the median round."""
        return self.workload.batch * self.workload.output / self.e2e.median

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second over all sequences between the first token and the last, at the median gap."""
        return self.workload.batch / self.tpot.median


class Stopwatch(Protocol):
    """Marks moments, then tells the seconds between neighbouring marks."""

    def mark(self) -> None:
        """Mark this moment."""

    def gaps(self) -> list[float]:
        """Seconds between neighbouring marks, once the device has reached them all."""


class HostStopwatch:
    """Marks host time; `sync` runs before each mark, where work is handed to something that returns early."""

    def __init__(self, clock: Clock = time.perf_counter, sync: Callable[[], object] | None = None) -> None:
        self._clock, self._sync = clock, sync
        self._marks: list[float] = []

    def mark(self) -> None:
        """Mark this moment."""
        if self._sync is not None:
            self._sync()
        self._marks.append(self._clock())

    def gaps(self) -> list[float]:
        """Seconds between neighbouring marks."""
        return [later - earlier for earlier, later in itertools.pairwise(self._marks)]


class CudaStopwatch:
    """Marks the moment at which the current stream of `device` gets here, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Record an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def gaps(self) -> list[float]:
        """Seconds between neighbouring events."""
        torch.cuda.synchronize(self._device)
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in itertools.pairwise(self._events)]


def stopwatch(device: torch.device | str, clock: Clock = time.perf_counter) -> Stopwatch:
    """A fresh stopwatch for work on `device`: events on CUDA, host time by `clock` elsewhere."""
    device = torch.device(device)
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch(clock)


def synchronise(device: torch.device | str) -> None:
    """Wait until `device` has done all it was given; a CPU always has."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    sync: Callable[[], object] | None = None,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` a name, the names interleaved and sample i of every name in one round.

    On a CUDA `device` calls are timed by events, so the host's own launching is seen only where the device waits for
    it; give `sync` to time by the host's clock instead, synchronised before each mark.

    Raises:
        UsageError: nothing to time, or counts that make no samples.
    """
    _counts("time_interleaved", callables, repeats, warmup)
    samples: dict[str, list[float]] = {name: [] for name in callables}
    with _no_collection():
        for index, order in enumerate(_rounds(tuple(callables), warmup + repeats)):
            for name in order:
                watch = stopwatch(device, clock) if sync is None else HostStopwatch(clock, sync)
                watch.mark()
                callables[name]()
                watch.mark()
                (seconds,) = watch.gaps()
                if index >= warmup:
                    samples[name].append(seconds)
    return samples


def measure_generation(
    runners: Mapping[str, Runner],
    workload: Workload,
    *,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
    box_seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, GenerationTiming]:
    """Time greedy generation of `workload` by each runner, interleaved.

    Each round draws one batch of random prompts `[B, S]` that every runner continues. `device` is where prompts are
    put and defaults to each runner's own. `tpot` summarises every gap of every round. No round is begun that would
    end more than `box_seconds` after the warm-up, by how long those before it took; one is always measured.
    `progress` receives the rounds that are done and those there are.

    Raises:
        UsageError: nothing to time, or a workload longer than a runner's context.
        DeviceError: a runner made fewer or more tokens than asked.
    """
    _counts("measure_generation", runners, repeats, warmup)
    for name, runner in runners.items():
        if workload.prompt + workload.output > runner.max_context:
            raise UsageError(
                f"runner {name!r}: prompt {workload.prompt} + output {workload.output} exceed its max_context "
                f"{runner.max_context}; shorten the workload or build the runner with a longer context"
            )
    vocabulary = min(runner.vocab_size for runner in runners.values())
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, workload.prompt)
    runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in runners}
    with _no_collection():
        for index, order in enumerate(_rounds(tuple(runners), warmup + repeats)):
            measured = index - warmup
            if measured <= 0:
                began = clock()
            elif (clock() - began) * (measured + 1) / measured > box_seconds:
                break
            tokens = torch.randint(min(1, vocabulary - 1), vocabulary, shape, generator=generator)
            for name in order:
                runner = runners[name]
                run = _generate_once(name, runner, tokens.to(device or runner.device), workload, clock)
                if index >= warmup:
                    runs[name].append(run)
            if progress is not None:
                progress(index + 1, warmup + repeats)
    return {name: _timing(workload, rounds) for name, rounds in runs.items()}


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000
) -> Ratio:
    """The ratio of paired samples; baseline seconds over a candidate's is its speed-up.

    Sample i of both must come from the same round, as `time_interleaved` and `*_rounds` give them. The interval is
    the percentile bootstrap of the median over rounds, from a fixed seed.

    Raises:
        UsageError: samples that do not pair up, or are not positive and finite.
    """
    a, b = _finite("ratio", numerator), _finite("ratio", denominator)
    if len(a) != len(b) or min(a.min(), b.min()) <= 0:
        raise UsageError(f"ratio: {len(a)} and {len(b)} samples must be as many, paired by round, and all positive")
    if not 0 < confidence < 1:
        raise UsageError(f"ratio: confidence={confidence!r} must lie between 0 and 1")
    ratios = a / b
    drawn = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, (tail, 100 - tail))
    median, p10, p90 = np.percentile(ratios, (50, 10, 90))
    return Ratio(float(median), float(p10), float(p90), float(low), float(high), len(ratios))


def rotate(make: Callable[[], T], cache_bytes: int) -> Iterator[T]:
    """Endless inputs in turn, enough of them (more than 5× the cache) that each is cold when it comes round.

    `make` builds one input: a tensor, or tuples, lists and dicts of tensors.

    Raises:
        UsageError: an input holds no tensor bytes.
    """
    first = make()
    size = sum(leaf.nbytes for leaf in pytree.tree_leaves(first) if isinstance(leaf, Tensor))
    if size == 0:
        raise UsageError("rotate: the inputs made hold 0 bytes of tensors; make must return at least one tensor")
    copies = math.floor(COLD_CACHES * cache_bytes / size) + 1
    return itertools.cycle([first, *(make() for _ in range(copies - 1))])


def _generate_once(
    name: str, runner: Runner, tokens: Tensor, workload: Workload, clock: Clock
) -> tuple[float, list[float]]:
    """One generation: its end-to-end seconds, and the gaps from submission to first token and from token to token."""
    synchronise(tokens.device)
    watch = stopwatch(tokens.device, clock)
    submitted = clock()
    watch.mark()
    runner.generate(
        tokens, max_new_tokens=workload.output, temperature=0.0, eos_token_id=None, on_token=lambda _: watch.mark()
    )
    synchronise(tokens.device)
    e2e = clock() - submitted
    gaps = watch.gaps()
    if len(gaps) != workload.output:
        raise DeviceError(
            f"runner {name!r} made {len(gaps)} tokens a row where max_new_tokens={workload.output} was asked and no "
            "end token; generate must call on_token once for each token, or the times mean nothing"
        )
    return e2e, gaps


def _timing(workload: Workload, rounds: Sequence[tuple[float, list[float]]]) -> GenerationTiming:
    e2e = tuple(seconds for seconds, _ in rounds)
    ttft = tuple(gaps[0] for _, gaps in rounds)
    tpot = tuple(float(np.mean(gaps[1:])) for _, gaps in rounds)
    later = [gap for _, gaps in rounds for gap in gaps[1:]]
    return GenerationTiming(workload, Summary.of(ttft), Summary.of(later), Summary.of(e2e), ttft, tpot, e2e)


def _rounds(names: tuple[str, ...], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of each round: every name once, beginning with the next one."""
    for index in range(rounds):
        turn = index % len(names)
        yield names[turn:] + names[:turn]


def _counts(function: str, things: Mapping[str, object], repeats: int, warmup: int) -> None:
    if not things or repeats < 1 or warmup < 0:
        raise UsageError(
            f"{function}: {len(things)} things to time, repeats={repeats}, warmup={warmup}; "
            "give at least one thing and one repeat, and no negative warm-up"
        )


def _finite(function: str, samples: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = np.asarray(samples, dtype=np.float64).reshape(-1)
    if len(values) == 0 or not np.isfinite(values).all():
        raise UsageError(f"{function}: {len(values)} samples, which must be at least one and all finite")
    return values


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cyclic garbage collector out of the times, as `timeit` does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
