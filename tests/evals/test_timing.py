import gc
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.timing import (
    HostStopwatch,
    Summary,
    Workload,
    measure_generation,
    ratio,
    rotate,
    stopwatch,
    time_interleaved,
)


class FakeClock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class ScriptedRunner:
    """Takes `first` seconds to its first token, `step(i)` to token i after it, and `tail` to return."""

    device = torch.device("cpu")
    max_context = 64

    def __init__(self, clock, first, step, *, tail=0.0, missing=0, vocab_size=50, log=None, name=""):
        self.clock, self.first, self.step, self.tail, self.missing = clock, first, step, tail, missing
        self.vocab_size, self.name, self.log = vocab_size, name, log if log is not None else []
        self.prompts = []

    def generate(self, tokens, mask=None, *, max_new_tokens, temperature, eos_token_id, on_token, **other):
        assert (temperature, eos_token_id, mask, other) == (0.0, None, None, {})
        assert not gc.isenabled()
        self.log.append(self.name)
        self.prompts.append(tokens)
        self.clock.work(self.first)
        for i in range(max_new_tokens - self.missing):
            self.clock.work(self.step(i) if i else 0.0)
            on_token(tokens[:, -1])
        self.clock.work(self.tail)
        return tokens


def test_summary_agrees_with_quantiles_by_hand():
    summary = Summary.of([float(i) for i in range(100, -1, -1)])
    assert (summary.p10, summary.median, summary.p50, summary.p90) == (10, 50, 50, 90)
    assert (summary.p95, summary.p99, summary.n) == (95, 99, 101)
    assert Summary.of([3.0]) == Summary(3.0, 3.0, 3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_a_summary_of_nothing_or_nonsense_is_refused(samples):
    with pytest.raises(UsageError, match="at least one and all finite"):
        Summary.of(samples)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_within_the_samples(samples):
    s = Summary.of(samples)
    values = [min(samples), s.p10, s.median, s.p90, s.p95, s.p99, max(samples)]
    assert all(a <= b + 1e-9 * (1 + b) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    "fields", [(0, 1, 2), (1, 0, 2), (1, 1, 1), (1, -3, 2), (1.0, 1, 2), (True, 1, 2), ("1", 1, 2)]
)
def test_impossible_workloads_are_refused(fields):
    with pytest.raises(UsageError, match="must be an integer of at least"):
        Workload(*fields)


def test_generation_times_are_those_of_the_script():
    clock = FakeClock()
    runner = ScriptedRunner(clock, 0.5, lambda i: i / 16, tail=0.25)
    timing = measure_generation({"a": runner}, Workload(3, 7, 4), repeats=2, warmup=1, clock=clock)["a"]
    assert timing.ttft == Summary.of([0.5, 0.5])
    assert timing.tpot == Summary.of([1 / 16, 2 / 16, 3 / 16] * 2)
    assert timing.tpot_rounds == (2 / 16, 2 / 16)
    assert timing.e2e_rounds == (0.5 + 6 / 16 + 0.25,) * 2
    assert timing.tokens_per_second == 3 * 4 / 1.125
    assert timing.decode_tokens_per_second == 3 / (2 / 16)


def test_warm_up_rounds_are_left_out():
    clock = FakeClock()
    firsts = iter([9.0, 8.0, 0.5, 0.25])
    runner = ScriptedRunner(clock, 0.0, lambda i: 0.125)
    plain = runner.generate

    def generate(tokens, **options):
        runner.first = next(firsts)
        return plain(tokens, **options)

    runner.generate = generate
    timing = measure_generation({"a": runner}, Workload(1, 2, 2), repeats=2, warmup=2, clock=clock)["a"]
    assert timing.ttft_rounds == (0.5, 0.25)


@pytest.mark.parametrize(("box", "rounds"), [(math.inf, 5), (3.0, 3), (2.9, 2), (0.0, 1)])
def test_no_round_is_begun_that_would_end_after_the_time_and_one_is_always_measured(box, rounds):
    clock = FakeClock()
    runner = ScriptedRunner(clock, 0.5, lambda i: 0.25)  # a second a generation
    found = measure_generation({"a": runner}, Workload(1, 2, 3), repeats=5, warmup=2, box_seconds=box, clock=clock)
    assert len(found["a"].e2e_rounds) == rounds
    assert len(runner.prompts) == 2 + rounds


def test_runners_take_turns_on_the_same_fresh_random_prompts():
    clock, log = FakeClock(), []
    runners = {
        name: ScriptedRunner(clock, 0.5, lambda i: 0.125, log=log, name=name, vocab_size=size)
        for name, size in (("a", 50), ("b", 9), ("c", 30))
    }
    measure_generation(runners, Workload(2, 8, 3), repeats=3, warmup=1, seed=5, clock=clock)
    assert log == [*"abc", *"bca", *"cab", *"abc"]
    for prompts in zip(*(runner.prompts for runner in runners.values()), strict=True):
        assert all(torch.equal(prompts[0], other) for other in prompts[1:])
    prompts = runners["a"].prompts
    assert len({tuple(p.flatten().tolist()) for p in prompts}) == 4
    assert all(p.shape == (2, 8) and p.dtype == torch.int64 and p.min() >= 1 and p.max() < 9 for p in prompts)

    again = ScriptedRunner(clock, 0.5, lambda i: 0.125, vocab_size=9)
    measure_generation({"a": again}, Workload(2, 8, 3), repeats=1, warmup=0, seed=5, clock=clock)
    assert torch.equal(again.prompts[0], prompts[0])


def test_a_drift_of_the_machine_falls_on_both():
    clock = FakeClock()

    def drifting(cost):
        return lambda: clock.work(cost * (clock.now / 100))

    samples = time_interleaved({"slow": drifting(2.0), "fast": drifting(1.0)}, repeats=40, warmup=0, clock=clock)
    assert max(samples["slow"]) > 2 * min(samples["slow"])
    assert ratio(samples["slow"], samples["fast"]).median == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("missing", [1, 3, -1])
def test_a_runner_that_makes_other_than_the_tokens_asked_is_an_error(missing):
    clock = FakeClock()
    runner = ScriptedRunner(clock, 0.5, lambda i: 0.125, missing=missing)
    with pytest.raises(DeviceError, match=f"'bad' made {3 - missing} tokens a row where max_new_tokens=3"):
        measure_generation({"bad": runner}, Workload(1, 2, 3), clock=clock)
    assert gc.isenabled()


def test_a_workload_beyond_the_context_is_refused_before_anything_runs():
    clock = FakeClock()
    runner = ScriptedRunner(clock, 0.5, lambda i: 0.125)
    with pytest.raises(UsageError, match="exceed its max_context 64"):
        measure_generation({"a": runner}, Workload(1, 62, 3), clock=clock)
    assert runner.prompts == []


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_counts_without_samples_are_refused(options):
    with pytest.raises(UsageError, match="one repeat, and no negative warm-up"):
        time_interleaved({"a": lambda: None}, **options)
    with pytest.raises(UsageError, match="at least one thing"):
        time_interleaved({})
    with pytest.raises(UsageError, match="at least one thing"):
        measure_generation({}, Workload(1, 1, 2))


def test_calls_alternate_and_the_order_rotates():
    clock, log = FakeClock(), []

    def call(name, seconds):
        def run():
            log.append(name)
            clock.work(seconds)

        return run

    samples = time_interleaved({"a": call("a", 0.5), "b": call("b", 0.25)}, repeats=3, warmup=1, clock=clock)
    assert log == [*"ab", *"ba", *"ab", *"ba"]
    assert samples == {"a": [0.5] * 3, "b": [0.25] * 3}


def test_pending_work_is_waited_for_on_both_sides_of_a_call():
    clock = FakeClock()
    pending = [0.5]  # left by something earlier: not this call's

    def sync():
        clock.work(sum(pending))
        pending.clear()

    samples = time_interleaved({"a": lambda: pending.append(2.0)}, repeats=2, warmup=0, sync=sync, clock=clock)
    assert samples == {"a": [2.0, 2.0]}


def test_the_callers_random_state_and_collector_stay_as_they_were():
    before = torch.get_rng_state()
    clock = FakeClock()
    gc.disable()
    try:
        measure_generation({"a": ScriptedRunner(clock, 1, lambda i: 1)}, Workload(1, 2, 2), clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()
    measure_generation({"a": ScriptedRunner(clock, 1, lambda i: 1)}, Workload(1, 2, 2), clock=clock)
    assert gc.isenabled()
    assert torch.equal(before, torch.get_rng_state())


def test_a_stopwatch_tells_gaps_between_marks():
    clock = FakeClock()
    watch = stopwatch("cpu", clock)
    assert isinstance(watch, HostStopwatch)
    assert watch.gaps() == []
    for seconds in (0.0, 0.5, 0.25):
        clock.work(seconds)
        watch.mark()
    assert watch.gaps() == [0.5, 0.25]


def test_ratio_by_hand():
    r = ratio([2, 4, 9], [1, 2, 3])
    assert (r.median, r.n) == (2, 3)
    assert r.p10 == pytest.approx(2)
    assert r.p90 == pytest.approx(2 + 0.8)
    assert (r.low, r.high) == (2, 3)
    assert ratio([2, 4, 9], [1, 2, 3]) == r


def test_the_interval_of_the_median_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        noise = np.exp(generator.normal(0, 0.1, 30))
        r = ratio(1.5 * noise, np.ones(30), resamples=400)
        assert r.low <= r.median <= r.high
        covered += r.low <= 1.5 <= r.high
    assert 0.88 <= covered / 200 <= 0.995  # nominal 0.95; the binomial's own spread is 0.015


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2], [1]), ([], []), ([1], [0]), ([0], [1]), ([1], [-1]), ([math.nan], [1]), ([1], [math.inf])]
)
def test_samples_that_do_not_pair_are_refused(a, b):
    with pytest.raises(UsageError, match="ratio"):
        ratio(a, b)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, math.nan])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(UsageError, match="confidence"):
        ratio([1], [1], confidence=confidence)


def test_rotation_outgrows_the_cache_and_comes_round():
    made = []

    def make():
        made.append({"x": torch.zeros(100), "rest": (torch.zeros(25, dtype=torch.int8), "label")})  # 425 bytes
        return made[-1]

    inputs = rotate(make, cache_bytes=1000)
    seen = list(itertools.islice(inputs, 2 * len(made)))
    assert 425 * len(made) > 5 * 1000 >= 425 * (len(made) - 1)
    assert all(a is b for a, b in zip(seen, made * 2, strict=True))


def test_rotation_of_nothing_is_refused():
    with pytest.raises(UsageError, match="0 bytes"):
        rotate(lambda: ("label",), 100)


@pytest.mark.gpu
def test_events_time_the_work_of_the_device():
    a = torch.randn(4096, 4096, device="cuda")
    samples = time_interleaved({"one": lambda: a @ a, "four": lambda: [a @ a for _ in range(4)]}, device="cuda")
    assert 3 < ratio(samples["four"], samples["one"]).median < 5
