"""The search of an automatic plan: predict every candidate, try the most promising, judge it, learn, go on.

Everything is decided in seconds of the workload under the quality floors: `search` ranks the candidates by the
predicted objective (TTFT, TPOT or a whole request), tries the best one through the whole gate, and keeps the fastest
that passes. After each try the predictions are corrected by what was measured. A candidate that missed a quality floor
takes those that are at least as risky with it. It ends when the goal is met and nothing left is predicted to gain,
when the time is up, or when the machine's limit is reached. Layers that are slower quantized stay as they are.

What measures is a `Bench`: `optimizer.plan_bench` has the real one. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from optimizer.candidates import CACHES, CacheOption, Candidate, WeightOption
from optimizer.errors import UsageError
from optimizer.evals.gate import Floor, Measurement, judge
from optimizer.evals.predict import Bottleneck, Correction, LinearTimes, Objective, StepTimes, predict

GOALS = (
    "decode.speedup", "ttft.speedup", "throughput.speedup", "tpot.seconds", "ttft.seconds",
    "throughput.tokens_per_second", "decode.mbu", "prefill.mfu", "weights.ratio", "weights.bytes", "kv.ratio",
)  # fmt: skip
"""Metrics that every try measures, besides those of quality (`quality.<task>.<metric>.recovery` or `.ratio`)."""

LEAST_GAIN = 0.03
"""A candidate is tried only where it is predicted to be this share faster than the best so far."""

LEAST_TERM = 0.01
"""A term of a phase that is a smaller share of it is not worth relieving. Kernels are often several times above their
bytes, so a small share may hide a large one; what is above it is measured."""

TIE = 0.03
"""Predictions that are no further apart than this share are equally good: the less risky goes first."""


@dataclass(frozen=True)
class Start:
    """The model before anything is quantized: as Hugging Face runs it, and compiled over a static cache."""

    eager: StepTimes
    plain: StepTimes
    original: Bottleneck  # of an eager decode step
    bottlenecks: tuple[Bottleneck, ...]  # of prefill and of a compiled decode step


@dataclass(frozen=True)
class Attempt:
    """A candidate that went through the gate: its times, everything that was measured, and the seconds it took.

    `times` are those of the original at the start over the paired speed-ups, so that they can be put beside others
    that were measured when the machine was faster or slower. `quantize_seconds` is the part of quantizing.
    """

    times: StepTimes
    evidence: Mapping[str, Measurement]
    seconds: float
    quantize_seconds: float = 0.0
    bottlenecks: tuple[Bottleneck, ...] = ()


class Bench(Protocol):
    """What a search measures with. A `UsageError` from any method takes the candidate out, with its message."""

    def start(self) -> Start:
        """The original, measured."""

    def paged_anchor(self) -> StepTimes:
        """The compiled, unquantized model on the paged cache, keys and values as they are."""

    def cache_seconds(self, cache: CacheOption) -> float:
        """What rounding keys and values saves of a step, by their bytes and the measured bandwidth."""

    def linears(self, weights: WeightOption) -> Sequence[LinearTimes]:
        """The layers that `weights` would quantize, timed as they are and quantized."""

    def known(self, candidate: Candidate, ignore: Sequence[str]) -> bool:
        """Whether the candidate was measured before, so that `attempt` costs no time."""

    def attempt(self, candidate: Candidate, ignore: Sequence[str], predicted: StepTimes) -> tuple[StepTimes, Attempt]:
        """Keep the prediction, then carry the candidate out and measure it. Returns the prediction that was kept.

        One that was measured before is not measured again: its first prediction comes back with it.
        """

    def keep(self, candidate: Candidate) -> None:
        """The last attempt is the best so far."""


@dataclass(eq=False)
class PlanStep:
    """One candidate: what was predicted, what came of it, and why it was or was not chosen."""

    candidate: Candidate
    ignore: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    raw: StepTimes | None = None
    predicted: StepTimes | None = None
    attempt: Attempt | None = None
    missed: tuple[str, ...] = ()
    chosen: bool = False
    reason: str = ""

    @property
    def quality(self) -> Literal["passed", "missed", "not measured"]:
        """`passed`, `missed`, or `not measured`."""
        if self.attempt is None:
            return "not measured"
        return "missed" if any(metric.startswith("quality.") for metric in self.missed) else "passed"


@dataclass
class Plan:
    """What a search found. `steps` are in the order in which they were tried, then the rest by prediction."""

    start: Start
    objective: str
    floors: tuple[Floor, ...]
    steps: list[PlanStep] = field(default_factory=list)
    stopped: str = ""

    @property
    def chosen(self) -> PlanStep | None:
        """The fastest candidate that holds every floor; else the fastest that holds those of quality."""
        return next((step for step in self.steps if step.chosen), None)

    @property
    def passed(self) -> bool:
        """Whether the chosen candidate held every floor."""
        return self.chosen is not None and not self.chosen.missed

    @property
    def limits(self) -> list[str]:
        """What binds the chosen candidate, phase by phase, and how much faster than the original a phase can get."""
        best = self.chosen
        if best is None or best.attempt is None:
            return []
        first = {"prefill": self.start.eager.ttft, "decode": self.start.eager.tpot}
        return [
            f"{b}; {'it is at its limit' if b.near_limit else 'at that floor'} it would be "
            f"{first[b.phase] / b.floor_seconds:.3g}× as fast as the original"
            for b in best.attempt.bottlenecks
        ]

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(predicted, measured) TTFT and TPOT of every candidate that changes weights or cache and was tried."""
        tried = [(s.predicted, s.attempt.times) for s in self.steps if s.predicted and s.attempt and not _plain(s)]
        return [pair for p, m in tried for pair in ((p.ttft, m.ttft), (p.tpot, m.tpot))]


