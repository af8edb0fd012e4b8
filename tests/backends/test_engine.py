"""Continuous batching: whatever joins, leaves or is put back, each request gets the tokens it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from optimizer.backends.drafting import Draft, PromptLookup
from optimizer.backends.engine import Engine, Request
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.sampling import Sampling
from optimizer.backends.schedule import Limits
from optimizer.backends.speculation import Speculation, SpeculationPolicy, StepCosts
from optimizer.errors import UsageError
from optimizer.evals.serving import replay
from optimizer.evals.serving_report import ServingReport, Slo
from optimizer.evals.workloads import Lengths, Poisson, RequestSpec, schedule_requests
from optimizer.passes.base import view
from optimizer.preflight import resident_bytes
from tests.backends.decoder_models import VOCAB, llama, mistral

MODEL = llama()
DRAWN = Sampling(0.9, 30, 0.95)
TREES = partial(PromptLookup, 3, 1, 3)


def runner(model: Any = MODEL, **options: Any) -> PagedRunner:
    """Small blocks and chunks, no compiler."""
    return PagedRunner(view(model), compile=False, options=PagedOptions(**{"block_size": 8, "chunk": 7} | options))


def some_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def alone(
    prompt: list[int], new: int, sampling: Sampling | None = None, seed: int = 0, model: Any = MODEL
) -> list[int]:
    """The tokens of a request that has an engine for itself."""
    engine = Engine(runner(model))
    request = engine.submit(prompt, max_new_tokens=new, sampling=sampling, seed=seed)
    return finish(engine, [request])[0]


def finish(engine: Engine, requests: list[Request]) -> list[list[int]]:
    while engine.busy:
        engine.step()
        for pool in engine.runner.cache.pools:
            pool.check()
    assert all(request.done for request in requests)
    assert [pool.used for pool in engine.runner.cache.pools] == [0] * len(engine.runner.cache.pools)
    return [request.tokens for request in requests]


def test_one_request_gets_what_transformers_generates() -> None:
    prompt = some_prompts(1)[0]
    expected = MODEL.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert alone(prompt, 40) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("cache_tokens", [None, 160], ids=["room", "tight"])
@pytest.mark.parametrize("drafter", [None, PromptLookup, TREES], ids=["plain", "lookup", "trees"])
def test_requests_beside_others_get_their_own_tokens(
    sampling: Sampling | None, cache_tokens: int | None, drafter: Callable[[], PromptLookup] | None
) -> None:
    prompts = some_prompts(9)
    engine = Engine(runner(cache_tokens=cache_tokens), Limits(4, 16), speculation=drafter and Speculation(drafter))
    requests = [engine.submit(p, max_new_tokens=30, sampling=sampling, seed=i) for i, p in enumerate(prompts)]
    found = finish(engine, requests)
    assert found == [alone(prompt, 30, sampling, i) for i, prompt in enumerate(prompts)]
    assert engine.stats.peak_rows == 4
    assert (engine.stats.preemptions > 0) == (cache_tokens is not None)


def test_a_window_frees_blocks_while_requests_run() -> None:
    model = mistral(window=24)
    engine = Engine(runner(model, cache_tokens=2048), Limits(3, 32))
    prompts = some_prompts(5, 90)
    requests = [engine.submit(prompt, max_new_tokens=60) for prompt in prompts]
    assert finish(engine, requests) == [alone(prompt, 60, model=model) for prompt in prompts]
    most = engine.runner.layout.blocks_for(10_000, 0) + 1 + 2  # and the block and chunk being written
    assert engine.stats.peak_bytes <= 3 * most * 8 * engine.runner.kv_bytes_per_token


def test_guesses_that_stand_save_steps() -> None:
    repeating = [5, 6, 7, 8, 9, 10] * 4
    plain, guessing = Engine(runner()), Engine(runner(), speculation=Speculation(Oracle))
    for engine in (plain, guessing):
        request = engine.submit(repeating, max_new_tokens=40)
        finish(engine, [request])
    assert guessing.stats.steps < plain.stats.steps / 3


class Oracle:
    """Knows the tokens that the model would make."""

    def propose(self, history: Any, limit: int) -> Draft:
        return Draft.chain(alone(list(history), limit))


class Wrong:
    """Guesses what is never right."""

    def propose(self, history: Any, limit: int) -> Draft:
        right = alone(list(history), 1)[0]
        return Draft.chain([(right + 1) % VOCAB] * limit)


class Branching:
    """Knows the tokens that the model would make, and hides them among wrong ones."""

    def propose(self, history: Any, limit: int) -> Draft:
        right = alone(list(history), min(limit, 3))
        wrong = [(token + 1) % VOCAB for token in right]
        return Draft.tree([[wrong[0]], [*right[:1], *wrong[1:]], right], limit)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_the_right_branch_of_a_tree_stands_and_its_keys_are_kept(kv: str | None) -> None:
    # The tree holds wrong nodes before right ones, so that what is kept must be moved.
    prompt = some_prompts(1)[0]
    engine = Engine(runner(kv=kv), speculation=Speculation(Branching, 8))
    request = engine.submit(prompt, max_new_tokens=40)
    plain = Engine(runner(kv=kv))
    expected = plain.submit(prompt, max_new_tokens=40)
    assert finish(engine, [request]) == finish(plain, [expected])
    if kv is None:
        assert engine.stats.steps <= 1 + -(-39 // 4) + 1


@pytest.mark.parametrize(
    ("sampling", "window"), [pytest.param(None, 0, marks=pytest.mark.slow), (DRAWN, 3)], ids=["greedy", "narrow window"]
)
def test_trees_are_verified_by_the_compiled_step(sampling: Sampling | None, window: int) -> None:
    """Of several rows, deeper than a window is long; whole graphs, and nothing but prompts runs uncompiled."""
    model = mistral(window=window) if window else MODEL
    own = PagedRunner(view(model), compile=True, options=PagedOptions(block_size=8, chunk=7))
    own.backend = "eager"
    prompts = some_prompts(3)
    expected = [alone(prompt, 20, sampling, i, model) for i, prompt in enumerate(prompts)]
    known = {tuple(prompt): prompt + tokens for prompt, tokens in zip(prompts, expected, strict=True)}

    class Hidden:
        """The tokens that will come, among wrong ones."""

        def propose(self, history: Any, limit: int) -> Draft:
            text = next(text for prompt, text in known.items() if tuple(history[: len(prompt)]) == prompt)
            right = text[len(history) :][: min(limit, 6)]
            wrong = [(token + 1) % VOCAB for token in right]
            return Draft.tree([wrong[:1], [*right[:1], *wrong[1:2]], right], limit)

    engine = Engine(own, Limits(4, 64), speculation=Speculation(Hidden, 9))
    requests = [engine.submit(p, max_new_tokens=20, sampling=sampling, seed=i) for i, p in enumerate(prompts)]
    assert finish(engine, requests) == expected
    assert any(tokens > 4 for _, tokens, _, _ in own._steps)
    assert own.ledger.steps["prefill chunk"] < 20  # of prompts alone
    assert own.ledger.steps["compiled"] < 12
    assert not own.ledger.steps["eager"]


def test_speculation_turns_itself_off_and_says_why() -> None:
    policy = SpeculationPolicy(StepCosts({1: 1.0, 5: 1.1}), probe_every=1000)
    engine = Engine(runner(), speculation=Speculation(Wrong, 4, policy))
    request = engine.submit(some_prompts(1)[0], max_new_tokens=40)
    assert finish(engine, [request]) == [alone(request.prompt, 40)]
    assert "acceptance" in str(policy.stats.off_reason)
    assert policy.stats.off_steps > 10


def test_an_end_token_ends_a_request_also_among_guesses() -> None:
    prompt = some_prompts(1)[0]
    tokens = alone(prompt, 40)
    end = tokens[17]
    wanted = tokens[: tokens.index(end) + 1]
    for drafter in (None, Oracle):
        engine = Engine(runner(), speculation=drafter and Speculation(drafter))
        request = engine.submit(prompt, max_new_tokens=40, eos_token_id=end)
        assert finish(engine, [request]) == [wanted]


def test_tokens_are_reported_as_they_come_and_first_tokens_wait_for_no_step() -> None:
    engine, seen = Engine(runner()), list[int]()
    request = engine.submit(some_prompts(1)[0][:5], max_new_tokens=6, on_token=seen.append)
    engine.step()
    assert len(seen) == 1  # the prompt's step gives one token, the next step the second
    engine.step()
    assert len(seen) == 2
    finish(engine, [request])
    assert seen == request.tokens


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine = Engine(runner(), Limits(4, 8))
    short = engine.submit([3, 4, 5], max_new_tokens=30)
    engine.step()
    engine.submit(some_prompts(1, 300, seed=3)[0] * 3, max_new_tokens=2)
    for made in range(2, 20):
        engine.step()
        assert len(short.tokens) == made


def test_prompts_that_begin_alike_share_blocks() -> None:
    engine = Engine(runner(), Limits(4, 512))
    head = [*range(3, 67)]
    first = engine.submit([*head, 70], max_new_tokens=4)
    finish(engine, [first])
    second = engine.submit([*head, 71], max_new_tokens=4)
    assert finish(engine, [second]) == [alone([*head, 71], 4)]
    assert second.cached == 64
    assert engine.stats.cached_prompt_tokens == 64


def test_what_can_never_run_is_refused_at_once() -> None:
    engine = Engine(runner(cache_tokens=64))
    for prompt, new in (([], 4), ([VOCAB], 4), ([-1], 4), ([3] * 60, 5), ([3], 0)):
        with pytest.raises(UsageError, match="prompt"):
            engine.submit(prompt, max_new_tokens=new)
    assert not engine.busy
    finish(engine, [engine.submit([3] * 60, max_new_tokens=4)])


def test_replay_measures_an_engine() -> None:
    engine = Engine(runner(), Limits(4, 64))
    corpus = list(range(3, VOCAB)) * 20
    spec = RequestSpec("tiny", prompt=Lengths(12, 3), output=Lengths(6, 2))
    schedule = schedule_requests(spec, Poisson(200.0), corpus, 12)
    records = replay(engine, schedule)
    assert all(record.outcome == "finished" for record in records)
    report = ServingReport.of(records, Slo(60.0, 60.0))
    assert report.met_share.value == 1
    assert report.tokens_per_second > 0


class Batching(RuleBasedStateMachine):
    """Requests join, leave, are cancelled and put back in any order; two or three fit, so rows are put back often."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(runner(cache_tokens=72), Limits(3, 12), speculation=Speculation(PromptLookup))
        self.open: list[tuple[Request, tuple[int, ...], int]] = []

    @rule(prompt=st.sampled_from(PROMPTS := [tuple(p) for p in some_prompts(6, 30)]), new=st.integers(1, 12))
    def submit(self, prompt: tuple[int, ...], new: int) -> None:
        self.open.append((self.engine.submit(prompt, max_new_tokens=new), prompt, new))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.open))[0]
        was_done = request.done
        self.engine.cancel(request)
        assert request.done
        assert request.cancelled != was_done

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @invariant()
    def tokens_are_right_and_no_block_is_lost(self) -> None:
        for pool in self.engine.runner.cache.pools:
            pool.check()
        held = {request for request, *_ in self.open if request._row is not None}
        assert len(held) <= 3
        for request, prompt, new in self.open:
            assert request.tokens == EXPECTED[prompt][: len(request.tokens)]
            if request.done and not request.cancelled:
                assert len(request.tokens) == new
        self.open = [entry for entry in self.open if not entry[0].done]

    def teardown(self) -> None:
        self.engine.close()
        assert [pool.used for pool in self.engine.runner.cache.pools] == [0]


EXPECTED = {prompt: alone(list(prompt), 12) for prompt in [tuple(p) for p in some_prompts(6, 30)]}
TestBatching = Batching.TestCase
TestBatching.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
def test_ten_thousand_steps_take_no_more_memory() -> None:
    engine = Engine(runner(cache_tokens=400), Limits(4, 32), speculation=Speculation(PromptLookup))
    prompts, before = some_prompts(50, 60), 0
    for step in range(10_000):
        if len(engine._waiting) < 3:
            engine.submit(prompts[step % 50], max_new_tokens=1 + step % 40)
        engine.step()
        if step == 2_000:
            before = resident_bytes()
    assert resident_bytes() - before < 8 << 20
    engine.close()
    assert engine.runner.cache.pools[0].used == 0
