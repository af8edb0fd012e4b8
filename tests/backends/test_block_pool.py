"""Every sequence reads back its own tokens, whatever is opened, forked, rolled back or evicted around it.

The state machine writes through the tables as a cache does, into a memory that knows for every slot which token after
which others was put there. The rest pins what is found again, what goes first, and what is refused.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from optimizer.backends.block_pool import BlockPool, OutOfBlocks, PagedSequence
from optimizer.errors import OptimizerError, UsageError

SAME_HASH = (0, 2**61 - 1)  # Python's integers are hashed modulo this prime, so every block of these collides
TOKENS = st.lists(st.sampled_from(SAME_HASH), max_size=9)
WHICH = st.integers(0, 11)


@dataclass
class Row:
    """What a sequence should hold."""

    sequence: PagedSequence
    tokens: list[int]
    keep: int
    released: set[int] = field(default_factory=set)  # blocks, as places in the table


class PagedCache(RuleBasedStateMachine):
    @initialize(blocks=st.integers(1, 7), size=st.integers(1, 3), share=st.sampled_from([True, True, True, False]))
    def start(self, blocks: int, size: int, share: bool) -> None:
        self.pool = BlockPool(blocks, size, share_prefixes=share)
        self.size = size
        self.rows: list[Row] = []
        # (block, offset) -> all tokens up to the one whose key and value were written there: what a key depends on
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}

    def slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.sequence.table[position // self.size], position % self.size

    def state(self) -> object:
        tables = [(list(row.sequence.table), list(row.sequence.tokens)) for row in self.rows]
        return tables, self.pool.free, self.pool.cached, [self.pool.match([*row.tokens, 0]) for row in self.rows]

    def write(self, row: Row, accepted: list[int], rejected: list[int]) -> None:
        """Reserve, copy, write all, commit what is accepted; the outcome foreseen from the tables alone."""
        old, size = len(row.tokens), self.size
        drafted = row.tokens + accepted + rejected
        tables = [other.sequence.table for other in self.rows if other is not row]
        copied = old % size > 0 and any(row.sequence.table[old // size] in table for table in tables)
        used = {block for table in (*tables, row.sequence.table) for block in table if block >= 0}
        more = max(0, -(-len(drafted) // size) - len(row.sequence.table)) + copied
        before = self.state()
        if len(drafted) > old and more > self.pool.blocks - len(used):
            with pytest.raises(OutOfBlocks):
                self.pool.reserve(row.sequence, len(drafted))
            assert self.state() == before
            return
        copies = self.pool.reserve(row.sequence, len(drafted))
        assert len(copies) == (copied and len(drafted) > old)
        for source, target in copies:
            for offset in range(size):
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        for position in range(old, len(drafted)):
            self.memory[self.slot(row, position)] = tuple(drafted[: position + 1])
        self.pool.commit(row.sequence, accepted)
        row.tokens += accepted

    @precondition(lambda self: len(self.rows) < 6)
    @rule(prompt=TOKENS, keep=st.integers(0, 2))
    def open(self, prompt: list[int], keep: int) -> None:
        matched = self.pool.match(prompt)
        sequence = self.pool.open(prompt)
        assert sequence.table == matched
        assert sequence.cached == len(matched) * self.size <= max(0, len(prompt) - 1)
        self.rows.append(Row(sequence, prompt[: sequence.cached], keep))
        self.write(self.rows[-1], prompt[sequence.cached :], [])

    @precondition(lambda self: self.rows)
    @rule(which=WHICH, accepted=TOKENS, rejected=TOKENS)
    def append(self, which: int, accepted: list[int], rejected: list[int]) -> None:
        self.write(self.rows[which % len(self.rows)], accepted, rejected)

    @precondition(lambda self: self.rows)
    @rule(which=WHICH, forgotten=st.integers(0, 9))
    def truncate(self, which: int, forgotten: int) -> None:
        row = self.rows[which % len(self.rows)]
        length = max(0, len(row.tokens) - forgotten)
        if row.released and length < (max(row.released) + 1) * self.size:
            with pytest.raises(UsageError, match="were released"):
                self.pool.truncate(row.sequence, length)
            return
        self.pool.truncate(row.sequence, length)
        del row.tokens[length:]
        assert len(row.sequence.table) == -(-length // self.size)

    @precondition(lambda self: 0 < len(self.rows) < 6)
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        row = self.rows[which % len(self.rows)]
        twin = self.pool.fork(row.sequence)
        assert twin.cached == len(row.tokens)
        self.rows.append(Row(twin, list(row.tokens), row.keep, set(row.released)))

    @precondition(lambda self: self.rows)
    @rule(which=WHICH, window=st.integers(0, 7))
    def release_before(self, which: int, window: int) -> None:
        row = self.rows[which % len(self.rows)]
        position = len(row.tokens) - window
        gone = {i for i in range(row.keep, len(row.sequence.table)) if (i + 1) * self.size <= position}
        assert self.pool.release_before(row.sequence, position, keep=row.keep) == len(gone - row.released)
        row.released |= gone

    @precondition(lambda self: self.rows)
    @rule(which=WHICH)
    def close(self, which: int) -> None:
        self.pool.close(self.rows.pop(which % len(self.rows)).sequence)

    @invariant()
    def bookkeeping_is_consistent(self) -> None:
        self.pool.check()
        assert self.pool.free + self.pool.cached + self.pool.used == self.pool.blocks
        assert self.pool.used == len({b for row in self.rows for b in row.sequence.table if b >= 0})
        assert 0 <= self.pool.utilization <= 1

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for row in self.rows:
            assert row.sequence.tokens == row.tokens
            assert {i for i, block in enumerate(row.sequence.table) if block == -1} == row.released
            for position in range(len(row.tokens)):
                if position // self.size not in row.released:
                    assert self.memory[self.slot(row, position)] == tuple(row.tokens[: position + 1])

    @invariant()
    def what_is_found_holds_the_prefix(self) -> None:
        for row in self.rows:
            found = self.pool.match([*row.tokens, 0])
            for position in range(len(found) * self.size):
                slot = found[position // self.size], position % self.size
                assert self.memory[slot] == tuple(row.tokens[: position + 1])
            if not row.released:  # nothing of it can have been evicted
                assert len(found) == self.pool.share_prefixes * (len(row.tokens) // self.size)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for row in self.rows:
                self.pool.close(row.sequence)
            self.pool.check()
            assert self.pool.available == self.pool.blocks


PagedCache.TestCase.settings = settings(max_examples=250, stateful_step_count=50, deadline=None, derandomize=True)
TestPagedCache = PagedCache.TestCase


def run(pool: BlockPool, tokens: list[int]) -> PagedSequence:
    """A sequence with all of `tokens` committed."""
    sequence = pool.open(tokens)
    assert pool.reserve(sequence, len(tokens)) == []
    pool.commit(sequence, tokens[sequence.cached :])
    return sequence


def remember(pool: BlockPool, *prompts: list[int]) -> None:
    """Run and close prompts, oldest first."""
    for tokens in prompts:
        pool.close(run(pool, tokens))
    pool.check()


def known(pool: BlockPool, tokens: list[int]) -> int:
    """How many blocks of `tokens` would be found."""
    return len(pool.match([*tokens, 0]))


def test_a_table_grows_with_the_sequence() -> None:
    pool = BlockPool(4, 4)
    sequence = pool.open([7] * 5)
    assert (sequence.table, sequence.length, sequence.cached) == ([], 0, 0)
    pool.reserve(sequence, 5)
    assert sequence.table == [0, 1]
    assert pool.room(sequence) == 8
    assert (pool.free, pool.cached, pool.used, pool.available) == (2, 0, 2, 2)
    assert pool.utilization == 0
    pool.commit(sequence, [7] * 5)
    assert pool.utilization == 5 / 8
    assert pool.reserve(sequence, 8) == []
    assert sequence.table == [0, 1]
    pool.release_before(sequence, 4)
    assert pool.utilization == 1 / 4  # one token in the one block that is left
    pool.close(sequence)
    assert (pool.free, pool.cached, pool.used, pool.utilization) == (3, 1, 0, 0)


def test_a_prefix_is_computed_once() -> None:
    pool = BlockPool(8, 2)
    first = run(pool, [1, 2, 3, 4, 5])
    second = pool.open([1, 2, 3, 4, 9, 9])  # while the first is still open
    assert second.table == first.table[:2]
    assert second.tokens == [1, 2, 3, 4]
    assert (pool.query_tokens, pool.hit_tokens) == (11, 4)
    pool.close(first)
    pool.close(second)
    third = pool.open([1, 2, 3, 4, 5])  # and when both are closed
    assert third.cached == 4
    assert (pool.query_tokens, pool.hit_tokens) == (16, 8)
    pool.check()


def test_a_match_takes_and_counts_nothing() -> None:
    pool = BlockPool(4, 2)
    remember(pool, [1, 2, 3, 4])
    assert len(pool.match([1, 2, 3, 4, 5])) == 2
    assert (pool.used, pool.query_tokens) == (0, 4)


@pytest.mark.parametrize(("length", "found"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (9, 4)])
def test_the_last_token_is_always_computed(length: int, found: int) -> None:
    pool = BlockPool(8, 2)
    remember(pool, list(range(8)))
    assert len(pool.match(range(length))) == found


def test_equal_hashes_are_not_equal_prefixes() -> None:
    zero, prime = SAME_HASH
    assert hash((zero, zero)) == hash((prime, zero))
    assert hash((-1,)) == hash((-2,))
    pool = BlockPool(16, 1)
    remember(pool, [zero, prime, zero], [-1, 5])
    assert known(pool, [zero, prime, zero]) == 3
    assert known(pool, [zero, zero]) == 1
    assert known(pool, [prime]) == known(pool, [-2]) == 0
    remember(pool, [prime, prime, zero])
    assert not set(pool.match([prime, prime, zero, 0])) & set(pool.match([zero, prime, zero, 0]))


def test_equal_tokens_after_different_ones_are_not_shared() -> None:
    pool = BlockPool(8, 2)
    remember(pool, [1, 2, 5, 6], [3, 4, 5, 6])
    assert pool.cached == 4
    assert known(pool, [5, 6]) == 0
    assert known(pool, [1, 2, 3, 4]) == 1


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(3, 1)
    remember(pool, [1], [2], [3])
    pool.close(pool.open([1, 0]))  # used again, so no longer the oldest
    remember(pool, [4])
    assert [known(pool, [token]) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    remember(pool, [5])
    assert [known(pool, [token]) for token in (1, 2, 3, 4)] == [1, 0, 0, 1]


def test_leaves_go_before_what_they_continue() -> None:
    pool = BlockPool(5, 1)
    remember(pool, [1, 2, 3], [1, 8, 9])
    for newcomer, (first, second) in enumerate([(2, 3), (1, 3), (1, 2), (1, 1)]):
        held = run(pool, [100 + newcomer])  # takes one block and keeps it
        assert (known(pool, [1, 2, 3]), known(pool, [1, 8, 9])) == (first, second)
        assert held.length == 1
        pool.check()


def test_a_free_block_is_taken_before_a_cached_one() -> None:
    pool = BlockPool(4, 2)
    remember(pool, [1, 2, 3, 4])
    run(pool, [7, 7, 8])
    assert (pool.free, known(pool, [1, 2, 3, 4])) == (0, 2)


def test_a_block_in_use_is_never_evicted() -> None:
    pool = BlockPool(3, 1)
    remember(pool, [1, 2])
    sequence = pool.open([1, 0])
    other = run(pool, [5, 6])
    assert known(pool, [1, 2]) == 1
    with pytest.raises(OutOfBlocks, match=r"2 tokens need 1 more blocks, and 0 of 3 are available\. Close"):
        pool.reserve(sequence, 2)
    pool.close(other)
    pool.reserve(sequence, 2)
    pool.check()


def test_prompts_computed_together_keep_their_blocks_and_one_is_found() -> None:
    pool = BlockPool(8, 2)
    first, second = run(pool, []), run(pool, [])
    for sequence in (first, second):
        pool.reserve(sequence, 5)
    for sequence in (first, second):
        pool.commit(sequence, [1, 2, 3, 4, 5])
    assert not set(first.table) & set(second.table)
    assert pool.match([1, 2, 3, 4, 0]) == first.table[:2]
    pool.close(first)
    assert pool.match([1, 2, 3, 4, 0]) == second.table[:2]
    assert pool.cached == 0  # the second of equal blocks is not kept beside one in use
    pool.close(second)
    assert (pool.cached, pool.free) == (2, 6)
    pool.check()


def test_a_prompt_of_whole_blocks_takes_no_more_room_each_time() -> None:
    pool = BlockPool(4, 2)
    for _ in range(5):  # its last block is computed again every time
        remember(pool, [1, 2, 3, 4])
        assert (pool.cached, known(pool, [1, 2, 3, 4])) == (2, 2)


def test_a_rolled_back_block_is_found_until_it_is_written_again() -> None:
    pool = BlockPool(8, 4)
    sequence = run(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    first, second, _ = sequence.table
    pool.truncate(sequence, 6)
    assert sequence.table == [first, second]
    assert (known(pool, [1, 2, 3, 4, 5, 6, 7, 8]), pool.room(sequence)) == (2, 6)
    assert pool.reserve(sequence, 8) == []  # nobody else holds it: no copy
    assert sequence.table == [first, second]
    assert known(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == 1
    pool.commit(sequence, [70, 80])
    assert pool.match([1, 2, 3, 4, 5, 6, 70, 80, 0]) == [first, second]
    pool.check()


def test_a_rolled_back_block_that_others_read_is_copied() -> None:
    pool = BlockPool(8, 4)
    writer = run(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    reader = pool.open([1, 2, 3, 4, 5, 6, 7, 8, 0])
    shared = writer.table[1]
    pool.truncate(writer, 6)
    [(source, target)] = pool.reserve(writer, 7)
    assert (source, target) == (shared, writer.table[1])
    assert reader.table[1] == shared != target
    pool.commit(writer, [70, 80])
    assert known(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == known(pool, [1, 2, 3, 4, 5, 6, 70, 80]) == 2
    pool.check()


def test_reserved_room_is_given_back_by_a_rollback() -> None:
    pool = BlockPool(8, 2)
    sequence = run(pool, [1, 2, 3])
    pool.reserve(sequence, 12)
    assert pool.used == 6
    pool.truncate(sequence, 3)
    assert pool.used == 2
    assert pool.reserve(sequence, 4) == []  # a partial block of its own is written on


def test_forks_share_until_one_goes_on() -> None:
    pool = BlockPool(8, 4)
    parent = run(pool, [1, 2, 3, 4, 5])
    pool.reserve(parent, 12)
    child = pool.fork(parent)
    assert child.table == parent.table[:2]  # room that has no tokens is not shared
    assert (child.cached, child.tokens) == (5, parent.tokens)
    assert pool.room(parent) == pool.room(child) == 5
    old = parent.table[1]
    assert pool.reserve(parent, 5) == []  # nothing is to be written
    assert pool.reserve(parent, 6) == [(old, parent.table[1])]
    assert pool.reserve(child, 6) == []  # the only holder now
    assert child.table[1] == old
    pool.commit(parent, [6])
    pool.commit(child, [60])
    assert (parent.tokens, child.tokens) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 60])
    pool.close(parent)
    pool.check()
    assert child.tokens == [1, 2, 3, 4, 5, 60]


def test_room_reserved_before_a_fork_does_not_pay_for_the_copy() -> None:
    pool = BlockPool(3, 4)
    parent = run(pool, [1, 2, 3, 4, 5])
    pool.reserve(parent, 12)
    pool.fork(parent)
    with pytest.raises(OutOfBlocks, match="6 tokens need 1 more blocks, and 0 of 3"):
        pool.reserve(parent, 6)
    pool.check()


def test_a_window_keeps_sinks_and_leaves_the_rest_to_be_found() -> None:
    pool = BlockPool(8, 2)
    sequence = run(pool, list(range(11)))
    blocks = list(sequence.table)
    assert pool.release_before(sequence, -3, keep=1) == 0
    assert pool.release_before(sequence, 7, keep=1) == 2
    assert sequence.table == [blocks[0], -1, -1, *blocks[3:]]
    assert pool.release_before(sequence, 7, keep=1) == 0
    assert (pool.cached, known(pool, list(range(10)))) == (2, 5)
    other = pool.open(range(7))
    assert other.table == blocks[:3]
    pool.close(other)
    pool.truncate(sequence, 6)
    with pytest.raises(UsageError, match=r"invalid length 5\. .* 6 tokens, and those before 6 were released"):
        pool.truncate(sequence, 5)
    twin = pool.fork(sequence)
    assert twin.table == sequence.table == [blocks[0], -1, -1]
    pool.check()


def test_a_window_bounds_the_blocks_of_an_endless_sequence() -> None:
    pool = BlockPool(4, 4)  # a window of 8 tokens, wherever it begins, and the block being written
    sequence = pool.open([])
    for token in range(2000):
        pool.reserve(sequence, token + 1)
        pool.commit(sequence, [token])
        pool.release_before(sequence, token + 1 - 8)
        assert pool.used <= 3
    pool.check()
    assert known(pool, list(range(4))) == 1  # the end of what continues it was taken first, its start never


def test_what_continues_an_evicted_block_is_not_found() -> None:
    pool = BlockPool(4, 1)
    sequence = run(pool, [1, 2, 3])
    pool.release_before(sequence, 2)
    run(pool, [8, 9])  # one free block, and the end of what was released
    assert known(pool, [1, 2, 3]) == 1
    pool.reserve(sequence, 4)
    pool.commit(sequence, [4])
    pool.close(sequence)
    pool.check()
    assert (pool.cached, pool.free) == (0, 2)  # what cannot be found is not kept


def test_out_of_blocks_leaves_everything_as_it_was() -> None:
    pool = BlockPool(4, 2)
    remember(pool, [1, 2])
    sequence = run(pool, [5, 6, 7])
    twin = pool.fork(sequence)
    before = (list(sequence.table), pool.free, pool.cached, known(pool, [1, 2]))
    for length in (7, 100_000):  # a copy and two more, where two are available
        with pytest.raises(OutOfBlocks):
            pool.reserve(sequence, length)
        assert (sequence.table, pool.free, pool.cached, known(pool, [1, 2])) == before
        pool.check()
    pool.reserve(sequence, 6)  # a copy and one more: what is cached counts as available
    assert (pool.available, known(pool, [1, 2])) == (0, 0)
    assert twin.table == before[0]
    assert issubclass(OutOfBlocks, OptimizerError)
    assert not issubclass(OutOfBlocks, UsageError)


def test_without_sharing_nothing_is_kept() -> None:
    pool = BlockPool(4, 2, share_prefixes=False)
    remember(pool, [1, 2, 3, 4, 5])
    assert (pool.free, known(pool, [1, 2, 3, 4])) == (4, 0)
    assert pool.open([1, 2, 3]).cached == pool.hit_tokens == 0


def closed(pool: BlockPool) -> PagedSequence:
    sequence = run(pool, [1, 2, 3])
    pool.close(sequence)
    return sequence


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pool: BlockPool(0, 2), r"BlockPool: invalid blocks 0\. Use blocks > 0\."),
        (lambda pool: BlockPool(2, -1), r"BlockPool: invalid block_size -1\. Use block_size > 0\."),
        (lambda pool: pool.reserve(run(pool, []), -1), r"BlockPool\.reserve: invalid length -1\. Use length >= 0"),
        (lambda pool: pool.truncate(run(pool, [1]), -1), r"truncate: invalid length -1\. The sequence has 1 tokens"),
        (lambda pool: pool.truncate(run(pool, [1]), 2), r"truncate: invalid length 2\. The sequence has 1 tokens"),
        (
            lambda pool: pool.commit(pool.open([1]), [1]),
            r"commit: 1 tokens, and room for 0 was reserved\. Call reserve",
        ),
        (lambda pool: pool.commit(run(pool, [1]), [2, 3]), r"commit: 3 tokens, and room for 2 was reserved"),
        (lambda pool: pool.commit(pool.fork(run(pool, [1])), [2]), r"commit: 2 tokens, and room for 1 .* after fork"),
        (lambda pool: pool.release_before(run(pool, [1]), 2), r"invalid position 2 or keep 0\. .* sequence's 1 tokens"),
        (lambda pool: pool.release_before(run(pool, [1]), 0, keep=-1), r"invalid position 0 or keep -1\. "),
        (lambda pool: pool.close(closed(pool)), r"is closed, or another pool's\. Open the tokens in this pool\."),
        (lambda pool: pool.reserve(closed(pool), 0), "is closed"),
        (lambda pool: pool.commit(closed(pool), []), "is closed"),
        (lambda pool: pool.truncate(closed(pool), 0), "is closed"),
        (lambda pool: pool.release_before(closed(pool), 0), "is closed"),
        (lambda pool: pool.fork(closed(pool)), "is closed"),
        (lambda pool: pool.room(closed(pool)), "is closed"),
        (lambda pool: pool.close(BlockPool(1, 1).open([])), "another pool's"),
    ],
)
def test_wrong_use_is_refused(wrong: Callable[[BlockPool], object], message: str) -> None:
    pool = BlockPool(4, 2)
    with pytest.raises(UsageError, match=message):
        wrong(pool)
    pool.check()


def test_a_pool_of_one_block() -> None:
    pool = BlockPool(1, 4)
    prompt = list(range(100_000))
    sequence = pool.open(prompt)
    with pytest.raises(OutOfBlocks):
        pool.reserve(sequence, len(prompt))
    pool.close(sequence)
    remember(pool, [1, 2, 3, 4])
    sequence = pool.open([1, 2, 3, 4, 5])
    assert sequence.cached == 4
    pool.truncate(sequence, 2)
    assert pool.reserve(sequence, 4) == []
    pool.commit(sequence, [9, 9])
    pool.close(sequence)
    assert (known(pool, [1, 2, 3, 4]), known(pool, [1, 2, 9, 9])) == (0, 1)
    remember(pool, [7])
    assert (pool.free, pool.cached) == (1, 0)


def test_a_prompt_of_100_000_tokens() -> None:
    pool = BlockPool(100_000, 1)
    prompt = list(range(100_000))
    remember(pool, prompt)
    assert pool.open(prompt).cached == 99_999
    pool = BlockPool(100_000, 1)
    remember(pool, prompt)
    remember(pool, prompt[::-1])  # evicts the whole chain, a leaf at a time
    assert (known(pool, prompt), known(pool, prompt[::-1])) == (0, 100_000)


@pytest.mark.parametrize("different", [10_000, 4], ids=["evicted", "found"])
def test_ten_thousand_requests_leave_no_trace(different: int) -> None:
    pool = BlockPool(64, 4)
    remember(pool, [5] * 4)  # and never asked for again

    def serve(first: int, last: int) -> int:
        """Requests that start alike and end differently; bytes in use afterwards."""
        for i in (request % different for request in range(first, last)):
            sequence = run(pool, [1, 2, 3, 4, i % 3, 6, 7, 8, i, i + 1, i + 2, i + 3, 9])
            pool.release_before(sequence, 8 * (i % 2))
            pool.truncate(sequence, 12)
            pool.close(sequence)
        pool.check()  # of the order of eviction too, which is rebuilt from time to time
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = serve(0, 1000), serve(1000, 10_000)
    finally:
        tracemalloc.stop()
    assert pool.available == 64
    assert known(pool, [5] * 4) == (different == 4)
    assert after - before < 16_384  # a byte and a half a request would be seen
