from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.evals.gate import Floor, Measurement, judge
from optimizer.evals.power import Sampling, items_needed

GOOD = {
    "quality.reference_next_line.acc.recovery": Measurement(0.99, 0.975, 1.01, 200),
    "quality.reference_perplexity.word_perplexity.ratio": Measurement(1.01, 1.005, 1.015, 100),
    "quality.reference_next_line.acc.loss": Measurement(0.002, -0.006, 0.009, 700),
    "quality.reference_next_line.acc.flip_rate": Measurement(0.02, 0.01, 0.035, 700),
    "quality.reference_next_line.acc.lost_rate": Measurement(0.012, 0.005, 0.02, 700),
    "quality.gsm8k.exact_match,strict-match.recovery": Measurement(0.99, 0.975, 1.01, 200),
    "quality.gsm8k.exact_match,strict-match.loss": Measurement(0.002, -0.006, 0.009, 700),
    "quality.kl.mean": Measurement(0.001, 0.0008, 0.0012, 16, "nats"),
    "quality.kl.p99": Measurement(0.02, 0.015, 0.03, 16, "nats"),
    "quality.kl.top1_agreement": Measurement(0.98, 0.975, 0.985, 16),
    "decode.speedup@b8c512": Measurement(2.4, 2.3, 2.5, 5, "x"),
    "decode.attainable@b8c512": Measurement(0.6, 0.58, 0.63, 5),
    "decode.speedup": Measurement(2.4, 2.3, 2.5, 20, "x"),
    "prefill.speedup": Measurement(1.3, 1.25, 1.35),
    "decode.mbu": Measurement(0.81, 0.8, 0.82),
    "prefill.mfu": Measurement(0.5, 0.49, 0.51),
    "ttft.seconds": Measurement(0.08, 0.07, 0.09, unit="s"),
    "tpot.seconds": Measurement(0.004, 0.0039, 0.0041, unit="s"),
    "throughput.tokens_per_second": Measurement(250.0, 240.0, 260.0),
    "throughput.speedup": Measurement(2.0, 1.9, 2.1),
    "weights.ratio": Measurement(0.29),
    "weights.bytes": Measurement(6.4e6),
    "memory.peak_bytes": Measurement(9e7),
}
FLOORS = {
    "quality.reference_next_line.acc.recovery": Floor("quality.reference_next_line.acc.recovery", at_least=0.97),
    "quality.reference_perplexity.word_perplexity.ratio": Floor(
        "quality.reference_perplexity.word_perplexity.ratio", at_most=1.02
    ),
    "quality.reference_next_line.acc.loss": Floor("quality.reference_next_line.acc.loss", at_most=0.01),
    "quality.reference_next_line.acc.flip_rate": Floor("quality.reference_next_line.acc.flip_rate", at_most=0.035),
    "quality.reference_next_line.acc.lost_rate": Floor("quality.reference_next_line.acc.lost_rate", at_most=0.02),
    "quality.gsm8k.exact_match,strict-match.recovery": Floor(
        "quality.gsm8k.exact_match,strict-match.recovery", at_least=0.97
    ),
    "quality.gsm8k.exact_match,strict-match.loss": Floor("quality.gsm8k.exact_match,strict-match.loss", at_most=0.01),
    "quality.kl.mean": Floor("quality.kl.mean", at_most=0.002),
    "quality.kl.p99": Floor("quality.kl.p99", at_most=0.03),
    "quality.kl.top1_agreement": Floor("quality.kl.top1_agreement", at_least=0.97),
    "decode.speedup@b8c512": Floor("decode.speedup@b8c512", at_least=2.0),
    "decode.attainable@b8c512": Floor("decode.attainable@b8c512", at_least=0.5),
    "decode.speedup": Floor("decode.speedup", at_least=2.0),
    "prefill.speedup": Floor("prefill.speedup", at_least=1.2),
    "decode.mbu": Floor("decode.mbu", at_least=0.55),
    "prefill.mfu": Floor("prefill.mfu", at_least=0.4),
    "ttft.seconds": Floor("ttft.seconds", at_most=0.1),
    "tpot.seconds": Floor("tpot.seconds", at_most=0.005),
    "throughput.tokens_per_second": Floor("throughput.tokens_per_second", at_least=200),
    "throughput.speedup": Floor("throughput.speedup", at_least=1.5),
    "weights.ratio": Floor("weights.ratio", at_most=0.3),
    "weights.bytes": Floor("weights.bytes", at_most=7e6),
    "memory.peak_bytes": Floor("memory.peak_bytes", at_most=1e8),
}