def _plain(step: PlanStep) -> bool:
    """Whether this is the anchor itself, whose prediction is its measurement."""
    return step.candidate.weights.quantize is None and step.candidate.cache is CACHES[0]


def described(start: Start) -> list[str]:
    """What each phase consists of before anything is quantized, in words."""
    return [f"as it was, {start.original}", *(f"compiled, {bottleneck}" for bottleneck in start.bottlenecks)]


def objective_of(goals: Sequence[Floor], output: int) -> tuple[str, Objective]:
    """What a search makes faster: the one phase that every goal is about, or a whole request."""
    about = {goal.metric.partition(".")[0] for goal in goals}
    if about and about <= {"decode", "tpot"}:
        return "TPOT", lambda times: times.tpot
    if about and about <= {"ttft", "prefill"}:
        return "TTFT", lambda times: times.ttft
    return f"a request of {output} tokens", lambda times: times.e2e(output)


def expected(start: Start, times: StepTimes, output: int) -> dict[str, Measurement]:
    """The evidence that predicted times would give, for the floors that they decide."""
    return {
        "decode.speedup": Measurement(start.eager.tpot / times.tpot),
        "ttft.speedup": Measurement(start.eager.ttft / times.ttft),
        "throughput.speedup": Measurement(start.eager.e2e(output) / times.e2e(output)),
        "tpot.seconds": Measurement(times.tpot),
        "ttft.seconds": Measurement(times.ttft),
    }


