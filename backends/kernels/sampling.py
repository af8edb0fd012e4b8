"""Drawing the next token inside a graph: temperature, top-k, then top-p, without a sort and without asking the host.

    logits       [B, V] any float
    temperature  [B] float32; 0 (or what is not positive) takes the largest logit, the first of equals
    top_k        [B] int32; 0 keeps all
    top_p        [B] float32; 1 keeps all
    uniform      [B] float32 in [0, 1): the only randomness
    token        [B] int64

In float32, `z = (max(logits) - logits) · (1 / temperature)` and `w = exp(-z)`. Top-k keeps `z ≤` the k-th smallest z;
top-p keeps every z for which the w of all smaller ones sum to less than top_p of what top-k kept. The token is the
last i with w_i > 0 and `Σ_{j < i} w_j ≤ uniform · Σ w`: the inverse of the distribution function, in index order.

This is the distribution of `optimizer.backends.sampling.probabilities`, but for ties: equals stay or go together at
both cuts, whereas a sort lets top-p keep some of them. A row whose largest logit is not finite (NaN counts as the
largest) has no distribution and gives -1, which no embedding accepts.

The kernel reads the row, of V b bytes, once from memory for the largest, then from cache twice for the draw and at most
15 times for each cut: bits of floats that are not negative are ordered as integers, so a cut among all 2³¹ of them is
found by testing 4 at once; a top-k cut ends when k tokens are counted. Where the kernel and the reference cut alike,
their distribution functions differ by at most `(V / BLOCK + 32) 2⁻²⁴`: V / BLOCK float32 additions a lane, log₂ BLOCK
across them, and an exp that is off by a few 2⁻²⁴ and by z 2⁻²⁴, of which the mean is below log V. So they draw the
same token unless `uniform` is nearer than that to a step, or top_p to a sum of w at which it cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.backends.kernels.gpu import Shipped, bound, jit, tl
from optimizer.backends.kernels.library import define
from optimizer.errors import UsageError

BLOCK = 4096
EDGES = 4
WARPS = 16
_TINY = torch.finfo(torch.float32).tiny


def sample_tokens_ref(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The specification: float32 weights, summed in float64."""
    _check(logits, temperature, top_k, top_p, uniform)
    values = logits.float()
    values = torch.where(values.isnan(), torch.inf, values)
    best = values.argmax(-1, keepdim=True)  # [B, 1]
    largest = values.gather(1, best)
    z = (largest - values) * (1 / temperature.clamp(min=_TINY)).unsqueeze(1)
    ordered = z.sort(-1).values
    last = values.shape[-1] - 1
    k = torch.where(top_k > 0, top_k.long() - 1, last).clamp(max=last).unsqueeze(1)
    limit = ordered.gather(1, k)  # [B, 1]
    mass = torch.where(ordered <= limit, torch.exp(-ordered), 0).double()
    total = mass.cumsum(-1)
    stays = total - mass < top_p.clamp(min=_TINY).unsqueeze(1) * total[:, -1:]
    limit = torch.where((top_p < 1).unsqueeze(1), torch.where(stays, ordered, 0).amax(-1, True), limit)
    w = torch.where(z <= limit, torch.exp(-z), 0).double()
    before = w.cumsum(-1) - w
    reached = (w > 0) & (before <= uniform.unsqueeze(1) * w.sum(-1, keepdim=True))
    places = torch.arange(values.shape[-1], device=values.device)
    drawn = torch.where(reached, places, -1).amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), torch.where(temperature.unsqueeze(1) > 0, drawn, best), -1).squeeze(1)


@jit
def _weights(row_ptr, start, v, largest, inverse, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """z as bits, above every number outside the row, and w, for the columns from `start` on."""
    column = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + column, mask=column < v, other=float("-inf"), eviction_policy="evict_last")
    z = (largest - logits.to(tl.float32)) * inverse
    return tl.where(column < v, z.to(tl.int32, bitcast=True), 0x7FFFFFFF), tl.exp(-z)


