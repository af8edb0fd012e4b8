"""The part of a report that puts the forms of a model side by side: the original, PyTorch's runner, each export."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from optimizer.report_units import MISSING, NONE, NUMBER, interval


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class FormScore(_Entry):
    """What one form reached on a metric, and that over the original's on the same documents; None for the original."""

    label: str
    value: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    @property
    def compared(self) -> str:
        """The ratio with its interval; empty for the original."""
        return "" if self.ratio is None else interval(NUMBER, self.ratio, self.ratio_low, self.ratio_high)


class FormEntry(_Entry):
    """One form: `bytes` are its weights, or the files of an export. Times are medians from the rounds of the workload.

    `released` marks the one that the floors judged. `reason` says why one was not measured here.
    """

    name: str
    runtime: str
    released: bool = False
    bytes: Annotated[int, Field(ge=0)]
    build_seconds: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    scores: list[FormScore] = []
    reason: str = ""
    notes: list[str] = []

    @property
    def missing(self) -> str:
        """What stands where there is no measurement."""
        return f"{MISSING}: {self.reason}" if self.reason else MISSING

    def cells(self, labels: list[str]) -> list[tuple[str, str]]:
        """For each metric its value, and the ratio over the original's; empty for a form that was not measured."""
        found = {score.label: score for score in self.scores}
        return [
            (NUMBER.format(found[label].value), found[label].compared) if label in found else (NONE, "")
            for label in labels
        ]
