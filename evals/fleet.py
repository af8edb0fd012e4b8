"""One model on many GPUs: how it is divided, what fits, what the GPUs send each other, and how long a step then takes.

A `Replica` is a model on `tensor · pipeline · expert` GPUs:
- tensor: every linear, expert and attention is cut `t` ways; each layer all-reduces its hidden states twice;
- pipeline: the layers are cut into `p` stages; a prompt in `m` microbatches leaves a bubble of (p − 1)/(m + p − 1);
- expert: `e` groups hold 1/e of the experts each and a copy of all else; each serves its share of the requests, and two
  all-to-alls a layer carry tokens to their experts and back.

Times are floors under stated assumptions, never predictions: kernels reach the ceilings of the device. Communication is
`latency` + bytes / bandwidth and is not hidden behind computing, since the next operation needs its result. Groups
wider than a machine send at the network's bandwidth. Routing is even unless `imbalance` says that the busiest experts
get that many times the mean. Stages are as even as whole layers allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from optimizer.errors import UsageError
from optimizer.evals.arithmetic import (
    all_reduce_bytes,
    all_reduce_seconds,
    all_to_all_seconds,
    pipeline_bubble,
    requests_that_fit,
    transfer_seconds,
)
from optimizer.evals.hardware import Gpu
from optimizer.evals.roofline import REPLICATED, Attention, Load, Lookup, ModelShape, OpCost, Weights

Op = Weights | Lookup | Attention
SEARCH_LIMIT = 1024  # GPUs tried before a model is said to fit nowhere


@dataclass(frozen=True, slots=True)
class Layout:
    """GPUs of one replica by what they divide. A prompt is cut into `microbatches`; a pipeline's depth unless given."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    microbatches: int | None = None

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.expert, self.in_flight) < 1:
            raise UsageError(f"{self}: every degree and the number of microbatches must be at least 1")

    @property
    def gpus(self) -> int:
        """GPUs of a replica."""
        return self.tensor * self.pipeline * self.expert

    @property
    def in_flight(self) -> int:
        """Microbatches of a prompt; one where there is no pipeline to fill."""
        return 1 if self.pipeline == 1 else self.pipeline if self.microbatches is None else self.microbatches

    def __str__(self) -> str:
        return f"tensor {self.tensor} × pipeline {self.pipeline} × expert {self.expert}"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Floors of one step, in seconds, on the GPU that has the most to do.

    `moving`, `computing` and the communication are those of the whole step; `seconds` is its latency, of which the
    fraction `bubble` is idle, and `occupied_seconds` the time after which the next step can follow.
    """

    moving: float
    computing: float
    all_reduce: float
    all_to_all: float
    send: float
    bubble: float
    seconds: float
    occupied_seconds: float


@dataclass(frozen=True)
class Replica:
    """A model divided over GPUs. `latency` is seconds a collective or send; `reserve_bytes` of each GPU stay free.

    Raises:
        UsageError: the layout cannot divide this model, or its communication cannot be counted.
    """

    shape: ModelShape
    gpu: Gpu
    layout: Layout = Layout()
    latency: float = 5e-6
    imbalance: float = 1.0
    reserve_bytes: float = 0.0

    def __post_init__(self) -> None:
        wrong = misfit(self.shape, self.layout)
        if wrong:
            raise UsageError(f"{self.layout}: {wrong}")
        if self.imbalance < 1 or self.latency < 0 or not 0 <= self.reserve_bytes < self.gpu.memory_bytes:
            raise UsageError(
                f"imbalance={self.imbalance}, latency={self.latency}, reserve_bytes={self.reserve_bytes}: the busiest "
                "experts get at least the mean, a latency is not negative, and the reserve is part of the memory"
            )

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights on the fullest GPU."""
        return sum(self._held(op) for op in self.shape.ops if not isinstance(op, Attention)) - self._other_end_bytes

    def kv_bytes(self, context: int) -> float:
        """Bytes of the cache of one request of `context` tokens on a GPU that holds part of it."""
        return self._layer_share * sum(
            op.kv_bytes_per_token * min(context, op.window or context) / min(self.layout.tensor, op.kv_heads)
            for op in self.shape.ops
            if isinstance(op, Attention)
        )

    @property
    def free_bytes(self) -> float:
        """Bytes that a GPU has left for the cache; negative where the weights do not fit."""
        return self.gpu.memory_bytes - self.reserve_bytes - self.weight_bytes

    def capacity(self, context: int) -> int:
        """Requests of `context` tokens whose cache fits at once."""
        if not self.kv_bytes(context):
            raise UsageError(
                f"{self.shape.name}: without attention no cache is counted, so any number of requests would fit; "
                "give layers, heads, kv_heads and head_dim"
            )
        return self.layout.expert * requests_that_fit(
            self.gpu.memory_bytes - self.reserve_bytes, self.weight_bytes, self.kv_bytes(context)
        )

    def decode(self, batch: int, context: int) -> StepTime:
        """One more token for each of `batch` requests that have `context` tokens cached.

        A token passes every stage before the next can start: the batch is cut into a microbatch a stage, since more
        would only read the weights more often, and a batch smaller than the pipeline is deep leaves stages idle.
        """
        stages, groups = self.layout.pipeline, min(self.layout.pipeline, batch)
        part = self._stage(Load(math.ceil(batch / groups), 1, context, self.layout.tensor))
        return _step(part, stages, groups, stages, bubble=1 - groups / stages)

    def prefill(self, batch: int, prompt: int) -> StepTime:
        """`batch` prompts of `prompt` tokens, cut into microbatches of consecutive tokens."""
        stages, groups = self.layout.pipeline, min(self.layout.in_flight, prompt)
        part = self._stage(Load(batch, prompt, 0, self.layout.tensor), groups)
        return _step(part, groups + stages - 1, groups, groups, bubble=pipeline_bubble(stages, groups))

    def kv_transfer_seconds(self, context: int) -> float:
        """Seconds to hand one request's cache to another replica, every GPU sending its part over the network."""
        parts = self.layout.tensor * self.layout.pipeline
        held = self.shape.kv_cache_bytes(1, context)
        return transfer_seconds(held, parts, self.gpu.network_bandwidth, self.latency)

    @cached_property
    def _layer_share(self) -> float:
        """The fraction of the layers on the fullest stage."""
        return math.ceil(_layers(self.shape) / self.layout.pipeline) / max(1, _layers(self.shape)) or 1.0

    @cached_property
    def _other_end_bytes(self) -> float:
        """Bytes of embedding or head, whichever is less: a pipeline puts them on different stages."""
        if self.layout.pipeline == 1:
            return 0.0
        stored = [op for op in self.shape.ops if not isinstance(op, Attention)]
        return min(sum(self._held(op) for op in stored if _end(op) == end) for end in ("embedding", "lm_head"))

    def _held(self, op: Weights | Lookup) -> float:
        """Bytes of an operation's weights on a GPU of the stage that holds most of them."""
        divided = 1
        if isinstance(op, Weights):
            divided = 1 if op.kind in REPLICATED else self.layout.tensor
            divided *= self.layout.expert if op.experts > 1 else 1
        return op.total_bytes * (1.0 if _end(op) else self._layer_share) / divided

    def _busiest(self, op: Op, load: Load) -> OpCost:
        """What an operation costs the GPU with most of it to do. At the experts the tokens of every group meet."""
        experts = self.layout.expert
        routed = isinstance(op, Weights) and op.experts > 1
        cost = op.cost(
            load if routed else replace(load, batch=math.ceil(load.batch / experts)), self.shape.element_bytes
        )
        part = (1.0 if _end(op) else self._layer_share) * (min(self.imbalance / experts, 1.0) if routed else 1.0)
        read = part * cost.weight_bytes
        if isinstance(op, Weights):
            read = min(read, self._held(op))
        return replace(cost, flops=part * cost.flops, weight_bytes=read, kv_bytes=part * cost.kv_bytes)

    def _stage(self, load: Load, microbatches: int = 1) -> StepTime:
        """The floors of the busiest stage for one of the equal microbatches of a step.

        Each microbatch reads the weights that it touches; the cache is read once, and the head runs once, over all.
        """
        small = replace(load, tokens=math.ceil(load.tokens / microbatches))
        flops = moved = 0.0
        for op in self.shape.ops:
            if self.layout.pipeline > 1 and _end(op) == "embedding":
                continue  # the last stage has the head, which is more
            whole = self._busiest(op, load)
            weights = whole.weight_bytes / microbatches if _end(op) else self._busiest(op, small).weight_bytes
            flops += whole.flops / microbatches
            moved += weights + whole.kv_bytes / microbatches
        moving, computing = moved / self.gpu.bandwidth, flops / self.gpu.fp16_flops
        reduce, exchange, send = self._communication(math.ceil(load.batch / self.layout.expert) * small.tokens)
        seconds = max(moving, computing) + reduce + exchange + send
        return StepTime(moving, computing, reduce, exchange, send, 0.0, seconds, seconds)

    def _communication(self, tokens: int) -> tuple[float, float, float]:
        """Seconds of a stage's all-reduces, all-to-alls and hand-over, for `tokens` tokens of each group."""
        tensor, pipeline, expert = self.layout.tensor, self.layout.pipeline, self.layout.expert
        width, element = hidden_size(self.shape), self.shape.element_bytes
        layers, (expert_layers, active) = math.ceil(_layers(self.shape) / pipeline), _expert_layers(self.shape)
        hidden = all_reduce_bytes(width, tokens, element, per_layer=1)
        reduce = all_reduce_seconds(hidden, tensor, self._bandwidth(tensor), self.latency)
        # The ranks of a tensor-parallel group hold the same hidden states, so each sends its part of them.
        routed = min(self.imbalance, expert) * active * hidden / tensor
        exchange = all_to_all_seconds(routed, expert, self._bandwidth(tensor * expert), self.latency)
        send = transfer_seconds(hidden, tensor, self._bandwidth(self.layout.gpus), self.latency)
        return 2 * layers * reduce, 2 * math.ceil(expert_layers / pipeline) * exchange, send if pipeline > 1 else 0.0

    def _bandwidth(self, gpus: int) -> float:
        """Bytes/s that a GPU can send within a group of `gpus`."""
        return self.gpu.link_bandwidth if gpus <= self.gpu.node else self.gpu.network_bandwidth


