"""What a change of a model will gain, in seconds, before it is tried.

A step is taken apart into its linear layers and the rest. Both halves are measured: the whole step of the unquantized
model, as it is served, and the layers alone, as they are and quantized, at the workload's row counts. Then

    seconds(candidate) = correction · (seconds(anchor) − Σ plain + Σ quantized − bytes of cache saved / bandwidth)

over the layers that the candidate quantizes, for prefill (TTFT) and a decode step (TPOT) alike. What the sum leaves out
(kernels called alone pay a dispatch that a compiled step does not, another state of caches) shows as the ratio of
measured to predicted seconds of the candidates that were tried; `Correction` learns it, drawn towards 1 while it has
seen few.

`Bottleneck` says what a step's time consists of at least, so that only candidates that relieve a real term are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from optimizer.errors import UsageError
from optimizer.evals.roofline import Roofline, StepCost

LOSES = 1.02
"""A layer is slower quantized when it takes this many times as long: less is within the spread of two medians."""

NEAR_LIMIT = 0.8
"""Share of a step that its floor makes up from which on nothing worth the work is left."""


TERMS = ("weights", "kv", "compute", "launch", "other")
"""What a phase's time consists of; see `Bottleneck`."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds to the first token (prefill), and of each later one (a decode step)."""

    ttft: float
    tpot: float

    def e2e(self, output: int) -> float:
        """Seconds of a request of `output` tokens."""
        return self.ttft + (output - 1) * self.tpot

    def __mul__(self, factors: StepTimes) -> StepTimes:
        """Each time with its factor."""
        return StepTimes(self.ttft * factors.ttft, self.tpot * factors.tpot)

    def __truediv__(self, other: StepTimes) -> StepTimes:
        """The ratio of each."""
        return StepTimes(self.ttft / other.ttft, self.tpot / other.tpot)


Objective = Callable[[StepTimes], float]
"""The seconds that a search makes less: TTFT, TPOT, or a whole request."""


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """Seconds of all layers of one kind (one name, one shape) in a prefill and in a decode step.

    `layers` are their names, siblings that are served merged together; `shape` is `[N, K]` of one product.
    """

    kind: str
    layers: tuple[str, ...]
    shape: tuple[int, int]
    plain: StepTimes
    quantized: StepTimes

    def loses(self, objective: Objective) -> bool:
        """Whether quantizing these layers costs time."""
        return objective(self.quantized) > LOSES * objective(self.plain)


def predict(
    anchor: StepTimes,
    linears: Iterable[LinearTimes],
    *,
    cache_seconds: float = 0.0,
    correction: Correction | None = None,
) -> StepTimes:
    """The step times once `linears` are quantized, `anchor` being those of the unquantized model.

    `cache_seconds` is what a smaller cache saves of a decode step. No prediction is below a hundredth of the anchor.
    """
    changed = list(linears)
    ttft = anchor.ttft + sum(kind.quantized.ttft - kind.plain.ttft for kind in changed)
    tpot = anchor.tpot + sum(kind.quantized.tpot - kind.plain.tpot for kind in changed) - cache_seconds
    found = StepTimes(max(ttft, anchor.ttft / 100), max(tpot, anchor.tpot / 100))
    return correction.apply(found) if correction is not None else found


@dataclass
class Correction:
    """Ratios of measured to predicted seconds so far.

    With n of them the factor is their geometric mean to the power n / (n + 1).
    """

    ratios: list[StepTimes] = field(default_factory=list)

    def learn(self, predicted: StepTimes, measured: StepTimes) -> None:
        """Take in a candidate that was measured; `predicted` is without any correction."""
        values = (*_pair(predicted), *_pair(measured))
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UsageError(f"Correction.learn: {predicted} and {measured} must be positive and finite seconds")
        self.ratios.append(measured / predicted)

    def apply(self, predicted: StepTimes) -> StepTimes:
        """The prediction times what was learnt."""
        columns = [ratio.ttft for ratio in self.ratios], [ratio.tpot for ratio in self.ratios]
        return predicted * StepTimes(*(math.exp(sum(map(math.log, c)) / (len(c) + 1)) for c in columns))


def _pair(times: StepTimes) -> tuple[float, float]:
    return times.ttft, times.tpot


def relative_error(predicted: float, measured: float) -> float:
    """How far the prediction was off, as a share of what was measured; above 0 it was too slow."""
    return predicted / measured - 1


def median_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The median size of the relative error over (predicted, measured); None without any."""
    return median(abs(relative_error(*pair)) for pair in pairs) if pairs else None


@dataclass(frozen=True)
class Bottleneck:
    """What one phase takes, and the seconds that each cause accounts for on its own.

    `terms`: reading `weights`, reading and writing `kv`, `compute`, `launch` (what compiling the step saved), and
    `other`, which no cause explains: kernels below the machine's ceilings. `floor_seconds` is the roofline's.
    """

    phase: str
    seconds: float
    terms: Mapping[str, float]
    floor_seconds: float

    @classmethod
    def of(
        cls, phase: str, cost: StepCost, seconds: float, roofline: Roofline, *, launch_seconds: float = 0.0
    ) -> Bottleneck:
        """From what a step must do, how long it took, and the measured ceilings of the machine."""
        memory = cost.required_bytes / roofline.bandwidth
        compute = cost.flops / roofline.peak_flops
        terms = {
            "weights": cost.weight_bytes / roofline.bandwidth,
            "kv": cost.kv_bytes / roofline.bandwidth,
            "compute": compute,
            "launch": max(0.0, launch_seconds),
        }
        terms["other"] = max(0.0, seconds - max(memory, compute) - terms["launch"])
        return cls(phase, seconds, terms, max(memory, compute))

    def share(self, term: str) -> float:
        """The term as a share of the phase, at most 1."""
        return min(1.0, self.terms[term] / self.seconds)

    @property
    def binds(self) -> str:
        """The largest cause that has a name."""
        return max(TERMS[:-1], key=lambda term: self.terms[term])

    @property
    def near_limit(self) -> bool:
        """Whether the phase is so near its floor that there is nothing left to gain."""
        return self.floor_seconds >= NEAR_LIMIT * self.seconds

    def __str__(self) -> str:
        terms = ", ".join(f"{term} {self.terms[term] * 1e3:.3g} ms" for term in TERMS if self.terms[term])
        return (
            f"{self.phase}: {self.seconds * 1e3:.3g} ms, at least {self.floor_seconds * 1e3:.3g} ms; "
            f"{self.binds} binds ({terms})"
        )
