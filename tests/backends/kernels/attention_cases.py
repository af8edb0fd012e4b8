"""Attention of one token in float64, with the error that kernels in float32 may make."""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24  # what one operation in float32 rounds by, relatively


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, rounded_weights: float = 0.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`q [B, H, D]` over `k`, `v [B, H_kv, S, D]` where `seen [B, S]`: the result `[B, H, D]` and its error.

    A score, a sum of D products, is off by (D + 8) u times the sum of magnitudes: 8 covers its scale, its base and the
    maximum that is subtracted. A weight is then off by that much and u relatively, and so is their sum: twice. Adding
    up S of them and S products is off by S u each, splits by a few u more; the result is rounded to the type of q.
    `rounded_weights` is the relative rounding of probabilities before they are multiplied. Capping a score does not
    enlarge its error, since its slope is at most 1, and adds that of a tanh: 8 u of the largest that there is, 1.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    query, hidden = q.double().unsqueeze(2), ~seen[:, None, None]
    scores = query @ keys.mT * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    size = (query.abs() @ keys.abs().mT * scale).masked_fill(hidden, 0).amax(-1, keepdim=True)
    relative = 2 * ((q.shape[-1] + 8) * U * size + 8 * U * softcap) + (2 * seen.shape[1] + 16) * U + rounded_weights
    values = values.masked_fill(hidden.mT, 0)
    exact, error = weights @ values, relative * (weights @ values.abs())
    kind = torch.finfo(q.dtype)
    error = error + kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    return exact.squeeze(2), error.squeeze(2)


def assert_within(got: Tensor, exact: Tensor, error: Tensor) -> None:
    """Each element of `got` lies within its error of `exact`; NaN does not."""
    excess = (got.double() - exact).abs() - error
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding explains"