def _step(part: StepTime, turns: int, busy: int, occupied: int, bubble: float) -> StepTime:
    """A step of `turns` turns of a stage, `busy` of which work, after `occupied` of which the next step can follow."""
    return StepTime(
        moving=busy * part.moving,
        computing=busy * part.computing,
        all_reduce=busy * part.all_reduce,
        all_to_all=busy * part.all_to_all,
        send=busy * part.send,
        bubble=bubble,
        seconds=turns * part.seconds,
        occupied_seconds=occupied * part.seconds,
    )


# Dividing a model


def _end(op: Op) -> str | None:
    """ "embedding" or "lm_head" for what only the first or the last stage holds."""
    if isinstance(op, Lookup):
        return "embedding"
    return op.kind if isinstance(op, Weights) and op.kind == "lm_head" else None


def _layers(shape: ModelShape) -> int:
    return sum(isinstance(op, Attention) for op in shape.ops)


def hidden_size(shape: ModelShape) -> int:
    """Elements of a token's hidden state: an embedding's width, or what `from_parameters` was told."""
    tables = [op.width for op in shape.ops if isinstance(op, Lookup)]
    return max(tables, default=next((op.elements for op in shape.ops if isinstance(op, Weights)), 0))


def _banks(shape: ModelShape) -> list[Weights]:
    return [op for op in shape.ops if isinstance(op, Weights) and op.experts > 1]


