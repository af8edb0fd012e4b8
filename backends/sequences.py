"""The sequences that share a paged cache: which blocks each holds, over all groups of layers.

A `BlockPool` does the bookkeeping of one group; this keeps the groups in step, copies the blocks that a pool asks to
have copied before they are written, gives back what has left a window, and keeps the tables that kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import torch

from optimizer.backends.block_pool import BlockPool, OutOfBlocks, PagedSequence
from optimizer.backends.kv_layout import FEW_TOKENS, KeyValueLayout
from optimizer.backends.paged_cache import Storage


@dataclass(eq=False)
class Sequence:
    """One row of tokens in the cache. `length` of them are written; `cached` were there when it was opened."""

    handles: list[PagedSequence]
    cached: int = 0
    version: int = field(default=0)
    """Changes whenever a table, the ring or `kept` does."""
    ring: int = -1
    """Which ring holds its recent tokens (`recent_kv`), from the first reservation on."""
    kept: int = 0
    """The first position that was ever written there and may still be."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are written."""
        return self.handles[0].length

    def table(self, group: int) -> list[int]:
        """The block of every `block_size` positions; -1 where it left the window."""
        return self.handles[group].table


class SequenceCache:
    """A paged cache of `tokens` tokens (of those layers that keep all of them) and the sequences in it.

    Layers with a window get room for as many sequences as the others would hold of `context` tokens each, plus what a
    prompt's `chunk` writes before anything leaves the window. At most `rings` sequences have recent tokens at once.
    """

    def __init__(
        self,
        layout: KeyValueLayout,
        tokens: int,
        context: int,
        device: torch.device,
        *,
        chunk: int = 512,
        share_prefixes: bool = True,
        rings: int = 0,
    ) -> None:
        self.layout = layout
        self._rings = list(range(rings))[::-1] if layout.recent else []
        self._rings_used = 0
        rows = max(1, tokens // context)
        size = layout.block_size
        blocks = tuple(
            -(-tokens // size)
            if not window
            else min(-(-tokens // size), rows * (layout.blocks_for(context, group) + -(-chunk // size)))
            for group, window in enumerate(layout.windows)
        )
        self.storage = Storage(layout, blocks, device, rings=len(self._rings))
        self.pools = [BlockPool(count, size, share_prefixes=share_prefixes) for count in blocks]

    def open(self, tokens: Tokens[int], *, share: bool = True) -> Sequence:
        """A sequence that begins with what is cached of `tokens`, if anything; never all of them."""
        handles = [pool.open(tokens if share else ()) for pool in self.pools]
        cached = min(handle.cached for handle in handles)
        sequence = Sequence(handles, cached, kept=cached)
        for pool, handle in zip(self.pools, handles, strict=True):
            pool.truncate(handle, cached)
        return sequence

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Make room for `length` tokens. Raises `OutOfBlocks` where there is none: what is written stays."""
        if self.layout.recent and sequence.ring < 0:
            if not self._rings:
                raise OutOfBlocks(f"{self._rings_used} sequences have recent tokens, and max_batch allows no more.")
            sequence.ring = self._rings.pop()
            self._rings_used += 1
            sequence.version += 1
        for group, (pool, handle) in enumerate(zip(self.pools, sequence.handles, strict=True)):
            held = len(handle.table)
            copies = pool.reserve(handle, length)
            for source, target in copies:
                self.storage.copy_block(group, source, target)
            if copies or len(handle.table) != held:
                sequence.version += 1

    def commit(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """Record that these further tokens are written; what they push out of a window is given back."""
        for group, (pool, handle) in enumerate(zip(self.pools, sequence.handles, strict=True)):
            pool.commit(handle, tokens)
            if window := self.layout.windows[group]:
                keep = -(-self.layout.sinks // self.layout.block_size)
                sequence.version += pool.release_before(handle, handle.length - window + 1, keep=keep)

    def keep(self, sequence: Sequence, places: Tokens[int]) -> None:
        """Move what was written at these positions behind the committed tokens, one after the other."""
        targets = list(range(sequence.length, sequence.length + len(places)))
        if targets != list(places):
            for group in range(len(self.pools)):
                self.storage.move(group, sequence.table(group), places, targets)
            if self.layout.recent:
                self.storage.move_recent(sequence.ring, places, targets)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget the tokens beyond `length`, and the room that was reserved beyond it."""
        written = sequence.length + FEW_TOKENS  # at most: drafts that fell
        for pool, handle in zip(self.pools, sequence.handles, strict=True):
            pool.truncate(handle, length)
        if self.layout.recent:
            sequence.kept = min(max(sequence.kept, written - self.layout.ring), length)
        sequence.version += 1

    def close(self, sequence: Sequence) -> None:
        """Give back all blocks; full ones stay to be found by later prompts until the room is needed."""
        for pool, handle in zip(self.pools, sequence.handles, strict=True):
            pool.close(handle)
        if sequence.ring >= 0:
            self._rings.append(sequence.ring)
            self._rings_used -= 1
            sequence.ring = -1

    def room(self) -> int:
        """Tokens that could be reserved now."""
        return min(pool.available for pool in self.pools) * self.layout.block_size

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that fits an empty cache."""
        full = [pool.blocks for pool, window in zip(self.pools, self.layout.windows, strict=True) if not window]
        return min(full) * self.layout.block_size if full else 2**31

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks and rings that open sequences hold."""
        blocks = sum(
            pool.used * self.layout.block_size * self.layout.bytes_per_token(group)
            for group, pool in enumerate(self.pools)
        )
        return blocks + self._rings_used * self.layout.ring_bytes