def ruin(floor: Floor, measured: Measurement) -> Measurement:
    factor = 0.5 if floor.at_least is not None else 2.0
    ends = (None if end is None else end * factor for end in (measured.low, measured.high))
    return replace(measured, value=measured.value * factor, low=next(ends), high=next(ends))


def test_a_good_model_passes_every_floor():
    verdict = judge(list(FLOORS.values()), GOOD)
    assert verdict.passed
    assert [item.measurement for item in verdict.floors] == [GOOD[name] for name in FLOORS]
    assert all(item.passed and item.floor.metric in item.reason for item in verdict.floors)


@pytest.mark.parametrize("metric", FLOORS)
def test_each_kind_of_floor_fails_a_ruined_model(metric):
    verdict = judge(list(FLOORS.values()), GOOD | {metric: ruin(FLOORS[metric], GOOD[metric])})
    assert not verdict.passed
    assert [item.floor.metric for item in verdict.floors if not item.passed] == [metric]


@pytest.mark.parametrize("metric", FLOORS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["value", "pessimistic end"])
def test_what_is_not_finite_fails(metric, number, part):
    floor = FLOORS[metric]
    end = "low" if floor.at_least is not None else "high"
    broken = replace(GOOD[metric], **{"value" if part == "value" else end: number})
    verdict = judge([floor], {metric: broken})
    assert not verdict.passed
    assert "finite" in verdict.floors[0].reason


@pytest.mark.parametrize("metric", FLOORS)
def test_each_kind_of_floor_fails_when_it_was_not_measured(metric):
    verdict = judge([FLOORS[metric]], {name: at for name, at in GOOD.items() if name != metric})
    assert not verdict.passed
    assert f"{metric} was not measured" in verdict.floors[0].reason


def loss(value: float, low: float, high: float, samples: int, **options) -> dict[str, Measurement]:
    sampling = Sampling(0.2, 0.05, 0.8, flip_rate=0.04, **options)
    return {"q.loss": Measurement(value, low, high, samples, sampling=sampling)}


def test_too_few_items_are_told_from_a_worse_model():
    floor = Floor("q.loss", at_most=0.01)
    (open_still,) = judge([floor], loss(0.0, -0.02, 0.02, 500)).floors
    needed = items_needed(0.01, flips=0.04)
    assert (open_still.passed, open_still.inconclusive, open_still.items_needed) == (False, True, needed)
    assert f"this limit needs about {needed:,} items" in open_still.reason
    assert "there were 500" in open_still.reason
    (worse,) = judge([floor], loss(0.05, 0.02, 0.08, 500)).floors
    assert (worse.passed, worse.inconclusive) == (False, False)
    assert "needs about" not in worse.reason
    (unlucky,) = judge([floor], loss(0.005, -0.001, 0.011, 5000)).floors
    assert unlucky.inconclusive
    assert "needs about" not in unlucky.reason  # there were enough
    assert judge([floor], loss(0.0, -0.005, 0.005, 5000)).floors[0].items_needed == needed


