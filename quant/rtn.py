"""Round-to-nearest: each weight goes to the closest point of its group's grid.

Symbols: weight `W [N, K]`, group size `g`, groups a row `G = K / g`, integers `q [N, K]`, scale `s [N, G]`,
zero point `z [N, G]`. Symmetric: `s = max|w| / (2^b - 1) * 2`, `q = clamp(round(w / s))`. Asymmetric: the range
`[min(w, 0), max(w, 0)]` is split into `2^b - 1` steps and `z = round(q_min - min / s)`, so that 0 is exact.
Either way `|w - (q - z) s| ≤ s / 2`, plus `(2^b - 1) u s` where `s` was rounded down to its stored type and the range
no longer reaches the largest weight (`u` is 2^-8 in bfloat16, 2^-11 in float16). Rounding `z` shifts the grid and
costs nothing: a weight it pushes off the end was at most half a step away.

Worked example, 4 bits, two rows, one group each: `W = [[-0.7, 0.1], [1.5, 0.4]]` has `s = [0.0933, 0.2]`, so
`q = [[-8, 1], [7, 2]]` (1.5 / 0.2 = 7.5 rounds to 8 and is clamped to 7) and `Ŵ = [[-0.7467, 0.0933], [1.4, 0.4]]`.

The grid is the one compressed-tensors observers produce, so its consumers read it without surprise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import Format


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid: `q [N, K]` int8, `scale [N, G]`, `zero [N, G]` int8 (absent when symmetric)."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(q - z) * s` as `[N, K]`, computed in float32 and rounded once to `dtype`."""
        rows, k = self.q.shape
        grouped = self.q.view(rows, self.scale.shape[1], -1).float()
        if self.zero is not None:
            grouped = grouped - self.zero.unsqueeze(-1).float()
        return (grouped * self.scale.unsqueeze(-1).float()).view(rows, k).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output rows `start:stop`: quantization works row by row, so this is exact."""
        zero = None if self.zero is None else self.zero[start:stop]
        return QuantizedWeight(self.q[start:stop], self.scale[start:stop], zero, self.format)


def concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of one format and one K along their output rows."""
    zeros = [part.zero for part in parts if part.zero is not None]
    zero = torch.cat(zeros) if zeros else None
    return QuantizedWeight(
        torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts]), zero, parts[0].format
    )


def quantize_rtn(weight: Tensor, format: Format, scale_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize `weight [N, K]`; the scale is stored in `scale_dtype` (the weight's own type unless given).

    The scale is rounded to its stored type first and the integers are taken against the rounded scale, so what is
    saved is exactly what was evaluated. Raises `ModelError` for NaN or inf, `UsageError` when groups do not fill K or
    there is nothing to quantize.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UsageError(
            f"a weight must be [N, K] of a floating type, not empty; got {list(weight.shape)} {weight.dtype}."
        )
    if not torch.isfinite(weight).all():
        raise ModelError("the weight holds NaN or infinite values. Quantization needs finite weights.")
    rows, k = weight.shape
    grouped = weight.detach().float().reshape(rows, format.groups(k), -1)  # [N, G, g]
    scale_dtype = scale_dtype or weight.dtype
    steps = format.q_max - format.q_min
    if format.symmetric:
        scale = grouped.abs().amax(-1) / (steps / 2)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / steps
    scale = _storable(scale, scale_dtype, 2**format.bits)
    q = grouped / scale.float().unsqueeze(-1)
    zero = None
    if not format.symmetric:
        zero = (format.q_min - low / scale.float()).round().clamp(format.q_min, format.q_max)
        q = q + zero.unsqueeze(-1)
    q = q.round().clamp(format.q_min, format.q_max).to(torch.int8).view(rows, k)
    return QuantizedWeight(q, scale, None if zero is None else zero.to(torch.int8), format)


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
