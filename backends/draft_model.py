"""Guesses of a smaller model: a draft model, or the first layers of the target itself (early exit).

The draft decodes greedily, so its guesses are certain, as `speculation` takes them, and the target's tokens are exact
whatever the draft is. It keeps a paged cache of its own, in which the tokens that it shares with the history stay and
the others are forgotten.

Early exit (Draft & Verify, Zhang et al., arXiv:2309.08168; LayerSkip, Elhoushi et al., arXiv:2404.16710) needs no
second model: the first layers, then the target's own last norm and head. It shares every weight with the target.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Any

from torch import nn

from optimizer.backends.block_pool import OutOfBlocks
from optimizer.backends.drafting import Draft
from optimizer.backends.kv_layout import FEW_TOKENS
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.sequences import Sequence
from optimizer.errors import ModelError, UsageError


class DraftModel:
    """The greedy tokens of `runner`; a `Proposer` for one request. `close` gives its blocks back."""

    def __init__(self, runner: PagedRunner) -> None:
        self.runner = runner
        self._row: Sequence | None = None

    def propose(self, history: Tokens[int], limit: int) -> Draft:
        """The `limit` most likely next tokens, one after the other; none where the draft's cache has no room."""
        limit = min(limit, self.runner.max_context - len(history))
        if limit < 1:
            return Draft()
        try:
            return Draft.chain(self._chain(list(history), limit))
        except OutOfBlocks:
            self.close()
            return Draft()

    def close(self) -> None:
        """Forget the history."""
        if self._row is not None:
            self.runner.cache.close(self._row)
            self._row = None

    def _chain(self, history: list[int], limit: int) -> list[int]:
        row = self._at(history)
        new = history[row.length :]
        if len(new) > FEW_TOKENS:
            logits = self.runner.extend([row], [history])
            found = [int(logits.argmax(-1))]
        else:
            found = [self._step(row, new)]
        while len(found) < limit:
            found.append(self._step(row, [found[-1]]))
        return found

    def _at(self, history: list[int]) -> Sequence:
        """The draft's sequence, with no more in it than `history` begins with, but for its last token."""
        if self._row is None:
            self._row = self.runner.cache.open(history)
            return self._row
        known, most = self._row.handles[0].tokens, len(history) - 1
        shared = next((i for i, (a, b) in enumerate(zip(known, history, strict=False)) if a != b), len(known))
        if min(shared, most) < len(known):
            try:
                self.runner.cache.truncate(self._row, min(shared, most))
            except UsageError:  # into what has left a window
                self.close()
                return self._at(history)
        return self._row

    def _step(self, row: Sequence, new: list[int]) -> int:
        """Write `new` tokens; the most likely one after the last."""
        width = len(new) if len(new) == 1 else 1 << (len(new) - 1).bit_length()
        step = self.runner.step(1, width, context=row.length + width)
        step.bind([row], [new])
        step.reserve([len(new)])
        _, chosen = step()
        self.runner.cache.commit(row, new)
        return int(chosen[0, len(new) - 1])


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
