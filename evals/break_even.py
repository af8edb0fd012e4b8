"""When an optimization has paid for itself: the tokens after which its own time has been won back.

A token costs the end-to-end time of a request over the tokens it makes, e2e / (batch · output), so that prefill is
shared by the tokens it is run for. With S seconds spent once, and b and a seconds a token before and after,

    tokens = S / (b - a)

which is never reached where a ≥ b. The interval of the speed-up gives the pessimistic count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimizer.errors import UsageError


@dataclass(frozen=True)
class BreakEven:
    """What was spent once, `seconds`, and what a generated token took `before` and takes `after`, in seconds.

    `speedup_low` is the pessimistic end of before / after.
    """

    seconds: float
    before: float
    after: float
    speedup_low: float

    def __post_init__(self) -> None:
        for name in ("seconds", "before", "after", "speedup_low"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name != "seconds" and value == 0):
                raise UsageError(f"break-even: {name} is {value}; times are positive and finite")

    @property
    def tokens(self) -> int | None:
        """Tokens after which the time is won back; None for never."""
        return self._tokens(self.after)

    @property
    def tokens_at_worst(self) -> int | None:
        """The same if the speed-up is no more than the pessimistic end of its interval."""
        return self._tokens(self.before / self.speedup_low)

    def _tokens(self, after: float) -> int | None:
        saved = self.before - after
        return math.ceil(self.seconds / saved) if saved > 0 else None
