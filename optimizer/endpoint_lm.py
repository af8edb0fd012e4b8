"""Measures an endpoint: lm-eval's tasks through the protocol of its `local-completions`, latency through streams.

Requests are those of lm-eval's own `local-completions` adapter: scoring echoes the prompt with its log-probabilities
(`echo`, `logprobs: 1`, `max_tokens: 1`), generation sends tokens and stop strings. The tokens and windows are those of
`RunnerLM`, so that the same document makes the same request here and on a local runner, which a paired comparison
rests on. The server must take token ids as prompts, as vLLM, SGLang and llama.cpp do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text

from optimizer.endpoint import Endpoint
from optimizer.errors import EndpointError, RefusedRequestError
from optimizer.evals.runner_lm import RunnerLM
from optimizer.evals.timing import Summary, Workload

MOST_STOPS = 4  # stop strings that a completion request may have


class _Window:
    """What `RunnerLM` asks of a runner before it runs anything."""

    device = torch.device("cpu")
    vocab_size = 1  # logits stay at the server, so that no batch is cut short for their sake

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context


class EndpointLM(RunnerLM):
    """`RunnerLM` whose prompts go to `endpoint`, in the tokens of `tokenizer`, which must be the served model's."""

    def __init__(self, endpoint: Endpoint, tokenizer: Any, *, max_length: int, **options: Any) -> None:
        window: Any = _Window(max_length)
        super().__init__(window, tokenizer, max_length=max_length, **options)
        self.endpoint = endpoint

    def _score_batch(self, rows: list[list[int]], wanted: list[int]) -> list[tuple[float, bool]]:
        payload = {"prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": self.seed, "echo": True}
        choices = self._choices(payload, len(rows))
        return [self._scored(choice, len(row), count) for choice, row, count in zip(choices, rows, wanted, strict=True)]

    def _scored(self, choice: Any, tokens: int, wanted: int) -> tuple[float, bool]:
        """The log-likelihood (nats) of the last `wanted` of a prompt's tokens, and whether each was the greedy one."""
        try:
            logprobs = choice["logprobs"]
            values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
            if not tokens <= len(values) <= tokens + 1 or len(tops) != len(values):
                raise EndpointError(
                    f"{self.endpoint.url} echoed {len(values)} log-probabilities of a prompt of {tokens} tokens; it "
                    "must take token ids as prompts and support echo with logprobs"
                )
            last = slice(tokens - wanted, tokens)
            scored = [
                (float(value), max(map(float, top.values())))
                for value, top in zip(values[last], tops[last], strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(
                f"{self.endpoint.url} sent log-probabilities that cannot be read ({type(error).__name__}); it must "
                "support echo with logprobs. To measure its speed alone, give no tasks (--tasks '')"
            ) from None
        return math.fsum(value for value, _ in scored), all(value >= top for value, top in scored)

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        stops = [stop for stop in options["until"] if stop]
        sampled = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        payload = {
            "prompt": prompts, "max_tokens": options["max_gen_toks"], "temperature": sampled,
            "stop": stops[:MOST_STOPS], "seed": self.seed,
        }  # fmt: skip
        choices = self._choices(payload, len(prompts))
        texts = [choice.get("text") for choice in choices]
        if not all(isinstance(text, str) for text in texts):
            raise EndpointError(f"{self.endpoint.url} sent a choice without text")
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _choices(self, payload: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """The answer's choices in the order of the prompts."""
        try:
            choices = self.endpoint.post(payload).get("choices")
        except RefusedRequestError as error:
            raise RefusedRequestError(f"{error}. To measure its speed alone, give no tasks (--tasks '')") from None
        rows = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
        found = {row["index"]: row for row in rows if type(row.get("index")) is int}
        if len(found) != count or set(found) != set(range(count)):
            raise EndpointError(f"{self.endpoint.url} answered {count} prompts with the choices {sorted(found)[:9]}")
        return [found[index] for index in range(count)]


@dataclass(frozen=True)
class RemoteTiming:
    """How fast an endpoint served a workload, as its client saw it; one value a round, percentiles over all gaps.

    A chunk of a stream may hold several tokens; `exact` says that each held one, so that gaps are those of tokens.
    Else a request's mean gap stands for each of its own.
    """

    ttft: Summary
    tpot: Summary
    ttft_rounds: tuple[float, ...]
    tpot_rounds: tuple[float, ...]
    tokens_per_second: float
    exact: bool


def takes_tokens(endpoint: Endpoint, prompt: Sequence[int]) -> bool:
    """Whether the server takes token ids as a prompt; one that refuses `prompt` wants text."""
    try:
        endpoint.post({"prompt": list(prompt), "max_tokens": 1, "temperature": 0})
    except RefusedRequestError:
        return False
    return True


def time_endpoint(
    endpoint: Endpoint,
    prompts: Sequence[Sequence[int] | str],
    workload: Workload,
    *,
    repeats: int,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RemoteTiming:
    """Stream `workload.batch` requests at a time, `repeats` times; prompts (token ids or text) are taken in turn.

    TTFT is until every request of a round has its first token, and includes connecting. Raises `EndpointError` for an
    answer of fewer than two tokens.
    """
    rounds = []
    with ThreadPoolExecutor(workload.batch) as pool:
        for index in range(warmup + repeats):
            chosen = [prompts[(index * workload.batch + row) % len(prompts)] for row in range(workload.batch)]
            began = time.perf_counter()
            streams = list(pool.map(lambda prompt: _stream(endpoint, prompt, workload.output), chosen))
            if index >= warmup:
                rounds.append((began, streams))
            if progress is not None:
                progress(index + 1, warmup + repeats)
    ttft = [max(times[0] for times, _ in streams) - began for began, streams in rounds]
    means = [[(times[-1] - times[0]) / (tokens - 1) for times, tokens in streams] for _, streams in rounds]
    exact = all(len(times) == tokens for _, streams in rounds for times, tokens in streams)
    gaps = [gap for _, streams in rounds for times, _ in streams for gap in _gaps(times)]
    spent = sum(max(times[-1] for times, _ in streams) - began for began, streams in rounds)
    made = sum(tokens for _, streams in rounds for _, tokens in streams)
    per_round = tuple(sum(row) / len(row) for row in means)
    samples = gaps if exact else [mean for row in means for mean in row]
    return RemoteTiming(Summary.of(ttft), Summary.of(samples), tuple(ttft), per_round, made / spent, exact)


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def _stream(endpoint: Endpoint, prompt: Sequence[int] | str, output: int) -> tuple[list[float], int]:
    """When each chunk with text came, and how many tokens the server says it made (else one a chunk)."""
    payload = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": output, "temperature": 0,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    times, tokens = [], 0
    for event in endpoint.stream(payload):
        now = time.perf_counter()
        choices, usage = event.get("choices"), event.get("usage")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("text"):
            times.append(now)
        if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
            tokens = usage["completion_tokens"]
    tokens = tokens or len(times)
    if len(times) < 2 or not len(times) <= tokens <= output:
        raise EndpointError(
            f"{endpoint.url} streamed {len(times)} chunks for {tokens} tokens where {output} were asked; latency needs "
            "at least two chunks, and no more tokens than were asked"
        )
    return times, tokens
