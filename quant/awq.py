"""AWQ: channels with large inputs are made larger before rounding, and ranges are clipped where the output gains.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Objective: the squared error of the outputs on the calibration tokens
of all linears that share an input, `Σ_i tr(ΔW_i H ΔW_iᵀ)` (see `gram`), over one scale for that input:

    Ŵ_i = Q(W_i diag(s)) diag(s)⁻¹,   s = absmean^α or absmean^α / size^(1-α), centred so that max s · min s = 1

| symbol    | shape    | meaning                                                          |
|-----------|----------|------------------------------------------------------------------|
| `W_i`     | [N_i, K] | weights of the linears that read one input                       |
| `s`       | [K]      | what the input is divided by, and `W_i` multiplied               |
| `absmean` | [K]      | mean magnitude of each input channel                             |
| `size`    | [K]      | mean magnitude of each weight column, over all rows              |
| `α`       | –        | tried over 0 … 1; 0 is no scale, so the search can only help     |
| `H_g`     | [g, g]   | the block of the Gram matrix of one group of g columns           |

Nothing is run forward: every candidate is scored by the Gram matrix, first on a sample of the rows, and the winner is
compared with no scale on all of them. Once the scale is folded (into the norm before, say) the range of each group is
clipped by the share of `rtn.SHRINK` that makes `Δ_g H_g Δ_gᵀ` least. That ignores how groups act together, so the
clipped weight is kept only where its whole error is smaller.

A scale constant over some channels (heads that share a KV head) is made by `reduce`, applied to each candidate.

Worked example, 4 bits: `W = [[1.5, 0.1]]`, tokens `[1, 16]` and `[1, -16]`, so `H = diag(2, 512)` and `absmean =
[1, 16]`. Rounded as it is, the step is 0.2 and `Ŵ = [[1.4, 0]]`: error 5.14. `α = 0.5` gives `s = [0.5, 2]`,
`W s = [[0.75, 0.2]]` with step 0.1, `Ŵ = [[1.4, 0.1]]`: error 0.02. `α = 1` gives `Ŵ = [[1.4933, 0.0933]]`: 0.0228.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import BLOCK, Format
from optimizer.quant.gram import (
    Gram,
    Reduce,
    check_weights,
    foldable_scale,
    normalized_gram,
    sample_rows,
    trace_error,
)
from optimizer.quant.rtn import SHRINK, check_weight, fit_grid, quantize_rtn
from optimizer.quant.weight import Grid, QuantizedWeight


@dataclass(frozen=True)
class AWQ:
    """Options: steps of `α`, whether ranges are clipped, and `rows` of each weight that scales are compared by."""

    grid: int = 20
    clip: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        if self.grid < 1 or self.rows < 1:
            raise UsageError(f"Invalid grid {self.grid} or rows {self.rows}. Use at least 1 of each.")


def search_scale(
    weights: Sequence[Tensor],
    gram: Gram,
    format: Format,
    config: AWQ | None = None,
    *,
    reduce: Reduce | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """The scale `[K]` float32 for the shared input of `weights [N_i, K]`; all ones where none lowers the error.

    Divide the input by it (`Gram.scaled` does the same to its statistics) and multiply the columns of every weight.
    Raises `ModelError` for weights that are not finite, `UsageError` where shapes or groups do not fit.
    """
    config = config or AWQ()
    check_weights(weights, gram.k)
    H = normalized_gram(gram, gram.k, weights[0].device)
    absmean = gram.absmean.to(H.device)
    dtype = scale_dtype or weights[0].dtype
    identity = torch.ones_like(absmean)
    samples = [sample_rows(weight, config.rows) for weight in weights]
    best, least = identity, _rounding_error(samples, identity, H, format, dtype)
    size = torch.cat(samples).abs().mean(0)
    live = (absmean > 0) & (size > 0)
    for step in range(1, config.grid + 1):
        alpha = step / config.grid
        by_input = absmean.double() ** alpha
        for raw in (by_input, by_input / size.double().clamp(min=torch.finfo(torch.float32).tiny) ** (1 - alpha)):
            scale = foldable_scale(raw, live, reduce)
            error = _attempt(samples, scale, H, format, dtype)
            if error < least:
                best, least = scale, error
    if best is identity or all(len(w) <= config.rows for w in weights):
        return best
    whole = [weight.detach().float() for weight in weights]
    better = _attempt(whole, best, H, format, dtype) < _rounding_error(whole, identity, H, format, dtype)
    return best if better else identity


def quantize_awq(
    weight: Tensor,
    gram: Gram | Tensor,
    format: Format,
    config: AWQ | None = None,
    scale_dtype: torch.dtype | None = None,
    *,
    tensor_max: float | None = None,
) -> QuantizedWeight:
    """Quantize `weight [N, K]` with clipped ranges, where its scale and that of `gram` are already folded.

    Never worse than round-to-nearest on `tr(ΔW H ΔWᵀ)`. For `tensor_max` see `rtn.fit_grid`. Raises as `search_scale`
    does.
    """
    config = config or AWQ()
    nearest = quantize_rtn(weight, format, scale_dtype, tensor_max=tensor_max)
    if not config.clip:
        return nearest
    grid = search_clip(weight, gram, format, scale_dtype, tensor_max=tensor_max)
    exact = weight.detach().float()
    clipped = QuantizedWeight(grid.encode(exact), grid.scale, grid.zero, format, grid.global_scale)
    H = normalized_gram(gram, weight.shape[1], weight.device)
    lost, before = (trace_error(exact - candidate.dequantize(), H) for candidate in (clipped, nearest))
    return clipped if lost < before else nearest


def search_clip(
    weight: Tensor,
    gram: Gram | Tensor,
    format: Format,
    scale_dtype: torch.dtype | None = None,
    *,
    tensor_max: float | None = None,
) -> Grid:
    """The grid whose ranges are shrunk, each on its own, to the share of `SHRINK` with the least `Δ_g H_g Δ_gᵀ`."""
    check_weight(weight)
    dtype, weight = scale_dtype or weight.dtype, weight.detach().float()
    n, k = weight.shape
    if format.scale == "e4m3":
        tensor_max = max(float(weight.abs().amax()), tensor_max or 0.0)

    def shrunk(share: Tensor | float) -> Grid:
        # The grid of a smaller weight is the smaller grid; NVFP4's tensor scale stays that of the whole.
        return fit_grid(weight * share, format, dtype, tensor_max=tensor_max)

    rows, groups = format.scale_shape(n, k)
    width = {"group": format.group_size, "block": BLOCK}.get(format.granularity, k)  # columns that share a scale
    height = {"tensor": n, "block": BLOCK}.get(format.granularity, 1)
    blocks = _diagonal_blocks(normalized_gram(gram, k, weight.device), groups, width)
    size = float(weight.abs().amax()) or 1.0  # so that no square leaves float32
    share = torch.ones(rows, groups, device=weight.device)
    least = torch.full_like(share, torch.inf)
    for tried in SHRINK:
        grid = shrunk(tried)
        errors = _group_errors((weight - grid.decode(grid.encode(weight))) / size, blocks, height)
        share = torch.where(errors < least, tried, share)
        least = torch.minimum(errors, least)
    return shrunk(share.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :k])


def _attempt(weights: Sequence[Tensor], scale: Tensor, H: Tensor, format: Format, dtype: torch.dtype) -> float:
    """The error with a scale; infinite where it takes a weight out of the range of its scales."""
    try:
        return _rounding_error(weights, scale, H, format, dtype)
    except ModelError:
        return math.inf


def _rounding_error(weights: Sequence[Tensor], scale: Tensor, H: Tensor, format: Format, dtype: torch.dtype) -> float:
    """`Σ_i tr(ΔW_i H ΔW_iᵀ)` of float32 weights rounded to nearest under a scale."""
    return sum(trace_error(w - quantize_rtn(w * scale, format, dtype).dequantize() / scale, H) for w in weights)


def _diagonal_blocks(H: Tensor, groups: int, width: int) -> Tensor:
    """The blocks `H_g` `[G, g, g]` along the diagonal of `H [K, K]`, the last one filled up with zeros."""
    blocks = torch.zeros(groups, width, width, device=H.device)
    for block, start in zip(blocks, range(0, len(H), width), strict=True):
        part = H[start : start + width, start : start + width]
        block[: len(part), : len(part)] = part
    return blocks


def _group_errors(delta: Tensor, blocks: Tensor, height: int) -> Tensor:
    """`Δ_g H_g Δ_gᵀ` of `delta [N, K]`, summed over the `height` rows that share a scale: `[rows, G]`."""
    groups, width = blocks.shape[:2]
    n, k = delta.shape
    parts = pad(delta, (0, groups * width - k)).view(n, groups, width).transpose(0, 1)  # [G, N, g]
    errors = ((parts @ blocks) * parts).sum(-1).T  # [N, G]
    return pad(errors, (0, 0, 0, -n % height)).view(-1, height, groups).sum(1)
