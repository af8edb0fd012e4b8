"""Replay of a schedule of requests against a serving engine, in real time, as its clients see it.

Times are seconds. A request *arrives* at the moment its client sends it, which its latencies count from. A loop that is
busy with a step gets round to submitting it later; to count from then would leave out just the waits that an overloaded
engine causes (coordinated omission). `optimizer.evals.serving_report` turns the records into metrics.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.timing import Clock
from optimizer.evals.workloads import Schedule

Outcome = Literal["finished", "cancelled", "unfinished"]


class RequestHandle(Protocol):
    """A request in an engine. When `step` returns, its new `tokens` are on the host, as a client would see them."""

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids produced so far."""

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""

    @property
    def cancelled(self) -> bool:
        """Whether the engine gave the request up."""


class ServingEngine(Protocol):
    """An engine with continuous batching: requests join and leave between steps."""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""

    def submit(self, prompt: Sequence[int], /, *, max_new_tokens: int) -> RequestHandle:
        """Queue a request."""

    def step(self) -> None:
        """Prefill some of what waits, or produce the next tokens of what runs."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request. Moments are seconds after the start of the replay.

    `submitted` is None if the replay ended before the engine was given it; `ended` is when its last token came, when
    it was seen cancelled, or when the replay gave up.
    """

    arrival: float
    submitted: float | None
    token_times: tuple[float, ...]
    ended: float
    outcome: Outcome

    @property
    def ttft(self) -> float | None:
        """Arrival to first token; None without a token."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean gap between later tokens; None for fewer than two tokens."""
        later = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / later if later > 0 else None

    @property
    def gaps(self) -> tuple[float, ...]:
        """The gap before each later token; 0 for tokens that came out of one step together."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_times))

    @property
    def e2e(self) -> float | None:
        """Arrival to end; None unless finished."""
        return self.ended - self.arrival if self.outcome == "finished" else None


@dataclass(slots=True)
class _Flight:
    """A request in the engine, and when its tokens were seen."""

    arrival: float
    submitted: float
    limit: int
    handle: RequestHandle
    token_times: list[float] = field(default_factory=list)
    ended: float | None = None

    def look(self, now: float) -> bool:
        """Note what is new at `now`; whether the request is still in flight."""
        over = self.handle.done or self.handle.cancelled  # read before the tokens, so that none is missed
        count = len(self.handle.tokens)
        if count > self.limit:
            raise DeviceError(f"the engine made {count} tokens of a request for max_new_tokens={self.limit}")
        self.token_times.extend([now] * (count - len(self.token_times)))
        if over:
            self.ended = now
        return not over

    def record(self, cutoff: float) -> RequestRecord:
        """What is known at the end of the replay."""
        times = tuple(self.token_times)
        if self.ended is None:
            return RequestRecord(self.arrival, self.submitted, times, cutoff, "unfinished")
        outcome: Outcome = "cancelled" if self.handle.cancelled else "finished"
        return RequestRecord(self.arrival, self.submitted, times, self.ended, outcome)


def replay(
    engine: ServingEngine,
    schedule: Schedule,
    *,
    timeout_seconds: float | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> list[RequestRecord]:
    """Serve `schedule` in real time; one record a request, in its order.

    Requests whose time has come are submitted between steps; an idle engine is waited for with `sleep`. In a closed
    loop a request arrives when the end of another was seen. After `timeout_seconds` what is left counts as unfinished.
    Warm the engine up with a replay of its own: what it compiles here is counted. The garbage collector stays on, as
    in deployment.

    Raises:
        UsageError: a timeout before the last arrival, which would count requests that nobody has sent yet.
        DeviceError: the engine stops being busy with requests unfinished, or makes more tokens than asked.
    """
    last = schedule.arrivals[-1].seconds
    if timeout_seconds is not None and not timeout_seconds > last:
        raise UsageError(f"replay: timeout_seconds={timeout_seconds!r} must exceed the last arrival, at {last} s")
    closed = schedule.concurrency is not None
    waiting, live, flights = deque(schedule.arrivals), list[_Flight](), list[_Flight]()
    start = seen = clock()

    def due() -> bool:
        if schedule.concurrency is not None:
            return len(live) < schedule.concurrency
        return start + waiting[0].seconds <= clock()

    while (waiting or live) and (timeout_seconds is None or seen - start < timeout_seconds):
        while waiting and due():
            request = waiting.popleft()
            submitted = clock() - start
            handle = engine.submit(request.prompt, max_new_tokens=request.max_new_tokens)
            arrival = seen - start if closed else request.seconds
            live.append(_Flight(arrival, submitted, request.max_new_tokens, handle))
            flights.append(live[-1])
        if engine.busy:
            engine.step()
        elif not live:
            sleep(max(0.0, start + waiting[0].seconds - clock()))
        seen = clock()
        live = [flight for flight in live if flight.look(seen - start)]
        if live and not engine.busy:
            raise DeviceError(
                f"the engine is not busy, yet {len(live)} of its requests are neither done nor cancelled; busy must "
                "hold until they are, or they never end"
            )
    cutoff = seen - start
    unsent = [RequestRecord(cutoff if closed else left.seconds, None, (), cutoff, "unfinished") for left in waiting]
    return [*(flight.record(cutoff) for flight in flights), *unsent]
