from collections import deque

import pytest

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.serving import RequestRecord, replay
from optimizer.evals.serving_report import ServingReport, Slo
from optimizer.evals.workloads import Arrival, Closed, Lengths, Poisson, RequestSpec, Schedule, schedule_requests


class FakeClock:
    """Time that passes only when an engine works or somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Handle:
    def __init__(self, prompt, limit):
        self.prompt, self.limit, self.tokens, self.done, self.cancelled = prompt, limit, [], False, False


class FakeEngine:
    """`slots` requests at once; a step takes `step` seconds and gives each `burst` tokens. The rest wait their turn.

    `cancel[i]` cancels the i-th request when it has so many tokens, `refuse` the i-th at once.
    """

    def __init__(self, clock, *, slots=8, step=0.25, burst=1, cancel=None, refuse=()):
        self.clock, self.slots, self.seconds, self.burst = clock, slots, step, burst
        self.cancel, self.refuse, self.handles, self.queue, self.running = cancel or {}, refuse, [], deque(), []

    @property
    def busy(self):
        return bool(self.queue or self.running)

    def submit(self, prompt, *, max_new_tokens):
        handle = Handle(prompt, max_new_tokens)
        if len(self.handles) in self.refuse:
            handle.cancelled = True
        else:
            self.queue.append(handle)
        self.handles.append(handle)
        return handle

    def step(self):
        self.clock.now += self.seconds
        while self.queue and len(self.running) < self.slots:
            self.running.append(self.queue.popleft())
        for handle in self.running:
            handle.tokens += [7] * min(self.burst, handle.limit - len(handle.tokens))
            handle.cancelled = len(handle.tokens) == self.cancel.get(self.handles.index(handle))
            handle.done = handle.cancelled or len(handle.tokens) == handle.limit
        self.running = [handle for handle in self.running if not handle.done]


def run(arrivals, *, concurrency=None, timeout_seconds=None, **engine):
    clock = FakeClock()
    schedule = Schedule(tuple(Arrival(seconds, (1, 2), tokens) for seconds, tokens in arrivals), concurrency)
    served = FakeEngine(clock, **engine)
    return replay(served, schedule, timeout_seconds=timeout_seconds, clock=clock, sleep=clock.sleep), clock


def test_one_request_by_hand():
    (record,), clock = run([(0, 3)])
    assert record == RequestRecord(0, 0, (0.25, 0.5, 0.75), 0.75, "finished")
    assert (record.ttft, record.tpot, record.gaps, record.e2e) == (0.25, 0.25, (0.25, 0.25), 0.75)
    assert clock.slept == []


def test_time_to_first_token_counts_from_the_arrival_not_from_the_submission():
    (first, second), _ = run([(0, 2), (0.25, 1)], step=1.0)
    assert first.token_times == (1, 2)
    assert (second.arrival, second.submitted) == (0.25, 1.0)  # the loop was busy with a step
    assert second.token_times == (2,)
    assert second.ttft == 1.75  # and not 2 − 1
    assert second.e2e == 1.75


def test_an_idle_engine_is_slept_for_until_the_next_arrival():
    (first, second), clock = run([(0.5, 1), (2, 1)])
    assert clock.slept == [0.5, 1.25]
    assert (first.submitted, first.ended) == (0.5, 0.75)
    assert (second.submitted, second.ended) == (2, 2.25)


def test_a_burst_beyond_the_slots_waits_its_turn():
    records, _ = run([(0, 2)] * 4, slots=2)
    assert [record.token_times for record in records] == [(0.25, 0.5)] * 2 + [(0.75, 1.0)] * 2
    assert [record.ttft for record in records] == [0.25, 0.25, 0.75, 0.75]
    assert [record.submitted for record in records] == [0] * 4


def test_requests_join_between_steps_and_are_recorded_in_their_order():
    records, _ = run([(0, 4), (0.3, 1), (0.5, 1)])
    assert [record.ended for record in records] == [1.0, 0.75, 0.75]
    assert [record.submitted for record in records] == [0, 0.5, 0.5]


def test_in_a_closed_loop_a_request_arrives_when_one_ends():
    records, _ = run([(0, 2), (0, 1), (0, 3), (0, 1)], concurrency=2)
    assert [(record.arrival, record.submitted, record.ended) for record in records] == [
        (0, 0, 0.5),
        (0, 0, 0.25),
        (0.25, 0.25, 1.0),
        (0.5, 0.5, 0.75),
    ]
    assert ServingReport.of(records, Slo(1, 1)).peak_concurrency == 2


def test_tokens_of_one_step_come_together():
    (record,), _ = run([(0, 5)], burst=2)
    assert record.token_times == (0.25, 0.25, 0.5, 0.5, 0.75)
    assert record.gaps == (0, 0.25, 0, 0.25)
    assert record.tpot == 0.125


def test_what_the_engine_cancels_is_recorded_with_the_tokens_it_had():
    records, _ = run([(0, 4), (0, 4), (0, 2)], cancel={0: 2}, refuse=(1,))
    assert records[0] == RequestRecord(0, 0, (0.25, 0.5), 0.5, "cancelled")
    assert records[1] == RequestRecord(0, 0, (), 0.25, "cancelled")
    assert records[1].ttft is records[1].tpot is records[1].e2e is records[0].e2e is None
    assert records[2].outcome == "finished"


def test_an_engine_that_refuses_everything_ends():
    records, _ = run([(0, 4), (1, 4)], refuse=(0, 1))
    assert [record.outcome for record in records] == ["cancelled"] * 2


def test_after_the_timeout_what_is_left_counts_as_unfinished():
    records, _ = run([(0, 3), (0, 9), (0.6, 9)], step=0.5, timeout_seconds=1)
    assert records == [
        RequestRecord(0, 0, (0.5, 1.0), 1.0, "unfinished"),
        RequestRecord(0, 0, (0.5, 1.0), 1.0, "unfinished"),
        RequestRecord(0.6, None, (), 1.0, "unfinished"),  # its time came during the last step
    ]
    closed, _ = run([(0, 4), (0, 4)], concurrency=1, timeout_seconds=0.5)
    assert closed[1] == RequestRecord(0.5, None, (), 0.5, "unfinished")


@pytest.mark.parametrize("timeout", [0.5, 1.0, 0, float("nan")])
def test_a_timeout_before_the_last_arrival_is_refused(timeout):
    with pytest.raises(UsageError, match="must exceed the last arrival, at 1 s"):
        run([(0, 1), (1, 1)], timeout_seconds=timeout)


def test_an_engine_that_falls_idle_with_work_left_is_an_error():
    clock = FakeClock()
    engine = FakeEngine(clock)
    engine.step = engine.queue.clear
    with pytest.raises(DeviceError, match="not busy, yet 1 of its requests are neither done nor cancelled"):
        replay(engine, Schedule((Arrival(0, (1,), 1),)), clock=clock, sleep=clock.sleep)


def test_an_engine_that_makes_more_tokens_than_asked_is_an_error():
    clock = FakeClock()
    engine = FakeEngine(clock)
    engine.step = lambda: engine.handles[0].tokens.extend([7] * 3)
    with pytest.raises(DeviceError, match="3 tokens of a request for max_new_tokens=2"):
        replay(engine, Schedule((Arrival(0, (1,), 2),)), clock=clock, sleep=clock.sleep)


def test_an_error_of_the_engine_is_not_swallowed():
    clock = FakeClock()
    engine = FakeEngine(clock)

    def fail():
        raise RuntimeError("out of blocks")

    engine.step = fail
    with pytest.raises(RuntimeError, match="out of blocks"):
        replay(engine, Schedule((Arrival(0, (1,), 2),)), clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("process", [Poisson(3.7), Closed(5)])
def test_a_drawn_schedule_is_served_whole_and_as_drawn(process):
    clock = FakeClock()
    engine = FakeEngine(clock, slots=3, step=0.013)
    spec = RequestSpec("t", Lengths(9, 0.5), Lengths(20, 0.5))
    schedule = schedule_requests(spec, process, range(1000), 60, seed=2)
    records = replay(engine, schedule, clock=clock, sleep=clock.sleep)
    assert [(h.prompt, h.limit) for h in engine.handles] == [(a.prompt, a.max_new_tokens) for a in schedule.arrivals]
    assert [len(record.token_times) for record in records] == [a.max_new_tokens for a in schedule.arrivals]
    assert all(record.arrival <= record.submitted + 1e-9 for record in records)
    if isinstance(process, Poisson):
        assert [record.arrival for record in records] == [a.seconds for a in schedule.arrivals]
    report = ServingReport.of(records, Slo(10, 10))
    assert report.finished == 60
    assert report.output_tokens == sum(a.max_new_tokens for a in schedule.arrivals)
    assert report.itl.samples == report.output_tokens - 60
    assert report.tpot.p50.value == pytest.approx(0.013)


def test_the_real_clock_and_sleep_serve_as_well():
    schedule = Schedule((Arrival(0, (1,), 2), Arrival(0.002, (1,), 2)))
    records = replay(FakeEngine(FakeClock()), schedule)
    assert [record.outcome for record in records] == ["finished"] * 2
    assert records[1].submitted >= 0.002
    assert all(record.arrival <= record.submitted <= record.token_times[0] <= record.ended for record in records)
