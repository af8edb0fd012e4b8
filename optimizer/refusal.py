"""What is known of a job that the gate refused: who carries the loss, and the candidates that were gated again."""

from __future__ import annotations

from dataclasses import dataclass, field

from optimizer.attribution import Finding, Loss
from optimizer.evals.gate import Floor, Verdict
from optimizer.passes.reverts import Revert


@dataclass(frozen=True)
class Attempt:
    """A candidate that was gated again: what it takes back, and what the gate said; `error` if it could not be run."""

    reverts: tuple[Revert, ...]
    confidence: float
    verdict: Verdict | None
    speedup: float | None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether every floor held."""
        return self.verdict is not None and self.verdict.passed


@dataclass
class Refusal:
    """Why the gate refused a job, and what was done about it.

    `floor` is the first of the floors that were missed and searched, `whole` the refused job's loss as the search saw
    it, `chosen` what the released candidate takes back (empty if none was released), `proposed` a revert that is
    expected to hold and was not gated.
    """

    floor: Floor
    verdict: Verdict
    documents: str = ""
    whole: Loss | None = None
    findings: list[Finding] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    chosen: tuple[Revert, ...] = ()
    proposed: tuple[Revert, ...] = ()
    notes: list[str] = field(default_factory=list)
    candidates: int = 0
    seconds: float = 0.0
    complete: bool = True