@dataclass
class Search:
    """One search; see the module. `objective` is what it makes less, and its name."""

    bench: Bench
    candidates: Sequence[Candidate]
    floors: Sequence[Floor]
    objective: tuple[str, Objective]
    output: int
    budget_seconds: float
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget_seconds) and self.budget_seconds > 0):
            raise UsageError(f"the time of a plan is {self.budget_seconds!r} seconds; it must be positive and finite")
        self._began = self.clock()
        self._corrections: dict[str, Correction] = {}
        self._objective = self.objective[1]

    def run(self) -> Plan:
        """Measure, predict, try, until there is a reason to stop."""
        start = self.bench.start()
        plan = Plan(start, self.objective[0], tuple(self.floors))
        for line in described(start):
            self.tell(line)
        steps = [self.describe(start, candidate) for candidate in self._considered(start)]
        tried: list[PlanStep] = []
        while True:
            waiting = [step for step in steps if step.raw is not None and step.attempt is None and not step.reason]
            for step in waiting:
                assert step.raw is not None
                step.predicted = self._correction(step).apply(step.raw)
            waiting.sort(key=lambda step: self._rank(start, step))
            best = self._best(tried)
            following, plan.stopped = self._next(start, waiting, best, tried)
            if following is None:
                break
            self._try(following, waiting)
            if following.attempt is not None:
                tried.append(following)
                if self._best(tried) is following:
                    self.bench.keep(following.candidate)
        self._conclude(best, tried, waiting, plan.stopped)
        plan.steps = tried + waiting + [step for step in steps if step not in tried and step not in waiting]
        return plan

    def _considered(self, start: Start) -> Iterator[Candidate]:
        """All candidates, but of a cache that relieves nothing only the first, to say why."""
        named: set[str] = set()
        for candidate in self.candidates:
            if candidate.cache.name not in named or not _useless(candidate.cache, start):
                yield candidate
            named.add(candidate.cache.name)

    def describe(self, start: Start, candidate: Candidate) -> PlanStep:
        """The candidate with its prediction, or with the reason why it is not considered."""
        step = PlanStep(candidate)
        for option in (candidate.cache, candidate.weights):
            if reason := _useless(option, start):
                step.reason = reason
                return step
        try:
            linears = list(self.bench.linears(candidate.weights)) if candidate.weights.quantize is not None else []
            anchor = start.plain if not candidate.cache.decode else self.bench.paged_anchor()
            saved = self.bench.cache_seconds(candidate.cache) if candidate.cache.bits else 0.0
        except UsageError as error:
            step.reason = f"cannot be carried out: {error}"
            return step
        worth = [kind for kind in linears if not kind.loses(self._objective)]
        losing = [kind for kind in linears if kind.loses(self._objective)]
        if linears and not worth:
            step.reason = f"every layer is slower quantized ({_milliseconds(losing, self._objective)})"
            return step
        step.ignore = tuple(name for kind in losing for name in kind.layers)
        step.kept = tuple(_milliseconds([kind], self._objective) for kind in losing)
        step.raw = predict(anchor, worth, cache_seconds=saved)
        return step

    def _correction(self, step: PlanStep) -> Correction:
        """What was learnt of candidates on the same cache. The anchor itself needs none."""
        if _plain(step):
            return Correction()
        return self._corrections.setdefault(step.candidate.cache.name, Correction())

    def _rank(self, start: Start, step: PlanStep) -> tuple[bool, int, int, float]:
        """Those predicted to hold the speed floors first, then the fastest, then the least risky."""
        assert step.predicted is not None
        seconds = self._objective(step.predicted)
        bucket = math.floor(math.log(seconds) / math.log1p(TIE))
        risk = step.candidate.weights.risk + step.candidate.cache.risk
        return not self._promises(start, step.predicted), bucket, risk, seconds

    def _promises(self, start: Start, times: StepTimes) -> bool:
        """Whether the floors that predicted times decide would hold."""
        evidence = expected(start, times, self.output)
        floors = [floor for floor in self.floors if floor.metric in evidence]
        return not floors or judge(floors, evidence).passed

    def _best(self, tried: Sequence[PlanStep]) -> PlanStep | None:
        """The fastest that holds all floors, or else those of quality."""
        good = [step for step in tried if step.quality == "passed"]
        return min(good, key=lambda s: (bool(s.missed), self._objective(_times(s))), default=None)

    def _next(
        self, start: Start, waiting: Sequence[PlanStep], best: PlanStep | None, tried: Sequence[PlanStep]
    ) -> tuple[PlanStep | None, str]:
        """The candidate to try next, the first that there is time for; or None and why the search ends."""
        if not waiting:
            return None, "no candidate is left"
        worth = [step for step in waiting if best is None or self._gains(start, step, best)]
        if not worth:
            assert best is not None
            return None, f"no candidate left is predicted to be {LEAST_GAIN:.0%} faster than {best.candidate.name}"
        spent = self.clock() - self._began
        for step in worth:
            if self.bench.known(step.candidate, step.ignore) or spent + _duration(step, tried) <= self.budget_seconds:
                return step, ""
        needed = min(_duration(step, tried) for step in worth)
        left = f" and a try takes {needed:.0f} s" if needed else ""
        return None, f"the time was up: {spent:.0f} of {self.budget_seconds:.0f} s were spent{left}"

    def _gains(self, start: Start, step: PlanStep, best: PlanStep) -> bool:
        """Whether the candidate is predicted to be faster than the best, or to hold a floor that the best missed."""
        assert step.predicted is not None
        faster = self._objective(step.predicted) < (1 - LEAST_GAIN) * self._objective(_times(best))
        return faster or (bool(best.missed) and self._promises(start, step.predicted))

    def _try(self, step: PlanStep, waiting: Sequence[PlanStep]) -> None:
        """Carry the candidate out, judge it, learn, and drop those that can only be worse."""
        assert step.raw is not None
        assert step.predicted is not None
        self.tell(f"try {step.candidate.name}: predicted {_shown(step.predicted)}")
        try:
            step.predicted, step.attempt = self.bench.attempt(step.candidate, step.ignore, step.predicted)
        except UsageError as error:
            step.reason = f"cannot be carried out: {error}"
            return
        verdict = judge(self.floors, step.attempt.evidence)
        step.missed = tuple(item.floor.metric for item in verdict.floors if not item.passed)
        self._correction(step).learn(step.raw, step.attempt.times)
        outcome = "every floor holds" if not step.missed else f"missed {', '.join(step.missed)}"
        self.tell(f"{step.candidate.name}: measured {_shown(step.attempt.times)}; {outcome}")
        if step.quality == "missed":
            for other in waiting:
                if other is not step and other.candidate.as_risky_as(step.candidate):
                    other.reason = f"at least as risky as {step.candidate.name}, which missed its quality floor"

    def _conclude(
        self, best: PlanStep | None, tried: Sequence[PlanStep], waiting: Sequence[PlanStep], stopped: str
    ) -> None:
        for step in waiting:
            step.reason = step.reason or f"not tried: {stopped}"
        for step in tried:
            if step is best:
                step.chosen = True
                step.reason = "the fastest that holds every floor" if not step.missed else (
                    f"the fastest that holds the quality floors; {', '.join(step.missed)} missed"
                )  # fmt: skip
            elif step.missed:
                step.reason = f"missed {', '.join(step.missed)}"
            else:
                assert best is not None
                step.reason = f"slower than {best.candidate.name}"


