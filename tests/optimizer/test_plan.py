"""The search of a plan, on made-up measurements: what is tried, in which order, what is learnt, and when it stops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from optimizer.candidates import CACHES, WEIGHTS, CacheOption, Candidate, WeightOption, candidates
from optimizer.errors import RecipeError, UsageError
from optimizer.evals.gate import Floor, Measurement
from optimizer.evals.predict import Bottleneck, LinearTimes, StepTimes
from optimizer.passes.registry import build_pass
from optimizer.plan import Attempt, Plan, Search, Start, objective_of, parse_goal, with_quality

OUTPUT = 64
PPL = "quality.task.perplexity.ratio"
QUALITY, FASTER = Floor(PPL, at_most=1.01), Floor("decode.speedup", at_least=1.0)
BY_NAME = {option.name: option for option in WEIGHTS}
SPEEDS = {  # how many times as fast the layers of each become: (prefill, decode)
    "int8": (1.0, 2.0), "int8, int8 inputs": (1.5, 2.1), "fp8": (0.9, 1.8), "w8a8-int8": (1.6, 2.0),
    "w8a8-fp8": (0.5, 0.5), "int4-g32 gptq": (0.9, 2.8), "int4-g128 gptq": (0.9, 3.4),
    "int4-g128 gptq, int8 inputs": (1.4, 3.8), "int4-g32": (0.9, 2.8), "int4-g128": (0.9, 3.4),
    "int4-g128, int8 inputs": (1.4, 3.8),
}  # fmt: skip


def bottleneck(phase: str, seconds: float, **terms: float) -> Bottleneck:
    full = {"weights": 0.0, "kv": 0.0, "compute": 0.0, "launch": 0.0, "other": 0.0} | terms
    return Bottleneck(phase, seconds, full, max(full["weights"] + full["kv"], full["compute"]))


@dataclass
class FakeBench:
    """A machine on which everything is known. `reality` multiplies predicted layers, `perplexity` says what is lost."""

    prefill: float = 0.100
    decode: float = 0.010
    kv: float = 0.00005
    share: float = 0.8  # of a phase, that its linear layers take
    speeds: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(SPEEDS))
    reality: float = 1.0
    perplexity: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    loser: str = ""
    seconds: float = 30.0
    now: float = 0.0
    log: list[str] = field(default_factory=list)
    memory: dict[str, tuple[StepTimes, Attempt]] = field(default_factory=dict)
    kept: str = ""

    def start(self) -> Start:
        self.now += 10
        eager = StepTimes(1.1 * self.prefill, 3 * self.decode)
        weights = {"weights": 0.5 * self.decode, "kv": self.kv}
        return Start(
            eager, StepTimes(self.prefill, self.decode),
            bottleneck("decode", eager.tpot, launch=2 * self.decode, **weights),
            (bottleneck("prefill", self.prefill, compute=0.6 * self.prefill),
             bottleneck("decode", self.decode, **weights)),
        )  # fmt: skip

    def paged_anchor(self) -> StepTimes:
        self.log.append("paged")
        return StepTimes(self.prefill, 0.99 * self.decode)

    def cache_seconds(self, cache: CacheOption) -> float:
        assert cache.bits == 8
        return 0.47 * self.kv

    def linears(self, weights: WeightOption) -> Sequence[LinearTimes]:
        if weights.name in self.refused:
            raise RecipeError(self.refused[weights.name])
        fast, step = self.speeds[weights.name]
        found = []
        for kind, part in (("q_proj", 0.25), ("down_proj", 0.75)):
            plain = StepTimes(part * self.share * self.prefill, part * self.share * self.decode)
            slow = 4.0 if kind == self.loser else 1.0
            quantized = StepTimes(slow * plain.ttft / fast, slow * plain.tpot / step)
            found.append(LinearTimes(kind, (f"0.{kind}", f"1.{kind}"), (8, 8), plain, quantized))
        return found

    def known(self, candidate: Candidate, ignore: Sequence[str]) -> bool:
        return f"{candidate.name} {ignore}" in self.memory

    def attempt(self, candidate: Candidate, ignore: Sequence[str], predicted: StepTimes) -> tuple[StepTimes, Attempt]:
        key = f"{candidate.name} {ignore}"
        if key not in self.memory:
            self.now += self.seconds
            self.log.append(candidate.name)
            self.memory[key] = predicted, self._measure(candidate, predicted)
        return self.memory[key]

    def _measure(self, candidate: Candidate, predicted: StepTimes) -> Attempt:
        times = StepTimes(predicted.ttft, predicted.tpot * (1.0 if candidate.weights.risk == 0 else self.reality))
        eager = StepTimes(1.1 * self.prefill, 3 * self.decode)
        evidence = {
            PPL: Measurement(self.perplexity.get(candidate.weights.name, 1.0)),
            "decode.speedup": Measurement(eager.tpot / times.tpot),
            "ttft.speedup": Measurement(eager.ttft / times.ttft),
        }
        after = bottleneck("decode", times.tpot, weights=0.002, kv=self.kv)
        return Attempt(times, evidence, self.seconds, bottlenecks=(after,))

    def keep(self, candidate: Candidate) -> None:
        self.kept = candidate.name


def search(bench: FakeBench, *floors: Floor, goals: Sequence[Floor] = (), budget: float = 1e6, **options: Any) -> Plan:
    floors = floors or (QUALITY, FASTER)
    return Search(
        bench, candidates(), [*floors, *goals], objective_of(goals, OUTPUT), OUTPUT, budget,
        clock=lambda: bench.now, **options,
    ).run()  # fmt: skip


def chosen(plan: Plan) -> str:
    assert plan.chosen is not None
    return plan.chosen.candidate.name


def reasons(plan: Plan) -> dict[str, str]:
    return {step.candidate.name: step.reason for step in plan.steps}


def test_the_fastest_is_tried_first_and_chosen_when_it_passes() -> None:
    bench = FakeBench()
    plan = search(bench)
    assert bench.log == ["int4-g128 gptq, int8 inputs"]  # of two that are equally fast, the less risky
    assert chosen(plan) == bench.kept == "int4-g128 gptq, int8 inputs"
    assert plan.passed
    assert "no candidate left is predicted to be 3% faster" in plan.stopped


def test_a_quality_miss_goes_on_with_the_next_less_aggressive_and_skips_the_more_risky() -> None:
    bench = FakeBench(perplexity={name: 1.2 for name in SPEEDS if name.startswith("int4")})
    plan = search(bench)
    assert bench.log == ["int4-g128 gptq, int8 inputs", "int4-g128 gptq", "int4-g32 gptq", "int8, int8 inputs"]
    assert chosen(plan) == "int8, int8 inputs"
    assert plan.steps[0].quality == "missed"
    assert reasons(plan)["int4-g128"] == (
        "at least as risky as int4-g128 gptq, int8 inputs, which missed its quality floor"
    )
    assert reasons(plan)["int4-g128 gptq"] == f"missed {PPL}"


def test_where_every_rounding_costs_too_much_the_model_stays_as_it_is_compiled() -> None:
    plan = search(FakeBench(perplexity=dict.fromkeys(SPEEDS, 1.5)))
    assert chosen(plan) == "unquantized"
    assert plan.passed


def test_nothing_is_chosen_where_even_the_compiled_model_misses_its_quality() -> None:
    plan = search(FakeBench(perplexity=dict.fromkeys((*SPEEDS, "unquantized"), 1.5)))
    assert plan.chosen is None
    assert not plan.passed
    assert plan.stopped == "no candidate is left"


def test_a_prefill_goal_picks_eight_bit_products_and_a_decode_goal_four_bit_weights() -> None:
    assert chosen(search(FakeBench(), goals=[Floor("ttft.speedup", at_least=1.2)])) == "w8a8-int8"
    assert "int4" in chosen(search(FakeBench(), goals=[Floor("decode.speedup", at_least=3.0)]))


def test_a_large_batch_picks_eight_bit_products() -> None:
    """Of many rows, int4 kernels decode weights for products that compute binds: they lose, int8 products win."""
    slow = {name: (0.9, 0.8) for name in SPEEDS if name.startswith(("int4", "fp8"))}
    many = slow | {"int8": (1.0, 0.9), "int8, int8 inputs": (1.5, 1.6), "w8a8-int8": (1.6, 1.7), "w8a8-fp8": (0.5, 0.5)}
    plan = search(FakeBench(speeds=many))
    assert chosen(plan) == "w8a8-int8"
    assert "every layer is slower quantized (q_proj [8, 8]: " in reasons(plan)["int4-g128"]
    assert "int4-g128" not in FakeBench(speeds=many).log


def test_a_cache_that_binds_is_rounded_and_one_that_does_not_is_not_even_measured() -> None:
    bench = FakeBench(kv=0.006)
    plan = search(bench)
    assert chosen(plan) == "int4-g128 gptq, int8 inputs, kv int8"
    assert bench.log[0] == "paged"
    small = FakeBench()
    assert "kv int8 relieves kv, 0.5% of a step" in reasons(search(small))["unquantized, kv int8"]
    assert "paged" not in small.log


def test_a_layer_that_is_slower_quantized_stays_as_it_is_and_the_plan_says_which_and_why() -> None:
    plan = search(FakeBench(loser="q_proj"))
    best = plan.chosen
    assert best is not None
    assert best.ignore == ("0.q_proj", "1.q_proj")
    (kept,) = best.kept
    assert kept.startswith("q_proj [8, 8]: ")
    assert "ms as it is" in kept
    all_of_it = FakeBench().linears(best.candidate.weights)
    saved = sum(k.plain.tpot - k.quantized.tpot for k in all_of_it if k.kind == "down_proj")
    assert best.raw is not None
    assert best.raw.tpot == pytest.approx(0.010 - saved)


def test_predictions_are_corrected_by_what_was_measured() -> None:
    missing = {name: 1.2 for name in SPEEDS if name.startswith("int4")}
    plan = search(FakeBench(reality=1.5, perplexity=missing))
    tried = [step for step in plan.steps if step.attempt is not None and step.candidate.weights.quantize]
    errors = [s.predicted.tpot / s.attempt.times.tpot for s in tried if s.predicted and s.attempt and s.raw]
    assert tried[0].predicted == tried[0].raw
    assert tried[1].predicted is not None
    assert tried[1].raw is not None
    assert tried[1].predicted.tpot > 1.2 * tried[1].raw.tpot  # the root of 1.5
    assert len(errors) >= 3


def test_a_faster_one_is_still_tried_after_a_disappointment() -> None:
    """The first turns out at half the speed that was predicted; others are then better than it."""
    bench = FakeBench()
    measure = bench._measure

    def disappointing(candidate: Candidate, predicted: StepTimes) -> Attempt:
        found = measure(candidate, predicted)
        if "int4" not in candidate.name:
            return found
        slow = StepTimes(found.times.ttft, 4 * found.times.tpot)
        return Attempt(slow, {**found.evidence, "decode.speedup": Measurement(0.03 / slow.tpot)}, found.seconds)

    bench._measure = disappointing  # type: ignore[method-assign]
    plan = search(bench)
    assert len(bench.log) > 1
    assert chosen(plan) == min(
        (s for s in plan.steps if s.attempt is not None), key=lambda s: s.attempt.times.e2e(OUTPUT) if s.attempt else 0
    ).candidate.name  # fmt: skip


def test_no_try_is_begun_that_would_end_after_the_time() -> None:
    bench = FakeBench(perplexity={name: 1.2 for name in SPEEDS if name.startswith("int4")}, seconds=100)
    plan = search(bench, budget=250)  # 10 to measure, then 100 each
    assert len(bench.log) == 2
    assert bench.now <= 250
    assert plan.stopped == "the time was up: 210 of 250 s were spent and a try takes 100 s"
    assert plan.chosen is None
    assert "not tried: the time was up" in reasons(plan)["int8, int8 inputs"]


def test_a_quick_try_is_made_where_there_is_no_time_for_a_long_one() -> None:
    bench = FakeBench(perplexity={name: 1.2 for name in SPEEDS if name.startswith("int4")})
    attempt = bench.attempt

    def slow_calibration(candidate: Candidate, *rest: Any) -> tuple[StepTimes, Attempt]:
        predicted, found = attempt(candidate, *rest)
        calibrates = candidate.weights.calibrates
        bench.now += 70 if calibrates else 0
        return predicted, replace(found, seconds=100 if calibrates else 30, quantize_seconds=70 if calibrates else 0)

    bench.attempt = slow_calibration  # type: ignore[method-assign]
    plan = search(bench, budget=260)  # 10 to measure, 100 each with calibration, 30 without
    assert bench.log[-1] == chosen(plan) == "int8, int8 inputs"


def test_a_search_without_time_for_a_single_try_says_so() -> None:
    plan = search(FakeBench(), budget=5)
    assert plan.chosen is None
    assert plan.stopped == "the time was up: 10 of 5 s were spent"


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        search(FakeBench(), budget=budget)


def test_a_search_that_was_killed_goes_on_without_measuring_again_and_ends_the_same() -> None:
    missing = {name: 1.2 for name in SPEEDS if name.startswith("int4")}
    whole = FakeBench(perplexity=missing)
    expected = search(whole)
    for tries in range(len(whole.log)):
        bench = FakeBench(perplexity=missing)
        attempt, left = bench.attempt, itertools.count()

        def killed(*args: Any, attempt: Any = attempt, left: Any = left, tries: int = tries) -> Any:
            if next(left) == tries:
                raise KeyboardInterrupt
            return attempt(*args)

        bench.attempt = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            search(bench)
        bench.attempt = attempt  # type: ignore[method-assign]
        plan = search(bench)
        assert bench.log == whole.log  # each once, over both runs
        assert chosen(plan) == chosen(expected)
        assert [s.predicted for s in plan.steps] == [s.predicted for s in expected.steps]


def test_known_results_are_taken_when_the_time_is_up() -> None:
    bench = FakeBench()
    search(bench)
    bench.now = 0.0
    assert chosen(search(bench, budget=1)) == "int4-g128 gptq, int8 inputs"


def test_a_goal_that_is_not_met_keeps_the_fastest_and_says_what_binds() -> None:
    plan = search(FakeBench(), goals=[Floor("decode.speedup", at_least=100)])
    assert not plan.passed
    best = plan.chosen
    assert best is not None
    assert best.missed == ("decode.speedup",)
    assert best.reason == "the fastest that holds the quality floors; decode.speedup missed"
    (limit,) = plan.limits
    assert "weights binds" in limit
    assert "14.6× as fast as the original" in limit  # 30 ms before, 2 + 0.05 ms must be read


def test_one_that_cannot_be_carried_out_is_named_with_the_reason_and_the_rest_goes_on() -> None:
    bench = FakeBench(refused={name: f"{name} does not fit" for name in SPEEDS if name.startswith("int4")})
    plan = search(bench)
    assert "int4" not in chosen(plan)
    assert reasons(plan)["int4-g128"] == "cannot be carried out: int4-g128 does not fit"


def test_an_attempt_that_is_refused_does_not_end_the_search() -> None:
    bench = FakeBench()
    attempt = bench.attempt

    def refuses(candidate: Candidate, *rest: Any) -> Any:
        if "int4" in candidate.name:
            raise RecipeError("no room")
        return attempt(candidate, *rest)

    bench.attempt = refuses  # type: ignore[method-assign]
    plan = search(bench)
    assert "int4" not in chosen(plan)
    assert reasons(plan)["int4-g128 gptq, int8 inputs"] == "cannot be carried out: no room"


def test_a_candidate_that_is_predicted_to_miss_a_speed_floor_goes_last() -> None:
    """The fastest request is one whose first token would come too late."""
    speeds = SPEEDS | {name: (0.5, SPEEDS[name][1]) for name in SPEEDS if name.startswith("int4")}
    bench = FakeBench(speeds=speeds)
    plan = search(bench, QUALITY, Floor("ttft.speedup", at_least=0.9))
    assert chosen(plan) == bench.log[0] == "int8, int8 inputs"


def test_the_anchor_is_no_evidence_for_the_predictions() -> None:
    plan = search(FakeBench(perplexity=dict.fromkeys(SPEEDS, 1.5)))
    tried = [s for s in plan.steps if s.attempt is not None]
    assert tried[-1].candidate.name == "unquantized"
    assert len(plan.pairs) == 2 * (len(tried) - 1)


def test_every_candidate_has_passes_that_exist() -> None:
    for candidate in candidates():
        for spec in candidate.passes(["lm_head"], decode={"max_context": 64}, fuse=True):
            build_pass(spec["name"], {key: value for key, value in spec.items() if key != "name"})
    assert len({candidate.name for candidate in candidates()}) == len(WEIGHTS) * len(CACHES)


def test_risk_is_compared_in_both_kinds() -> None:
    int8, int4 = (Candidate(BY_NAME[name]) for name in ("int8", "int4-g128"))
    assert int4.as_risky_as(int8)
    assert not int8.as_risky_as(int4)
    assert not Candidate(BY_NAME["int8"], CACHES[2]).as_risky_as(int4)
    assert not int4.as_risky_as(Candidate(BY_NAME["int8"], CACHES[2]))


@pytest.mark.parametrize(
    ("goals", "name"),
    [
        ((), "a request of 64 tokens"),
        (("decode.speedup>=3", "tpot.seconds<=0.1"), "TPOT"),
        (("ttft.speedup>=2",), "TTFT"),
        (("decode.speedup>=2", "ttft.speedup>=1"), "a request of 64 tokens"),
        (("throughput.speedup>=2",), "a request of 64 tokens"),
    ],
)
def test_goals_say_what_is_made_faster(goals: tuple[str, ...], name: str) -> None:
    assert objective_of([parse_goal(goal) for goal in goals], 64)[0] == name


@pytest.mark.parametrize(
    "text", ["", "decode.speedup", "decode.speedup>=", "decode.speedup=3", "decode.speedup>=nan", ">=fast", ">=3"]
)
def test_a_goal_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_goal(text)


def test_a_goal_on_what_is_not_measured_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'decode.speedup'"):
        parse_goal("decode.spedup>=3")
    assert parse_goal("quality.task.acc.recovery>=0.9").metric == "quality.task.acc.recovery"


def test_goals_are_floors() -> None:
    assert parse_goal("decode.speedup >= 3") == Floor("decode.speedup", at_least=3.0)
    assert parse_goal("tpot.seconds<=2e-3") == Floor("tpot.seconds", at_most=0.002)


def test_quality_sets_what_perplexity_may_grow_to_and_loosens_a_recovery_no_further() -> None:
    floors = [QUALITY, Floor("quality.task.acc.recovery", at_least=0.93), FASTER]
    found = with_quality(floors, 0.9)
    assert found[0].at_most == pytest.approx(1 / 0.9)
    assert found[1].at_least == 0.9
    assert found[2] == FASTER
    assert with_quality(floors, 0.99)[1].at_least == 0.93
    others = [Floor("quality.t.acc.loss", at_most=0.04), Floor("quality.kl.mean", at_most=0.002)]
    assert [f.at_most for f in with_quality(others, 0.9)] == [pytest.approx(0.1), pytest.approx(0.10536, rel=1e-4)]
    assert [f.at_most for f in with_quality(others, 0.999)] == [0.04, 0.002]
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="share of quality"):
            with_quality(floors, wrong)


def test_the_search_tells_what_it_does() -> None:
    said: list[str] = []
    tell: Callable[[str], None] = said.append
    search(FakeBench(), tell=tell)
    assert "launch binds" in said[0]
    assert any(line.startswith("try int4-g128 gptq, int8 inputs: predicted TTFT") for line in said)
    assert said[-1].endswith("every floor holds")
