"""Serves a workload of requests that come and go on an endpoint: one stream a request, as its clients would.

`RemoteEngine` is a `ServingEngine` whose steps are made elsewhere: it has a thread for each request in flight and waits
for what they receive. A request that fails counts as cancelled, and so misses its objective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from optimizer.endpoint import Endpoint
from optimizer.errors import EndpointError
from optimizer.evals.serving import replay
from optimizer.evals.serving_report import ServingReport, Slo
from optimizer.evals.workloads import PRESETS, ArrivalProcess, Burst, Closed, Poisson, RequestSpec, schedule_requests
from optimizer.recipe import ServingSpec

WAIT = 0.002  # seconds a step waits at most: an arrival that falls due meanwhile is sent that much late


class RemoteRequest:
    """One stream. `tokens` has an entry for each chunk with text; what the server says it made is not in time."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.done = False
        self.cancelled = False


class RemoteEngine:
    """Requests as streams of an endpoint; `errors` holds what went wrong with those that failed."""

    def __init__(self, endpoint: Endpoint, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.endpoint, self._decode = endpoint, decode
        self.errors: list[EndpointError] = []
        self._news = threading.Condition()
        self._live = 0
        self._fresh = False

    @property
    def busy(self) -> bool:
        """Whether a stream is open, or has ended without a step since."""
        return self._live > 0 or self._fresh

    def submit(self, prompt: Sequence[int], /, *, max_new_tokens: int) -> RemoteRequest:
        """Send a request at once, as text where the engine has a tokenizer for it."""
        request = RemoteRequest()
        with self._news:
            self._live += 1
        sent = list(prompt) if self._decode is None else self._decode(prompt)
        threading.Thread(target=self._run, args=(request, sent, max_new_tokens), daemon=True).start()
        return request

    def step(self) -> None:
        """Wait until something came, or a moment."""
        with self._news:
            if not self._fresh:
                self._news.wait(WAIT)
            self._fresh = False

    def _run(self, request: RemoteRequest, prompt: list[int] | str, most: int) -> None:
        payload = {"prompt": prompt, "max_tokens": most, "temperature": 0}
        failed: EndpointError | None = None
        try:
            for event in self.endpoint.stream(payload):
                choices = event.get("choices")
                if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("text"):
                    self._tell(lambda: request.tokens.append(0))
                    if len(request.tokens) >= most:
                        break
        except EndpointError as error:
            failed = error
        self._tell(lambda: self._end(request, failed))

    def _end(self, request: RemoteRequest, failed: EndpointError | None) -> None:
        self._live -= 1
        if failed is None:
            request.done = True
        else:
            request.cancelled = True
            self.errors.append(failed)

    def _tell(self, change: Callable[[], object]) -> None:
        with self._news:
            change()
            self._fresh = True
            self._news.notify_all()


def serve_remote(
    endpoint: Endpoint,
    spec: ServingSpec,
    corpus: Sequence[int],
    context: int | None,
    *,
    seed: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> tuple[ServingReport, RequestSpec, list[EndpointError]]:
    """Replay `spec` on `endpoint`: the report, the shape of the requests, and what went wrong with those that failed.

    `corpus` (token ids) is what prompts are passages of. Lengths are scaled to `context` tokens, so that they are those
    of a local variant; without one they are the preset's own. `decode` makes the text of a prompt for a server
    that takes no token ids.
    """
    shape = PRESETS[spec.preset]
    shape = shape if context is None else shape.scaled_to(context)
    process: ArrivalProcess = Closed(spec.concurrency)
    if spec.rate is not None:
        process = Burst(spec.burst, spec.burst / spec.rate) if spec.burst > 1 else Poisson(spec.rate)
    engine = RemoteEngine(endpoint, decode)
    schedule = schedule_requests(shape, process, corpus, spec.requests, seed=seed)
    records = replay(engine, schedule)
    return ServingReport.of(records, Slo(spec.ttft_ms / 1e3, spec.tpot_ms / 1e3)), shape, engine.errors
