"""How many replicas serve a load within its objectives, prefilling and decoding in one place or in two.

Rates are upper bounds and times floors, never predictions: requests are alike and arrive evenly, nothing waits in a
queue, prompts share no cached prefix, batches are always as full as memory and objectives allow, and each step takes no
longer than `optimizer.evals.fleet` says that it must. A real fleet needs more. Disaggregation as in DistServe
(Zhong et al. 2024, https://arxiv.org/abs/2401.09670).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from optimizer.errors import UsageError
from optimizer.evals.fleet import Layout, Replica, divisors, layouts, smallest_that_fits


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of `prompt` tokens that want `output` more: the first within `ttft` seconds, the others `tpot` each."""

    prompt: int
    output: int
    requests_per_second: float = 1.0
    ttft: float = math.inf
    tpot: float = math.inf

    def __post_init__(self) -> None:
        if (
            self.prompt < 1
            or self.output < 2
            or not all(x > 0 for x in (self.requests_per_second, self.ttft, self.tpot))
        ):
            raise UsageError(
                f"{self}: give a prompt of at least 1 token, an output of at least 2 (of which the prompt makes the "
                "first), and a load and objectives above 0"
            )

    @property
    def context(self) -> int:
        """Tokens cached when a request ends; its last token is never read again."""
        return self.prompt + self.output - 1

    @property
    def mean_context(self) -> int:
        """Tokens cached before a decode step, on average over a request's."""
        return self.prompt + (self.output - 2) // 2


@dataclass(frozen=True, slots=True)
class Service:
    """What serves a demand within its objectives: the fewest whole replicas, by upper bounds of what each serves.

    `goodput` is requests/s that these can serve within the objectives, at least the load. `prefill_replicas` is 0 where
    every replica does both phases, `kv_transfer_seconds` 0 where no cache changes hands.
    """

    prefill_replicas: int
    decode_replicas: int
    gpus: int
    batch: int
    ttft: float
    tpot: float
    kv_transfer_seconds: float
    goodput: float


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` for which a condition that only ever turns false holds; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def colocated(replica: Replica, demand: Demand) -> Service:
    """Every replica prefills and decodes in turn.

    With B requests in flight each waits, over its own decode steps, for the prefills of B others, so its TPOT is
    step(B) + B · prefill / (output − 1), and the replica ends B requests in (output − 1) · TPOT.
    """
    groups, steps = replica.layout.expert, demand.output - 1
    prefill = replica.prefill(groups, demand.prompt)
    stall = prefill.occupied_seconds / groups / steps

    def tpot(batch: int) -> float:
        return replica.decode(batch, demand.mean_context).seconds + batch * stall

    batch = _within(replica, demand, prefill.seconds, tpot)
    each = batch / (steps * tpot(batch))
    replicas = math.ceil(demand.requests_per_second / each)
    return Service(
        0, replicas, replicas * replica.layout.gpus, batch, prefill.seconds, tpot(batch), 0.0, replicas * each
    )


def disaggregated(replica: Replica, demand: Demand) -> Service:
    """Some replicas only prefill and hand the cache to others that only decode, so that neither waits for the other.

    The hand-over counts as part of TTFT: the decoding replica makes the token known.
    """
    groups, steps = replica.layout.expert, demand.output - 1
    prefill, transfer = replica.prefill(groups, demand.prompt), replica.kv_transfer_seconds(demand.prompt)
    ttft = prefill.seconds + transfer

    def tpot(batch: int) -> float:
        return replica.decode(batch, demand.mean_context).seconds

    batch = _within(replica, demand, ttft, tpot)
    filled, ended = groups / prefill.occupied_seconds, batch / (steps * tpot(batch))
    prefills = math.ceil(demand.requests_per_second / filled)
    decodes = math.ceil(demand.requests_per_second / ended)
    return Service(
        prefills, decodes, (prefills + decodes) * replica.layout.gpus, batch, ttft, tpot(batch), transfer,
        min(prefills * filled, decodes * ended),
    )  # fmt: skip


def _within(replica: Replica, demand: Demand, ttft: float, tpot: Callable[[int], float]) -> int:
    """The most requests in flight that fit and keep the objectives."""
    if ttft > demand.ttft:
        raise UsageError(
            f"{replica.layout}: the first token of {demand.prompt} takes at least {ttft:.4g} s, and the objective is "
            f"{demand.ttft:.4g} s; use more GPUs a replica, shorter prompts, or a later objective"
        )
    capacity = replica.capacity(demand.context)
    if not capacity:
        raise UsageError(f"{replica.layout}: no request of {demand.context} tokens fits beside the weights")
    batch = _largest(capacity, lambda batch: tpot(batch) <= demand.tpot)
    if not batch:
        raise UsageError(
            f"{replica.layout}: a later token takes at least {tpot(1):.4g} s, the objective is {demand.tpot:.4g} s; "
            "use more GPUs a replica, fewer bits, or a slower objective"
        )
    return batch


def best(replica: Replica, gpus: int, demand: Demand) -> Replica:
    """The division that serves most requests a second on `gpus` GPUs, as copies of one replica that fill them.

    Raises:
        UsageError: none fits, with the fewest GPUs that would do; or none keeps the objectives.
    """
    found: dict[Layout, float] = {}
    refused: UsageError | None = None
    fits = False
    for each in divisors(gpus):
        for layout in layouts(replica.shape, each, replica.layout.microbatches):
            divided = replace(replica, layout=layout)
            if not divided.capacity(demand.context):
                continue
            fits = True
            try:
                served = colocated(divided, replace(demand, requests_per_second=1e-9)).goodput
            except UsageError as error:
                refused = error
                continue
            found[layout] = served * gpus / each
    if not fits:
        raise too_small(replica, gpus, demand.context)
    if not found:
        raise refused or AssertionError("a division that fits is either counted or refused")
    return replace(replica, layout=max(found, key=lambda layout: found[layout]))


def too_small(replica: Replica, gpus: int, context: int) -> UsageError:
    """The error that says how many GPUs the model needs."""
    least = smallest_that_fits(replica, context)
    return UsageError(
        f"{replica.shape.name} ({replica.shape.weight_bytes / 1e9:.4g} GB of weights) with one request of {context} "
        f"tokens does not fit on {gpus} × {replica.gpu.name} of {replica.gpu.memory_bytes / 1e9:.0f} GB; the smallest "
        f"number that holds it is {least.layout.gpus} ({least.layout})"
    )
