"""What a long job tells its caller while it works. The command line draws it; the library is silent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Phases of a job, with the seconds each took. Subclasses show `update`; this one only keeps the times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of the job; a phase entered twice adds up."""
        self.started(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.finished(name, spent)

    def started(self, name: str) -> None:
        """A phase begins."""

    def update(self, what: str, done: float, total: float) -> None:
        """`done` of `total` parts of the current phase are finished."""

    def finished(self, name: str, seconds: float) -> None:
        """A phase ended after so many seconds."""

    def said(self, text: str) -> None:
        """A line of what was found on the way."""
