"""Where a scale of input channels folds away exactly, and the folding itself.

SmoothQuant (https://arxiv.org/abs/2211.10438) and AWQ (https://arxiv.org/abs/2306.00978) multiply the columns of a
linear layer by a positive vector `s [K]` and divide its input by the same. The division is free where whatever writes
that input can absorb it:

    norm → linear    (x̂ · (c + g) + b) / s   =  x̂ · ((c + g) / s)  +  b / s          c = 1 for Gemma, else 0
    linear → linear  f(diag(1/s) (W x + b))  =  f(W x + b) / s      if f is linear in that operand: a weighted sum of
                                                                    values, `act(gate) · up`, ReLU

`optimizer.passes.fold_sites` finds such places in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optimizer.errors import UsageError

HEAD_SIZE_NAMES = ("head_dim", "head_size")
"""What attention modules call the channels of one head."""


@dataclass(frozen=True)
class Site:
    """A writer whose output channels may be divided by `s [channels]`, and all that reads them. Paths are relative.

    `rows` are the ranges of a fused linear's output rows that are written to the readers, in order (None: all of
    them). With grouped-query attention each of them feeds `repeat` channels of the readers: row `h · head_dim + i` goes
    to channels `(h · repeat + r) · head_dim + i`. `others` hold a weight `[E, K]` without being linear layers (the
    routers of experts). `offset` is the `c` in a norm that multiplies by `c + weight`.
    """

    kind: Literal["norm", "linear"]
    writer: str
    readers: tuple[str, ...]
    channels: int
    others: tuple[str, ...] = ()
    rows: tuple[tuple[int, int], ...] | None = None
    repeat: int = 1
    head_dim: int = 1
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The writer's name; no two sites of a block have the same."""
        return self.writer


