"""What products of two 8-bit matrices under scales take: `q [..., K]`, `data [N, K]` and their scales, checked.

q, data   int8, or float8_e4m3fn
q_scale   float32 [1] for the tensor, [..., 1] for each token, or [..., K / 128] (e4m3 only)
scale     float32 [N, 1] for each row, and for e4m3 also [1, 1] or [⌈N / 128⌉, ⌈K / 128⌉]
bias      [N], any float type
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK

INT32_COLUMNS = 1 << 17
"""K from which a sum of products as large as 128² may pass 2^31."""

_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operands:
    """Checked operands as matrices, and the shape of y.

    `a_scale` is `[M, 1]` or `[M, K / 128]`; `b_scale` `[N, 1]`, or `[⌈N / 128⌉, ⌈K / 128⌉]` where `b_rows` is 128.
    """

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    b_rows: int
    bias: Tensor | None
    shape: tuple[int, ...]

    @property
    def blocks(self) -> bool:
        """Whether scales change along K."""
        return self.a_scale.shape[1] > 1 or self.b_rows > 1


def operands(
    q: Tensor, q_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: torch.dtype
) -> Operands:
    """Inputs `q [..., K]` and weight `data [N, K]` of type `kind`, and their scales, as matrices.

    Raises `UsageError` for types, shapes or devices that do not go together. Copies what is not contiguous along K.
    """
    if q.dtype != kind or data.dtype != kind:
        raise UsageError(f"inputs are {q.dtype} and weights {data.dtype}: both must be {kind}. Quantize both first.")
    if data.dim() != 2 or q.dim() < 1 or q.shape[-1] != data.shape[1]:
        raise UsageError(f"inputs {list(q.shape)} and weight {list(data.shape)} must be [..., K] and [N, K].")
    (n, k), rows = data.shape, math.prod(q.shape[:-1])
    if kind == torch.int8 and k >= INT32_COLUMNS:
        raise UsageError(f"{k} input features can overflow 32-bit sums; int8 takes fewer than {INT32_COLUMNS}.")
    if dtype not in _OUTPUTS:
        raise UsageError(f"the product cannot be {dtype}. Use float32, bfloat16 or float16.")
    if q_scale.dtype != torch.float32 or scale.dtype != torch.float32:
        raise UsageError(f"scales are {q_scale.dtype} and {scale.dtype}: both must be float32. Convert them.")
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
        raise UsageError(f"the bias is {bias.dtype} {list(bias.shape)}, and must be floats of shape [{n}].")
    devices = {str(t.device) for t in (q, q_scale, data, scale, bias) if t is not None}
    if len(devices) > 1:
        raise UsageError(f"the operands are on {', '.join(sorted(devices))}. Move them to one device.")
    b_scale, b_rows = _weight_scale(scale, n, k, kind)
    return Operands(
        _rows(q.reshape(rows, k)),
        _input_scale(q_scale, q, rows, k, kind),
        _rows(data),
        b_scale,
        b_rows,
        None if bias is None else bias.contiguous(),
        (*q.shape[:-1], n),
    )


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _input_scale(scale: Tensor, q: Tensor, rows: int, k: int, kind: torch.dtype) -> Tensor:
    if scale.shape == (1,):
        return scale.expand(rows, 1)
    groups = {1, k // BLOCK} if kind.is_floating_point and k and k % BLOCK == 0 else {1}
    if scale.shape[:-1] != q.shape[:-1] or scale.shape[-1] not in groups:
        raise UsageError(
            f"input scales {list(scale.shape)} do not fit inputs {list(q.shape)}. Give one for the tensor, [1], or "
            f"{' or '.join(map(str, sorted(groups)))} for each token."
        )
    return scale.reshape(rows, scale.shape[-1])


def _weight_scale(scale: Tensor, n: int, k: int, kind: torch.dtype) -> tuple[Tensor, int]:
    """The scales with the rows of the weight that share one."""
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    if scale.shape == (n, 1):
        return scale, 1
    if kind.is_floating_point and scale.shape == (1, 1):
        return scale.expand(n, 1), 1
    if kind.is_floating_point and scale.shape == blocks:
        return scale, BLOCK
    allowed = f"[{n}, 1]" + (f", [1, 1] or {list(blocks)}" if kind.is_floating_point else "")
    raise UsageError(f"weight scales {list(scale.shape)} do not fit a weight [{n}, {k}] of {kind}. Give {allowed}.")


def scaled_linear_fake(q: Tensor, *rest: Tensor | torch.dtype | None) -> Tensor:
    """The fake of ops with the arguments `q, q_scale, data, scale, bias, dtype`: shape and type of y."""
    data, dtype = rest[1], rest[4]
    assert isinstance(data, Tensor)
    assert isinstance(dtype, torch.dtype)
    return q.new_empty((*q.shape[:-1], data.shape[0]), dtype=dtype)
