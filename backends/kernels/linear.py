"""What the linear ops share: the float32 product that specifies them, its decoded form, and the fake."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., K]` by `weight [N, K]` float32, plus `bias [N]`: accumulated in float32, rounded once to `x`'s type."""
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def dequantized_linear(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """`float32_linear` on `(q - zero) * scale`, with `q [N, K]` and `scale`, `zero [N, G]`."""
    rows, k = q.shape
    weight = q.float().view(rows, scale.shape[1], -1)
    if zero is not None:
        weight = weight - zero.unsqueeze(-1)
    return float32_linear(x, (weight * scale.unsqueeze(-1)).view(rows, k), bias)


def linear_fake(x: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    """Shape and type of the result: the weight's rows come first in whatever it is stored as."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