def _whole(n: int, k: int, d: int | None) -> Iterator[dict[str, Any]]:
    if n == k:
        yield {}
    elif d and k % n == 0 and n % d == 0:
        yield {"repeat": k // n, "head_dim": d}


def _values(n: int, k: int, d: int | None) -> Iterator[dict[str, Any]]:
    """Q, K and V stacked in `n = k + 2v` rows: as three blocks, or by key-value head as [its queries, key, value]."""
    v = (n - k) // 2
    if v <= 0 or (n - k) % 2 or k % v or (d is None and k != v) or (d and v % d):
        return
    repeat, d = k // v, d or k
    yield {"rows": ((n - v, n),), "repeat": repeat, "head_dim": d}
    if d < v:
        ends = range((repeat + 2) * d, n + 1, (repeat + 2) * d)
        yield {"rows": tuple((end - d, end) for end in ends), "repeat": repeat, "head_dim": d}


def _half(n: int, k: int, _d: int | None) -> Iterator[dict[str, Any]]:
    if n == 2 * k:
        yield {"rows": ((k, n),)}
        yield {"rows": ((0, k),)}


Layout = Callable[[int, int, int | None], Iterator[dict[str, Any]]]
"""From a writer's rows N, its reader's columns K and the head size to the ways in which rows may feed columns."""

SPLIT_VALUES = ("v_proj",)
FUSED_VALUES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
LINKS: tuple[tuple[tuple[str, ...], tuple[str, ...], Layout], ...] = (
    (SPLIT_VALUES, OUTPUTS, _whole),
    (FUSED_VALUES, OUTPUTS, _values),
    (("up_proj",), ("down_proj",), _whole),
    (("gate_up_proj",), ("down_proj",), _half),
    (("fc1", "c_fc", "dense_h_to_4h"), ("fc2", "c_proj", "dense_4h_to_h"), _whole),
)
"""Linear layers that may write what another one of the same module reads. Whether they do is found by trying."""


def shared_scale(site: Site, s: Tensor) -> Tensor:
    """`s [K]` with one value for all channels that the same row of the writer feeds: their geometric mean.

    `UsageError` unless `s` is a finite, positive vector of the site's channels.
    """
    if s.shape != (site.channels,) or not s.is_floating_point():
        raise UsageError(
            f"{site.name}: a scale of shape {list(s.shape)} and type {s.dtype} was given. "
            f"Give one floating-point value for each of the {site.channels} channels."
        )
    if not bool((s.float().isfinite() & (s.float() > 0)).all()):
        raise UsageError(f"{site.name}: the scale has values that are not finite and positive. Clamp it first.")
    if site.repeat == 1:
        return s
    grouped = s.view(-1, site.repeat, site.head_dim)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    mean = grouped.double().log().mean(1, keepdim=True).exp().to(s.dtype)
    return torch.where(low == high, low, mean).expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold(block: nn.Module, site: Site, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Divide the writer by `scale [K]` and multiply the readers by it; returns the scale applied, float32 or wider.

    Parameters are replaced, never written to. A norm keeps its type: its weight is rounded, and the readers are
    multiplied by the quotient of the old and the rounded weight, so the rounding costs nothing. Where no value of
    that type will do (zero, infinite) the channel stays as it is. The linear layers get `dtype`, by default their
    own; float32 keeps them exact for a quantizer that follows. `others` keep theirs.
    """
    writer = block.get_submodule(site.writer)
    s = shared_scale(site, scale).to(device=weight_of(writer).device, dtype=torch.float32)
    if site.kind == "norm":
        s = _divide_norm(writer, s, site.offset)
    else:
        _divide_rows(writer, s, site, dtype)
    for path in site.readers:
        reader = block.get_submodule(path)
        replace_parameter(reader, "weight", _wide(weight_of(reader)) * s.to(weight_of(reader).device), dtype)
        if dtype is not None:
            replace_parameter(reader, "bias", reader.bias, dtype)
    for path in site.others:
        other = block.get_submodule(path)
        replace_parameter(other, "weight", _wide(weight_of(other)) * s.to(weight_of(other).device))
    return s


def _divide_norm(norm: nn.Module, s: Tensor, offset: float) -> Tensor:
    """Returns the scale in effect after rounding. A channel whose gain is zero takes any scale, so it takes `s`."""
    weight = weight_of(norm)
    gain = weight.double() + offset
    rounded = (gain / s - offset).to(weight.dtype)
    quotient = gain / (rounded.double() + offset)
    fits = quotient.isfinite() & (quotient > 0)
    dead = gain == 0
    effective = torch.where(dead, s, torch.where(fits, quotient, 1.0)).to(_wide(weight).dtype)
    replace_parameter(norm, "weight", torch.where(fits | dead, rounded, weight))
    if norm._parameters.get("bias") is not None:
        replace_parameter(norm, "bias", _wide(norm._parameters["bias"]) / effective)
    return effective


def _divide_rows(linear: nn.Module, s: Tensor, site: Site, dtype: torch.dtype | None) -> None:
    """Row `h · head_dim + i` of the values takes the scale of the first channel it feeds."""
    weight = weight_of(linear)
    of_rows = s.view(-1, site.repeat, site.head_dim)[:, 0].reshape(-1)  # [K / repeat]
    divisor = torch.ones(weight.shape[0], dtype=s.dtype, device=weight.device)
    rows = site.rows or ((0, weight.shape[0]),)
    divisor[torch.cat([torch.arange(*r, device=weight.device) for r in rows])] = of_rows
    replace_parameter(linear, "weight", _wide(weight) / divisor[:, None], dtype)
    bias = linear._parameters.get("bias")
    replace_parameter(linear, "bias", None if bias is None else _wide(bias) / divisor, dtype)


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a layer that has one."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _wide(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def replace_parameter(module: nn.Module, name: str, value: Any, dtype: torch.dtype | None = None) -> None:
    """Give a module its own parameter in place of one it has, in `dtype` or the old one's type."""
    old = module._parameters.get(name)
    if old is not None:
        setattr(module, name, nn.Parameter(value.detach().to(dtype or old.dtype), requires_grad=old.requires_grad))
