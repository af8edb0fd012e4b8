"""A quantized weight: elements and scales, and what they stand for.

Elements are held one a byte, whatever a checkpoint packs: integers as int8, e4m3 as float8_e4m3fn, e2m1 as the four
bits sign, exponent (2), mantissa in a uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK, Format

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the magnitudes 0 to 7 of a 4-bit float stand for; code 8 + i is the negative of code i."""


@dataclass(frozen=True)
class Grid:
    """The points a weight `[N, K]` may take: `scale [rows, G]` (`Format.scale_shape`), `zero` int8, `global_scale [1]`.

    The step between neighbours is `scale`, or `scale / global_scale` where there is one (NVFP4).
    """

    format: Format
    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None

    def steps(self, n: int, k: int) -> Tensor:
        """The step of each scale as a float32 tensor that broadcasts against `split(weight)`, for a weight `[n, k]`."""
        step = self.scale.float()
        if self.global_scale is not None:
            step = step / self.global_scale.float()
        if self.format.granularity == "block":
            return spread(step, n, k)
        return step.unsqueeze(-1)

    def split(self, weight: Tensor) -> Tensor:
        """A weight `[N, K]` as `[N, G, g]`, or as it is for blocks: the form in which scales broadcast."""
        return weight if self.format.granularity == "block" else weight.reshape(len(weight), self.scale.shape[1], -1)

    def encode(self, weight: Tensor) -> Tensor:
        """The nearest elements `[N, K]` of a float32 weight; beyond the ends, the ends."""
        scaled = self.split(weight) / self.steps(*weight.shape)
        if self.zero is not None:
            scaled = scaled + self.zero.unsqueeze(-1).float()
        return to_elements(scaled, self.format).reshape(weight.shape).contiguous()

    def decode(self, q: Tensor) -> Tensor:
        """`(q - zero) * step` as float32 `[N, K]`."""
        values = self.split(from_elements(q, self.format))
        if self.zero is not None:
            values = values - self.zero.unsqueeze(-1).float()
        return (values * self.steps(*q.shape)).reshape(q.shape)

    def columns(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Step and zero point of every weight, float32 `[n, k]` each (views where possible): for work by columns."""
        steps = self.steps(n, k)
        if self.format.granularity == "block":
            return steps, torch.zeros((), device=steps.device).expand(n, k)
        zero = torch.zeros_like(steps) if self.zero is None else self.zero.unsqueeze(-1).float()
        groups = self.scale.shape[1]
        return (
            steps.expand(n, groups, k // groups).reshape(n, k),
            zero.expand(n, groups, k // groups).reshape(n, k),
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid: elements `q [N, K]`, `scale`, `zero` (absent when symmetric), `global_scale` (NVFP4)."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    global_scale: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """The grid without the elements."""
        return Grid(self.format, self.scale, self.zero, self.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the weight stands for as `[N, K]`, computed in float32 and rounded once to `dtype`."""
        return self.grid.decode(self.q).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output rows `start:stop`, exactly; `UsageError` where they would cut a block."""
        if self.format.granularity == "tensor":
            return QuantizedWeight(self.q[start:stop], self.scale, self.zero, self.format, self.global_scale)
        first, last = start, stop
        if self.format.granularity == "block":
            if start % BLOCK or (stop % BLOCK and stop != len(self.q)):
                raise UsageError(f"rows {start}:{stop} cut a block of {BLOCK}. Split between blocks.")
            first, last = start // BLOCK, -(-stop // BLOCK)
        zero = None if self.zero is None else self.zero[first:last]
        return QuantizedWeight(self.q[start:stop], self.scale[first:last], zero, self.format, self.global_scale)


def stackable(parts: list[QuantizedWeight]) -> str:
    """Why weights of one format and one K cannot share one tensor along their rows; empty when they can."""
    granularity = parts[0].format.granularity
    if granularity == "block" and any(len(part.q) % BLOCK for part in parts[:-1]):
        return f"rows {[len(part.q) for part in parts]} do not fill blocks of {BLOCK}"
    shared = [part.scale if granularity == "tensor" else part.global_scale for part in parts]
    if any(s is not None and not torch.equal(s, shared[0]) for s in shared):  # type: ignore[arg-type]
        return "tensor scales differ"
    return ""


def concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of one format and one K along their output rows; `UsageError` where `stackable` says why not."""
    if reason := stackable(parts):
        raise UsageError(f"these weights cannot be stacked: {reason}.")
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    whole = first.format.granularity == "tensor"
    return QuantizedWeight(
        torch.cat([part.q for part in parts]),
        first.scale if whole else torch.cat([part.scale for part in parts]),
        None if not zeros else zeros[0] if whole else torch.cat(zeros),
        first.format,
        first.global_scale,
    )


def spread(blocks: Tensor, n: int, k: int) -> Tensor:
    """One value a block `[⌈n / 128⌉, ⌈k / 128⌉]` as one a weight, `[n, k]`."""
    return blocks.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def to_elements(scaled: Tensor, format: Format) -> Tensor:
    """The nearest elements of `format`, ties to even, clamped to its range; in the storage type of the module."""
    scaled = scaled.clamp(format.q_min, format.q_max)
    if format.kind == "int":
        return scaled.round().to(torch.int8)
    if format.bits == 8:
        return scaled.to(torch.float8_e4m3fn)
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=scaled.device, dtype=scaled.dtype)
    size = scaled.abs().contiguous()  # bucketize warns of anything else
    # A tie goes to the even code: up at the edges below codes 2, 4 and 6, down at the others.
    up = torch.bucketize(size, edges, right=True)
    down = torch.bucketize(size, edges)
    code = torch.where(up % 2 == 0, up, down)
    return (code + 8 * torch.signbit(scaled)).to(torch.uint8)


def from_elements(q: Tensor, format: Format) -> Tensor:
    """Elements as float32."""
    if q.dtype != torch.uint8 or format.kind == "int":
        return q.float()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=q.device)
    return table[q.long()]
