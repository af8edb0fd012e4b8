"""The part of a report that says what bound the original model and what binds the optimized one, phase by phase."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class BoundEntry(BaseModel):
    """One phase of one model on the run's workload.

    `attained` is its floor on the measured roofline over its time, `term` the part of the step that takes the most,
    with its `share`; `next` is the intervention that would save a request the most, with the gain that is predicted.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    variant: Literal["original", "optimized"]
    phase: Literal["prefill", "decode"]
    seconds: float
    attained: float
    verdict: str
    why: str
    term: str
    share: float
    next: str | None = None
    next_gain: float | None = None
