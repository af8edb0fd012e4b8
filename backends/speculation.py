"""Speculative decoding: which drafted tokens stand, exactly, and when drafting pays.

Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318; for trees
Miao et al. 2024 (SpecInfer), https://arxiv.org/abs/2305.09781. Objective: more than one token a forward, each
distributed exactly as without drafts.

After the root and after each node the target chooses a token as it would without drafts: the largest logit, or one
drawn with the random number that belongs to the position. From the root on, the walk goes to the child that holds the
token chosen after a node; where none does, that token is new. So whatever the draft is, the tokens are those of plain
decoding, drawn ones too, and a seed gives the same with drafts as without them, where the logits are the same.

A drafted token x stands with the target's probability p(x) of it. Drafts are looked up or decoded greedily here: for
one that was drawn from q, rejection sampling would let it stand with min(1, p(x) / q(x)).

Worked example: `p = [0.6, 0.4]` and token 0 is drafted. It stands with 0.6, when the target chooses it too; else the
target has chosen token 1. In all 0.6 and 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from optimizer.backends.drafting import ROOT, Draft, Proposer
from optimizer.errors import UsageError

if TYPE_CHECKING:
    from optimizer.backends.paged_runner import PagedRunner

_LEAST_TESTS = 4.0  # what evidence never shrinks below, and the weight of the first guess: one probe moves it by 1/5


@dataclass(frozen=True)
class Accepted:
    """The nodes of a draft that stand, from the root on, and the token that the target adds after the last of them."""

    path: list[int]
    next_token: int

    def tokens(self, draft: Draft) -> list[int]:
        """All new tokens: those along the path, then the target's."""
        return [*(draft.tokens[node] for node in self.path), self.next_token]

    def tests(self, draft: Draft) -> int:
        """How often the walk had a guess to try: at each node that stands, and once more if a guess ended it."""
        return len(self.path) + bool(draft.children[(self.path[-1] if self.path else ROOT) + 1])


