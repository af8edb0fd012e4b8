"""Buckets of steps: a replay is the step itself in each of them, generation moves between them, and all can be compiled
ahead. Graphs are recorded by a runtime that makes calls again, since what is tested is which buffers a step reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from optimizer.backends import paged_step
from optimizer.backends.capture import buckets, compile_ahead
from optimizer.backends.draft_model import DraftModel
from optimizer.backends.drafting import Draft, PromptLookup
from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.paged_step import Step
from optimizer.backends.sampling import Sampling
from optimizer.backends.speculation import Speculation, SpeculationPolicy, StepCosts
from optimizer.errors import UsageError
from optimizer.passes.base import view
from tests.backends.decoder_models import VOCAB, llama, prompts
from tests.backends.fake_cuda import FakeCuda, install

# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

CONTEXTS = (256, 512, 600)


def paged(model: Any, *, context_buckets: bool = True, compile: bool = False, **options: Any) -> PagedRunner:
    """A runner whose steps are made for contexts of 256, 512 and 600 tokens, as on a GPU."""
    runner = PagedRunner(view(model), compile=compile, max_context=600, options=PagedOptions(**options))
    runner.context_buckets = context_buckets
    return runner


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Steps are captured by a runtime that records calls."""
    runtime = install(monkeypatch)
    own = paged_step._executable

    def recorded(runner: PagedRunner, step: Step) -> tuple[Callable[[], Any], str]:
        run, kind = own(runner, step)
        return runtime.recorded(run, (torch.zeros(*step.tokens.shape, VOCAB), torch.zeros_like(step.tokens))), kind

    monkeypatch.setattr(paged_step, "_executable", recorded)
    return runtime


