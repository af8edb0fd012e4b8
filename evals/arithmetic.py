"""Closed formulas of inference performance: what a model of P parameters must move, compute, and cost.

Bytes and FLOP are floats or exact integers, times are seconds, shares are fractions. They answer questions that need
no model at hand; `optimizer.evals.roofline` counts the same quantities operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from optimizer.errors import UsageError


class Work(NamedTuple):
    """FLOP computed and bytes moved by one operation."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


def _require(valid: bool, function: str, rule: str, **values: object) -> None:
    """Raise `UsageError` naming the function, the values and the rule unless `valid`."""
    if not valid:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise UsageError(f"{function}({given}): {rule}")


# Weights and cache


def effective_bits(bits: float, group_size: int, scale_bits: float = 16, zero_bits: float = 0) -> float:
    """Bits per weight with the scale and zero point of each group of `group_size`."""
    _require(group_size > 0, "effective_bits", "group_size must be positive", group_size=group_size)
    return bits + (scale_bits + zero_bits) / group_size


def weight_bytes(parameters: float, bits: float = 16) -> float:
    """Bytes of `parameters` weights of `bits` (effective) bits each."""
    return parameters * bits / 8


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bits: float = 16) -> float:
    """Bytes of the keys and values of one token in every layer: 2·L·H_kv·d_h·b."""
    return 2 * layers * kv_heads * head_dim * bits / 8


def requests_that_fit(memory_bytes: float, weight_bytes: float, kv_bytes_per_request: float) -> int:
    """Whole requests whose cache fits beside the weights on one device; 0 if the weights alone do not."""
    _require(
        kv_bytes_per_request > 0, "requests_that_fit", "a request's cache must hold bytes", kv=kv_bytes_per_request
    )
    return max(0, math.floor((memory_bytes - weight_bytes) / kv_bytes_per_request))


# A step of a model known only by its size


def prefill_flops(parameters: float, tokens: int, batch: int = 1) -> float:
    """FLOP of the linears over a prompt: 2·P·S a row."""
    return 2 * parameters * tokens * batch


def decode_flops(parameters: float, batch: int = 1) -> float:
    """FLOP of the linears in one decode step: 2·P·B."""
    return 2 * parameters * batch


def decode_intensity(
    parameters: float, batch: int, d_model: int = 0, param_bytes: float = 2, element_bytes: float = 2
) -> float:
    """FLOP per byte of a decode step: 2·P·B / (P·b_param + B·d_model·b_elem)."""
    return decode_flops(parameters, batch) / (parameters * param_bytes + batch * d_model * element_bytes)


def expected_experts(experts: int, active: int, tokens: int) -> float:
    """Distinct experts that `tokens` touch when each picks `active` of `experts` evenly: E·(1 − (1 − k/E)^T)."""
    _require(1 <= active <= experts, "expected_experts", "1 ≤ active ≤ experts", active=active, experts=experts)
    return experts * (1 - (1 - active / experts) ** tokens)


# Operators


def gemm(m: int, n: int, k: int, element_bytes: float = 2) -> Work:
    """`[M, K] @ [K, N]`: every operand moved once."""
    return Work(2 * m * n * k, element_bytes * (m * k + k * n + m * n))


def elementwise(elements: int, flops_per_element: float, element_bytes: float = 2) -> Work:
    """An operation that reads and writes each element once; GELU takes about 5 FLOP an element."""
    return Work(flops_per_element * elements, 2 * elements * element_bytes)


def attention(tokens: int, heads: int, head_dim: int, *, materialised: bool, element_bytes: float = 2) -> Work:
    """Full self-attention over `tokens`, 4·S²·d FLOP a head.

    Q, K, V and O always move. `materialised` scores and probabilities are each written and read as well: 4·S²
    elements a head that a tiled kernel keeps on the chip (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """
    moved = 4 * tokens * head_dim + (4 * tokens**2 if materialised else 0)
    return Work(4 * tokens**2 * head_dim * heads, moved * heads * element_bytes)


def fused_bytes_saved(elements: int, intermediates: int, element_bytes: float = 2) -> float:
    """Traffic that fusing a chain removes: each intermediate tensor of `elements` is no longer written and read."""
    return 2 * intermediates * elements * element_bytes


# Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)


def speculative_tokens(acceptance: float, drafts: int) -> float:
    """Expected tokens per pass of the target: (1 − p^(k+1)) / (1 − p)."""
    _require(
        0 <= acceptance <= 1 and drafts >= 0,
        "speculative_tokens",
        "acceptance must lie in [0, 1] and drafts be at least 0",
        acceptance=acceptance,
        drafts=drafts,
    )
    return sum(acceptance**i for i in range(drafts + 1))


