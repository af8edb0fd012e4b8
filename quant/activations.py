"""Rounding of activations: the input `x [..., K]` of a layer, as the product of low-precision numbers would see it.

Elements are `q = round(x / s)`, clamped to the format; what they stand for is `q s`. Symbols: `m` is the largest
magnitude of what shares a scale, `t` the scale of a tensor found in calibration.

    int8      s = m / 127.5, a clamp at 127 included     one s a token, or one for the tensor
    fp8       s = m / 448, saturating                    one s a token, 128 values of a token, or the tensor
    static    s = t = m / 127.5 or m / 448               with m from calibration; what is larger saturates
    nvfp4     s = e4m3(t m / 6) / t, t = 448 · 6 / M     16 values of a token, under the M of calibration

LLM.int8 takes columns k with some |x[..., k]| > threshold out: they stay as they are, and `m` does not see them.

Worked example, int8: the token `[2.55, -1, 0.01]` has s = 0.02, q = [127, -50, 0] (127.5 is clamped, 0.5 ties to the
even 0) and stands for `[2.54, -1, 0]`.

Everything is computed and returned in float32: 16 bits cannot hold every `q s`, and a kernel that multiplies elements
and scales the sum keeps that precision. The scales are those of compressed-tensors, a zero one included: zeros stay
zeros. A value that is not finite makes its scale NaN, and so everything that shares it; static scales poison its
token. It never saturates to a number.

Sources: LLM.int8 arXiv:2208.07339, SmoothQuant arXiv:2211.10438 (static int8), FP8 arXiv:2209.05433, and 128-value
groups arXiv:2412.19437 section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import FP8_CHANNEL, NVFP4, ActivationFormat, Format
from optimizer.quant.weight import from_elements, to_elements

_ELEMENTS: dict[tuple[int, str], Format] = {(8, "int"): Format(8), (8, "float"): FP8_CHANNEL, (4, "float"): NVFP4}
_E4M3_MAX = 448.0
_ZERO_E4M3_SCALE = 0.125
"""What compressed-tensors puts for an e4m3 scale that rounds to 0; its group then rounds to zeros."""


def quantize_activation(x: Tensor, format: ActivationFormat, scale: Tensor | None = None) -> Tensor:
    """`x [..., K]` rounded to the grid of `format`, as float32 of the same shape.

    `scale [1]` is that of `static_scale`, for static formats. Raises `UsageError` as `check_activation` does.
    """
    q, steps, outliers = activation_elements(x, format, scale)
    values = _split(from_elements(q, _ELEMENTS[format.bits, format.kind]), format)
    steps = steps.float()
    if format.bits == 4:
        assert scale is not None
        steps = steps / scale.float()
    rounded = (values * steps.unsqueeze(-1)).reshape(x.shape)
    return rounded if outliers is None else torch.where(outliers, x.float(), rounded)


def activation_elements(
    x: Tensor, format: ActivationFormat, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x [..., K]` as elements `q [..., K]` (int8, e4m3, or the codes of e2m1), their scales, and outlier columns.

    Scales are float32 `[..., 1]`, `[..., K / g]` for groups, or `[1]` for a dynamic one of the tensor; those of nvfp4
    are e4m3 and still to be divided by `scale`. The outliers are a mask `[K]` where the format has a threshold, else
    None; q is 0 there. Where a scale is NaN the elements mean nothing.
    """
    check_activation(format, x.shape[-1], scale)
    x, outliers = x.float().contiguous(), None
    if format.outlier_threshold is not None:
        outliers = (x.abs() > format.outlier_threshold).reshape(-1, x.shape[-1]).any(0)
        x = x.masked_fill(outliers, 0.0)
    elements = _ELEMENTS[format.bits, format.kind]
    values = _split(x, format)
    steps = stored = _scales(values, format, elements, scale)
    if format.bits == 4:
        assert scale is not None
        stored, steps = steps.to(torch.float8_e4m3fn), steps / scale.float()
    # No integer is NaN, and the conversion of one to int8 is whatever the processor does.
    q = to_elements((values / steps.unsqueeze(-1)).nan_to_num(), elements)
    return q.reshape(x.shape), stored, outliers


def static_scale(absmax: Tensor | float, format: ActivationFormat) -> Tensor:
    """The float32 scale `[1]` for inputs whose largest magnitude is `absmax`; 1 where that is 0 or too small for one.

    Raises `UsageError` for a dynamic format and `ModelError` for a magnitude that is not finite.
    """
    if format.dynamic:
        raise UsageError(f"{format.name} takes its scales from each input. Only static formats have one in advance.")
    largest = torch.as_tensor(absmax).detach().float().reshape(-1)
    if largest.numel() != 1 or not bool(torch.isfinite(largest).all() & (largest >= 0).all()):
        raise ModelError(
            f"the largest input magnitude is {largest.tolist()}, and must be one finite number ≥ 0. "
            "Calibrate on inputs for which the model computes finite numbers."
        )
    elements = _ELEMENTS[format.bits, format.kind]
    scale = _E4M3_MAX * elements.q_max / largest if format.bits == 4 else largest / _half_range(elements)
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def check_activation(format: ActivationFormat, k: int, scale: Tensor | None) -> None:
    """`UsageError` unless inputs of `k` features can be rounded to `format` with this static scale, or without one."""
    tensor_scaled = format.bits == 4  # nvfp4: dynamic scales under a static one
    grouped = format.granularity == "group"
    known = (format.bits, format.kind) in _ELEMENTS and grouped == (format.group_size > 0)
    if not known or (tensor_scaled and (not grouped or format.dynamic)):
        raise UsageError(
            f"activations cannot be {format.name}: 8 bits per token, tensor or group, or 4-bit floats in groups under "
            "a static scale."
        )
    if not format.dynamic and not tensor_scaled and format.granularity != "tensor":
        raise UsageError(f"{format.name} has one static scale, so its granularity is tensor.")
    if grouped and k % format.group_size:
        raise UsageError(f"{format.name} groups do not divide {k} input features. Leave this layer as it is.")
    if (scale is None) != format.dynamic:
        takes = "takes its scales from each input and no static one" if format.dynamic else "needs a static scale"
        raise UsageError(f"{format.name} {takes}.")
    if scale is not None and scale.numel() != 1:
        raise UsageError(f"{format.name} needs one static scale, got {list(scale.shape)}.")


def _split(x: Tensor, format: ActivationFormat) -> Tensor:
    """`[..., K]` as `[..., G, g]`, what shares a scale along the last dimension."""
    size = format.group_size if format.granularity == "group" else x.shape[-1]
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _scales(values: Tensor, format: ActivationFormat, elements: Format, given: Tensor | None) -> Tensor:
    """Scales of `values [..., G, g]` as float32 `[..., G]`, or `[1]` for a dynamic one of the tensor."""
    largest = values.abs().amax(-1)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    if given is not None and format.bits == 8:
        return given.float() + 0 * largest
    if format.granularity == "tensor":
        largest = largest.amax().reshape(1) if largest.numel() else largest.new_zeros(1)
    scale = largest / _half_range(elements)
    if given is None:
        return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    scale = (given.float() * scale).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(scale == 0, _ZERO_E4M3_SCALE, scale)


def _half_range(elements: Format) -> float:
    """What the largest magnitude is divided by: half of the distance between the ends of the grid."""
    return (elements.q_max - elements.q_min) / 2
