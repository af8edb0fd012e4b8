"""Bookkeeping of a paged key-value cache: which block holds which tokens of which sequence. It touches no tensor.

Keys and values lie in `blocks` blocks of `block_size` tokens. A sequence reaches them through its table: position `p`
is at offset `p % block_size` of block `table[p // block_size]`. So memory is taken only as a sequence grows, fewer than
`block_size` slots of it stay empty, and sequences with one prefix share its blocks (PagedAttention, Kwon et al.,
arXiv:2309.06180). A full block that no sequence holds any more can still be found by its tokens and all those before,
until its room is needed: prefixes form a tree, and the least recently used leaf goes first (RadixAttention, Zheng et
al., arXiv:2312.07104).

    sequence = pool.open(prompt)                              # prompt[: sequence.cached] is already there
    for source, target in pool.reserve(sequence, length):     # before every write
        ...                                                   # copy block source to block target, in this order
    ...                                                       # write positions sequence.length to length - 1
    pool.commit(sequence, tokens)                             # what proved right: rejected drafts are left out
    pool.close(sequence)

A block is written by a sequence that alone holds it, and never while it can be found. Only the partial last block can
come to be shared (by `fork`, or by `truncate` into a full one), and `reserve` sees to it: if others hold the block, the
sequence gets a block of its own and the caller copies; if not, the block just leaves the tree. What was reserved before
a `fork` or `truncate` is therefore reserved anew. Two prefixes never share a block, whatever their hashes: a node finds
its children in a dict keyed by their tokens, which compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count
from operator import index

from optimizer.errors import OptimizerError, UsageError

RELEASED = -1  # a table's entry for a block that the sequence gave back


class OutOfBlocks(OptimizerError):  # noqa: N818 (a signal to wait or preempt, not a defect)
    """Fewer blocks are available than asked for. Nothing was changed: close a sequence, or wait, and ask again."""


@dataclass(eq=False, repr=False, slots=True)
class _Prefix:
    """A node of the tree: `depth` blocks of tokens, of which `tokens [block_size]` are the last.

    `blocks` is an ordered set of those that hold them: several in use (computed at the same time), or one cached. A
    node without any has left the tree, for good.
    """

    parent: _Prefix | None = None
    tokens: tuple[int, ...] = ()
    depth: int = 0
    blocks: dict[int, None] = field(default_factory=dict)
    children: dict[tuple[int, ...], _Prefix] = field(default_factory=dict)
    cached_children: int = 0
    released: int = 0  # when its block was last given back

    @property
    def block(self) -> int:
        return next(iter(self.blocks))

    @property
    def findable(self) -> bool:
        return self.parent is None or bool(self.blocks)


@dataclass(eq=False)
class PagedSequence:
    """A sequence and the blocks it holds. `BlockPool.open` and `fork` make it; everyone else only reads it.

    `table [blocks held or released]` has a block's id, or -1 where `release_before` gave it back; `tokens [length]` are
    the committed ones; `cached` of them were there from the start.
    """

    table: list[int]
    tokens: list[int]
    cached: int
    _tip: _Prefix = field(repr=False)  # the longest prefix of whole blocks that was entered in the tree
    _released: int = 0  # how many blocks `release_before` gave back
    _released_end: int = 0  # and the place in the table behind the last of them

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self.tokens)


class BlockPool:
    """`blocks` blocks with ids from 0, each of `block_size` tokens, and who holds them. Not safe across threads.

    A block is free, used (in the table of at least one sequence), or cached (in none, but found by its tokens). Without
    `share_prefixes` none is cached, and only a `fork` shares. `query_tokens` counts the tokens given to `open`,
    `hit_tokens` those that needed no computing.
    """

    def __init__(self, blocks: int, block_size: int, *, share_prefixes: bool = True) -> None:
        for name, value in (("blocks", blocks), ("block_size", block_size)):
            if value < 1:
                raise UsageError(f"BlockPool: invalid {name} {value}. Use {name} > 0.")
        self.blocks, self.block_size, self.share_prefixes = blocks, block_size, share_prefixes
        self.query_tokens = self.hit_tokens = 0
        self._free = list(range(blocks))[::-1]
        self._holders = [0] * blocks
        self._prefix: list[_Prefix | None] = [None] * blocks
        self._root = _Prefix()
        self._open: dict[PagedSequence, None] = {}
        self._cached = 0
        # Cached blocks that no cached block continues, as (released, block). An entry that no longer holds is skipped
        # when it comes up, so nothing is ever searched for in the heap.
        self._leaves: list[tuple[int, int]] = []
        self._clock = count(1)

    @property
    def free(self) -> int:
        """Blocks with no content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that no sequence holds, kept for a prompt that starts with their tokens; given up when needed."""
        return self._cached

    @property
    def available(self) -> int:
        """Blocks that can be reserved: free and cached."""
        return self.free + self.cached

    @property
    def used(self) -> int:
        """Blocks that at least one open sequence holds."""
        return self.blocks - self.available

    @property
    def utilization(self) -> float:
        """Committed tokens / tokens of room, over the blocks that open sequences hold; 0 where they hold none."""
        released = sum(sequence._released for sequence in self._open)
        held = sum(len(sequence.table) for sequence in self._open) - released
        tokens = sum(sequence.length for sequence in self._open) - released * self.block_size
        return tokens / (held * self.block_size) if held else 0.0

    def match(self, tokens: Iterable[int]) -> list[int]:
        """Blocks of the longest known prefix of `tokens [S]`, which stay as they are: only `open` holds them.

        Never all of `tokens`: the last one is computed, or there would be no logits to go on from.
        """
        return [prefix.block for prefix in self._known(list(map(index, tokens)))]

    def open(self, tokens: Iterable[int]) -> PagedSequence:
        """Start a sequence for the prompt `tokens [S]`: `cached` of them are there; reserve and commit the rest."""
        prompt = list(map(index, tokens))
        known = list(self._known(prompt))
        for prefix in known:
            self._hold(prefix.block)
        cached = len(known) * self.block_size
        self.query_tokens += len(prompt)
        self.hit_tokens += cached
        tip = known[-1] if known else self._root
        sequence = PagedSequence([prefix.block for prefix in known], prompt[:cached], cached, tip)
        self._open[sequence] = None
        return sequence

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens in the same blocks. Whichever goes on first copies the last."""
        self._check_open(sequence)
        table = sequence.table[: self._blocks_of(sequence.length)]
        for block in table:
            if block != RELEASED:
                self._hold(block)
        twin = replace(sequence, table=table, tokens=list(sequence.tokens), cached=sequence.length)
        self._open[twin] = None
        return twin

    def room(self, sequence: PagedSequence) -> int:
        """Tokens that the sequence can have before it must reserve again: no more than now if its last is shared."""
        self._check_open(sequence)
        last = self._partial(sequence)
        if last is not None and (self._holders[last] > 1 or self._prefix[last] is not None):
            return sequence.length
        return len(sequence.table) * self.block_size

    def reserve(self, sequence: PagedSequence, length: int) -> list[tuple[int, int]]:
        """Make room for `length` tokens in all. Returns the copies (source, target) that the caller makes at once.

        All positions from `sequence.length` to `length - 1` can then be written, as often as wanted. Blocks are copied
        in the order given, over all calls, and before anything else is written. Raises `OutOfBlocks` and changes
        nothing if too few are available.
        """
        if length < 0:
            raise UsageError(f"BlockPool.reserve: invalid length {length}. Use length >= 0, in tokens from the start.")
        if length <= self.room(sequence):
            return []
        table, last = sequence.table, self._partial(sequence)
        shared = last is not None and self._holders[last] > 1
        more = max(0, self._blocks_of(length) - len(table))
        if more + shared > self.available:
            raise OutOfBlocks(
                f"BlockPool: {length} tokens need {more + shared} more blocks, and {self.available} of {self.blocks} "
                "are available. Close a sequence, or make the pool larger."
            )
        copies = []
        if last is not None and shared:
            table[sequence.length // self.block_size] = target = self._take()
            self._give_back(last)
            copies.append((last, target))
        elif last is not None:
            self._leave_tree(last)
        table.extend(self._take() for _ in range(more))
        return copies

    def commit(self, sequence: PagedSequence, tokens: Iterable[int]) -> None:
        """Append `tokens`, whose keys and values are written. Blocks that became full can be found from now on."""
        new = list(map(index, tokens))
        length, room = sequence.length + len(new), self.room(sequence)
        if new and length > room:
            raise UsageError(
                f"BlockPool.commit: {length} tokens, and room for {room} was reserved. Call reserve before writing, "
                "and again after fork or truncate."
            )
        full = sequence.length // self.block_size
        sequence.tokens += new
        if self.share_prefixes:
            for position in range(full, length // self.block_size):
                self._enter_tree(sequence, position)

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Forget the tokens from `length` on, and give back every block that holds none of the others."""
        self._check_open(sequence)
        first = sequence._released_end * self.block_size
        if not first <= length <= sequence.length:
            raise UsageError(
                f"BlockPool.truncate: invalid length {length}. The sequence has {sequence.length} tokens, and those "
                f"before {first} were released: use a length between the two, or open the tokens anew."
            )
        for _ in range(len(sequence.table) - self._blocks_of(length)):
            self._give_back(sequence.table.pop())
        del sequence.tokens[length:]
        while sequence._tip.depth > length // self.block_size:
            assert sequence._tip.parent is not None
            sequence._tip = sequence._tip.parent

    def release_before(self, sequence: PagedSequence, position: int, *, keep: int = 0) -> int:
        """Give back the blocks wholly before `position`, where a sliding window no longer looks; says how many.

        Their table entries become -1. A position up to 0, of a window that is not full yet, releases none. The first
        `keep` blocks (attention sinks) stay; give the same `keep` in every call. The blocks are cached like any other,
        so a prompt finds them; once the last of them is taken, what continues it is not found any more.
        """
        self._check_open(sequence)
        if position > sequence.length or keep < 0:
            raise UsageError(
                f"BlockPool.release_before: invalid position {position} or keep {keep}. Use a position within the "
                f"sequence's {sequence.length} tokens, and keep >= 0 blocks."
            )
        first, end = max(keep, sequence._released_end), position // self.block_size
        if end <= first:
            return 0
        for i in range(end - 1, first - 1, -1):
            self._give_back(sequence.table[i])
            sequence.table[i] = RELEASED
        sequence._released += end - first
        sequence._released_end = end
        return end - first

    def close(self, sequence: PagedSequence) -> None:
        """Give back every block; the full ones stay cached. The sequence cannot be used any more."""
        self._check_open(sequence)
        del self._open[sequence]
        while sequence.table:  # from the end: only the last one is a leaf then
            block = sequence.table.pop()
            if block != RELEASED:
                self._give_back(block)
        sequence._tip = self._root

    def _check_open(self, sequence: PagedSequence) -> None:
        if sequence not in self._open:
            raise UsageError(f"BlockPool: {sequence!r:.80} is closed, or another pool's. Open the tokens in this pool.")

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _partial(self, sequence: PagedSequence) -> int | None:
        """The block that the next token goes into, if it holds tokens already."""
        return sequence.table[sequence.length // self.block_size] if sequence.length % self.block_size else None

    def _known(self, tokens: list[int]) -> Iterator[_Prefix]:
        prefix, size = self._root, self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            child = prefix.children.get(tuple(tokens[start : start + size]))
            if child is None:
                return
            yield (prefix := child)

    def _enter_tree(self, sequence: PagedSequence, position: int) -> None:
        """Let the full block at table `position` be found, unless a block before it no longer can."""
        tip, block, size = sequence._tip, sequence.table[position], self.block_size
        if not tip.findable:
            return
        assert tip.depth == position
        tokens = tuple(sequence.tokens[position * size : (position + 1) * size])
        prefix = tip.children.get(tokens)
        if prefix is None:
            prefix = tip.children[tokens] = _Prefix(tip, tokens, position + 1)
        elif self._is_cached(prefix):  # computed again, so the copy that nobody holds is one too many
            self._uncache(prefix)
            self._prefix[prefix.block] = None
            self._free.append(prefix.block)
            prefix.blocks.clear()
        prefix.blocks[block] = None
        self._prefix[block] = prefix
        sequence._tip = prefix

    def _leave_tree(self, block: int) -> None:
        """Let `block` be found no more; if no other has its tokens, nor what continues it."""
        prefix = self._prefix[block]
        if prefix is None:
            return
        if len(prefix.blocks) > 1:
            del prefix.blocks[block]
            self._prefix[block] = None
        else:
            self._cut(prefix)

    def _cut(self, prefix: _Prefix) -> None:
        """Take a node and all that continues it out of the tree: cached blocks become free, used ones stay used."""
        assert prefix.parent is not None
        del prefix.parent.children[prefix.tokens]
        below = [prefix]
        while below:
            node = below.pop()
            below += node.children.values()
            if self._is_cached(node):
                self._uncache(node)
                self._free.append(node.block)
            for block in node.blocks:
                self._prefix[block] = None
            node.blocks.clear()
            node.children.clear()  # no cycle is left for the garbage collector

    def _take(self) -> int:
        while not self._free:
            released, block = heappop(self._leaves)
            prefix = self._prefix[block]
            if prefix is not None and prefix.released == released and self._is_leaf(prefix):
                self._cut(prefix)
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        prefix = self._prefix[block]
        if self._holders[block] == 0 and prefix is not None:
            self._uncache(prefix)
        self._holders[block] += 1

    def _give_back(self, block: int) -> None:
        """One holder less. The last one leaves the block cached if it is the only one with its tokens, else free."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        prefix = self._prefix[block]
        if prefix is None or len(prefix.blocks) > 1:
            self._leave_tree(block)
            self._free.append(block)
            return
        assert prefix.parent is not None
        self._cached += 1
        prefix.parent.cached_children += 1
        prefix.released = next(self._clock)
        self._note_leaf(prefix)

    def _uncache(self, prefix: _Prefix) -> None:
        assert prefix.parent is not None
        self._cached -= 1
        prefix.parent.cached_children -= 1
        self._note_leaf(prefix.parent)

    def _is_cached(self, prefix: _Prefix) -> bool:
        return bool(prefix.blocks) and self._holders[prefix.block] == 0

    def _is_leaf(self, prefix: _Prefix) -> bool:
        return prefix.cached_children == 0 and self._is_cached(prefix)

    def _note_leaf(self, prefix: _Prefix) -> None:
        if self._is_leaf(prefix):
            heappush(self._leaves, (prefix.released, prefix.block))
        if len(self._leaves) > 2 * self.blocks:  # at least half are out of date: a rebuild pays for itself
            leaves = (prefix for prefix in self._prefix if prefix is not None and self._is_leaf(prefix))
            self._leaves = [(prefix.released, prefix.block) for prefix in leaves]
            heapify(self._leaves)

    def check(self) -> None:
        """Assert every invariant, in O(blocks + tokens): for tests."""
        holders = Counter(block for sequence in self._open for block in sequence.table if block != RELEASED)
        assert self._holders == [holders[block] for block in range(self.blocks)]
        for sequence in self._open:
            held = [block for block in sequence.table if block != RELEASED]
            assert len(set(held)) == len(held) == len(sequence.table) - sequence._released
            assert len(sequence.table) >= self._blocks_of(sequence.length)
            tip = sequence._tip
            while tip.parent is not None:
                end = tip.depth * self.block_size
                assert tuple(sequence.tokens[end - self.block_size : end]) == tip.tokens
                tip = tip.parent
        free, cached = set(self._free), {b for b in range(self.blocks) if not self._holders[b] and self._prefix[b]}
        assert len(free) == len(self._free)
        assert len(cached) == self._cached
        assert not free & cached
        assert free | cached == {block for block in range(self.blocks) if not self._holders[block]}
        self._check_tree()

    def _check_tree(self) -> None:
        nodes, found = [self._root], 0
        while nodes:
            node = nodes.pop()
            children = list(node.children.values())
            assert node.cached_children == sum(self._is_cached(child) for child in children)
            for child in children:
                assert child.parent is node
                assert child.depth == node.depth + 1
                assert node.children[child.tokens] is child
                assert child.blocks
                assert all(self._prefix[block] is child for block in child.blocks)
                assert len(child.blocks) == 1 or all(self._holders[block] for block in child.blocks)
                assert not self._is_leaf(child) or (child.released, child.block) in self._leaves
            found += len(node.blocks)
            nodes += children
        assert found == sum(prefix is not None for prefix in self._prefix)
        assert len(self._leaves) <= 2 * self.blocks