def both_ways(step: Step) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A step replayed, and the same uncaptured from the same buffers, which it leaves advanced."""
    before = [buffer.clone() for buffer in step.buffers]
    replayed = step()
    for buffer, value in zip(step.buffers, before, strict=True):
        buffer.copy_(value)
    with torch.no_grad():
        return replayed, step.uncaptured()


@pytest.mark.parametrize("options", [{}, {"kv": "int8", "recent": 32}], ids=["plain", "recent"])
def test_a_replay_is_the_step_itself_in_every_bucket_after_all_inputs_change(
    fake: FakeCuda, options: dict[str, Any]
) -> None:
    runner = paged(llama(num_hidden_layers=1), share_prefixes=False, **options)
    runner.graphs = True
    for rows in (1, 3):
        for context, most in zip((1, 257, 513), CONTEXTS, strict=True):
            for tokens in (1, 3):
                step = runner.step(rows, tokens, context=context, sampled=True)
                assert step.context == most
                assert {table.shape for table in step.tables} == {(1 if rows == 1 else 4, -(-most // 32))}
                seen, drafts = [], {1: Draft.chain([4] * (tokens - 1)), 2: Draft((5, 6), (-1, -1))}
                for length, seed in ((9, 1), (most - 8, 2)):  # other sequences, blocks, trees, seeds and temperatures
                    texts = prompts(rows, length, seed=seed)[0].tolist()
                    sequences = [runner.cache.open([]) for _ in range(rows)]
                    runner.extend(sequences, texts)
                    draft = drafts[seed] if tokens > 1 else Draft()
                    step.bind(
                        sequences, [[seed, *draft.tokens]] * rows, [Sampling(0.5 * seed, 9)] * rows, [seed] * rows,
                        [draft] * rows,
                    )  # fmt: skip
                    step.reserve([tokens] * rows)
                    for mine, itself in zip(*both_ways(step), strict=True):
                        assert torch.equal(mine[:rows], itself[:rows])
                        assert bool(mine[:rows].isfinite().all())
                    seen.append(step()[0][:rows].clone())
                    for sequence in sequences:
                        runner.cache.close(sequence)
                assert not torch.equal(*seen)
    assert fake.captures == 2 * 3 * 2
    assert not runner.ledger.steps["eager"]
    assert "graph" not in runner.ledger.notes


def test_generation_moves_to_the_next_bucket_and_gives_the_same_tokens() -> None:
    model = llama()
    tokens, mask = prompts(2, 245, ragged=True)
    expected = model.generate(
        tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    runner = paged(model)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=20), expected)
    assert [key[2] for key in runner._steps] == [256, 512]
    stepped = runner.prefill(tokens, mask)
    for new in expected[:, 245:].T:
        assert torch.equal(stepped.argmax(-1), new)
        stepped = runner.decode(new)
    texts = [row[m.bool()].tolist() for row, m in zip(tokens, mask, strict=True)]
    assert runner.generate_batch(texts, max_new_tokens=20) == expected[:, 245:].tolist()
    sampling: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "seed": 5}
    one = paged(model, context_buckets=False)
    assert torch.equal(runner.generate(tokens, mask, **sampling), one.generate(tokens, mask, **sampling))
    assert {key[2] for key in one._steps} == {600}


def test_a_step_of_the_longest_row_serves_all_and_guesses_count() -> None:
    runner = paged(llama())
    engine = Engine(runner, speculation=Speculation(lambda: PromptLookup(2), 3))
    text = prompts(1, 40)[0][0].tolist()
    requests = [engine.submit(text * n, max_new_tokens=18) for n in (1, 6)]
    while engine.busy:
        engine.step()
    alone = [paged(llama(), context_buckets=False).generate_batch([r.prompt], max_new_tokens=18)[0] for r in requests]
    assert [r.tokens for r in requests] == alone
    assert all(key[2] >= 256 for key in runner._steps)
    assert any(key[2] == 512 for key in runner._steps)  # 240 tokens and 18 new ones


def test_all_steps_are_compiled_ahead_with_progress_and_none_later() -> None:
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    runner = paged(model, compile=True, max_batch=1, context_buckets=False)
    runner.backend = "eager"
    seen: list[tuple[str, int, int]] = []
    counters.clear()
    assert compile_ahead(runner, lambda *update: seen.append(update)) == 2
    assert seen == [("steps", done, 2) for done in range(3)]
    assert counters["stats"]["unique_graphs"] == 2
    assert runner.ledger.compile_seconds > 0
    assert not runner.ledger.steps
    assert runner.cache.bytes_in_use == 0
    before = runner.ledger.compile_seconds
    tokens, _ = prompts(1, 12)
    expected = paged(model).generate(tokens, max_new_tokens=8)
    assert torch.equal(runner.generate(tokens, max_new_tokens=8), expected)
    runner.generate(tokens, max_new_tokens=8, temperature=1.0, seed=1)
    assert counters["stats"]["unique_graphs"] == 2
    assert runner.ledger.compile_seconds == before
    compile_ahead(runner)  # what is ready stays
    assert runner.ledger.compile_seconds == before
    torch._dynamo.reset()


def test_capturing_ahead_captures_every_bucket_once(fake: FakeCuda) -> None:
    runner = paged(llama(), max_batch=2)
    runner.graphs = True
    count = compile_ahead(runner)
    assert count == fake.captures == 2 * 3 * 2
    tokens, _ = prompts(2, 250)
    expected = paged(llama()).generate(tokens, max_new_tokens=10)
    assert torch.equal(runner.generate(tokens, max_new_tokens=10), expected)
    assert fake.captures == count
    assert runner.ledger.steps["replayed"] == 9


def test_steps_that_verify_guesses_are_compiled_for_as_many_rows_as_guess() -> None:
    runner = paged(llama(), max_batch=8)
    policy = SpeculationPolicy(StepCosts({1: 1.0, 3: 1.2}), max_batch=3)
    runner.speculation = Speculation(lambda: PromptLookup(2), 2, policy)
    found = list(buckets(runner))
    assert {key[:2] for key in found} == {(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 3), (2, 3)}
    assert len(found) == len(set(found)) == 8 * 3 * 2


def test_the_steps_of_a_draft_model_are_compiled_ahead_and_none_later() -> None:
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    runner = paged(model, compile=True, max_batch=1, context_buckets=False)
    draft = paged(model, compile=True, context_buckets=False)
    runner.backend = draft.backend = "eager"
    runner.speculation = Speculation(lambda: DraftModel(draft), 1, draft_runner=draft)
    # Of 1 or 2 tokens, drawn or not, and of 1 or 2 tokens of the draft.
    counters.clear()
    assert compile_ahead(runner) == 2 * 2 + 2
    assert runner.ledger.compile_seconds > draft.ledger.compile_seconds > 0
    assert counters["stats"]["unique_graphs"] == 6
    texts = prompts(1, 12)[0].tolist()
    before = runner.ledger.compile_seconds
    found = runner.generate_batch(texts, max_new_tokens=12)
    assert found == paged(model).generate_batch(texts, max_new_tokens=12)
    assert counters["stats"]["unique_graphs"] == 6
    assert runner.ledger.compile_seconds == before
    assert draft.ledger.steps["compiled"] > 0
    torch._dynamo.reset()


def test_another_way_to_capture_is_refused() -> None:
    with pytest.raises(UsageError, match="lazy or ahead"):
        PagedOptions(capture="eager")
