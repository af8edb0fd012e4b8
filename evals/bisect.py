"""Which of many suspects make a test fail: the fewest whose removal makes it hold, found in few tests.

`holds(removed)` says whether the test holds once these suspects are gone. With suspects in an order of suspicion, the
shortest prefix whose removal holds is found by doubling and bisection; its last member is needed, for the prefix
without it failed. It is removed for good, and the search goes on in what stands before it until the removed alone are
enough (the progression search of Marques-Silva et al. 2013, https://doi.org/10.1007/978-3-642-39799-8_39). Where
removing more never makes the test fail, the set found has no member to spare. Where it does, as with noise, the set
still holds: a set is only ever returned as holding because it was tested.

Tests for k culprits among n suspects: at most k (2 log2 n + 3) + 1, and 3 for a single culprit that stands first.

Worked example: suspects a b c d, culprits b and d. Removing all holds, a fails, a b c fails: d is needed. Removing d
alone fails, a d fails, a b d holds: b. Removing b d holds: done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class OutOfBudget(Exception):  # noqa: N818 (a signal, not an error)
    """Raised by a test that there is no budget left for. A search then returns the best that it has tested."""


class Budget:
    """Seconds for a search. A candidate is not begun if one as long as the longest so far would end too late."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock, self.began = seconds, clock, clock()
        self.longest, self.candidates = 0.0, 0

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return self.clock() - self.began

    @contextmanager
    def candidate(self) -> Iterator[None]:
        """Measure one candidate; `OutOfBudget` if there is no time for it."""
        if self.spent + self.longest > self.seconds:
            raise OutOfBudget
        self.candidates += 1
        began = self.clock()
        try:
            yield
        finally:
            self.longest = max(self.longest, self.clock() - began)


@dataclass(frozen=True)
class Removal(Generic[T]):
    """Suspects whose removal was tested.

    `holds` says that the test holds without them; False where it fails even without any suspect, or where nothing that
    holds was found in time (`complete` is False then). `minimal` says that each member was seen to be needed; the
    first `needed` members were.
    """

    removed: tuple[T, ...]
    holds: bool
    minimal: bool
    needed: int = 0
    complete: bool = True


def minimal_removal(suspects: Sequence[T], holds: Callable[[frozenset[T]], bool], *, most: int = 8) -> Removal[T]:
    """The suspects to remove, of those given in order of suspicion; with none removed the test is known to fail.

    At most `most` are singled out: a loss that is spread over more has no culprits, and the shortest prefix found so
    far is returned with those. `holds` may raise `OutOfBudget`; any other exception is the caller's.
    """
    needed: list[T] = []
    pool = list(suspects)
    tested = False  # whether needed and pool together are known to hold

    def found(*, minimal: bool, complete: bool = True) -> Removal[T]:
        return Removal((*needed, *pool), tested, minimal, len(needed), complete)

    try:
        if not pool or not holds(frozenset(pool)):
            return found(minimal=False)
        tested = True
        while pool:
            if needed and holds(frozenset(needed)):
                pool.clear()
                break
            if len(needed) == most:
                return found(minimal=False)
            # Without the first `low` of the pool the test fails, without the first `high`, which is all, it holds.
            low, high, step = 0, len(pool), 1
            while high - low > 1:
                middle = min(low + step, high - 1) if step else (low + high) // 2
                if holds(frozenset((*needed, *pool[:middle]))):
                    high, step = middle, 0
                    del pool[high:]
                else:
                    low, step = middle, 2 * step
            needed.append(pool.pop())
    except OutOfBudget:
        return found(minimal=False, complete=False)
    return found(minimal=True)