def test_a_margin_of_zero_needs_more_than_there_can_be():
    (verdict,) = judge([Floor("q.loss", at_most=0.0)], loss(0.0, -0.01, 0.01, 500)).floors
    assert not verdict.passed
    assert "no number of items" in verdict.reason
    assert judge([Floor("q.loss", at_most=0.0)], loss(-0.02, -0.03, -0.01, 500)).passed  # it is better


def test_noise_does_not_pass_a_floor():
    noisy = {"decode.speedup": Measurement(2.1, 1.7, 2.5)}
    assert not judge([Floor("decode.speedup", at_least=2.0)], noisy).passed
    assert "low end" in judge([Floor("decode.speedup", at_least=2.0)], noisy).floors[0].reason
    assert judge([Floor("decode.speedup", at_least=2.0, bound="value")], noisy).passed
    slow = {"ttft.seconds": Measurement(0.09, 0.05, 0.2)}
    assert not judge([Floor("ttft.seconds", at_most=0.1)], slow).passed
    assert judge([Floor("ttft.seconds", at_most=0.1, bound="value")], slow).passed


def test_an_interval_that_misses_its_value_cannot_pass_it():
    assert not judge([Floor("decode.speedup", at_least=2.0)], {"decode.speedup": Measurement(1.0, 3.0, 4.0)}).passed


def test_the_limit_itself_passes():
    assert judge([Floor("m", at_least=2.0), Floor("m", at_most=2.0)], {"m": Measurement(2.0, 2.0, 2.0)}).passed


def test_a_missing_metric_fails_and_names_its_neighbours():
    verdict = judge([Floor("quality.reference_nextline.acc.recovery", at_least=0.9), FLOORS["decode.speedup"]], GOOD)
    assert not verdict.passed
    first, second = verdict.floors
    assert first.measurement is None
    assert "quality.reference_next_line.acc.recovery" in first.reason
    assert second.passed
    assert "nothing was" in judge([FLOORS["decode.speedup"]], {}).floors[0].reason


def test_no_floors_is_not_a_pass():
    with pytest.raises(UsageError, match="no floors"):
        judge([], GOOD)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"at_least": 1.0, "at_most": 2.0},
        {"at_least": math.nan},
        {"at_most": math.inf},
        {"at_most": 1, "bound": "x"},
    ],
)
def test_a_floor_must_make_sense(options):
    with pytest.raises(UsageError, match=r"decode\.speedup"):
        Floor("decode.speedup", **options)


numbers = st.floats(allow_nan=True, allow_infinity=True)
ends = st.none() | numbers
amounts = st.floats(0, 1e6)


@given(value=numbers, low=ends, high=ends, limit=st.floats(-1e9, 1e9), least=st.booleans(), worse=amounts)
def test_worsening_never_turns_a_failure_into_a_pass(value, low, high, limit, least, worse):
    floor = Floor("m", at_least=limit) if least else Floor("m", at_most=limit)
    step = -worse if least else worse
    before = Measurement(value, low, high)
    after = Measurement(value + step, *(None if end is None else end + step for end in (low, high)))
    assert judge([floor], {"m": before}).passed or not judge([floor], {"m": after}).passed


@given(value=numbers, low=ends, high=ends, limit=st.floats(-1e9, 1e9), least=st.booleans())
def test_a_pass_is_always_backed_by_the_numbers(value, low, high, limit, least):
    floor = Floor("m", at_least=limit) if least else Floor("m", at_most=limit)
    if judge([floor], {"m": Measurement(value, low, high)}).passed:
        end = low if least else high
        seen = [value] + ([] if end is None else [end])
        assert all(number >= limit if least else number <= limit for number in seen)


@given(st.lists(st.sampled_from(sorted(FLOORS)), min_size=1), st.sampled_from(sorted(FLOORS)))
def test_one_failing_floor_is_enough(names, ruined):
    evidence = GOOD | {ruined: ruin(FLOORS[ruined], GOOD[ruined])}
    assert judge([FLOORS[name] for name in names], evidence).passed == (ruined not in names)