@jit
def _mass(row_ptr, v, largest, inverse, limit, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the w up to a limit on z."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, bound(v), BLOCK, num_stages=3):
        bits, w = _weights(row_ptr, start, v, largest, inverse, BLOCK)
        total += tl.where(bits <= limit, w, 0.0)
    return tl.sum(total, 0)


@jit
def _cut(row_ptr, v, largest, inverse, limit, goal, COUNT: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least limit on z, as bits and at most `limit`, whose w (or tokens, if COUNT) come to `goal`."""
    low = tl.full([], -1, tl.int32)
    high = limit
    while high - low > 1:
        step = tl.maximum((high - low) // (EDGES + 1), 1)
        edges = tl.minimum(low + step * (tl.arange(0, EDGES) + 1), high)[:, None]  # [EDGES, 1]
        total = tl.zeros([EDGES, BLOCK], tl.float32)
        for start in tl.range(0, bound(v), BLOCK, num_stages=3):
            bits, w = _weights(row_ptr, start, v, largest, inverse, BLOCK)
            if COUNT:
                w = tl.full([BLOCK], 1.0, tl.float32)
            total += tl.where(bits[None, :] <= edges, w[None, :], 0.0)
        reached = tl.sum(total, 1, keep_dims=True)
        enough = reached >= goal
        high = tl.min(tl.where(enough, edges, high))
        low = tl.max(tl.where(enough | (edges >= high), low, edges))
        if tl.min(tl.where(enough, reached, float("inf"))) == goal:
            low = high - 1  # nothing is left to cut between an edge that is met exactly and the least such edge
    return high


@jit
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    out_ptr,
    v,
    stride,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, bound(v), BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + column, mask=column < v, other=float("-inf"), eviction_policy="evict_last")
        logits = logits.to(tl.float32)
        logits = tl.where(logits == logits, logits, float("inf"))
        place = tl.where(logits > best, column, place)
        best = tl.maximum(best, logits)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, place, 0x7FFFFFFF), 0)

    if tl.abs(largest) == float("inf"):
        token = tl.full([], -1, tl.int32)
    elif temperature > 0:
        inverse = tl.div_rn(1.0, tl.maximum(temperature, 1.1754943508222875e-38))
        limit = tl.full([], 0x7F800000, tl.int32)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < v):
            limit = _cut(row_ptr, v, largest, inverse, limit, top_k.to(tl.float32), True, EDGES, BLOCK)
        total = _mass(row_ptr, v, largest, inverse, limit, BLOCK)
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1:
            goal = tl.maximum(top_p, 1.1754943508222875e-38) * total
            limit = _cut(row_ptr, v, largest, inverse, limit, goal, False, EDGES, BLOCK)
            total = _mass(row_ptr, v, largest, inverse, limit, BLOCK)

        # The last block with something in it that begins at or before the target, then the last such token in it.
        target = tl.load(uniform_ptr + row).to(tl.float64) * total
        target = tl.where(target > 0, target, 0.0)
        before = tl.zeros([], tl.float64)
        passed = tl.zeros([], tl.float64)
        first = tl.zeros([], tl.int32)
        for start in tl.range(0, bound(v), BLOCK, num_stages=3):
            bits, w = _weights(row_ptr, start, v, largest, inverse, BLOCK)
            mass = tl.sum(tl.where(bits <= limit, w, 0.0), 0)
            begins = (mass > 0) & (before <= target)
            first = tl.where(begins, start, first)
            passed = tl.where(begins, before, passed)
            before += mass
        bits, w = _weights(row_ptr, first, v, largest, inverse, BLOCK)
        w = tl.where(bits <= limit, w, 0.0).to(tl.float64)
        reached = (w > 0) & (passed + tl.cumsum(w, 0) - w <= target)
        token = tl.max(tl.where(reached, first + tl.arange(0, BLOCK), -1), 0)
    tl.store(out_ptr + row, token.to(tl.int64))


def _check(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise UsageError(
            f"sample_tokens: logits is {logits.dtype} {list(logits.shape)}, and must be floats [B, V] with V ≥ 1."
        )
    kinds = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "uniform": torch.float32}
    for (name, dtype), given in zip(kinds.items(), (temperature, top_k, top_p, uniform), strict=True):
        if given.shape != logits.shape[:1] or given.dtype != dtype or given.device != logits.device:
            raise UsageError(
                f"sample_tokens: {name} is {given.dtype} {list(given.shape)} on {given.device}, and must be {dtype} "
                f"[{len(logits)}] on {logits.device}."
            )


def _sample_tokens_cuda(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    _check(logits, temperature, top_k, top_p, uniform)
    out = logits.new_empty(len(logits), dtype=torch.int64)
    if len(logits):
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        options = (t.contiguous() for t in (temperature, top_k, top_p, uniform))
        _sample_kernel[(len(rows),)](rows, *options, out, rows.shape[1], rows.stride(0), EDGES, BLOCK, num_warps=WARPS)
    return out


def _fake(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


sample_tokens = define(
    "sample_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor uniform) -> Tensor",
    sample_tokens_ref,
    _fake,
    cuda=_sample_tokens_cuda,
)

SHIPPED = tuple(
    Shipped(
        _sample_kernel,
        f"{kind} logits",
        {
            "logits_ptr": f"*{kind}",
            "temperature_ptr": "*fp32",
            "top_k_ptr": "*i32",
            "top_p_ptr": "*fp32",
            "uniform_ptr": "*fp32",
            "out_ptr": "*i64",
            "v": "i32",
            "stride": "i32",
        },
        {"EDGES": EDGES, "BLOCK": BLOCK},
        num_warps=WARPS,
        expects=("load128", "evict_last", "no-atomics"),
        registers=128,
    )
    for kind in ("bf16", "fp32")
)