def speculative_itl(draft_seconds: float, verify_seconds: float, tokens: float) -> float:
    """Effective seconds per token: one round of drafting and verifying over its expected tokens."""
    return (draft_seconds + verify_seconds) / tokens


# Time


def iron_law_seconds(
    bytes_moved: float,
    bandwidth: float,
    flops: float,
    peak_flops: float,
    *,
    efficiency: float = 1.0,
    latency_seconds: float = 0.0,
    overlapped: bool = True,
) -> float:
    """T = D_vol/BW + O/(R_peak·η) + L_lat; overlapped, the larger of the first two + L_lat."""
    memory, compute = bytes_moved / bandwidth, flops / (peak_flops * efficiency)
    return (max(memory, compute) if overlapped else memory + compute) + latency_seconds


def amdahl_seconds(seconds: float, shares: Mapping[str, float], removed: Mapping[str, float]) -> float:
    """A step's time after removing a fraction of some of its parts.

    `shares` are the parts' fractions of the step and sum to 1; `removed` is the fraction of each part that goes away.
    """
    unknown = removed.keys() - shares.keys()
    _require(not unknown, "amdahl_seconds", f"removed names parts without a share: {sorted(unknown)}", shares=shares)
    _require(math.isclose(sum(shares.values()), 1, rel_tol=1e-6), "amdahl_seconds", "shares sum to 1", shares=shares)
    return seconds * sum(share * (1 - removed.get(part, 0.0)) for part, share in shares.items())


def pipeline_bubble(stages: int, microbatches: int) -> float:
    """Idle fraction of a pipeline: (p − 1) / (m + p − 1)."""
    return (stages - 1) / (microbatches + stages - 1)


def scaling_tax(fleet_mfu: float, node_mfu: float) -> float:
    """The fraction of a node's utilisation lost by running many: 1 − MFU_fleet / MFU_node."""
    return 1 - fleet_mfu / node_mfu


def all_reduce_bytes(d_model: int, batch: int, element_bytes: float = 2, per_layer: int = 2) -> float:
    """Payload of a tensor-parallel layer's all-reduces: one after attention, one after the MLP."""
    return per_layer * d_model * batch * element_bytes


# Communication: a fixed latency, then what the slowest GPU must send over its bandwidth


def all_reduce_seconds(payload_bytes: float, ranks: int, bandwidth: float, latency_seconds: float = 0.0) -> float:
    """A ring's reduce-scatter and all-gather: each of n ranks sends 2·(n − 1)/n of the payload.

    The least that any all-reduce without help from a switch can send (Patarasuk, Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002). One rank sends nothing and waits for nobody.
    """
    _require(ranks >= 1, "all_reduce_seconds", "ranks must be at least 1", ranks=ranks)
    return 0.0 if ranks == 1 else latency_seconds + 2 * (ranks - 1) / ranks * payload_bytes / bandwidth


def all_to_all_seconds(payload_bytes: float, ranks: int, bandwidth: float, latency_seconds: float = 0.0) -> float:
    """Each of n ranks keeps 1/n of its payload and sends the rest to the others."""
    _require(ranks >= 1, "all_to_all_seconds", "ranks must be at least 1", ranks=ranks)
    return 0.0 if ranks == 1 else latency_seconds + (ranks - 1) / ranks * payload_bytes / bandwidth


def transfer_seconds(payload_bytes: float, links: int, bandwidth: float, latency_seconds: float = 0.0) -> float:
    """A payload cut evenly over `links` that send at once, such as a cache handed from prefill to decode."""
    _require(links >= 1, "transfer_seconds", "links must be at least 1", links=links)
    return latency_seconds + payload_bytes / (links * bandwidth)


# Metrics


def utilisation(amount: float, seconds: float, peak: float) -> float:
    """MFU of model FLOP against peak FLOP/s; MBU of model bytes that must be read against bytes/s."""
    return amount / (seconds * peak)


def goodput(
    requests: Iterable[tuple[float, float]], elapsed_seconds: float, *, ttft_slo: float, tpot_slo: float
) -> float:
    """Requests per second whose (TTFT, TPOT), in seconds, both meet the objectives."""
    return sum(ttft <= ttft_slo and tpot <= tpot_slo for ttft, tpot in requests) / elapsed_seconds


def cost_per_million_tokens(price_per_hour: float, tokens_per_second: float) -> float:
    """What a million tokens cost on a device of this price, in the price's currency."""
    return price_per_hour / (tokens_per_second * 3600) * 1e6
