"""Every step that requests may need, compiled (on a GPU captured) before the first of them comes.

A step's bucket is its rows, the tokens a row, the context that its tables have room for, and whether tokens are drawn.
Lazily each is compiled when it is first used, and the request that needs it waits. Ahead, all up to the runner's
`max_batch` rows are, with no row in them: rows at rest write nothing. So are those of a draft model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from optimizer.backends.compiled import bucket
from optimizer.backends.draft_model import CATCH_UP
from optimizer.backends.paged_runner import SMALLEST_CONTEXT, PagedRunner


def buckets(runner: PagedRunner) -> Iterator[tuple[int, int, int, bool]]:
    """Rows, tokens a row, context and whether tokens are drawn, of every step up to `max_batch` rows; smallest first.

    With speculation also those that verify guesses, in as many rows as it is on for.
    """
    most, limit = _rows(runner)
    drafts = 0 if runner.speculation is None else runner.speculation.drafts
    for tokens in range(1, drafts + 2):
        rows = [1 << i for i in range((most if tokens == 1 else min(most, limit)).bit_length())]
        yield from product(rows, [tokens], _contexts(runner), (False, True))


def draft_buckets(runner: PagedRunner) -> Iterator[tuple[int, int, int, bool]]:
    """The same of the steps that its draft model guesses with, if it has one."""
    if runner.speculation is None or runner.speculation.draft_runner is None:
        return
    rows = [1 << i for i in range(min(_rows(runner)).bit_length())]
    yield from product(rows, range(1, CATCH_UP + 1), _contexts(runner.speculation.draft_runner), (False,))


def _rows(runner: PagedRunner) -> tuple[int, int]:
    """The buckets of the most rows that a step has, and of the most that guess."""
    most = bucket(runner.options.max_batch)
    policy = None if runner.speculation is None else runner.speculation.policy
    if policy is not None and policy.max_batch is not None:  # from so many rows on nothing is guessed
        return most, bucket(max(1, policy.max_batch - 1))
    return most, most


def _contexts(runner: PagedRunner) -> list[int]:
    if not runner.context_buckets:
        return [runner.max_context]
    return sorted({min(SMALLEST_CONTEXT << i, runner.max_context) for i in range(32)})


def compile_ahead(
    runner: PagedRunner, progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None
) -> int:
    """Compile every step of `buckets` and `draft_buckets` that is not yet; how many there are.

    Their seconds are added to the runner's ledger.
    """
    every = [(runner, key) for key in buckets(runner)]
    draft = None if runner.speculation is None else runner.speculation.draft_runner
    if draft is not None:
        every += [(draft, key) for key in draft_buckets(runner)]
    progress("steps", 0, len(every))
    for done, (owner, (rows, tokens, context, sampled)) in enumerate(every, 1):
        before = owner.ledger.compile_seconds
        owner.step(rows, tokens, context=context, sampled=sampled).prepare()
        if owner is not runner:
            runner.ledger.compile_seconds += owner.ledger.compile_seconds - before
        progress("steps", done, len(every))
    return len(every)
