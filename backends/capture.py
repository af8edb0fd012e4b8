"""Every step that requests may need, compiled (on a GPU captured) before the first of them comes.

A step's bucket is its rows, the tokens a row, the context that its tables have room for, and whether tokens are drawn.
Lazily each is compiled when it is first used, and the request that needs it waits. Ahead, all up to the runner's
`max_batch` rows are, with no row in them: rows at rest write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from optimizer.backends.compiled import bucket
from optimizer.backends.paged_runner import SMALLEST_CONTEXT, PagedRunner


def buckets(runner: PagedRunner) -> Iterator[tuple[int, int, int, bool]]:
    """Rows, tokens a row, context and whether tokens are drawn, of every step up to `max_batch` rows; smallest first.

    With speculation also those that verify guesses, in as many rows as it is on for.
    """
    rows = [1 << i for i in range(bucket(runner.options.max_batch).bit_length())]
    contexts = [runner.max_context]
    if runner.context_buckets:
        contexts = sorted({min(SMALLEST_CONTEXT << i, runner.max_context) for i in range(32)})
    drafts, limit = 0, bucket(runner.options.max_batch)
    if runner.speculation is not None:
        drafts, policy = runner.speculation.drafts, runner.speculation.policy
        if policy is not None and policy.max_batch is not None:  # from so many rows on nothing is guessed
            limit = bucket(max(1, policy.max_batch - 1))
    for tokens in range(1, drafts + 2):
        yield from product([n for n in rows if tokens == 1 or n <= limit], [tokens], contexts, (False, True))


def compile_ahead(
    runner: PagedRunner, progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None
) -> int:
    """Compile every step of `buckets` that is not yet; how many there are. Their seconds are added to the ledger's."""
    every = list(buckets(runner))
    progress("steps", 0, len(every))
    for done, (rows, tokens, context, sampled) in enumerate(every, 1):
        runner.step(rows, tokens, context=context, sampled=sampled).prepare()
        progress("steps", done, len(every))
    return len(every)