def _expert_layers(shape: ModelShape) -> tuple[int, int]:
    """How many layers route tokens to experts, and to how many each token goes."""
    banks = _banks(shape)
    return len({op.name.rpartition("experts")[0] for op in banks}), max((op.active for op in banks), default=0)


def misfit(shape: ModelShape, layout: Layout) -> str | None:
    """Why the layout cannot divide this model, or None."""
    tensor, layers, experts = layout.tensor, _layers(shape), {op.experts for op in _banks(shape)}
    if layout.gpus > 1 and not (layers and hidden_size(shape)):
        return "nothing says what the GPUs send each other; give layers, heads, kv_heads, head_dim and d_model"
    for op in shape.ops:
        if isinstance(op, Attention) and op.heads % tensor:
            return f"tensor {tensor} does not divide the {op.heads} heads of {op.name}; use a divisor"
        if isinstance(op, Attention) and op.kv_heads % tensor and tensor % op.kv_heads:
            return f"tensor {tensor} neither divides nor is a multiple of the {op.kv_heads} KV heads of {op.name}"
    if layout.pipeline > max(layers, 1):
        return f"pipeline {layout.pipeline} has more stages than the model's {layers} layers"
    if layout.expert > 1 and not experts:
        return f"expert {layout.expert} needs a mixture of experts, and {shape.name} has none; use expert 1"
    if any(count % layout.expert for count in experts):
        return f"expert {layout.expert} does not divide the {min(experts)} experts; use a divisor"
    return None


def layouts(shape: ModelShape, gpus: int, microbatches: int | None = None) -> Iterator[Layout]:
    """Every way to divide the model over exactly `gpus` GPUs, least tensor parallelism first."""
    for tensor in divisors(gpus):
        for pipeline in divisors(gpus // tensor):
            layout = Layout(tensor, pipeline, gpus // tensor // pipeline, microbatches)
            if misfit(shape, layout) is None:
                yield layout


def divisors(number: int) -> list[int]:
    """The divisors of a number, in order."""
    return [i for i in range(1, number + 1) if number % i == 0]


def smallest_that_fits(replica: Replica, context: int) -> Replica:
    """The replica divided over the fewest GPUs that hold its weights and one request of `context` tokens.

    Raises:
        UsageError: no fleet of up to `SEARCH_LIMIT` GPUs holds it.
    """
    for gpus in range(1, SEARCH_LIMIT + 1):
        for layout in layouts(replica.shape, gpus, replica.layout.microbatches):
            divided = replace(replica, layout=layout)
            if divided.capacity(context):
                return divided
    raise UsageError(
        f"{replica.shape.name}: no division over up to {SEARCH_LIMIT} of {replica.gpu.name} holds it with one request "
        f"of {context} tokens; store weights or cache in fewer bits, shorten the context, or use larger GPUs"
    )
