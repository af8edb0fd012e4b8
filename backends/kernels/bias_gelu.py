"""GELU of a sum with a bias, the middle of a GPT-style feed-forward layer.

`y = gelu(x + bias)`, by the formulas of `gated`; Hendrycks and Gimpel, arXiv:1606.08415.

    x     [..., N] float32, bfloat16 or float16
    bias  [N] any float

The sum and everything after it is float32, rounded once. For M rows of b bytes an element `2 M N b` bytes move.
"""

from __future__ import annotations

from torch import Tensor

from optimizer.backends.kernels.gated import COLUMNS, GELU, activate, check_approximate, gelu_ref
from optimizer.backends.kernels.gpu import Shipped, jit, tl, triton
from optimizer.backends.kernels.library import define
from optimizer.backends.kernels.rounding import as_rows, check_rows, rounded


def bias_gelu_ref(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """The specification: in float32, rounded once."""
    check_rows("bias_gelu", x, bias=bias)
    check_approximate("bias_gelu", approximate)
    return gelu_ref(x.float() + bias.float(), approximate).to(x.dtype).contiguous()


@jit
def _bias_gelu_kernel(x_ptr, bias_ptr, out_ptr, n, x_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last")
    y = activate(x.to(tl.float32) + bias.to(tl.float32), ACTIVATION)
    tl.store(out_ptr + row * n + column, rounded(y, x.dtype), mask=inside)


def _bias_gelu_cuda(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    check_rows("bias_gelu", x, bias=bias)
    check_approximate("bias_gelu", approximate)
    out = x.new_empty(x.shape)
    n = x.shape[-1]
    if x.numel():
        rows = as_rows(x)
        _bias_gelu_kernel[(len(rows), triton.cdiv(n, COLUMNS.block))](
            rows, bias.contiguous(), out, n, rows.stride(0), GELU[approximate], COLUMNS.block, num_warps=COLUMNS.warps
        )
    return out


bias_gelu = define(
    "bias_gelu(Tensor x, Tensor bias, str approximate) -> Tensor",
    bias_gelu_ref,
    lambda x, *_: x.new_empty(x.shape),
    cuda=_bias_gelu_cuda,
)

SHIPPED = tuple(
    Shipped(
        _bias_gelu_kernel,
        activation,
        {"x_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "x_stride": "i32"},
        {"ACTIVATION": activation, "BLOCK": COLUMNS.block},
        num_warps=COLUMNS.warps,
        expects=("load128", "store128", "no-atomics"),
        registers=64,
    )
    for activation in GELU.values()
)
