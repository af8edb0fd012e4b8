"""Drafts for speculative decoding: trees of tokens that may come next, and looking them up in the text so far.

One forward over `n + 1` new tokens verifies a draft of n: the root, which is the last real token and not in the cache
yet, then the nodes. `PromptLookup` needs no draft model: code, quotations and edits repeat what they hold already, so
what followed the last few tokens when they stood earlier is a guess that costs nothing (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding; Yang et al. 2023, https://arxiv.org/abs/2304.04487).

Worked example: in `5 6 7 8 5 6` the suffix `5 6` stood at the start, so `7 8 5 6` is drafted, and if more is wanted
then `7 8 …` again: a copy that reaches the end of the text goes on with what it has copied, as in LZ77.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Protocol

from optimizer.errors import UsageError

ROOT = -1
_CHECKED = 64  # tokens compared to tell that a list that was seen before has only grown


@dataclass(frozen=True)
class Draft:
    """A tree of `n` tokens that may follow the root; node i comes after node `parents[i] < i`, or -1 for the root.

    Siblings differ, so a token leads to at most one child. A chain has the parents -1, 0, 1, … Whatever holds the root
    as well has it at 0, and node i at i + 1.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise UsageError(
                f"Draft: {len(self.tokens)} tokens and {len(self.parents)} parents. Give each token its parent."
            )
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if token < 0:
                raise UsageError(f"Draft: node {node} has the token {token}. Token ids are at least 0.")
            if not ROOT <= parent < node:
                raise UsageError(
                    f"Draft: node {node} has the parent {parent}. Use an earlier node, or {ROOT}: the root."
                )
        if len({*zip(self.parents, self.tokens, strict=True)}) < len(self.tokens):
            raise UsageError(
                f"Draft: a node of {self} has two children with the same token. Merge them, as `Draft.tree` does."
            )

    @classmethod
    def chain(cls, tokens: Iterable[int]) -> Draft:
        """One token after the other."""
        tokens = tuple(tokens)
        return cls(tokens, tuple(range(-1, len(tokens) - 1)))

    @classmethod
    def tree(cls, continuations: Sequence[Sequence[int]], limit: int) -> Draft:
        """The first `limit` nodes of the continuations, best first, with common beginnings merged.

        All first tokens come before all second ones: a limit is shared evenly, and what merging saves goes deeper.
        """
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        reached = [ROOT] * len(continuations)
        for level in zip_longest(*continuations):
            for which, token in enumerate(level):
                if token is None:
                    continue
                step = (reached[which], token)
                if step not in nodes:
                    if len(nodes) >= limit:
                        return cls(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes))
                    nodes[step] = len(nodes)
                reached[which] = nodes[step]
        return cls(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it; true of an empty draft."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of the root, then those of each node: n + 1 entries, siblings in order."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            found[parent + 1].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from the root, itself (0) first: n + 1 entries. A token's position is the root's plus its depth."""
        found = [0]
        for parent in self.parents:
            found.append(found[parent + 1] + 1)
        return tuple(found)

    @cached_property
    def sees(self) -> tuple[int, ...]:
        """The new tokens that each sees, the root (bit 0) first: itself and those it comes after; n + 1 entries."""
        found = [1]
        for node, parent in enumerate(self.parents):
            found.append(found[parent + 1] | 2 << node)
        return tuple(found)


class Proposer(Protocol):
    """Guesses how a text goes on. What it proposes changes the speed of decoding and never the result."""

    def propose(self, history: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens that may follow `history`, whose last token is the root; none if there is no guess."""


class PromptLookup:
    """What followed the longest suffix of `ngram_max` to `ngram_min` tokens where it stood before, most recent first.

    With several `branches`, that many occurrences are merged into a tree. One instance serves one request: an index
    grows with its history, so a step costs what is new, and the same list that was passed before is taken to have only
    grown if its last 64 known tokens still stand. Any other history is compared in full, and indexed anew unless it
    goes on from what is known.
    """

    def __init__(self, ngram_max: int = 3, ngram_min: int = 1, branches: int = 1) -> None:
        if not 1 <= ngram_min <= ngram_max:
            raise UsageError(
                f"PromptLookup: Invalid ngram_min {ngram_min} and ngram_max {ngram_max}. Use 1 ≤ ngram_min ≤ ngram_max."
            )
        if branches < 1:
            raise UsageError(f"PromptLookup: Invalid branches {branches}. Follow at least 1 occurrence.")
        self.ngram_max, self.ngram_min, self.branches = ngram_max, ngram_min, branches
        self._source: Sequence[int] | None = None
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], tuple[int, ...]] = {}  # n-gram -> places just after it, most recent first

    def propose(self, history: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens that followed the end of `history` before; all of `limit` on a chain."""
        self._extend(history)
        ends: dict[int, None] = {}  # in order of preference
        for size in range(min(self.ngram_max, len(self._tokens)), self.ngram_min - 1, -1):
            # A longer match is a match of each shorter size too. As `branches` are kept of every size, and no more than
            # are found already can be among them twice, the most recent of the others are never missed.
            ends.update(dict.fromkeys(self._ends.get(tuple(self._tokens[-size:]), ())))
        return Draft.tree([self._copy(end, limit) for end in [*ends][: self.branches]], limit)

    def _copy(self, end: int, limit: int) -> list[int]:
        period = len(self._tokens) - end
        return [self._tokens[end + i % period] for i in range(limit)]

    def _extend(self, history: Sequence[int]) -> None:
        if not self._goes_on(history):
            self._tokens, self._ends = [], {}
        self._source = history
        known = len(self._tokens)
        self._tokens.extend(history[known:])
        # An n-gram is entered once a token follows it, so the suffix of the history never finds itself.
        for end in range(known, len(self._tokens)):
            for size in range(self.ngram_min, min(self.ngram_max, end) + 1):
                ngram = tuple(self._tokens[end - size : end])
                self._ends[ngram] = (end, *self._ends.get(ngram, ())[: self.branches - 1])

    def _goes_on(self, history: Sequence[int]) -> bool:
        """Whether `history` begins with what is indexed."""
        known = len(self._tokens)
        start = max(0, known - _CHECKED) if history is self._source else 0
        return list(history[start:known]) == self._tokens[start:]  # a shorter one has too few
