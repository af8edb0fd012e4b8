"""The policy of continuous batching, by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.backends.schedule import Limits, Running, Waiting, plan
from optimizer.errors import UsageError


def test_requests_are_admitted_in_order_while_rows_and_room_last() -> None:
    waiting = [Waiting(30), Waiting(30), Waiting(30)]
    assert plan(waiting, [], 1000, Limits(2, 100), 8).admit == 2
    assert plan(waiting, [Running()], 1000, Limits(2, 100), 8).admit == 1
    assert plan(waiting, [], 80, Limits(8, 100), 8).admit == 2  # 38 each
    assert plan([Waiting(90), Waiting(1)], [Running()], 80, Limits(8, 100), 8).admit == 0  # none overtakes
    assert plan(waiting, [Running(60)], 100, Limits(8, 100), 8).admit == 1  # what is admitted needs its room first


def test_an_empty_engine_takes_the_first_request_whatever_the_room() -> None:
    # It was refused at once if it could never run; blocks of cached prefixes count as room that it may share.
    assert plan([Waiting(50)], [], 10, Limits(), 8).admit == 1


def test_chunks_share_the_budget_that_decoding_rows_leave() -> None:
    running = [Running(), Running(), Running(40), Running(40)]
    assert plan([], running, 0, Limits(8, 50), 8).chunks == (0, 0, 40, 8)
    assert plan([], running, 0, Limits(8, 10), 8).chunks == (0, 0, 8, 0)
    assert plan([Waiting(5)], [Running(3)], 100, Limits(8, 10), 8).chunks == (3, 5)


def test_a_prompt_gets_on_even_when_decoding_rows_take_the_whole_budget() -> None:
    assert plan([], [Running(), Running(), Running(9)], 0, Limits(8, 2), 8).chunks == (0, 0, 1)


@given(
    st.lists(st.builds(Waiting, st.integers(1, 200)), max_size=6),
    st.lists(st.builds(Running, st.integers(0, 200)), max_size=6),
    st.integers(0, 500),
    st.integers(1, 8),
    st.integers(1, 100),
)
def test_no_plan_breaks_a_limit_and_each_makes_progress(
    waiting: list[Waiting], running: list[Running], room: int, batch: int, budget: int
) -> None:
    decided = plan(waiting, running, room, Limits(batch, budget), 8)
    rows = [*running, *(Running(request.tokens) for request in waiting[: decided.admit])]
    assert len(decided.chunks) == len(rows)
    assert decided.admit == 0 or len(rows) <= batch
    assert all(0 <= chunk <= row.prompt_left for chunk, row in zip(decided.chunks, rows, strict=True))
    decoding = sum(row.prompt_left == 0 for row in rows)
    assert sum(decided.chunks) <= max(budget - decoding, 1)
    if rows:
        assert decoding or any(decided.chunks)
    elif waiting:
        assert decided.admit


def test_limits_are_checked() -> None:
    for bad in ({"max_batch": 0}, {"token_budget": 0}):
        with pytest.raises(UsageError, match="Invalid"):
            Limits(**bad)
