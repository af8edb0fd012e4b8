"""What calibration keeps of a layer's input: the Gram matrix and per-channel statistics, never the activations.

Every method here judges a quantized weight `Ŵ` by the error of the layer's output on the calibration tokens,

    Σ_t ‖(W - Ŵ) x_t‖² = tr(ΔW H ΔWᵀ),   ΔW = W - Ŵ,

which needs no more of the inputs than `H`. Layers that read one input (query, key, value) share one `Gram`.

| symbol    | shape  | meaning                                                  |
|-----------|--------|----------------------------------------------------------|
| `x`       | [T, K] | the tokens of one distinct layer input                   |
| `H`       | [K, K] | `Σ x xᵀ`, float32: a sum, not a mean                     |
| `absmax`  | [K]    | largest `|x|` of each channel                            |
| `absmean` | [K]    | mean `|x|` of each channel                               |
| `low`     | [K]    | least `x` of each channel; `high` the largest            |
| `W`, `Ŵ`  | [N, K] | a weight and what its quantized form stands for          |

A scale folded into the layer before (`x / s`, `W s`) turns `H` into `H / s sᵀ`: no second pass over the data.

Worked example: the tokens `[1, 2]` and `[3, -1]` give `H = [[10, -1], [-1, 5]]`, `absmax = [3, 2]`,
`absmean = [2, 1.5]`. With `ΔW = [[0.1, 0]]` the error is `0.01 · 10 = 0.1`, and `s = [2, 1]` makes
`H = [[2.5, -0.5], [-0.5, 5]]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizer.errors import DataError, ModelError, UsageError
from optimizer.quant.rtn import check_weight
from optimizer.quant.weight import QuantizedWeight

Reduce = Callable[[Tensor], Tensor]
"""Makes a scale `[K]` one that the layer before can absorb, such as one value for heads that share a KV head."""

LARGEST_SCALE = 1e4
"""A channel is scaled by at most this, and at least its inverse: what float16 weights survive."""

_SPAN = 512  # columns of H multiplied at once: large enough for GEMM, small beside [K, K]


class Gram:
    """Statistics of one layer input with `k` channels, held on `device`. A sum over every `update`."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        if k < 1:
            raise UsageError(f"a layer input needs at least 1 channel, got {k}.")
        self.H = torch.zeros(k, k, device=device)
        self.abs_sum = torch.zeros(k, device=device)
        self.low = torch.full((k,), torch.inf, device=device)
        self.high = torch.full((k,), -torch.inf, device=device)
        self.tokens = 0

    @property
    def k(self) -> int:
        """Channels."""
        return len(self.H)

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel `[K]`; 0 before any token."""
        return torch.maximum(self.high, -self.low).clamp(min=0)

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of each channel `[K]`; 0 before any token."""
        return self.abs_sum / max(self.tokens, 1)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest activation seen, for static scales. Raises `DataError` before any token."""
        if not self.tokens:
            raise DataError("no calibration token reached this layer, so its input has no range. Add calibration data.")
        return float(self.low.min()), float(self.high.max())

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the activations `x [..., K]`, those where `mask [...]` is true if it is given (padding is not).

        Raises `ModelError` for NaN, infinity, and magnitudes whose squares leave float32; nothing is added then.
        """
        if x.ndim < 1 or x.shape[-1] != self.k or not x.is_floating_point():
            raise UsageError(f"activations must be floats [..., {self.k}]; got {list(x.shape)} {x.dtype}.")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise UsageError(
                f"a mask for activations {list(x.shape)} must be bool {list(x.shape[:-1])}; "
                f"got {mask.dtype} {list(mask.shape)}."
            )
        x = x.detach().reshape(-1, self.k) if mask is None else x.detach()[mask]
        x = x.to(self.H.device, torch.float32)
        if not len(x):
            return
        low, high = x.aminmax(dim=0)
        largest = float(torch.maximum(high, -low).max())
        if not largest < torch.inf:
            raise ModelError("activations hold NaN or infinite values. Calibrate in a type that holds them.")
        if float(self.H.diagonal().max()) + largest**2 * len(x) >= torch.finfo(torch.float32).max:
            raise ModelError(f"an activation of {largest:.3g} is too large: its squares must be summed in float32.")
        self.H.addmm_(x.T, x)
        self.abs_sum += torch.linalg.vector_norm(x, ord=1, dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.tokens += len(x)

    def merge(self, other: Gram) -> None:
        """Add the tokens that `other` has seen, such as those of another process."""
        if other.k != self.k:
            raise UsageError(f"statistics of {other.k} and {self.k} channels cannot be merged.")
        self.H += other.H.to(self.H)
        self.abs_sum += other.abs_sum.to(self.H)
        self.low = torch.minimum(self.low, other.low.to(self.H))
        self.high = torch.maximum(self.high, other.high.to(self.H))
        self.tokens += other.tokens

    def scaled(self, s: Tensor) -> Gram:
        """The statistics of `x / s` for `s [K]`; `UsageError` for a scale that is not positive and finite."""
        s = check_scale(s, self.k).to(self.H)
        result = Gram(self.k, self.H.device)
        result.H = self.H / s.unsqueeze(1) / s
        result.abs_sum, result.low, result.high, result.tokens = (
            self.abs_sum / s,
            self.low / s,
            self.high / s,
            self.tokens,
        )
        if not torch.isfinite(result.H).all():
            raise ModelError(f"scales from {float(s.min()):.3g} make activations too large for float32.")
        return result


def check_scale(s: Tensor, k: int) -> Tensor:
    """`s` itself, or `UsageError` where it is no scale of k channels."""
    if s.shape != (k,) or not bool(((s > 0) & torch.isfinite(s)).all()):
        raise UsageError(
            f"a scale must be [{k}], positive and finite; got {list(s.shape)} from {s.min()} to {s.max()}."
        )
    return s


def check_weights(weights: Sequence[Tensor], k: int) -> None:
    """`UsageError` for weights that cannot share an input of k channels, `ModelError` for those that are not finite."""
    shapes = [list(weight.shape) for weight in weights]
    if not weights or any(weight.ndim != 2 or weight.shape[1] != k for weight in weights):
        raise UsageError(f"weights of shapes {shapes} do not share an input of {k} channels. Give [N, {k}] each.")
    for weight in weights:
        check_weight(weight)


def foldable_scale(raw: Tensor, live: Tensor, reduce: Reduce | None = None) -> Tensor:
    """The scale `[K]` float32 in the proportions of `raw [K]`, its largest and least the inverse of each other.

    Channels that are not `live` keep 1. None leaves `LARGEST_SCALE`. `reduce` is applied last, and checked.
    """
    scale = torch.ones_like(raw, dtype=torch.float32)
    if live.any():
        logs = raw[live].double().log()
        limit = math.log(LARGEST_SCALE)
        scale[live] = (logs - (logs.max() + logs.min()) / 2).clamp(-limit, limit).exp().float()
    return scale if reduce is None else check_scale(reduce(scale.clone()), len(scale)).to(scale)


def normalized_gram(gram: Gram | Tensor, k: int, device: torch.device) -> Tensor:
    """`H [K, K]` float32 over its largest diagonal entry (a zero one as it is), so that no product of it overflows.

    Raises `UsageError` for the wrong shape and `ModelError` for what cannot be a sum of squares.
    """
    H = gram.H if isinstance(gram, Gram) else gram
    if H.shape != (k, k) or not H.is_floating_point():
        raise UsageError(
            f"the Gram matrix of {k} input features must be floats [{k}, {k}]; got {list(H.shape)} {H.dtype}."
        )
    largest = H.diagonal().max()
    if not torch.isfinite(H).all() or bool((H.diagonal() < 0).any()):
        raise ModelError("the Gram matrix holds NaN, infinite or negative squares. Collect it with Gram.update.")
    return (H / largest if largest > 0 else H).to(device, torch.float32)


def trace_error(delta: Tensor, H: Tensor) -> float:
    """`tr(D H Dᵀ)` of `D [N, K]` float32 and a symmetric `H [K, K]`: the squared error of the output, never below 0.

    Only the upper half of `H` is multiplied: `N K²` operations instead of `2 N K²`.
    """
    size = float(delta.abs().amax())
    if not size:
        return 0.0
    delta, total = delta / size, 0.0
    for start in range(0, len(H), _SPAN):
        stop = min(start + _SPAN, len(H))
        product = delta[:, start:stop] @ H[start:stop, start:]  # [N, K - start]
        product[:, stop - start :] *= 2
        total += float(product.mul_(delta[:, start:]).sum(dtype=torch.float64))
    return max(total, 0.0) * size * size


def output_error(weight: Tensor, quantized: QuantizedWeight | Tensor, gram: Gram | Tensor) -> float:
    """`tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`: the share of the output's energy that quantization changed.

    0 where nothing changed; infinite where an output that was zero is none any more.
    """
    return relative_errors(weight, [quantized], normalized_gram(gram, weight.shape[1], weight.device))[0]


def relative_errors(weight: Tensor, candidates: Sequence[QuantizedWeight | Tensor], H: Tensor) -> list[float]:
    """The `output_error` of each of several forms of `weight [N, K]`, for an `H` from `normalized_gram`."""
    weight = weight.detach().float()
    size = float(weight.abs().amax()) or 1.0  # taken out first: squares of a huge weight leave even float64
    energy = trace_error(weight / size, H)
    errors = []
    for candidate in candidates:
        restored = candidate.dequantize() if isinstance(candidate, QuantizedWeight) else candidate.detach().float()
        lost = trace_error((weight - restored) / size, H)
        errors.append(lost / energy if energy else (math.inf if lost else 0.0))
    return errors


def sample_rows(weight: Tensor, rows: int) -> Tensor:
    """At most `rows` rows of `weight [N, K]` as float32, evenly spaced: enough to compare scales by."""
    n = len(weight)
    if n <= rows:
        return weight.detach().float()
    index = torch.arange(rows, device=weight.device) * n // rows
    return weight.detach()[index].float()
