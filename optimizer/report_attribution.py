"""The part of a report that says why the gate refused a job, and what was done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from optimizer.report_units import RATIO, Unit, interval

SHOWN = 4
"""Layers named in a sentence."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class LossEntry(_Entry):
    """The metric of one candidate on the documents of the search; `holds` is what the gate is expected to say."""

    value: float
    low: float
    high: float
    holds: bool
    error: str = ""

    @property
    def measured(self) -> str:
        """The value with its interval, or why there is none."""
        return self.error or interval(Unit(((1.0, ""),), digits=5), self.value, self.low, self.high)


class FindingEntry(_Entry):
    """A pass, pair of passes or set of layers: the metric without it and of it alone. None: not measured.

    Of the kind `time`, `without` holds how many times as fast the job is without it.
    """

    kind: Literal["pass", "pair", "layers", "time"]
    names: list[str]
    without: LossEntry | None = None
    alone: LossEntry | None = None
    guilty: bool

    @property
    def title(self) -> str:
        """What it is, long lists cut short."""
        shown = self.names[:SHOWN] + ([f"{len(self.names) - SHOWN} more"] if len(self.names) > SHOWN else [])
        return (" × " if self.kind == "pair" else ", ").join(shown)

    @property
    def without_shown(self) -> str:
        """The metric without it, or how many times as fast the job then is; empty where that was not measured."""
        return "" if self.without is None else self.without.measured + (" × as fast" if self.kind == "time" else "")

    @property
    def sentence(self) -> str:
        """What a guilty one did."""
        without = None if self.without is None else self.without.measured
        if self.kind == "time":
            times = "" if self.without is None else RATIO.format(self.without.value)
            return f"{self.title} costs time: without it the job is {times} as fast"
        if self.kind == "layers":
            return f"leaving {self.title} unquantized is enough: {without}"
        alone = "" if self.alone is None else f": alone {self.alone.measured}"
        if self.kind == "pair":
            return f"{self.title} carry the loss together, each alone is harmless{alone}"
        return f"{self.title} carries the loss{alone}" + (f", without it {without}" if without else "")


class AttemptEntry(_Entry):
    """A candidate that was gated again: what it takes back, at which confidence, and the floors that it missed."""

    reverted: list[str]
    confidence: float
    passed: bool
    decode_speedup: float | None = None
    missed: list[str] = []


class MissedFloor(_Entry):
    """A floor that the recipe as it was given missed, and why."""

    metric: str
    reason: str


class Attribution(_Entry):
    """Why the recipe as it was given was refused: who carries the loss, what was taken back, and what that cost.

    `whole` is the refused job as the search saw it. `reverted` is what the released model takes back, `proposed` what
    is expected to hold and was not gated. `complete` is False where time ran out before the search was sure.
    """

    metric: str
    rule: str
    refused: list[MissedFloor]
    documents: str = ""
    whole: LossEntry | None = None
    findings: list[FindingEntry] = []
    attempts: list[AttemptEntry] = []
    reverted: list[str] = []
    proposed: list[str] = []
    notes: list[str] = []
    candidates: int = Field(default=0, ge=0)
    seconds: float = 0.0
    complete: bool = True

    @property
    def causes(self) -> list[str]:
        """One sentence for each that was found to carry the loss, or why nothing was."""
        return [finding.sentence for finding in self.findings if finding.guilty] or self.notes[:1]

    @property
    def conclusion(self) -> str:
        """In a sentence: what was taken back and why, or that nothing could be."""
        why = "; ".join(self.causes)
        if self.reverted:
            return f"passed after reverting {', '.join(self.reverted)}: {why}"
        if not why:
            return "no cause was found"
        return why + (f". Expected to hold, not gated: {', '.join(self.proposed)}" if self.proposed else "")
