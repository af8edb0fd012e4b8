"""Verify drafts that are trees: one forward over each row's last token and all nodes of its draft."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from optimizer.backends.drafting import Draft
from optimizer.backends.paged_cache import View
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.sampling import Sampling
from optimizer.backends.sequences import Sequence


def verify_trees(
    runner: PagedRunner,
    rows: Rows[Sequence],
    roots: Rows[int],
    drafts: Rows[Draft],
    samplings: Rows[Sampling],
    seeds: Rows[int],
) -> Tensor:
    """Run each row's last token and its draft, a tree; the token chosen after the root and each node `[B, S]`.

    Not compiled: masks over whole contexts are of another shape in every step. Raises `OutOfBlocks`.
    """
    width = 1 + max(map(len, drafts))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    places = torch.full((len(rows), width), -1)
    positions = torch.full((len(rows), width), -1)
    seen = torch.zeros(len(rows), width, width, dtype=torch.bool)
    for i, (row, root, draft) in enumerate(zip(rows, roots, drafts, strict=True)):
        count = 1 + len(draft)
        runner.cache.reserve(row, row.length + count)
        ids[i, :count] = torch.tensor([root, *draft.tokens])
        places[i, :count] = torch.arange(row.length, row.length + count)
        positions[i, :count] = row.length + torch.tensor(draft.depths)
        seen[i, :count, :count] = draft.mask()
    ids, places, positions, seen = (t.to(runner.device) for t in (ids, places, positions, seen))
    context = int(places.max()) + 1
    view = View.of(
        runner.cache.storage, places, runner.tables(rows), context=context, tree=(seen, positions),
        rings=runner.rings(rows),
    )  # fmt: skip
    logits = runner.forward(ids, view, 0, positions)
    chosen = [
        runner.choose(logits[i], sampling, seed, positions[i])
        for i, (sampling, seed) in enumerate(zip(samplings, seeds, strict=True))
    ]
    return torch.stack(chosen)
