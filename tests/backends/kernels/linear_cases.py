"""Operands for the linear ops, with their exact product and the error that float32 accumulation may make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.kernels.bf16_linear import bf16_linear, bf16_linear_ref
from optimizer.backends.kernels.w4a16_linear import pack_int4, w4a16_linear, w4a16_linear_ref
from optimizer.backends.kernels.w8a16_linear import w8a16_linear, w8a16_linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An op with its reference, a weight in the form it takes, and that weight in float64.

    `magnitude [N, K]` bounds what is multiplied for one weight: the kernels subtract the zero point after summing, so
    a product is as large as `scale * (|q + offset| + |zero + offset|)`, not as its difference.
    """

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    weight: tuple[Tensor | None, ...]
    exact: Tensor
    magnitude: Tensor
    bias: Tensor | None = None

    def args(self, x: Tensor) -> tuple[Any, ...]:
        """What the op is called with."""
        return (x, *self.weight, self.bias)

    def expected(self, x: Tensor, *, unit: float = 2.0**-24, decoded: bool = False) -> tuple[Tensor, Tensor]:
        """The product in float64, and how far a float32 accumulation that rounds once may be from it.

        A sum of K products in any order, and the few operations around it, is off by at most (K + 16) u times the sum
        of magnitudes (Higham, Accuracy and Stability, 3.1); the result is then rounded to the type of `x`. `unit` is u,
        and `decoded` says that each weight was rounded to the type of `x` first, half an ulp off.
        """
        bias = 0 if self.bias is None else self.bias.double()
        product = x.double() @ self.exact.t() + bias
        sums = x.double().abs() @ self.magnitude.t() + abs(bias)
        error = (x.shape[-1] + 16) * unit * sums
        kind = torch.finfo(x.dtype)
        # With bfloat16 instructions, a CPU multiplies many rows by the weight rounded to bfloat16.
        native = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if decoded or native:
            error = error + kind.eps / 2 * (x.double().abs() @ self.exact.abs().t())
        return product, error + kind.eps / 2 * (product.abs() + error) + kind.smallest_normal * kind.eps

    def check(self, got: Tensor, x: Tensor, *, unit: float = 2.0**-24, decoded: bool = False) -> None:
        """`got` has the type of `x`, the shape of the product, and lies within its error."""
        product, error = self.expected(x, unit=unit, decoded=decoded)
        assert got.dtype == x.dtype
        assert got.shape == product.shape
        off = (got.double() - product).abs() - error
        assert bool((off <= 0).all()), f"off by {float(off.max()):.3g} more than float32 accumulation explains"


def quantized_case(
    bits: int,
    *,
    n: int = 19,
    k: int = 256,
    group: int = -1,
    symmetric: bool = True,
    bias: torch.dtype | None = None,
    offset: int | None = None,
) -> Case:
    """Random integers over the whole grid, positive and negative zero points, scales over three decades.

    `offset` is what a kernel adds to q while it sums: by default the 8 of stored 4-bit weights.
    """
    generator = torch.Generator().manual_seed(n + k + group)
    groups = 1 if group == -1 else k // group
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, groups, generator=generator) * torch.logspace(-3, 0, n).unsqueeze(1) + 1e-4
    zero = None if symmetric else torch.randint(-half, half, (n, groups), generator=generator).float()
    wide = (scale.double().repeat_interleave(k // groups, 1), 0.0)
    if zero is not None:
        wide = (wide[0], zero.double().repeat_interleave(k // groups, 1))
    offset = (8 if bits == 4 else 0) if offset is None else offset
    exact = (q.double() - wide[1]) * wide[0]
    magnitude = ((q.double() + offset).abs() + abs(wide[1] + offset)) * wide[0]
    b = None if bias is None else torch.randn(n, generator=generator).to(bias)
    if bits == 4:
        return Case(w4a16_linear, w4a16_linear_ref, (pack_int4(q), scale, zero), exact, magnitude, b)
    return Case(w8a16_linear, w8a16_linear_ref, (q, scale, zero), exact, magnitude, b)


def bf16_case(*, n: int = 19, k: int = 256, bias: torch.dtype | None = None) -> Case:
    """A random bfloat16 weight."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator).to(torch.bfloat16)
    b = None if bias is None else torch.randn(n, generator=generator).to(bias)
    return Case(bf16_linear, bf16_linear_ref, (weight,), weight.double(), weight.double().abs(), b)


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Standard normal `[..., K]`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
