"""What one step of a language model must compute and move, operation by operation, and the least time it can take.

The roofline model (Williams, Waterman, Patterson 2009, https://doi.org/10.1145/1498765.1498785): an operation of
F FLOP and B bytes takes at least max(F / peak, B / bandwidth). Its intensity F / B against the ridge point
peak / bandwidth says which of the two binds.

A `ModelShape` lists the operations of a model: `Weights` (a linear, norm, router, head or bank of experts), `Lookup`
(an embedding) and `Attention`. `optimizer.evals.architecture` reads one from a configuration or a live module. A step
takes `batch` rows of `tokens` new tokens each, with `context` tokens already cached: prefill is (B, S, 0) and decode
is (B, 1, context).

Counting rules, chosen so that the result is a floor for any implementation that runs these operations:
- a weight is read once a step; of E experts with k active, T tokens touch E·(1 − (1 − k/E)^T), evenly routed;
- an embedding reads one row a token; a head sees only the last position of each row unless `all_logits`;
- attention is tiled: scores never leave the chip; cached keys and values are read once, as far as the window
  reaches, and new ones are written once;
- every operation reads its input and writes its output; residual adds, rotary embedding and gating are taken to be
  fused with a neighbour and cost nothing;
- under tensor parallelism linears, experts, heads and attention are divided; norms, routers, embeddings repeated.
  The all-reduce is not part of it: see `arithmetic.all_reduce_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from optimizer.errors import UsageError
from optimizer.evals.arithmetic import expected_experts

NORM_FLOPS = 5  # per element: square, add, scale by the root, weight, and the mean or bias of a LayerNorm
REPLICATED = frozenset({"norm", "router", "other"})  # kinds that every tensor-parallel rank holds whole

Kind = Literal["linear", "expert", "router", "norm", "lm_head", "embedding", "attention", "other"]


@dataclass(frozen=True, slots=True)
class Roofline:
    """A machine's two ceilings: `peak_flops` in FLOP/s and `bandwidth` in bytes/s."""

    peak_flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.peak_flops > 0 and self.bandwidth > 0):
            raise UsageError(
                f"Roofline: peak_flops={self.peak_flops!r} and bandwidth={self.bandwidth!r} must be positive; "
                "give FLOP/s and bytes/s"
            )

    @property
    def ridge(self) -> float:
        """The intensity, FLOP/byte, at which both ceilings bind."""
        return self.peak_flops / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """The most FLOP/s that work of this intensity can reach."""
        return min(self.peak_flops, intensity * self.bandwidth)

    def bound(self, intensity: float) -> Literal["memory", "compute"]:
        """Which ceiling binds work of this intensity."""
        return "memory" if intensity < self.ridge else "compute"

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """The least time for this work, computing and moving at once."""
        return max(flops / self.peak_flops, bytes_moved / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are stored: `bits` each, plus `scale_bits + zero_bits` for every `group_size` along a row.

    `group_size=None` is one group a row. Unquantized values have no scales: `Precision(16)`.
    """

    bits: int
    group_size: int | None = None
    scale_bits: int = 0
    zero_bits: int = 0

    def __post_init__(self) -> None:
        group = 1 if self.group_size is None else self.group_size
        if min(self.bits, group) < 1 or min(self.scale_bits, self.zero_bits) < 0:
            raise UsageError(f"{self}: bits and group_size must be positive, scale_bits and zero_bits not negative")

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix `[rows, columns]`, scales and zero points included, rounded up to whole bytes."""
        groups = 1 if self.group_size is None else -(-columns // self.group_size)
        return -(-rows * (columns * self.bits + groups * (self.scale_bits + self.zero_bits)) // 8)


@dataclass(frozen=True, slots=True)
class Load:
    """One step: `batch` rows, `tokens` new tokens a row, `context` tokens a row already cached."""

    batch: int
    tokens: int
    context: int = 0
    tensor_parallel: int = 1
    all_logits: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.tokens, self.tensor_parallel) < 1 or self.context < 0:
            raise UsageError(f"{self}: batch, tokens and tensor_parallel must be at least 1, context at least 0")


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one operation computes (FLOP) and moves (bytes) in a step, on one device."""

    name: str
    kind: Kind
    flops: float
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """All bytes moved."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """The operations of one step, and their sums, on one device of a group."""

    load: Load
    ops: tuple[OpCost, ...]

    @property
    def flops(self) -> float:
        """FLOP of the step."""
        return sum(op.flops for op in self.ops)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights read."""
        return sum(op.weight_bytes for op in self.ops)

    @property
    def kv_bytes(self) -> float:
        """Bytes of the key-value cache read and written."""
        return sum(op.kv_bytes for op in self.ops)

    @property
    def bytes(self) -> float:
        """All bytes moved when each operation reads its input and writes its output."""
        return sum(op.bytes for op in self.ops)

    @property
    def required_bytes(self) -> float:
        """Weights and cache alone: what must be moved however much is fused. MBU divides by this."""
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte of the whole step."""
        return self.flops / self.bytes if self.bytes else 0.0

    def floor_seconds(self, roofline: Roofline) -> float:
        """The least time if all computing overlaps all moving. Nothing can be faster."""
        return roofline.seconds(self.flops, self.bytes)

    def serial_seconds(self, roofline: Roofline) -> float:
        """The least time of one operation after another, each on its own roofline."""
        return sum(roofline.seconds(op.flops, op.bytes) for op in self.ops)

    def tokens_per_second(self, roofline: Roofline) -> float:
        """New tokens per second over the batch, at `floor_seconds`."""
        return self.load.batch * self.load.tokens / self.floor_seconds(roofline)

    def by_kind(self) -> dict[Kind, OpCost]:
        """The costs summed by kind, in the order in which kinds first appear."""
        kinds: dict[Kind, OpCost] = {}
        for op in self.ops:
            total = kinds.get(op.kind, OpCost(op.kind, op.kind, 0.0))
            kinds[op.kind] = replace(
                total,
                flops=total.flops + op.flops,
                weight_bytes=total.weight_bytes + op.weight_bytes,
                kv_bytes=total.kv_bytes + op.kv_bytes,
                activation_bytes=total.activation_bytes + op.activation_bytes,
            )
        return kinds


@dataclass(frozen=True, slots=True)
class Weights:
    """An operation that reads weights `[rows, columns]`: a linear, norm, router, head, or a bank of experts.

    `weight_bytes` is one copy as stored, with scales, zero points and the `bias_bytes` it includes. A bank holds
    `experts` copies, of which each token uses `active`. `flops` and `elements` (activations read plus written) are
    per token and copy.
    """

    name: str
    kind: Kind
    rows: int
    columns: int
    weight_bytes: float
    flops: int
    elements: int
    bias_bytes: int = 0
    experts: int = 1
    active: int = 1

    @property
    def total_bytes(self) -> float:
        """Bytes held in memory."""
        return self.experts * self.weight_bytes

    def stored_as(self, precision: Precision) -> Weights:
        """The same operation with its matrix in `precision`; the bias stays as it is."""
        return replace(self, weight_bytes=precision.bytes(self.rows, self.columns) + self.bias_bytes)

    def cost(self, load: Load, element_bytes: float) -> OpCost:
        """What the operation costs in a step."""
        tokens = load.batch if self.kind == "lm_head" and not load.all_logits else load.batch * load.tokens
        copies = expected_experts(self.experts, self.active, tokens)
        ranks = 1 if self.kind in REPLICATED else load.tensor_parallel
        return OpCost(
            self.name,
            self.kind,
            flops=self.flops * tokens * self.active / ranks,
            weight_bytes=copies * self.weight_bytes / ranks,
            activation_bytes=self.elements * tokens * self.active * element_bytes / ranks,
        )


@dataclass(frozen=True, slots=True)
class Lookup:
    """An embedding table `[rows, width]`. `tied` tables are stored, and counted, by the head that shares them."""

    name: str
    rows: int
    width: int
    weight_bytes: float
    tied: bool = False

    @property
    def total_bytes(self) -> float:
        """Bytes held in memory by this table alone."""
        return 0.0 if self.tied else self.weight_bytes

    def cost(self, load: Load, element_bytes: float) -> OpCost:
        """What the look-up of every new token costs."""
        tokens = load.batch * load.tokens
        return OpCost(
            self.name,
            "embedding",
            flops=0.0,
            weight_bytes=tokens * self.weight_bytes / self.rows,
            activation_bytes=tokens * self.width * element_bytes,
        )


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of `heads` queries over `kv_heads` cached heads; `window` counts the token itself."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    kv: Precision = Precision(16)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, scales included."""
        return self.kv.bytes(2 * self.kv_heads, self.head_dim)

    def cached(self, context: int) -> int:
        """How many of `context` cached tokens the next one can see."""
        return context if self.window is None else min(context, self.window - 1)

    def positions(self, tokens: int, context: int) -> int:
        """Pairs of a new token and a token that it sees, itself included."""
        limit = context + tokens if self.window is None else self.window
        growing = max(0, min(tokens, limit - context))  # queries that still see everything before them
        return growing * context + growing * (growing + 1) // 2 + (tokens - growing) * limit

    def cost(self, load: Load, element_bytes: float) -> OpCost:
        """What scores and weighted values cost, with the cache read and written."""
        kv_share = 1 / min(load.tensor_parallel, self.kv_heads)
        cache_tokens = self.cached(load.context) + min(load.tokens, self.window or load.tokens)
        queries = self.heads / load.tensor_parallel
        elements = 2 * self.head_dim * (queries + self.kv_heads * kv_share)  # query and output, new key and value
        return OpCost(
            self.name,
            "attention",
            flops=4 * self.head_dim * queries * load.batch * self.positions(load.tokens, load.context),
            kv_bytes=load.batch * cache_tokens * self.kv_bytes_per_token * kv_share,
            activation_bytes=load.batch * load.tokens * elements * element_bytes,
        )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The operations of a model, and the bytes of one activation element."""

    name: str
    ops: tuple[Weights | Lookup | Attention, ...]
    element_bytes: float = 2.0

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in memory; a tied table counts once."""
        return sum(op.total_bytes for op in self.ops if not isinstance(op, Attention))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache while no window is full."""
        return sum(op.kv_bytes_per_token for op in self.ops if isinstance(op, Attention))

    def kv_cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of the cache of `batch` rows of `context` tokens; a window keeps no more than its length."""
        attentions = (op for op in self.ops if isinstance(op, Attention))
        return batch * sum(op.kv_bytes_per_token * min(context, op.window or context) for op in attentions)

    def step(self, load: Load) -> StepCost:
        """The cost of one step."""
        return StepCost(load, tuple(op.cost(load, self.element_bytes) for op in self.ops))

    def prefill(self, batch: int, prompt: int, *, tensor_parallel: int = 1, all_logits: bool = False) -> StepCost:
        """The cost of running prompts of `prompt` tokens."""
        return self.step(Load(batch, prompt, 0, tensor_parallel, all_logits))

    def decode(self, batch: int, context: int, *, tensor_parallel: int = 1) -> StepCost:
        """The cost of one more token a row, with `context` tokens a row cached before it."""
        return self.step(Load(batch, 1, context, tensor_parallel))

    def stored_as(self, weights: Precision, *, head: Precision | None = None) -> ModelShape:
        """The same model with linears and experts in `weights`, and the head in `head` where one is given.

        Routers, norms and embeddings stay as they are. A requantized head no longer shares the embedding's table.
        """
        precisions: dict[str, Precision | None] = {"linear": weights, "expert": weights, "lm_head": head}

        def stored(op: Weights | Lookup | Attention) -> Weights | Lookup | Attention:
            if isinstance(op, Lookup):
                return replace(op, tied=op.tied and head is None)
            precision = precisions.get(op.kind) if isinstance(op, Weights) else None
            return op.stored_as(precision) if isinstance(op, Weights) and precision else op

        return replace(self, ops=tuple(map(stored, self.ops)))

    def cached_as(self, kv: Precision) -> ModelShape:
        """The same model with its key-value cache in `kv`."""
        ops: Iterable[Weights | Lookup | Attention] = (
            replace(op, kv=kv) if isinstance(op, Attention) else op for op in self.ops
        )
        return replace(self, ops=tuple(ops))
