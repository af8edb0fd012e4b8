"""Choosing the next token from logits: greedy, temperature, top-k, top-p (nucleus; Holtzman et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. `temperature` 0 is greedy; `top_k` and `top_p` cut the tail before drawing."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"Invalid temperature {self.temperature}. Use 0 for greedy or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"Invalid top_k {self.top_k}. Keep at least 1 token, or None for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"Invalid top_p {self.top_p}. Use a probability in (0, 1], or None for all.")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution `[B, V]` that is drawn from, in float32. Temperature comes first, then top-k, then top-p."""
    logits = logits.float()
    # From the largest down, so that a temperature near 0 tends to greedy and never to inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # a token stays while those above it hold less than top_p
        ordered = ordered.masked_fill(before >= max(sampling.top_p, torch.finfo(torch.float32).tiny), 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row: `logits [B, V]` to `[B]` int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator).squeeze(-1)


PARTS = 64
"""Into how many parts a GPU divides a row of logits to find the largest."""


def most_likely(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)`, on a GPU in parts: of a whole row Inductor makes one program, and the others wait for it."""
    width, rest = divmod(logits.shape[-1], PARTS)
    if not logits.is_cuda or rest or not width:
        return logits.argmax(-1)
    return in_parts(logits, PARTS)


def in_parts(logits: Tensor, parts: int) -> Tensor:
    """The argmax of each part, then that of the part with the largest; of equals the first, and NaN above all."""
    largest, place = logits.unflatten(-1, (parts, -1)).max(-1)  # [..., parts]
    part = largest.argmax(-1, keepdim=True)
    chosen: Tensor = part * (logits.shape[-1] // parts) + place.gather(-1, part)
    return chosen.squeeze(-1)
