"""Drafts of another model, or of the target's own first layers: exact whatever they guess, and right when they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimizer.backends.draft_model import DraftModel, early_exit, guesses, propose_together
from optimizer.backends.drafting import PromptLookup
from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.sampling import Sampling
from optimizer.backends.schedule import Limits
from optimizer.backends.speculation import Speculation
from optimizer.errors import UsageError
from optimizer.passes.base import view
from tests.backends.decoder_models import llama, mistral, prompts
from tests.passes.small_architectures import ARCHITECTURES


def paged(model: Any, **options: Any) -> PagedRunner:
    return PagedRunner(view(model), compile=False, options=PagedOptions(**{"block_size": 8, "chunk": 16} | options))


def test_guesses_are_the_drafts_own_greedy_tokens_as_the_history_moves() -> None:
    model = llama()
    history = prompts(1, 30)[0][0].tolist()
    draft = DraftModel(paged(model))
    first = draft.propose(history, 5)
    expected = model.generate(torch.tensor([history]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert [*first.tokens] == expected[0, 30:35].tolist()
    assert first.is_chain
    accepted = expected[0, :33].tolist()  # three of them stood
    assert [*draft.propose(accepted, 4).tokens] == expected[0, 33:37].tolist()
    other = [*accepted[:-2], 7, 9]  # two did not
    wanted = model.generate(torch.tensor([other]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [*draft.propose(other, 3).tokens] == wanted[0, len(other) :].tolist()
    draft.close()
    assert draft.runner.cache.pools[0].used == 0


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 20, 0.9)], ids=["greedy", "drawn"])
def test_a_target_that_drafts_for_itself_stands_wholly_and_any_draft_changes_nothing(sampling: Sampling | None) -> None:
    model = llama()
    prompt = prompts(1, 20)[0][0].tolist()
    steps, tokens = {}, {}
    others = {"none": None, "itself": model, "another": mistral()}
    for name, other in others.items():
        runner = paged(model)
        speculation = None
        if other is not None:
            drafter = paged(other)
            speculation = Speculation(lambda drafter=drafter: DraftModel(drafter), 4)  # type: ignore[misc]
        engine = Engine(runner, speculation=speculation)
        request = engine.submit(prompt, max_new_tokens=41, sampling=sampling, seed=3)
        while engine.busy:
            engine.step()
        steps[name], tokens[name] = engine.stats.steps, request.tokens
        if other is not None:
            assert drafter.cache.pools[0].used == 0
    assert tokens["itself"] == tokens["none"] == tokens["another"]
    if sampling is None:
        assert steps["itself"] == 1 + 40 // 5


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 20, 0.9)], ids=["greedy", "drawn"])
def test_all_rows_of_a_batch_guess_in_the_same_steps(sampling: Sampling | None) -> None:
    model = llama()
    texts = [row[: 9 + 5 * i].tolist() for i, row in enumerate(prompts(4, 30)[0])]
    wanted = [26, 41, 15, 33]  # they leave one after the other
    alone = [
        paged(model).generate_batch([text], max_new_tokens=n, sampling=sampling, seed=i)[0]
        for i, (text, n) in enumerate(zip(texts, wanted, strict=True))
    ]
    for other in (model, mistral()):
        draft = paged(other)
        engine = Engine(paged(model), Limits(4, 1000), speculation=Speculation(lambda d=draft: DraftModel(d), 4))  # type: ignore[misc]
        requests = [
            engine.submit(text, max_new_tokens=n, sampling=sampling, seed=i)
            for i, (text, n) in enumerate(zip(texts, wanted, strict=True))
        ]
        while engine.busy:
            engine.step()
        assert [request.tokens for request in requests] == alone
        assert draft.cache.pools[0].used == 0
        # A step for each guess, and one more where some rows' last guess stood and others' did not; not one a row.
        assert draft.ledger.steps["eager"] <= 4 * engine.stats.steps
        if other is model and sampling is None:
            assert engine.stats.steps == 1 + 40 // 5


def test_a_row_that_the_drafts_cache_has_no_room_for_guesses_nothing() -> None:
    model = llama()
    draft = paged(model, cache_tokens=64, share_prefixes=False)
    models = [DraftModel(draft) for _ in range(3)]
    texts = [row[:length].tolist() for row, length in zip(prompts(3, 40)[0], (20, 40, 20), strict=True)]
    first, second, third = propose_together(models, texts, [4, 4, 4])
    assert [len(first), len(second), len(third)] == [4, 0, 4]
    assert first == DraftModel(paged(model)).propose(texts[0], 4)
    assert third == DraftModel(paged(model)).propose(texts[2], 4)
    models[0].close()
    assert len(propose_together(models[1:], texts[1:], [0, 9])[0]) == 0
    assert [len(draft) for draft in guesses([None, models[2], PromptLookup()], texts, [3, 0, 0])] == [0, 0, 0]
    for one in models:
        one.close()
    assert draft.cache.pools[0].used == 0
    longest = DraftModel(paged(llama(max_position_embeddings=32)))
    assert len(longest.propose(texts[1][:30], 9)) == 2
    assert len(longest.propose(texts[1], 9)) == 0


def test_early_exit_is_the_model_without_its_later_layers() -> None:
    model = llama(num_hidden_layers=3)
    cut = early_exit(view(model), 2)
    assert len(model.model.layers) == 3
    assert cut.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    alone = llama(num_hidden_layers=2)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if ".2." not in k})
    tokens = prompts(2, 9)[0]
    with torch.no_grad():
        assert torch.equal(cut(tokens).logits, alone(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_early_exit_of_other_architectures_drafts_without_changing_a_token(name: str) -> None:
    model = ARCHITECTURES[name]()
    runner, plain = paged(model), paged(model)
    draft = paged(early_exit(view(runner.model), 1))
    runner.speculation = Speculation(lambda: DraftModel(draft), 3)
    prompt = list(range(5, 30))
    assert runner.generate_batch([prompt], max_new_tokens=20) == plain.generate_batch([prompt], max_new_tokens=20)


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_an_exit_that_is_not_between_two_layers_is_refused(layers: int) -> None:
    with pytest.raises(UsageError, match=f"after {layers} layers: the model has 2"):
        early_exit(view(llama()), layers)
