"""Round-to-nearest: each weight goes to the closest point of its group's grid; the grid may be clipped by search.

Symbols: weight `W [N, K]`, group size `g`, groups a row `G = K / g`, elements `q [N, K]`, scale `s [N, G]`,
zero point `z [N, G]`. Symmetric: `s = max|w| / (2^b - 1) * 2`, `q = clamp(round(w / s))`. Asymmetric: the range
`[min(w, 0), max(w, 0)]` is split into `2^b - 1` steps and `z = round(q_min - min / s)`, so that 0 is exact.
Either way `|w - (q - z) s| ≤ s / 2`, plus `(2^b - 1) u s` where `s` was rounded down to its stored type and the range
no longer reaches the largest weight (`u` is 2^-8 in bfloat16, 2^-11 in float16). Rounding `z` shifts the grid and
costs nothing: a weight it pushes off the end was at most half a step away.

Floats: `s = max|w| / q_max` (448 in e4m3, 6 in e2m1). NVFP4 scales are e4m3 themselves, under one float32 for the
tensor that puts the largest of them at 448. MXFP4 scales are powers of two.

Worked example, 4 bits, two rows, one group each: `W = [[-0.7, 0.1], [1.5, 0.4]]` has `s = [0.0933, 0.2]`, so
`q = [[-8, 1], [7, 2]]` (1.5 / 0.2 = 7.5 rounds to 8 and is clamped to 7) and `Ŵ = [[-0.7467, 0.0933], [1.4, 0.4]]`.

The grid is the one compressed-tensors observers produce, so its consumers read it without surprise.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import BLOCK, Format
from optimizer.quant.weight import Grid, QuantizedWeight

Clip = Literal["max", "mse"]

SHRINK = tuple(1 - i / 40 for i in range(24))
"""Shares of the full range that a search tries, 1 first: down to 0.425."""

_CHUNK = 1 << 20
"""Weights that are rounded at a time, where rows do not depend on each other."""


def quantize_rtn(
    weight: Tensor,
    format: Format,
    scale_dtype: torch.dtype | None = None,
    *,
    clip: Clip = "max",
    importance: Tensor | None = None,
    tensor_max: float | None = None,
) -> QuantizedWeight:
    """Quantize `weight [N, K]`; the scale is stored in `scale_dtype` (the weight's own type unless given).

    The scale is rounded to its stored type first and the elements are taken against the rounded scale, so what is
    saved is exactly what was evaluated. For `clip`, `importance` and `tensor_max` see `fit_grid`. Raises `ModelError`
    for NaN or inf, `UsageError` when groups do not fill K or there is nothing to quantize.
    """
    check_weight(weight)
    weight = weight.detach()
    if format.scale == "e4m3":  # what the rows share
        tensor_max = max(float(weight.abs().amax()), tensor_max or 0.0)
    rows = len(weight) if format.granularity == "tensor" else chunk_rows(weight.shape[1])
    elements: Tensor | None = None
    grids = []
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        grid = fit_grid(part, format, scale_dtype, clip=clip, importance=importance, tensor_max=tensor_max)
        q = grid.encode(part.float())
        elements = q.new_empty(weight.shape) if elements is None else elements
        elements[start : start + rows] = q
        grids.append(grid)
    assert elements is not None  # a weight has rows
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    scale = torch.cat([grid.scale for grid in grids])
    return QuantizedWeight(elements, scale, torch.cat(zeros) if zeros else None, format, grids[0].global_scale)


def chunk_rows(k: int) -> int:
    """Rows of `k` weights to work on at a time: whole blocks, few enough that float32 copies stay in a cache."""
    return max(_CHUNK // (k * BLOCK), 1) * BLOCK


def fit_grid(
    weight: Tensor,
    format: Format,
    scale_dtype: torch.dtype | None = None,
    *,
    clip: Clip = "max",
    importance: Tensor | None = None,
    tensor_max: float | None = None,
) -> Grid:
    """Scales and zero points for `weight [N, K]`.

    `clip="mse"` tries each share of `SHRINK` of every range and keeps the one with the smallest squared error,
    each column weighted by `importance [K]` (such as the mean square of its input). `tensor_max` is the largest
    magnitude that NVFP4's and the tensor's scale must reach, where layers that are served merged share it.
    """
    check_weight(weight)
    stored, weight = weight.dtype, weight.detach().float()
    scale_dtype = scale_dtype or stored
    low, high = _ranges(weight, format)
    largest = max(float(weight.abs().amax()), tensor_max or 0.0)
    if format.granularity == "tensor" and tensor_max is not None:
        low, high = torch.full_like(low, -largest), torch.full_like(high, largest)
    grid = _grid(low, high, format, scale_dtype, largest)
    if clip == "max":
        return grid
    least = _group_errors(weight, grid, importance)
    scale, zero = grid.scale, grid.zero
    for share in SHRINK[1:]:
        tried = _grid(low * share, high * share, format, scale_dtype, largest)
        errors = _group_errors(weight, tried, importance)
        better = errors < least
        least = torch.where(better, errors, least)
        scale = _where(better, tried.scale, scale)
        zero = None if zero is None or tried.zero is None else torch.where(better, tried.zero, zero)
    return Grid(format, scale, zero, grid.global_scale)


def check_weight(weight: Tensor) -> None:
    """`UsageError` for what is no matrix of floats, `ModelError` for NaN and infinity."""
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UsageError(
            f"a weight must be [N, K] of a floating type, not empty; got {list(weight.shape)} {weight.dtype}."
        )
    if not torch.isfinite(torch.stack((weight if weight.itemsize > 1 else weight.float()).aminmax())).all():
        raise ModelError("the weight holds NaN or infinite values. Quantization needs finite weights.")


def _ranges(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Least (≤ 0) and largest (≥ 0) weight under each scale, in the shape of the scales."""
    n, k = weight.shape
    rows, groups = format.scale_shape(n, k)
    if format.granularity == "block":
        padded = torch.nn.functional.pad(weight, (0, -k % BLOCK, 0, -n % BLOCK))
        tiles = padded.view(rows, BLOCK, groups, BLOCK).transpose(1, 2).flatten(2)
    else:
        tiles = weight.reshape(rows, groups, -1)
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    if format.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _grid(low: Tensor, high: Tensor, format: Format, dtype: torch.dtype, largest: float) -> Grid:
    scale = (high - low) / (format.q_max - format.q_min)
    if format.scale == "e4m3":
        global_scale = _global_scale(largest, scale.device)
        return Grid(format, _e4m3_scale(scale * global_scale), None, global_scale)
    if format.scale == "e8m0":
        return Grid(format, _e8m0_scale(high))
    scale = _storable(scale, dtype, 2**format.bits if format.kind == "int" else int(2 * format.q_max))
    if format.symmetric:
        return Grid(format, scale)
    zero = (format.q_min - low / scale.float()).round().clamp(format.q_min, format.q_max)
    return Grid(format, scale, zero.to(torch.int8))


def _global_scale(largest: float, device: torch.device) -> Tensor:
    """The float32 `[1]` that puts a tensor's largest NVFP4 scale at 448; finite for any weight."""
    limit = torch.finfo(torch.float32).max
    return torch.tensor([min(448.0 * 6.0 / largest, limit) if largest > 0 else 1.0], device=device)


def _e4m3_scale(scale: Tensor) -> Tensor:
    """Scales as e4m3, none of them 0: the smallest positive number is 2^-9."""
    return scale.clamp(min=2.0**-9, max=448.0).to(torch.float8_e4m3fn)


def _e8m0_scale(largest: Tensor) -> Tensor:
    """The power of two of each group: that of its largest weight, rounded up from 1.75, over e2m1's 4 = 2^2."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
    power = exponent - 3 + (mantissa >= 0.875).int()
    return torch.ldexp(torch.ones_like(largest), power.clamp(-126, 127)).to(torch.float8_e8m0fnu)


def _group_errors(weight: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Squared error under each scale, in the shape of the scales."""
    error = (weight - grid.decode(grid.encode(weight))).square_()
    if importance is not None:
        error *= importance.to(error)
    n, k = error.shape
    rows, groups = grid.format.scale_shape(n, k)
    if grid.format.granularity == "block":
        padded = torch.nn.functional.pad(error, (0, -k % BLOCK, 0, -n % BLOCK))
        return padded.view(rows, BLOCK, groups, BLOCK).sum((1, 3))
    return error.reshape(rows, groups, -1).sum(-1)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` that also takes 8-bit floats."""
    if a.itemsize > 1:
        return torch.where(condition, a, b)
    return torch.where(condition, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)


def _storable(scale: Tensor, dtype: torch.dtype, points: int) -> Tensor:
    """Round scales to their stored type; a zero or underflowing one becomes the smallest normal number.

    Raises `ModelError` when a scale is too large for the type (float16 ends at 65504), or for a grid of `points` of
    its steps to end within float32.
    """
    stored = scale.to(dtype)
    reaches = bool(torch.isfinite(scale * points).all())
    if not (reaches and torch.isfinite(stored).all()):
        remedy = "Store the scales in torch.float32" if reaches else "Its weights are out of range"
        raise ModelError(f"a scale of {scale.max():.3g} does not fit {dtype}. {remedy}.")
    return stored.clamp(min=max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny))
