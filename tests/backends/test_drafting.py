"""Draft trees, and lookup against a search through the whole history written from the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.backends.drafting import Draft, PromptLookup, Proposer
from optimizer.errors import UsageError

#   root ─┬─ 7 ─┬─ 8 ── 9      nodes 0, 2, 4
#         │     └─ 6           node 3
#         └─ 5                 node 1
TREE = Draft((7, 5, 8, 6, 9), (-1, -1, 0, 0, 2))


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def test_a_tree_knows_its_depths_children_and_who_sees_whom() -> None:
    assert not TREE.is_chain
    assert TREE.depths == (0, 1, 1, 2, 2, 3)
    assert TREE.children == ((0, 1), (2, 3), (), (4,), (), ())
    assert [[sees >> node & 1 for node in range(len(TREE) + 1)] for sees in TREE.sees] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_mask_of_a_chain_is_causal(n: int) -> None:
    chain = Draft.chain(range(n))
    assert chain == Draft(tuple(range(n)), tuple(range(-1, n - 1)))
    assert chain.is_chain
    assert len(chain) == n
    assert chain.depths == tuple(range(n + 1))
    assert chain.sees == tuple((2 << node) - 1 for node in range(n + 1))


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ((1, 2), (-1,), "2 tokens and 1 parents"),
        ((1, -2), (-1, 0), "node 1 has the token -2"),
        ((1, 2), (-1, 1), "node 1 has the parent 1"),
        ((1,), (-2,), "node 0 has the parent -2"),
        ((1, 2, 2), (-1, 0, 0), "two children with the same token"),
    ],
)
def test_what_is_not_a_tree_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Draft(tokens, parents)


def test_the_same_token_may_stand_at_two_places() -> None:
    assert Draft((1, 2, 1, 1), (-1, -1, 0, 1)).children == ((0, 1), (2,), (3,), (), ())


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=4), st.integers(0, 12))
def test_a_tree_holds_the_first_beginnings_by_length_then_rank(continuations: list[list[int]], limit: int) -> None:
    beginnings = [tuple(c[:length]) for length in range(1, 6) for c in continuations if length <= len(c)]
    assert paths(Draft.tree(continuations, limit)) == list(dict.fromkeys(beginnings))[:limit]


# Lookup


def looked_up(
    history: Sequence[int], limit: int, ngram_max: int, ngram_min: int, branches: int
) -> list[tuple[int, ...]]:
    """The paths of the draft from the definition: every size, every place."""
    tokens = list(history)
    ends: list[int] = []
    for size in range(ngram_max, ngram_min - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:] and end not in ends:
                ends.append(end)
    continuations = []
    for end in ends[:branches]:
        copied = list(tokens)
        for i in range(limit):
            copied.append(copied[end + i])
        continuations.append(copied[len(tokens) :])
    beginnings = [tuple(c[:length]) for length in range(1, limit + 1) for c in continuations]
    return list(dict.fromkeys(beginnings))[:limit]


@settings(max_examples=300, deadline=None)
@given(
    # Tokens are added, or the request ends and the next begins; small vocabularies repeat themselves.
    st.lists(st.lists(st.integers(0, 3), max_size=12) | st.none(), max_size=10),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
def test_lookup_finds_what_a_search_of_everything_finds(
    additions: list[list[int] | None], limit: int, one: int, other: int, branches: int, in_place: bool
) -> None:
    sizes = (max(one, other), min(one, other))
    lookup: Proposer = PromptLookup(*sizes, branches)
    history: list[int] = []
    for new in additions:
        if new is None:
            history = []
        elif in_place:
            history += new
        else:
            history = history + new  # another object, which may or may not go on from the last
        draft = lookup.propose(history, limit)
        assert paths(draft) == looked_up(history, limit, *sizes, branches)
        assert draft.is_chain or branches > 1


def test_the_longest_match_wins_then_the_most_recent() -> None:
    #           0  1  2  3  4  5  6  7  8  9 10 11
    history = [1, 2, 3, 9, 2, 3, 8, 1, 3, 7, 2, 3]
    assert PromptLookup(3).propose(history, 2) == Draft.chain([8, 1])  # `2 3` at 4, over `3` at 8
    assert PromptLookup(1).propose(history, 2) == Draft.chain([7, 2])
    assert PromptLookup(3, 3).propose(history, 2) == Draft()
    assert PromptLookup(3, branches=2).propose(history, 4) == Draft((8, 9, 1, 2), (-1, -1, 0, 1))
    assert PromptLookup(3, branches=3).propose(history, 3) == Draft((8, 9, 7), (-1, -1, -1))


def test_a_copy_that_reaches_the_end_goes_on_with_itself() -> None:
    assert PromptLookup().propose([5, 6, 7, 8, 5, 6], 7) == Draft.chain([7, 8, 5, 6, 7, 8, 5])
    assert PromptLookup().propose([4, 4], 3) == Draft.chain([4, 4, 4])


@pytest.mark.parametrize("history", [[], [1], [1, 2, 3]])
def test_without_a_match_nothing_is_drafted(history: list[int]) -> None:
    assert PromptLookup().propose(history, 4) == Draft()


class Counted(Sequence[int]):
    """A history that counts the tokens read from it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.read = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        self.read += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return self.tokens[index]


def test_a_step_reads_what_is_new_and_not_the_history() -> None:
    lookup, history = PromptLookup(), Counted()
    history.tokens = [i * i % 101 for i in range(5000)]
    lookup.propose(history, 4)
    assert history.read == 5000
    for step in range(100):
        history.read = 0
        history.tokens += [step, step + 1]
        lookup.propose(history, 4)
        assert history.read <= 64 + 2  # the tail that tells it has only grown, and the new


def test_a_list_that_is_used_for_another_request_is_noticed() -> None:
    lookup, history = PromptLookup(), [1, 2, 3, 1]
    assert lookup.propose(history, 1) == Draft.chain([2])
    history[:] = [1, 5, 6, 7, 1]
    assert lookup.propose(history, 1) == Draft.chain([5])
    history[:] = [7, 1]
    assert lookup.propose(history, 1) == Draft()


def test_another_list_is_compared_from_its_start() -> None:
    lookup = PromptLookup()
    lookup.propose([5, 6, *range(10, 210), 5], 1)
    assert lookup.propose([5, 7, *range(10, 210), 5], 1) == Draft.chain([7])


def test_an_equal_copy_of_the_history_is_not_indexed_again() -> None:
    lookup = PromptLookup()
    lookup.propose([1, 2, 3, 1], 1)
    index = lookup._ends
    assert lookup.propose([1, 2, 3, 1, 2], 1) == Draft.chain([3])
    assert lookup._ends is index
    lookup.propose([2, 2, 3, 1, 2, 2], 1)
    assert lookup._ends is not index


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram_min": 0}, "ngram_min 0"),
        ({"ngram_max": 2, "ngram_min": 3}, "ngram_min 3 and ngram_max 2"),
        ({"branches": 0}, "branches 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptLookup(**options)
