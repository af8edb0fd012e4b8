"""Guesses of a smaller model: a draft model, or the first layers of the target itself (early exit).

The draft decodes greedily, so its guesses are certain, as `speculation` takes them, and the target's tokens are exact
whatever the draft is. It keeps a paged cache of its own, in which the tokens that it shares with the history stay and
the others are forgotten. All rows of a batch guess in the same steps, compiled as those of the target are.

Early exit (Draft & Verify, Zhang et al., arXiv:2309.08168; LayerSkip, Elhoushi et al., arXiv:2404.16710) needs no
second model: the first layers, then the target's own last norm and head. It shares every weight with the target.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Any

from torch import nn

from optimizer.backends.block_pool import OutOfBlocks
from optimizer.backends.drafting import Draft, Proposer
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.sequences import Sequence
from optimizer.errors import ModelError, UsageError

CATCH_UP = 2
"""Tokens that a step writes of a text that the draft is behind: its last guess, where all stood, and what came after.
One that is further behind, at the start or after a pause, runs them as a prompt."""


class DraftModel:
    """The greedy tokens of `runner`; a `Proposer` for one request. `close` gives its blocks back."""

    def __init__(self, runner: PagedRunner) -> None:
        self.runner = runner
        self._row: Sequence | None = None

    def propose(self, history: Tokens[int], limit: int) -> Draft:
        """The `limit` most likely next tokens, one after the other; none where the draft's cache has no room."""
        return propose_together([self], [history], [limit])[0]

    def close(self) -> None:
        """Forget the history."""
        if self._row is not None:
            self.runner.cache.close(self._row)
            self._row = None

    def row(self, history: Tokens[int], limit: int) -> Sequence | None:
        """The draft's sequence, with no more in it than `history` begins with, but for its last token.

        It has room for all of it and `limit` guesses; None where there is not so much.
        """
        if self._row is None:
            self._row = self.runner.cache.open(history)
        known, most = self._row.handles[0].tokens, len(history) - 1
        shared = next((i for i, (a, b) in enumerate(zip(known, history, strict=False)) if a != b), len(known))
        try:
            if min(shared, most) < len(known):
                self.runner.cache.truncate(self._row, min(shared, most))
            self.runner.cache.reserve(self._row, len(history) + limit - 1)
        except UsageError:  # into what has left a window
            self.close()
            return self.row(history, limit)
        except OutOfBlocks:
            self.close()
        return self._row


def guesses(proposers: Tokens[Proposer | None], histories: Tokens[Tokens[int]], limits: Tokens[int]) -> list[Draft]:
    """What each proposes, at most its limit; draft models all at once."""
    drafts = [Draft()] * len(proposers)
    together = [i for i, proposer in enumerate(proposers) if isinstance(proposer, DraftModel)]
    if together:
        models: list[Any] = [proposers[i] for i in together]
        found = propose_together(models, [histories[i] for i in together], [limits[i] for i in together])
        for i, draft in zip(together, found, strict=True):
            drafts[i] = draft
    for i, proposer in enumerate(proposers):
        if proposer is not None and limits[i] > 0 and i not in together:
            drafts[i] = proposer.propose(histories[i], limits[i])
    return drafts


def propose_together(models: Tokens[DraftModel], histories: Tokens[Tokens[int]], limits: Tokens[int]) -> list[Draft]:
    """The `limits` most likely next tokens after each history, in as many steps as the largest limit.

    All models are over one runner. None for a row that the draft's cache has no room for.
    """
    runner = models[0].runner
    wanted = [min(limit, runner.max_context - len(text)) for limit, text in zip(limits, histories, strict=True)]
    rows: dict[int, Sequence] = {}
    for i, (model, text) in enumerate(zip(models, histories, strict=True)):
        if wanted[i] > 0 and (row := model.row(text, wanted[i])) is not None:
            rows[i] = row
    found: dict[int, list[int]] = {}
    behind = [i for i in rows if len(histories[i]) - rows[i].length > CATCH_UP]
    near = [i for i in rows if i not in behind]
    if behind:
        logits = runner.extend([rows[i] for i in behind], [histories[i] for i in behind])
        found = {i: [token] for i, token in zip(behind, logits.argmax(-1).tolist(), strict=True)}
    context = max((len(histories[i]) + wanted[i] for i in rows), default=0)
    if near:
        new = [list(histories[i][rows[i].length :]) for i in near]
        found |= {i: [t] for i, t in zip(near, _first(runner, [rows[i] for i in near], new, context), strict=True)}
    going: list[int] = []
    for guessed in range(1, max((wanted[i] for i in rows), default=0)):
        left = [i for i in rows if wanted[i] > guessed]
        if left != going:
            going, step = left, runner.step(len(left), context=context)
            step.bind([rows[i] for i in going], [[found[i][-1]] for i in going])
        step.reserve([1] * len(going))
        _, chosen = step()  # which is also what the next step begins with
        for i, token in zip(going, chosen[:, 0].tolist(), strict=False):
            runner.cache.commit(rows[i], [found[i][-1]])
            found[i].append(token)
    return [Draft.chain(found.get(i, ())) for i in range(len(models))]


def _first(runner: PagedRunner, rows: list[Sequence], new: list[list[int]], context: int) -> list[int]:
    """Write one or two `new` tokens of each row; the most likely token after the last of each."""
    step = runner.step(len(rows), max(map(len, new)), context=context)
    step.bind(rows, new)
    step.reserve([len(tokens) for tokens in new])
    chosen = step()[1].tolist()
    for row, tokens in zip(rows, new, strict=True):
        runner.cache.commit(row, tokens)
    return [after[len(tokens) - 1] for after, tokens in zip(chosen, new, strict=False)]


def early_exit(model: Any, layers: int) -> Any:
    """Cut `model`, a view that nobody else uses, to its first `layers` decoder layers; returns it.

    Raises `UsageError` for a number of layers that it does not have, `ModelError` where they are not in one list.
    """
    config = model.config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    if not 1 <= layers < total:
        raise UsageError(f"early exit after {layers} layers: the model has {total}. Use 1 to {total - 1}.")
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise ModelError(f"{type(model).__name__} keeps its {total} decoder layers in {len(stacks)} lists, not in one")
    name, stack = stacks[0]
    model.set_submodule(name, stack[:layers])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return model
