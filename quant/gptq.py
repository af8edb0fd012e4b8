"""GPTQ: columns are rounded one after another, and each takes up the error of those before it.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. Objective: the squared error of the layer's output on the
calibration tokens, `tr(ΔW H ΔWᵀ)` (see `gram`), over all `Ŵ` on the grid, greedily.

| symbol | shape  | meaning                                                                   |
|--------|--------|---------------------------------------------------------------------------|
| `W`    | [N, K] | weight; `Ŵ` on the grid, `Δ = W - Ŵ`                                      |
| `H`    | [K, K] | Gram matrix, plus `damp · mean(diag H)` on its diagonal                   |
| `R`    | [K, K] | upper triangular, `H = R Rᵀ`; `U = R diag(R)⁻¹` has ones on its diagonal  |

The paper updates the remaining columns by the inverse of `H`. The same result (Chee et al. 2023, theorem 6,
https://arxiv.org/abs/2307.13304) comes from the factor of `H` itself, with no inverse:

    Ŵ_j = round(W_j + Σ_{i<j} Δ_i U_ij)

because `tr(Δ H Δᵀ) = Σ_j R_jj² ‖Σ_{i≤j} Δ_i U_ij‖²`: given the earlier columns, rounding makes term j least. The sum is
evaluated by halves: the first half of the columns, one product that adds their errors to the second half, the second
half. So all but `O(N K)` of the work is matrix products, for any grid and with no block size to choose.

Order. `act_order` takes the columns with the largest `diag H` first, when most columns are still free to take up their
errors. The scales of all groups are then fitted up front to the original weight, in the original order (static
groups): the result is stored like any other and needs no index of groups at run time. Without it the scales of a group
are fitted when its first column comes up, to the weight as the paper has updated it by then: in columns [a, b) of the
group, `W + S U_ab⁻¹` with `S` the sum above over i < a, `U_ab` the block of `U`. Scales that serve a row, a block or
the tensor are always fitted up front.

Channels that calibration never saw (`H_kk = 0`) have no influence on the others, and their weights are rounded to
nearest. Setting them to zero, as others do, saves nothing and is wrong as soon as such a channel speaks.

Never worse than round-to-nearest: what fails falls back, and the result says so. A factorization that fails in float32
is tried in float64, then with 10 and 100 times the damping; after that the diagonal of `H` alone is used, which is
rounding on the fitted grid. Where round-to-nearest has the smaller error on `H`, it is the result.

Worked example, 4 bits: `W = [[1.5, 0.5]]`, `H = [[1, 0.9], [0.9, 1]]`, damp 0.01. The scale is 0.2. Column 0: 7.5 is
clamped to 7, `Δ_0 = 0.1`. `U_01 = 0.9 / 1.01 = 0.891`, so column 1 is rounded as `0.5 + 0.089 = 0.589`: `q = 3` where
round-to-nearest has 2. `Δ = [0.1, -0.1]` has error 0.002 instead of 0.038.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK, Format
from optimizer.quant.gram import Gram, normalized_gram, relative_errors
from optimizer.quant.rtn import Clip, fit_grid, quantize_rtn
from optimizer.quant.weight import Grid, QuantizedWeight, to_elements

Method = Literal["gptq", "diagonal", "rtn"]


@dataclass(frozen=True)
class GPTQ:
    """Options: `damp` as a share of the mean of `diag H`, `act_order` (see the module), how a grid is clipped."""

    damp: float = 0.01
    act_order: bool = True
    clip: Clip = "max"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise UsageError(f"Invalid damp {self.damp}. Use a share of the mean diagonal above 0 and up to 1.")
        if self.clip not in ("max", "mse"):
            raise UsageError(f"Invalid clip {self.clip!r}. Use 'max' or 'mse'.")


@dataclass(frozen=True)
class GptqResult:
    """The weight, the `method` that made it, the damping it took, and `notes` that name every fallback.

    `error` and `rtn_error` are relative output errors (`gram.output_error`) of this and of round-to-nearest.
    """

    weight: QuantizedWeight
    method: Method
    damp: float
    error: float
    rtn_error: float
    notes: tuple[str, ...] = ()


def quantize_gptq(
    weight: Tensor,
    gram: Gram | Tensor,
    format: Format,
    config: GPTQ | None = None,
    scale_dtype: torch.dtype | None = None,
    *,
    tensor_max: float | None = None,
) -> GptqResult:
    """Quantize `weight [N, K]` for inputs with the Gram matrix `[K, K]`; scales are stored in `scale_dtype`.

    `tensor_max` is the largest magnitude that a scale of the tensor must reach (see `rtn.fit_grid`).
    Raises `ModelError` for a weight or Gram matrix that is not finite, `UsageError` where shapes or groups do not fit.
    """
    config, scale_dtype = config or GPTQ(), scale_dtype or weight.dtype
    nearest = quantize_rtn(weight, format, scale_dtype, tensor_max=tensor_max)
    weight = weight.detach().float()
    if format.scale == "e4m3":  # the tensor's scale stays, however much the errors of other columns add to some
        tensor_max = max(float(weight.abs().amax()), tensor_max or 0.0)
    H = normalized_gram(gram, weight.shape[1], weight.device)
    if not H.diagonal().any():
        reason = "the Gram matrix is zero: no calibration token reached this layer"
        return GptqResult(nearest, "rtn", 0.0, 0.0, 0.0, (reason,))
    importance = H.diagonal()
    order = torch.arange(len(H), device=H.device)
    if config.act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    factor, damp, notes = _factor(H[order][:, order], config.damp)

    def fit(columns: Tensor, start: int) -> Grid:
        """The grid of some columns `[N, k]` from `start` on, as updated until now."""
        chosen = importance[start : start + columns.shape[1]]
        if format.scale == "e4m3" and tensor_max is not None:
            columns = columns.clamp(-tensor_max, tensor_max)
        return fit_grid(columns, format, scale_dtype, clip=config.clip, importance=chosen, tensor_max=tensor_max)

    columns = _Columns(weight, format, order, fit, refit=format.granularity == "group" and not config.act_order)
    columns.solve(factor, 0, len(H))
    quantized = columns.result(order)
    error, rtn_error = relative_errors(weight, (quantized, nearest), H)
    if not error <= rtn_error:
        notes += (f"its error {error:.3g} exceeds the {rtn_error:.3g} of round-to-nearest, which is kept",)
        return GptqResult(nearest, "rtn", damp, rtn_error, rtn_error, notes)
    return GptqResult(quantized, "diagonal" if factor is None else "gptq", damp, error, rtn_error, notes)


def _factor(H: Tensor, damp: float) -> tuple[Tensor | None, float, tuple[str, ...]]:
    """`U [K, K]` float32 with the damping that it took; None where `H` cannot be factored."""
    notes: tuple[str, ...] = ()
    for share in (damp, 10 * damp, 100 * damp):
        for dtype in (torch.float32, torch.float64):
            damped = H.to(dtype, copy=True)
            damped.diagonal().add_(share * damped.diagonal().mean())
            # The upper factor of H is the lower one of H with rows and columns reversed.
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not info.item():
                upper = lower.flip(0, 1)
                return (upper / upper.diagonal()).float(), share, notes
            notes += (f"no Cholesky factor in {str(dtype).removeprefix('torch.')} with damping {share:g}",)
    return None, 0.0, (*notes, "only the diagonal of the Gram matrix is used")


class _Columns:
    """The columns of a weight on their way to the grid, in the order in which they are rounded."""

    def __init__(
        self, weight: Tensor, format: Format, order: Tensor, fit: Callable[[Tensor, int], Grid], *, refit: bool
    ) -> None:
        n, k = weight.shape
        self.format, self.fit, self.refit = format, fit, refit
        self.width = {"group": format.group_size, "block": BLOCK}.get(format.granularity, k)
        """Columns that share a scale."""
        self.group_of: list[int] = (order // self.width).tolist()
        self.points = weight.T[order].contiguous()
        """[K, N]: the columns with the errors before them added; once rounded, the elements."""
        self.delta = self.points.clone()
        """[K, N]: the columns; once rounded, `W - Ŵ`."""
        self.grids: list[Grid] = []
        self.steps: list[Tensor] = []
        self.zeros: list[Tensor] = []
        if not refit:
            self._open(fit(weight, 0), n, k)

    def solve(self, factor: Tensor | None, first: int, last: int) -> None:
        """Round columns first … last - 1, to which all earlier errors are already added."""
        size = last - first
        if self.refit and size == self.width:
            self._open(self.fit(self._compensated(factor, first, last), first), self.points.shape[1], size)
        if size == 1:
            self._round(first)
            return
        unit = self.width if self.refit and size > self.width else 1
        middle = first + max(size // 2 // unit, 1) * unit
        self.solve(factor, first, middle)
        if factor is not None:
            self.points[middle:last].addmm_(factor[first:middle, middle:last].T, self.delta[first:middle])
        self.solve(factor, middle, last)

    def result(self, order: Tensor) -> QuantizedWeight:
        """The elements, in their own order again, with the scales they were rounded to."""
        q = to_elements(self.points, self.format)[torch.argsort(order)].T.contiguous()
        first = self.grids[0]
        if len(self.grids) == 1:
            return QuantizedWeight(q, first.scale, first.zero, self.format, first.global_scale)
        zeros = [grid.zero for grid in self.grids if grid.zero is not None]
        scale = torch.cat([grid.scale for grid in self.grids], dim=1)
        return QuantizedWeight(q, scale, torch.cat(zeros, dim=1) if zeros else None, self.format, first.global_scale)

    def _compensated(self, factor: Tensor | None, first: int, last: int) -> Tensor:
        """The weights `[N, b - a]` that best make up for all errors before, if none of them had to be rounded."""
        weight = self.delta[first:last]
        if factor is None:
            return weight.T
        missing = self.points[first:last] - weight
        lower = factor[first:last, first:last].T
        shift: Tensor = torch.linalg.solve_triangular(lower, missing, upper=False, unitriangular=True)
        return (weight + shift).T

    def _open(self, grid: Grid, n: int, k: int) -> None:
        self.grids.append(grid)
        step, zero = grid.columns(n, k)
        self.steps.extend(step[:, :: self.width].T.contiguous())
        if grid.zero is not None:
            self.zeros.extend(zero[:, :: self.width].T.contiguous())

    def _round(self, column: int) -> None:
        """What `Grid.encode` and `decode` do to one column; in place, for this runs once a column."""
        points, group = self.points[column], self.group_of[column]
        points.div_(self.steps[group])
        if self.zeros:
            points.add_(self.zeros[group])
        if self.format.kind == "int":
            points.clamp_(self.format.q_min, self.format.q_max).round_()
        elif self.format.bits == 8:
            points.copy_(points.clamp_(self.format.q_min, self.format.q_max).to(torch.float8_e4m3fn))
        else:
            size = points.clamp_(self.format.q_min, self.format.q_max).abs()
            gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # between neighbours in e2m1
            points.div_(gap).round_().mul_(gap)
        values = points - self.zeros[group] if self.zeros else points
        self.delta[column].addcmul_(values, self.steps[group], value=-1)
