"""SmoothQuant: large input channels are made smaller, and the weights that read them larger, before both are rounded.

Xiao et al. 2022, https://arxiv.org/abs/2211.10438. For the linears that share an input:

    y = (x / s) (W_i diag(s))ᵀ,   s_j = max_t |x_tj|^α / max_in |W_i,nj|^(1-α)

| symbol   | shape    | meaning                                                              |
|----------|----------|----------------------------------------------------------------------|
| `W_i`    | [N_i, K] | weights of the linears that read one input                           |
| `x`      | [T, K]   | calibration tokens, known only by their `Gram`                       |
| `s`      | [K]      | what the input is divided by, centred so that max s · min s = 1      |
| `α`      | –        | 0: the weights decide, 1: the inputs; searched for each site if None |
| `v`      | [K]      | squared rounding error of each channel of `x / s`, over the tokens   |

Objective: the squared error of the outputs over the calibration tokens, predicted with no forward pass as that of the
rounded weight plus that of the rounded input, as if the two were independent:

    Σ_i tr(ΔW_i H ΔW_iᵀ) + Σ_j v_j Σ_in W_i,nj²        (W, ΔW and H after scaling)

- Integers: `v_j = T step² / 12`, with the step of the largest |x| under one scale. For a scale of each token that is
  less than the largest of all tokens, and the statistics do not hold it. It is estimated as if channels were normal
  with their `absmean`, whose root mean square is `σ_j = absmean_j √(π/2)`: the largest of K has a square of about
  `p/e (Σ_j σ_j^p)^(2/p)` with `p = 2 ln K`, which is `2 ln K σ²` for K equal channels. `absmean` and not `H_jj`, so
  that a few tokens with huge activations, which have steps of their own, do not count for all. It is bounded by the
  largest of all tokens and, summed over them, by `tr H`.
- Floats with m mantissa bits: rounding is relative, `v_j = 0.045 · 4^-m H_jj`: a gap of `2^(e-m)` between neighbours
  has variance `4^(e-m) / 12`, and `4^e / x²` is 0.54 on average for magnitudes spread evenly in `log x`. Below the
  smallest normal number they are integers again.
- No channel can lose more than it holds: `v_j ≤ H_jj`, where all of it is rounded to 0.

"No smoothing" is one of the candidates, so a search is never predicted to be worse.

Worked example: `absmax = [8, 0.25]`, largest weights `[0.5, 4]`, `α = 0.5`: `s = [4, 0.25]`. Then `x / s` reaches
`[2, 1]` and `W s` reaches `[2, 1]`: a 32-fold range has become a 2-fold one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import ActivationFormat, Scheme
from optimizer.quant.gram import (
    Gram,
    Reduce,
    check_scale,
    check_weights,
    foldable_scale,
    normalized_gram,
    sample_rows,
    trace_error,
)
from optimizer.quant.rtn import quantize_rtn

ALPHAS = tuple(i / 20 for i in range(21))
"""What a search tries, besides no smoothing."""

_FLOATS = {8: (3, 448.0, 2.0**-9), 4: (1, 6.0, 0.5)}
"""Mantissa bits, largest and smallest positive number of the float formats by their bits."""

_MEAN_SQUARE = 0.375 / math.log(2)
"""The mean of `4^e / x²` for x spread evenly in log x over [2^e, 2^(e+1))."""


@dataclass(frozen=True)
class SmoothQuant:
    """Options: `alpha` None searches it for each site; `rows` of each weight are what candidates are compared by."""

    alpha: float | None = None
    rows: int = 512

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"Invalid alpha {self.alpha}. Use a number from 0 to 1, or none to search it.")
        if self.rows < 1:
            raise UsageError(f"Invalid rows {self.rows}. Use at least 1.")


@dataclass(frozen=True)
class SmoothResult:
    """The scale `[K]` float32, its `alpha` (None: no smoothing), and predicted relative errors with and without it."""

    scale: Tensor
    alpha: float | None
    error: float
    plain_error: float


def search_scale(
    weights: Sequence[Tensor],
    gram: Gram,
    scheme: Scheme,
    config: SmoothQuant | None = None,
    *,
    reduce: Reduce | None = None,
) -> SmoothResult:
    """The scale for the shared input of `weights [N_i, K]`: divide the input by it, multiply the columns of each.

    `reduce` makes it constant over the channels that must share one. Raises `ModelError` for weights that are not
    finite, `UsageError` where shapes or groups do not fit.
    """
    config = config or SmoothQuant()
    check_weights(weights, gram.k)
    alphas = ALPHAS if config.alpha is None else (config.alpha,)
    absmax = gram.absmax.to(weights[0].device).double()
    largest = torch.stack([weight.detach().double().abs().amax(0) for weight in weights]).amax(0)
    live = (absmax > 0) & (largest > 0)
    scales: dict[float | None, Tensor] = {None: torch.ones_like(absmax, dtype=torch.float32)}
    scales |= {alpha: foldable_scale(absmax**alpha * largest ** (alpha - 1), live, reduce) for alpha in alphas}

    plain_error = predicted_error(weights, gram, scheme)
    chosen = config.alpha
    if chosen is None:
        samples = [sample_rows(weight, config.rows) for weight in weights]
        dtype = weights[0].dtype
        H = normalized_gram(gram, gram.k, weights[0].device)
        scored = {alpha: _attempt(samples, H, gram, scheme, scale, dtype) for alpha, scale in scales.items()}
        chosen = min(scored, key=lambda alpha: scored[alpha])
    if chosen is None:
        return SmoothResult(scales[None], None, plain_error, plain_error)
    try:
        error = predicted_error(weights, gram, scheme, scales[chosen])
    except ModelError:
        if config.alpha is not None:
            raise
        error = math.inf
    if config.alpha is None and not error < plain_error:  # all rows disagree with the sample
        return SmoothResult(scales[None], None, plain_error, plain_error)
    return SmoothResult(scales[chosen], chosen, error, plain_error)


def predicted_error(weights: Sequence[Tensor], gram: Gram, scheme: Scheme, scale: Tensor | None = None) -> float:
    """Predicted squared error of the outputs over their energy, for `weights [N_i, K]` in `scheme` under a scale.

    0 where calibration saw no token. Raises as `search_scale` does.
    """
    check_weights(weights, gram.k)
    H = normalized_gram(gram, gram.k, weights[0].device)
    scale = torch.ones_like(H[0]) if scale is None else check_scale(scale, gram.k).to(H)
    exact = [weight.detach().float() for weight in weights]
    lost = _lost(exact, H, gram, scheme, scale, weights[0].dtype)
    energy = sum(trace_error(weight, H) for weight in exact)
    return lost / energy if energy else (math.inf if lost else 0.0)


def activation_noise(gram: Gram, activation: ActivationFormat | None, scale: Tensor | None = None) -> Tensor:
    """`v [K]` float64: the squared rounding error of each channel of `x / scale`, summed over the tokens seen."""
    s = torch.ones_like(gram.absmax) if scale is None else scale.to(gram.absmax)
    absmax, absmean, power = gram.absmax.double() / s, gram.absmean.double() / s, gram.H.diagonal().double() / s / s
    if activation is None:
        return torch.zeros_like(power)
    unrounded = absmax > (math.inf if activation.outlier_threshold is None else activation.outlier_threshold)
    absmax, absmean, power = (channel.masked_fill(unrounded, 0) for channel in (absmax, absmean, power))
    k = len(absmax)
    width = activation.group_size if activation.granularity == "group" else k
    peaks = _grouped(absmax, width).amax(1).square() * gram.tokens  # [G]: Σ_t (largest |x|)²
    if activation.granularity != "tensor":
        peaks = torch.minimum(peaks, gram.tokens * _token_peak(_grouped(absmean, width)))
        peaks = torch.minimum(peaks, _grouped(power, width).sum(1))
    peaks = peaks.repeat_interleave(width)[:k]
    if activation.kind == "int":
        noise = peaks * (2 / (2**activation.bits - 1)) ** 2 / 12
    else:
        mantissa, largest, smallest = _FLOATS[activation.bits]
        noise = _MEAN_SQUARE / 12 * 4.0**-mantissa * power + peaks * (smallest / largest) ** 2 / 12
    return torch.minimum(noise, power)


def _grouped(channels: Tensor, width: int) -> Tensor:
    """`[K]` as `[G, width]`, filled up with zeros."""
    return pad(channels, (0, -len(channels) % width)).view(-1, width)


def _token_peak(absmean: Tensor) -> Tensor:
    """The expected square of the largest magnitude among the channels of a token, `[G, width]` to `[G]`."""
    p = 2 * math.log(max(absmean.shape[1], math.e))
    norm: Tensor = torch.linalg.vector_norm(absmean, ord=p, dim=1)
    return p / math.e * math.pi / 2 * norm.square()


def _attempt(
    weights: Sequence[Tensor], H: Tensor, gram: Gram, scheme: Scheme, scale: Tensor, dtype: torch.dtype
) -> float:
    """`_lost`; infinite where the scale takes a weight out of the range of its type."""
    try:
        return _lost(weights, H, gram, scheme, scale, dtype)
    except ModelError:
        return math.inf


def _lost(weights: Sequence[Tensor], H: Tensor, gram: Gram, scheme: Scheme, scale: Tensor, dtype: torch.dtype) -> float:
    """The objective of the module for float32 `weights`, over the largest `H_jj`: `H` is the normalized Gram."""
    noise = activation_noise(gram, scheme.activation, scale) / (float(gram.H.diagonal().max()) or 1.0)
    noise, lost = noise.to(H.device), 0.0
    for weight in weights:
        larger = weight * scale
        delta = larger - quantize_rtn(larger, scheme.weight, dtype).dequantize()
        lost += trace_error(delta / scale, H)  # as tr(D H' Dᵀ) with the Gram H' of x / s, which is never made
        norms = torch.linalg.vector_norm(larger, dim=0, dtype=torch.float64)
        lost += float((norms.square() * noise).sum())
    return lost
