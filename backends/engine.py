"""Requests of different lengths that join and leave between steps: continuous batching over a `PagedRunner`.

    engine = Engine(runner)
    request = engine.submit(tokens, max_new_tokens=64)
    while engine.busy:
        engine.step()          # one step for every request that runs; `request.tokens` grows

One process, one model, no network: serving over one is the job of vLLM, SGLang or TensorRT-LLM, which load the
artifact.

With `speculation`, each step verifies a few guessed tokens of every row at once. The result is exact: a token is drawn
(or is the largest logit) after each guess by the same random number that it would have without guesses, and a guess
stands only if it is that token.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace

import torch

from optimizer.backends.block_pool import OutOfBlocks
from optimizer.backends.draft_model import DraftModel, guesses
from optimizer.backends.drafting import Draft, Proposer
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.paged_step import Step
from optimizer.backends.sampling import Sampling
from optimizer.backends.schedule import Limits, Running, Waiting, plan
from optimizer.backends.sequences import Sequence
from optimizer.backends.speculation import Accepted, Speculation, accept
from optimizer.errors import UsageError


@dataclass(eq=False)
class Request:
    """A prompt and what has been made of it. `tokens` are the new ones; `done` once no more will come."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    ends: frozenset[int]
    seed: int
    on_token: Callable[[int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    cancelled: bool = False
    cached: int = 0
    """Prompt tokens that were found in the cache when it was last admitted."""
    known: list[int] = field(default_factory=list, repr=False)
    """The prompt and all new tokens: one list that only grows, which a drafter indexes as it does."""
    _findable: int | None = field(default=None, repr=False)
    """Of its tokens, those that it may look for in the cache: all, unless it was put back and has recent ones."""
    _row: Sequence | None = field(default=None, repr=False)
    _drafter: Proposer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.known = list(self.prompt)


@dataclass
class EngineStats:
    """What happened since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    peak_rows: int = 0
    peak_bytes: int = 0


class Engine:
    """Runs requests over the runner's cache. Not safe across threads; `step` is called by whoever owns the loop.

    It speculates as `speculation` says, the runner's own unless given.
    """

    def __init__(
        self,
        runner: PagedRunner,
        limits: Limits | None = None,
        *,
        speculation: Speculation | None = None,
    ) -> None:
        self.runner, self.limits = runner, limits or Limits()
        if runner.options.recent:  # each row that runs has a ring
            self.limits = replace(self.limits, max_batch=min(self.limits.max_batch, runner.options.max_batch))
        self.speculation = speculation or runner.speculation
        self.stats = EngineStats()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._step: Step | None = None
        self._bound: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any request is not done."""
        return bool(self._waiting or self._running)

    def submit(
        self,
        prompt: Tokens[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | Tokens[int] | None = None,
        seed: int | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Request:
        """Queue a prompt. Raises `UsageError` for one that can never run."""
        tokens = [int(token) for token in prompt]
        room = min(self.runner.max_context, self.runner.cache.capacity)
        if not tokens or min(tokens) < 0 or max(tokens) >= self.runner.vocab_size:
            raise UsageError(f"a prompt has at least one token, each below {self.runner.vocab_size}.")
        if max_new_tokens < 1 or len(tokens) + max_new_tokens > room:
            raise UsageError(
                f"{len(tokens)} prompt tokens and {max_new_tokens} new ones do not fit {room}. Ask for at least one "
                "new token, shorten the request, or give the runner a larger max_context or cache_tokens."
            )
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        request = Request(
            tokens, max_new_tokens, sampling or Sampling(), frozenset(ends),
            secrets.randbits(62) if seed is None else seed, on_token,
        )  # fmt: skip
        if self.speculation is not None:
            request._drafter = self.speculation.drafter()
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request; its blocks are given back at once. One that is done stays as it is."""
        if request.done:
            return
        request.cancelled = True
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._finish(request)

    def close(self) -> None:
        """Cancel everything."""
        for request in [*self._running, *self._waiting]:
            self.cancel(request)

    def step(self) -> None:
        """One step of every request that decodes, then a chunk of the prompts that were admitted."""
        if not self.busy:
            return
        self.stats.steps += 1
        chunks = self._admit()
        if decoding := self._make_room():
            self._decode(decoding)
        for request, chunk in chunks.items():
            if chunk and request in self._running:  # making room, or an earlier prompt, may have put it back
                self._prefill(request, chunk)
        self.stats.peak_rows = max(self.stats.peak_rows, len(self._running))
        self.stats.peak_bytes = max(self.stats.peak_bytes, self.runner.cache.bytes_in_use)

    def _admit(self) -> dict[Request, int]:
        """Admit what the policy says; the tokens to run of each request's prompt."""
        waiting = [Waiting(len(request.known)) for request in self._waiting]
        running = [Running(self._prompt_left(request)) for request in self._running]
        cache = self.runner.cache
        decided = plan(waiting, running, cache.room(), self.limits, cache.layout.block_size)
        for _ in range(decided.admit):
            request = self._waiting.popleft()
            request._row = cache.open(request.known[: request._findable])
            request.cached = request._row.cached
            self.stats.cached_prompt_tokens += request.cached
            self._running.append(request)
        return dict(zip(self._running, decided.chunks, strict=True))

    def _prompt_left(self, request: Request) -> int:
        """Tokens that must be run before the request can decode: all but the last that was drawn."""
        assert request._row is not None
        wanted = len(request.known) - bool(request.tokens)
        return max(0, wanted - request._row.length)

    def _prefill(self, request: Request, chunk: int) -> None:
        row = request._row
        assert row is not None
        wanted = len(request.known) - bool(request.tokens)
        end = min(row.length + chunk, wanted)
        if end <= row.length:
            return
        self.stats.prompt_tokens += end - row.length
        try:
            logits = self.runner.extend([row], [request.known[:end]])
        except OutOfBlocks:
            self._put_back(request)
            return
        if end == wanted and not request.tokens:
            self._take(request, [self._first(request, logits)])

    def _first(self, request: Request, logits: torch.Tensor) -> int:
        """The token after the prompt, by the rule and the random number of the step."""
        return int(self.runner.choose(logits, request.sampling, request.seed, len(request.prompt) - 1))

    def _make_room(self) -> list[Request]:
        """The requests that decode, after putting back the last ones if the cache has no room for all."""
        while True:
            decoding = [r for r in self._running if r.tokens and not self._prompt_left(r)]
            try:
                for request in decoding:
                    assert request._row is not None
                    self.runner.cache.reserve(request._row, request._row.length + 1)
            except OutOfBlocks:
                self._put_back(self._running[-1])
                continue
            return decoding

    def _put_back(self, request: Request) -> None:
        """Take a request's blocks away; it waits at the head of the queue."""
        if len(self._running) == 1 and len(request.known) + 1 > self.runner.cache.capacity:
            raise OutOfBlocks(f"one request of {len(request.known)} tokens needs more than the whole cache.")
        self.stats.preemptions += 1
        if self.runner.options.recent:  # what is found is read in 8 bits, where the request had read its own in full
            request._findable = request.cached + 1
        self._running.remove(request)
        self._release(request)
        self._waiting.appendleft(request)

    def _decode(self, rows: list[Request]) -> None:
        drafts = self._propose(rows)
        tokens = self._verify(rows, drafts)
        for request, draft, found in zip(rows, drafts, tokens, strict=False):
            accepted = accept(draft, found[: len(draft) + 1])
            if self.speculation is not None and self.speculation.policy is not None:
                self.speculation.policy.observe(draft, accepted)
            self._advance(request, draft, accepted)

    def _verify(self, rows: list[Request], drafts: list[Draft]) -> list[list[int]]:
        """The token chosen after the last one of each row and after each guess, by the compiled step."""
        width = 1 + max((len(draft) for draft in drafts), default=0)
        sampled = any(request.sampling.temperature > 0 for request in rows)
        longest = max(request._row.length for request in rows if request._row is not None)
        step = self.runner.step(len(rows), width, context=longest + width, sampled=sampled)
        if step is not self._step or rows != self._bound or width > 1:
            sequences = [request._row for request in rows if request._row is not None]
            step.bind(
                sequences, [[request.tokens[-1], *draft.tokens] for request, draft in zip(rows, drafts, strict=True)],
                [request.sampling for request in rows], [request.seed for request in rows], drafts,
            )  # fmt: skip
        step.reserve([1 + len(draft) for draft in drafts])
        self._step, self._bound = (step, list(rows)) if width == 1 else (None, [])
        _, chosen = step()
        return chosen.tolist()

    def _propose(self, rows: list[Request]) -> list[Draft]:
        """Guesses for each row, as many as the policy says; no more than what the request still wants."""
        if self.speculation is None:
            return [Draft()] * len(rows)
        limit, policy = self.speculation.drafts, self.speculation.policy
        if policy is not None:
            limit = policy.drafts(limit, len(rows))
        limits = [min(limit, request.max_new_tokens - len(request.tokens) - 1) for request in rows]
        drafts = guesses([request._drafter for request in rows], [request.known for request in rows], limits)
        for i, (request, draft) in enumerate(zip(rows, drafts, strict=True)):
            assert request._row is not None
            try:
                self.runner.cache.reserve(request._row, request._row.length + 1 + len(draft))
            except OutOfBlocks:  # guesses are worth no request's blocks
                drafts[i] = Draft()
        return drafts

    def _advance(self, request: Request, draft: Draft, accepted: Accepted) -> None:
        """Take over the tokens of a step: the keys and values of all but the last are written."""
        row = request._row
        assert row is not None
        taken = self._until_end(request, accepted.tokens(draft))
        self.runner.cache.commit(row, [request.tokens[-1]])
        # Guesses lie in the order of the draft, one place behind what was committed before the root was.
        self.runner.cache.keep(row, [row.length + node for node in accepted.path[: len(taken) - 1]])
        self.runner.cache.commit(row, taken[:-1])
        self._take(request, taken)

    def _until_end(self, request: Request, new: list[int]) -> list[int]:
        """Those up to an end token, and no more than were asked for."""
        new = new[: request.max_new_tokens - len(request.tokens)]
        end = next((i for i, token in enumerate(new) if token in request.ends), len(new))
        return new[: end + 1]

    def _take(self, request: Request, new: list[int]) -> None:
        for token in new:
            request.tokens.append(token)
            request.known.append(token)
            if request.on_token is not None:
                request.on_token(token)
        if request.tokens[-1] in request.ends or len(request.tokens) == request.max_new_tokens:
            self._running.remove(request)
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._release(request)
        request.done = True

    def _release(self, request: Request) -> None:
        if request._row is not None:
            self.runner.cache.close(request._row)
            request._row = None
        if isinstance(request._drafter, DraftModel):
            request._drafter.close()
        self._bound = []
