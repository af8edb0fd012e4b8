"""What the search takes for a loss, and what it expects the gate to say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer.evals.gate import Floor, Measurement
from optimizer.probe import QualityProbe, nats

RECOVERY = Floor("quality.t.acc.recovery", at_least=0.95)
RATIO = Floor("quality.t.ppl.ratio", at_most=1.1)


@pytest.mark.parametrize(
    ("floor", "value", "loss"),
    [
        (RECOVERY, 1.0, 0.0), (RECOVERY, 0.5, math.log(2)), (RECOVERY, 2.0, -math.log(2)), (RECOVERY, 0.0, math.inf),
        (RATIO, 1.0, 0.0), (RATIO, 2.0, math.log(2)), (RATIO, math.inf, math.inf), (RATIO, math.nan, math.inf),
        (RECOVERY, math.nan, math.inf), (Floor("quality.t.acc.loss", at_most=0.01), 0.02, 0.02),
    ],
)  # fmt: skip
def test_a_loss_is_0_for_the_original_and_grows_towards_what_the_floor_forbids(
    floor: Floor, value: float, loss: float
) -> None:
    assert nats(floor, value) == pytest.approx(loss)


def probe(floor: Floor, gate: Measurement, **found: Measurement) -> Any:
    """A probe whose candidates have been measured: the refused job, and one for each name."""
    one = QualityProbe.__new__(QualityProbe)
    one.floors, one.refused, one.scales = [floor], {frozenset()}, {}
    one.outcome = SimpleNamespace(evidence={floor.metric: gate})  # type: ignore[assignment]
    one.found = {frozenset({name}): {floor.metric: m} for name, m in found.items() if name != "refused"}  # type: ignore[misc]
    one.found[frozenset()] = {floor.metric: found["refused"]}
    one.calibrate(frozenset(), {floor.metric: gate})
    return one


def test_a_refused_candidate_misses_whatever_the_search_sees() -> None:
    same = Measurement(1.0, 0.999, 1.001, 10)
    one = probe(RATIO, Measurement(1.2, 1.15, 1.25, 40), refused=same)
    assert one.measure(frozenset()).misses


def test_losses_are_scaled_by_what_the_refused_job_lost_here_and_there() -> None:
    """Half the loss here of what the gate saw: another candidate is expected to lose twice what it shows."""
    gate = Measurement(1.2, 1.2, 1.2, 40)
    here = math.exp(math.log(1.2) / 2)
    value = math.exp(0.06)  # twice that is 0.12 nats; the floor allows 0.095
    one = probe(RATIO, gate, refused=Measurement(here, here, here, 40), other=Measurement(value, value, value, 40))
    assert one.measure(frozenset({"other"})).miss == pytest.approx(0.12 - math.log(1.1))
    one.scales[RATIO.metric] = 1.0
    assert one.measure(frozenset({"other"})).holds


def test_a_scale_is_at_most_three() -> None:
    one = probe(RATIO, Measurement(2.0, 2.0, 2.0, 40), refused=Measurement(1.01, 1.01, 1.01, 40))
    assert one.scales[RATIO.metric] == 3


def test_the_interval_is_narrowed_to_the_documents_of_the_gate() -> None:
    """With a quarter of the gate's documents an interval is twice as wide as the gate's would be."""
    gate = Measurement(1.2, 1.1, 1.3, 400)
    wide = Measurement(1.0, 1.0, math.exp(0.18), 100)
    one = probe(RATIO, gate, refused=gate, other=wide)
    assert one.measure(frozenset({"other"})).miss == pytest.approx(0.09 - math.log(1.1))
    assert one.measure(frozenset({"other"})).holds


def test_the_unfavourable_end_counts_unless_the_floor_judges_the_value() -> None:
    gate = Measurement(0.9, 0.85, 0.95, 100)
    shown = Measurement(0.97, 0.93, 1.0, 100)
    for bound, holds in (("interval", False), ("value", True)):
        floor = Floor(RECOVERY.metric, at_least=0.95, bound=bound)  # type: ignore[arg-type]
        assert probe(floor, gate, refused=gate, other=shown).measure(frozenset({"other"})).holds is holds


def test_what_the_gate_refuses_later_teaches_it_to_ask_for_more() -> None:
    gate = Measurement(1.3, 1.3, 1.3, 40)
    half = Measurement(1.08, 1.08, 1.08, 40)
    one = probe(RATIO, gate, refused=gate, some=half, more=Measurement(1.05, 1.05, 1.05, 40))
    assert one.measure(frozenset({"some"})).holds
    one.calibrate(frozenset({"some"}), {RATIO.metric: Measurement(1.2, 1.2, 1.2, 40)})
    assert one.measure(frozenset({"some"})).misses
    assert one.measure(frozenset({"more"})).misses  # 1.05 here is 1.122 there
    assert one.measure(frozenset()).misses
