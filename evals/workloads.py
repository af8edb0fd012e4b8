"""Traffic for a serving engine: what requests look like and when they come, drawn from a seed.

A `RequestSpec` gives the token counts of prompts and outputs, an arrival process the moments, a corpus the tokens;
`schedule_requests` puts them together. Times are seconds after the start of a run, lengths are tokens.

| preset        | prompt | output | what it strains                             |
|---------------|--------|--------|---------------------------------------------|
| chat          | 128    | 128    | scheduling: requests come and go quickly    |
| generation    | 128    | 1024   | decode: weights and a growing cache, read   |
| summarization | 2048   | 128    | prefill: long prompts that hold up decoding |
| reasoning     | 2048   | 1024   | the capacity of the cache                   |

Lengths are lognormal, as a few requests are always far longer than the rest, and cut at their 99th percentile, so that
a context can be promised; that takes less than 1 % off the presets' means. A context too short for a preset scales
every length by one factor, which keeps prompt : output and is told by `scale` and `str`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np

from optimizer.errors import DataError, UsageError

CUT = 0.99  # lengths above this quantile of their distribution become it


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that a client sends `seconds` after the start: `prompt` token ids, and the most tokens it wants."""

    seconds: float
    prompt: tuple[int, ...]
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not (0 <= self.seconds < math.inf and self.prompt and self.max_new_tokens >= 1):
            raise UsageError(
                f"Arrival(seconds={self.seconds!r}, {len(self.prompt)} prompt tokens, max_new_tokens="
                f"{self.max_new_tokens!r}): a request comes at a finite time from 0 on, with at least one token of "
                "prompt, and asks for at least one"
            )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Arrivals in the order of their times. Wrap a recorded list of arrivals in one to replay it.

    With a `concurrency` the loop is closed: that many clients each send their next request when one ends. No arrival
    is then set beforehand (all `seconds` are 0), and an engine that stalls is sent less: what such a loop measures is
    throughput at a concurrency, not the latency under a rate.
    """

    arrivals: tuple[Arrival, ...]
    concurrency: int | None = None

    def __post_init__(self) -> None:
        times = [arrival.seconds for arrival in self.arrivals]
        if not times or any(later < earlier for earlier, later in itertools.pairwise(times)):
            raise UsageError(
                f"Schedule: {len(times)} arrivals, which must be at least one and in the order of time; sort them"
            )
        if self.concurrency is not None and (self.concurrency < 1 or times[-1] > 0):
            raise UsageError(
                f"Schedule: concurrency={self.concurrency!r} with a last arrival at {times[-1]} s; a closed loop has "
                "at least one client and no times of its own: set every arrival to 0, or leave concurrency out"
            )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal token counts of this `mean`; `spread` is their standard deviation over the mean, 0 for a constant."""

    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and 0 <= self.spread <= 100):
            raise UsageError(
                f"Lengths(mean={self.mean!r}, spread={self.spread!r}): the mean is at least 1 token and the spread "
                "(standard deviation / mean) from 0 to 100"
            )

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm: sqrt(ln(1 + spread²))."""
        return math.sqrt(math.log1p(self.spread**2))

    @property
    def most(self) -> float:
        """The quantile at which lengths are cut, before rounding down."""
        return self.mean * math.exp(self.sigma * NormalDist().inv_cdf(CUT) - self.sigma**2 / 2)

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """`count` lengths of 1 to `most` tokens."""
        drawn = self.mean * np.exp(self.sigma * generator.standard_normal(count) - self.sigma**2 / 2)
        return [int(length) for length in np.clip(np.rint(drawn), 1, max(1, math.floor(self.most)))]


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What requests look like: lengths of prompt and output, and a system prompt that some of them share.

    A share `prefix_share` of the requests begins with the same `prefix` tokens, in front of the prompt drawn for each.
    `scale` is the factor by which the lengths differ from those the name stands for.
    """

    name: str
    prompt: Lengths
    output: Lengths
    prefix: int = 0
    prefix_share: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.prefix >= 0 and 0 <= self.prefix_share <= 1):
            raise UsageError(
                f"RequestSpec {self.name!r}: prefix={self.prefix!r} must be at least 0 tokens and "
                f"prefix_share={self.prefix_share!r} lie in [0, 1]"
            )

    def __str__(self) -> str:
        prefix = f", {self.prefix} shared by {self.prefix_share:.0%}" if self.prefix else ""
        scaled = f", lengths scaled by {self.scale:.3g}" if self.scale != 1 else ""
        return f"{self.name}: prompt {self.prompt.mean:.4g}{prefix}, output {self.output.mean:.4g} tokens{scaled}"

    @property
    def longest(self) -> float:
        """Tokens of context that no request exceeds."""
        return self.prefix + self.prompt.most + self.output.most

    def scaled(self, factor: float) -> RequestSpec:
        """The same with every length times `factor`; `UsageError` where that leaves less than a token."""
        prefix = math.floor(self.prefix * factor)
        if min(self.prompt.mean, self.output.mean) * factor < 1 or (self.prefix and not prefix):
            raise UsageError(
                f"RequestSpec {self.name!r}: prompts of {self.prompt.mean:g}, prefix of {self.prefix} and outputs of "
                f"{self.output.mean:g} tokens scaled by {factor:.3g} are less than a token; use a longer context"
            )
        shorter = (dataclasses.replace(part, mean=part.mean * factor) for part in (self.prompt, self.output))
        prompt, output = shorter
        return dataclasses.replace(self, prompt=prompt, output=output, prefix=prefix, scale=self.scale * factor)

    def scaled_to(self, max_context: int) -> RequestSpec:
        """The same if it fits a context of `max_context` tokens, else all of it scaled down until it does."""
        return self if self.longest <= max_context else self.scaled(max_context / self.longest)