def _times(step: PlanStep) -> StepTimes:
    assert step.attempt is not None
    return step.attempt.times


def _duration(step: PlanStep, tried: Sequence[PlanStep]) -> float:
    """Seconds that a try will take, by those before it, with the time of calibrating if it does. 0 before the first."""
    done = [(s.candidate.weights.calibrates, s.attempt) for s in tried if s.attempt is not None]
    rest = max((attempt.seconds - attempt.quantize_seconds for _, attempt in done), default=0.0)
    alike = [a.quantize_seconds for calibrates, a in done if calibrates == step.candidate.weights.calibrates]
    return rest + max(alike, default=0.0)


def _useless(option: WeightOption | CacheOption, start: Start) -> str:
    """Why what the option relieves is not worth it; empty where it is, or where the option changes nothing."""
    if option.risk == 0 and "launch" in option.relieves:
        return ""
    shares = {term: max(b.share(term) for b in start.bottlenecks) for term in option.relieves}
    if max(shares.values()) >= LEAST_TERM:
        return ""
    return f"{option.name} relieves " + ", ".join(f"{term}, {share:.1%} of a step" for term, share in shares.items())


def _milliseconds(kinds: Sequence[LinearTimes], objective: Objective) -> str:
    return ", ".join(
        f"{kind.kind} {list(kind.shape)}: {objective(kind.plain) * 1e3:.3g} ms as it is, "
        f"{objective(kind.quantized) * 1e3:.3g} ms quantized"
        for kind in kinds
    )


def _shown(times: StepTimes) -> str:
    return f"TTFT {times.ttft * 1e3:.2f} ms, TPOT {times.tpot * 1e3:.3f} ms"


def with_quality(floors: Sequence[Floor], quality: float) -> list[Floor]:
    """The floors with those of quality set to keep the share `quality` of the original.

    A perplexity may grow to 1 / `quality` of it. A recovery must reach `quality`, or what it was set to if that is
    less: an interval over few items is wide, and the floor allows for it. So may a loss be 1 − `quality`, and a
    divergence ln(1 / `quality`) nats, the same growth of perplexity, or what they were set to if that is more.
    """
    if not 0 < quality <= 1:
        raise UsageError(f"--quality is {quality}; it is the share of quality to keep, above 0 and at most 1.")

    def changed(floor: Floor) -> Floor:
        if not floor.metric.startswith("quality."):
            return floor
        if floor.at_most is not None and floor.metric.endswith(".ratio"):
            return replace(floor, at_most=1 / quality)
        if floor.at_most is not None:
            given_up = -math.log(quality) if floor.metric.startswith("quality.kl.") else 1 - quality
            return replace(floor, at_most=max(given_up, floor.limit))
        return replace(floor, at_least=min(quality, floor.limit))

    return [changed(floor) for floor in floors]


def parse_goal(text: str) -> Floor:
    """A floor from `metric>=number` or `metric<=number`. `UsageError` for anything else, and for an unknown metric."""
    for sign, side in ((">=", "at_least"), ("<=", "at_most")):
        metric, found, number = text.partition(sign)
        if found and metric.strip():
            _check_goal(metric.strip())
            try:
                limit = float(number)
                return Floor(metric.strip(), *((limit, None) if side == "at_least" else (None, limit)))
            except ValueError:
                break
    raise UsageError(f"goal {text!r} is no condition. Write a metric, >= or <=, and a number: decode.speedup>=3.")


def _check_goal(metric: str) -> None:
    """A goal on what is never measured could not be met, which a user would learn only at the end."""
    if metric in GOALS or metric.startswith("quality."):
        return
    near = difflib.get_close_matches(metric, GOALS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"goal on {metric!r}, which is not measured.{hint} Metrics: {', '.join(GOALS)}, quality.….")