def accept(draft: Draft, chosen: Sequence[int]) -> Accepted:
    """What stands of a draft; `chosen` (n + 1) are the target's tokens after the root and after each node."""
    if len(chosen) != len(draft) + 1:
        raise UsageError(
            f"accept: {len(chosen)} chosen tokens for a draft of {len(draft)}. Give one for the root and one for each "
            f"node: {len(draft) + 1}."
        )
    path: list[int] = []
    node = ROOT
    while True:
        token = chosen[node + 1]
        child = next((child for child in draft.children[node + 1] if draft.tokens[child] == token), None)
        if child is None:
            return Accepted(path, token)
        path.append(child)
        node = child


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens per forward of the target with k drafts in a chain, each standing with p: (1 - p^(k+1)) / (1 - p).

    Copies stand in runs rather than one by one: where a chain stands whole or not at all, the share of tested drafts
    that stood promises up to 15 % too much at k = 5, and 23 % at k = 15.
    """
    if not (0 <= acceptance <= 1 and drafts >= 0):
        raise UsageError(
            f"expected_tokens: acceptance {acceptance}, {drafts} drafts. Use a share in [0, 1], and 0 or more."
        )
    return sum(acceptance**i for i in range(drafts + 1))


@dataclass(frozen=True)
class StepCosts:
    """Measured seconds: of a forward by its number of new tokens, where 1 is a plain step, and of making one draft.

    A number that was not measured costs what the next larger one does, which is what a runner pads to; numbers beyond
    the largest are never chosen.
    """

    verify_seconds: Mapping[int, float]
    draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        seconds = {"draft_seconds": self.draft_seconds, **{str(n): s for n, s in self.verify_seconds.items()}}
        wrong = {name: s for name, s in seconds.items() if not (math.isfinite(s) and s >= 0)}
        if wrong or min(self.verify_seconds, default=0) != 1 or min(self.verify_seconds.values()) <= 0:
            raise UsageError(
                f"StepCosts: verify_seconds {dict(self.verify_seconds)}, draft_seconds {self.draft_seconds}. Give the "
                "positive seconds of 1 new token, the plain step, and of the larger numbers a step may verify."
            )
        # The caller may go on measuring into its own.
        object.__setattr__(self, "verify_seconds", dict(self.verify_seconds))

    @property
    def max_drafts(self) -> int:
        """The most drafts that a measured step verifies beside the root."""
        return max(self.verify_seconds) - 1

    def step_seconds(self, drafts: int) -> float:
        """Drafting and verifying."""
        if not 0 <= drafts <= self.max_drafts:
            raise UsageError(
                f"StepCosts: {drafts} drafts take a forward of {drafts + 1} tokens. Measure it, or draft from 0 to "
                f"{self.max_drafts}."
            )
        measured = min(tokens for tokens in self.verify_seconds if tokens > drafts)
        return drafts * self.draft_seconds + self.verify_seconds[measured]

    def seconds_per_token(self, acceptance: float, drafts: int) -> float:
        """The effective inter-token latency."""
        return self.step_seconds(drafts) / expected_tokens(acceptance, drafts)

    def best(self, acceptance: float, limit: int) -> int:
        """The drafts, up to `limit`, that give the most tokens per second; the fewest of equals, 0 if none pay."""
        allowed = range(min(max(limit, 0), self.max_drafts) + 1)
        return min(allowed, key=lambda drafts: self.seconds_per_token(acceptance, drafts))

    @cached_property
    def break_even(self) -> float:
        """The acceptance above which some number of drafts pays; infinite if none does when all of them stand."""
        if not self.best(1.0, self.max_drafts):
            return math.inf
        low, high = 0.0, 1.0
        for _ in range(40):  # to 1e-12: more tokens at the same cost, so what pays at p pays above it
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle, self.max_drafts) else (middle, high)
        return high

    @cached_property
    def probe(self) -> int:
        """The most drafts that cost no more than one."""
        drafts = range(1, self.max_drafts + 1)
        return max((k for k in drafts if self.step_seconds(k) <= self.step_seconds(1)), default=0)


@dataclass
class SpeculationStats:
    """What speculation did, for the report. A step is one row of one forward, so a batch of 4 counts 4."""

    steps: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    tested: int = 0
    off_steps: int = 0
    off_reason: str | None = None

    @property
    def acceptance(self) -> float:
        """The p of `expected_tokens`: accepted of *tested*. After the first that falls, a draft is proposed in vain."""
        return self.accepted / self.tested if self.tested else math.nan

    @property
    def tokens_per_step(self) -> float:
        """Tokens per forward of a row: 1 without drafts."""
        return self.tokens / self.steps if self.steps else math.nan


@dataclass
class SpeculationPolicy:
    """How many drafts the next step should verify, from the acceptance so far and measured costs; 0 when none pays.

    Evidence halves every `half_life` steps, so the text's change from code to prose shows. While acceptance is too low
    every `probe_every`-th step verifies the fewest drafts, to see it recover. From `max_batch` rows on the step is near
    the ridge point, where more tokens are no longer free, and nothing is drafted. All that decides is data: no clock.
    """

    costs: StepCosts
    max_batch: int | None = None
    initial_acceptance: float = 0.8
    half_life: int = 32
    probe_every: int = 16
    stats: SpeculationStats = field(default_factory=SpeculationStats, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.initial_acceptance <= 1:
            raise UsageError(
                f"SpeculationPolicy: Invalid initial_acceptance {self.initial_acceptance}. Use a share in [0, 1]."
            )
        for name in ("half_life", "probe_every", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"SpeculationPolicy: Invalid {name} {value}. Use at least 1.")
        self._tested, self._stood = _LEAST_TESTS, _LEAST_TESTS * self.initial_acceptance
        self._waited = 0

    @property
    def acceptance(self) -> float:
        """The share of tested drafts that stood, recent ones weighing more."""
        return self._stood / self._tested

    def drafts(self, limit: int, batch: int = 1) -> int:
        """Drafts to verify in the next step of `batch` rows, at most `limit`. Ask once a step."""
        faded = max(0.5 ** (1 / self.half_life), _LEAST_TESTS / self._tested)
        self._tested, self._stood = self._tested * faded, self._stood * faded
        off, probing = self._ruled_out(batch), False
        if off is None and self.acceptance < self.costs.break_even:
            off = (
                f"acceptance {self.acceptance:.2f}: below {self.costs.break_even:.2f} drafts take longer than they "
                "save, by the measured costs"
            )
            self._waited += 1
            probing = self._waited >= self.probe_every
        self.stats.off_reason = off
        if off is None:
            return self.costs.best(self.acceptance, limit)
        self.stats.off_steps += batch
        return min(max(limit, 0), self.costs.probe) if probing else 0

    def _ruled_out(self, batch: int) -> str | None:
        """Why drafts do not pay whatever their acceptance, so that there is nothing to probe for."""
        if self.max_batch is not None and batch >= self.max_batch:
            return f"batch {batch}: from {self.max_batch} rows on a step is near the ridge point"
        if math.isinf(self.costs.break_even):
            return "costs: no number of drafts pays at the measured costs, even if all of them stand"
        return None

    def observe(self, draft: Draft, accepted: Accepted) -> None:
        """Count what a step made of a row's draft; an empty one for a plain step."""
        tested, stood = accepted.tests(draft), len(accepted.path)
        self._tested += tested
        self._stood += stood
        if tested:  # a proposer without a guess leaves the probe due
            self._waited = 0
        self.stats.steps += 1
        self.stats.tokens += stood + 1
        self.stats.proposed += len(draft)
        self.stats.accepted += stood
        self.stats.tested += tested


@dataclass(frozen=True)
class Speculation:
    """How an engine speculates: a new `drafter` for each request, at most `drafts` guesses a step, and when to.

    Without a `policy` every step speculates.
    """

    drafter: Callable[[], Proposer]
    drafts: int = 4
    policy: SpeculationPolicy | None = None
    draft_runner: PagedRunner | None = None
    """What drafts decode with, if they do, so that its steps can be compiled ahead too."""

    @property
    def summary(self) -> str:
        """What it did so far, for the report."""
        if self.policy is None:
            return f"up to {self.drafts} guesses in every step"
        stats = self.policy.stats
        done = f"{stats.tokens_per_step:.2f} tokens a step and row, {stats.acceptance:.0%} of tested guesses stood"
        if not stats.steps:
            done = "no step yet"
        return f"{done}; off at the end: {stats.off_reason}" if stats.off_reason else done