PRESETS = {
    name: RequestSpec(name, Lengths(prompt, 0.5), Lengths(output, 0.5))
    for name, prompt, output in (
        ("chat", 128, 128),
        ("generation", 128, 1024),
        ("summarization", 2048, 128),
        ("reasoning", 2048, 1024),
    )
}


def quadrants(max_context: int) -> dict[str, RequestSpec]:
    """All presets, scaled by the one factor that makes the longest fit, so that short stays short against long."""
    factor = min(1.0, *(max_context / spec.longest for spec in PRESETS.values()))
    return {name: spec.scaled(factor) if factor < 1 else spec for name, spec in PRESETS.items()}


class ArrivalProcess(Protocol):
    """When requests come."""

    def times(self, count: int, generator: np.random.Generator) -> list[float]:
        """`count` moments in ascending order, in seconds after the start."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps, `rate` requests a second on average, the first at 0.

    `burstiness` is the gamma distribution's shape, as serving benchmarks have it: 1 is a Poisson process, below 1
    comes in clusters, above 1 is steadier; the gaps' standard deviation over their mean is 1 / sqrt(burstiness).
    """

    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and 0 < self.burstiness < math.inf):
            raise UsageError(
                f"arrivals with rate={self.rate!r} and burstiness={self.burstiness!r}: both must be positive and "
                "finite; use Burst for requests that come at once"
            )

    def times(self, count: int, generator: np.random.Generator) -> list[float]:
        """Sums of gaps. One seed gives the same pattern at every rate, only faster or slower."""
        gaps = generator.gamma(self.burstiness, 1 / self.burstiness, count) / self.rate
        return [0.0, *(float(moment) for moment in np.cumsum(gaps[1:]))]


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent clients: exponential gaps, `rate` requests a second on average, the first at 0."""

    rate: float

    def __post_init__(self) -> None:
        Gamma(self.rate)

    def times(self, count: int, generator: np.random.Generator) -> list[float]:
        """Sums of gaps, the same pattern at every rate."""
        return Gamma(self.rate).times(count, generator)


@dataclass(frozen=True, slots=True)
class Burst:
    """`size` requests at once, again and again, `every` so many seconds."""

    size: int
    every: float

    def __post_init__(self) -> None:
        if not (self.size >= 1 and 0 < self.every < math.inf):
            raise UsageError(f"Burst(size={self.size!r}, every={self.every!r}): at least 1 request, a positive time")

    def times(self, count: int, generator: np.random.Generator) -> list[float]:  # noqa: ARG002 - nothing is random
        """Multiples of `every`."""
        return [index // self.size * self.every for index in range(count)]


@dataclass(frozen=True, slots=True)
class Closed:
    """`concurrency` clients, each sending its next request when one ends; see `Schedule`."""

    concurrency: int

    def times(self, count: int, generator: np.random.Generator) -> list[float]:  # noqa: ARG002 - nothing is random
        """Zeros: the engine sets the pace."""
        return [0.0] * count


@dataclass(frozen=True, slots=True)
class Recorded:
    """Moments recorded elsewhere, in seconds after the start, for prompts drawn here."""

    seconds: tuple[float, ...]

    def times(self, count: int, generator: np.random.Generator) -> list[float]:  # noqa: ARG002 - nothing is random
        """The first `count` of them."""
        if count > len(self.seconds):
            raise DataError(f"Recorded: {count} arrivals asked of {len(self.seconds)} recorded; ask for fewer")
        return list(self.seconds[:count])


def schedule_requests(
    spec: RequestSpec, process: ArrivalProcess, corpus: Sequence[int], count: int, *, seed: int = 0
) -> Schedule:
    """`count` requests like `spec`, arriving as `process` has it, their prompts passages of `corpus` (token ids).

    No two passages begin at the same token, and none in the shared prefix, which is the start of the corpus: what an
    engine gains from a prefix cache comes from the prefix alone. For the same reason a short corpus is refused, not
    wrapped around. Times, lengths, passages and who shares the prefix are drawn from streams of their own: changing
    the rate leaves the requests as they are.

    Raises:
        UsageError: a count below 1 or a negative seed.
        DataError: the corpus is too short for that many different passages.
    """
    if count < 1 or seed < 0:
        raise UsageError(f"schedule_requests: count={count!r} must be at least 1 and seed={seed!r} at least 0")
    moments, prompts, outputs, places, sharing = (np.random.default_rng([seed, stream]) for stream in range(5))
    lengths = spec.prompt.draw(count, prompts)
    starts = len(corpus) - spec.prefix - max(lengths) + 1
    if starts < count:
        raise DataError(
            f"schedule_requests: a corpus of {len(corpus)} tokens is too short for {count} different prompts of up to "
            f"{max(lengths)} tokens and a prefix of {spec.prefix}; give at least {len(corpus) + count - starts} tokens"
        )
    begins = spec.prefix + places.choice(starts, count, replace=False)
    sharers = set(sharing.permutation(count)[: round(spec.prefix_share * count)].tolist())
    prefix = tuple(int(token) for token in corpus[: spec.prefix])
    drawn = zip(process.times(count, moments), begins.tolist(), lengths, spec.output.draw(count, outputs), strict=True)
    arrivals = []
    for index, (seconds, begin, length, output) in enumerate(drawn):
        passage = tuple(int(token) for token in corpus[begin : begin + length])
        arrivals.append(Arrival(seconds, prefix + passage if index in sharers else passage, output))
    return Schedule(tuple(arrivals), process.concurrency if isinstance(process, Closed) else None)
