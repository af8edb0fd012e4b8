"""Linear layer whose weight has no kernel of its own: decoded, then multiplied.

`y = x Ŵᵀ + b`, `Ŵ = (q - zero) * scale / global_scale`.

    x             [..., K] float32, bfloat16 or float16
    data          elements: [N, K] int8 or float8_e4m3fn, or [N, K / 2] uint8, two 4-bit floats (e2m1) a byte, low first
    scale         [N, G], [1, 1], or [⌈N / 128⌉, ⌈K / 128⌉] where `blocks`: a float type, e4m3 or e8m0
    zero          [N, G], absent when symmetric
    global_scale  [1] float32, for 4-bit floats with e4m3 scales
    bias          [N]

Products are float32 and rounded once to the type of `x`, except that 16-bit activations are multiplied in their own
type where the processor has instructions for it: there the decoded weight is rounded to that type, as a plain
checkpoint's would be. A few million weights are decoded at a time. Moves their decoded form besides the stored one,
so it is a reference: right and small, not fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.linear import linear_fake
from optimizer.quant.formats import BLOCK, FP8_BLOCK, FP8_CHANNEL, NVFP4, Format
from optimizer.quant.packing import unpack_nibbles
from optimizer.quant.weight import Grid

DECODED_AT_ONCE = 8 << 20
"""Weights decoded at a time: 32 MB in float32."""

_ELEMENTS = {
    (torch.int8, False): Format(8),
    (torch.int8, True): Format(8, granularity="block"),
    (torch.float8_e4m3fn, False): FP8_CHANNEL,
    (torch.float8_e4m3fn, True): FP8_BLOCK,
    (torch.uint8, False): NVFP4,
}


def decoded_linear_ref(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    blocks: bool,
) -> Tensor:
    """The specification: decode rows to the type of the product, multiply, round once to the type of `x`."""
    n, dtype = data.shape[0], _product_type(x)
    format, x_wide = _ELEMENTS[data.dtype, blocks], x.to(dtype)
    step = max(BLOCK, DECODED_AT_ONCE // max(1, x.shape[-1]) // BLOCK * BLOCK)
    parts = []
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        scaled = slice(first // BLOCK, -(-rows.stop // BLOCK)) if blocks else rows if len(scale) == n else slice(None)
        grid = Grid(format, scale[scaled], None if zero is None else zero[scaled], global_scale)
        q = unpack_nibbles(data[rows]) if data.dtype == torch.uint8 else data[rows]
        part_bias = None if bias is None else bias[rows].to(dtype)
        parts.append(F.linear(x_wide, grid.decode(q).to(dtype), part_bias))
    return torch.cat(parts, dim=-1).to(x.dtype)


def _product_type(x: Tensor) -> torch.dtype:
    """The type of `x` where the processor multiplies it natively, else float32."""
    if x.device.type != "cpu":
        return x.dtype
    native = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype if native else torch.float32


decoded_linear = define(
    "decoded_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? global_scale, Tensor? bias, bool blocks)"
    " -> Tensor",
    decoded_linear_ref,
    linear_fake,
)
