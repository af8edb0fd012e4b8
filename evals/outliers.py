"""Plant large activations in a model without changing what it computes: an exactly known baseline for outlier handling.

Large language models have a few channels whose activations are tens to hundreds of times the others', the same
channels in every layer (LLM.int8(), https://arxiv.org/abs/2208.07339; SmoothQuant, https://arxiv.org/abs/2211.10438).
Small models have none, so a scheme that large models break passes on them. A channel j is made one by a rescale that
cancels, with `g [H]` the norm's weight and `W [N, H]` each linear that reads the norm:

    g[j] → c g[j],    W[:, j] → W[:, j] / c

and in the MLP, whose hidden channel j is made by `up [I, H]` and read by `down [H, I]`:

    up[j, :] → c up[j, :],    down[:, j] → down[:, j] / c

With c a power of two, only exponents change: every product, and so every logit, is the same bit for bit.

Why 4 channels times 128 by default. The step of an INT8 scale shared by a token is its largest entry over 127, so c
near 128 makes it as large as an ordinary activation, and naive W8A8 loses all but the outliers: it must fail visibly.
A weight divided by c falls below the step of its row and is lost as well, and c times its activation makes that count.
With a handful of channels INT8 weights hardly show it and INT4 weights show it a little, as in large models (it is
what AWQ rescues); a larger c or more channels would make a scheme that leaves activations alone fail too. Hidden
channels are off by default: no norm stands before `down`, so folding a rotation into weights does not reach them.

Worked example, c = 4, channel 0: `g = [1, 1]`, `W = [[2, 3]]`, `x / rms(x) = [0.5, 1]`: the linear sees `[0.5, 1]` and
gives 4. Planted, `g = [4, 1]`, `W = [[0.5, 3]]`: it sees `[2, 1]` and gives 4.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError, UsageError

READERS = {
    "input_layernorm": r"self_attn\.(?:q|k|v|qkv)_proj",
    "post_attention_layernorm": r"mlp\.(?:gate|up|gate_up)_proj",
}
"""The norms of a block, each with the linears that read it."""


@dataclass(frozen=True)
class Planted:
    """What was planted: `channels` of the stream and `hidden` channels of the MLP, times `scale`, at these `sites`."""

    scale: float
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    sites: tuple[str, ...]

    def describe(self) -> str:
        """One sentence for a log or a report."""
        inner = f" and hidden channels {list(self.hidden)} of every MLP" if self.hidden else ""
        return f"channels {list(self.channels)}{inner} times {self.scale:g} at {len(self.sites)} places"


def plant_outliers(
    model: nn.Module, *, channels: int = 4, scale: float = 128.0, hidden: int = 0, seed: int = 0
) -> tuple[Any, Planted]:
    """A copy of a Llama-like model with `channels` outliers after each norm of a block, and what was planted.

    `hidden` of the MLP's inner channels are planted as well. Channels are drawn from `seed` and are the same in every
    layer. The copy shares the tensors that do not change; the model given is left as it was. `UsageError` when `scale`
    is no power of two or there are not so many channels, `ModelError` when a block has no norm that multiplies by its
    weight before plain linears, or where c does not cancel exactly in the model's type.
    """
    if scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise UsageError(f"scale {scale} is no power of two, so dividing by it rounds. Use 128, say.")
    planted = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    blocks = {n: m for n, m in planted.named_modules() if all(hasattr(m, norm) for norm in READERS)}
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no block with {' and '.join(READERS)}: outliers go after these.")
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(blocks.values()))
    stream = _draw(channels, first.input_layernorm.weight.shape[0], generator)
    inner = _draw(hidden, _inner_width(first), generator) if hidden != 0 else ()
    sites: list[str] = []
    with torch.no_grad():
        for name, block in blocks.items():
            sites += [f"{name}.{site}" for site in _plant_block(name, block, stream, inner, scale)]
    return planted, Planted(scale, stream, inner, tuple(sites))


def _plant_block(name: str, block: nn.Module, stream: tuple[int, ...], inner: tuple[int, ...], c: float) -> list[str]:
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for norm, pattern in READERS.items():
        readers = [module for n, module in linears.items() if re.fullmatch(pattern, n)]
        source = block.get_submodule(norm)
        if not readers or not _multiplies(source):
            raise ModelError(
                f"{name}.{norm} ({type(source).__name__}) must multiply by its weight and be read by plain linears "
                f"named like {pattern}; {len(readers)} are. Plant outliers in a Llama-like model."
            )
        _scale(f"{name}.{norm}", source, 0, stream, c)
        for module in readers:
            _scale(f"{name}.{norm}", module, 1, stream, 1 / c)
    if inner:
        _scale(f"{name}.mlp", linears["mlp.up_proj"], 0, inner, c)
        _scale(f"{name}.mlp", linears["mlp.down_proj"], 1, inner, 1 / c)
    return [*READERS, *(["mlp.down_proj"] if inner else [])]


def _multiplies(norm: nn.Module) -> bool:
    """Whether a weight of zeros gives zeros: not so where 1 or a bias is added (Gemma's norm, LayerNorm)."""
    if [n for n, _ in norm.named_parameters()] != ["weight"]:
        return False
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.arange(1.0, len(weight) + 1).unsqueeze(0)
    return not torch.func.functional_call(norm, {"weight": torch.zeros_like(x[0])}, (x,)).any()


def _scale(name: str, module: nn.Module, dim: int, channels: tuple[int, ...], by: float) -> None:
    """Give the module a weight (and along dim 0 a bias) with these channels multiplied; the old one stays as it is."""
    index = torch.tensor(channels)
    for kind in ("weight", "bias") if dim == 0 else ("weight",):
        old = getattr(module, kind, None)
        if old is None:
            continue
        new = old.detach().clone()
        part = new.index_select(dim, index.to(new.device))
        if not torch.equal(part * by / by, part) or not torch.isfinite(part * by).all():
            raise ModelError(f"{name}: {by:g} times a weight is not exact in {new.dtype}. Use a smaller scale.")
        new.index_copy_(dim, index.to(new.device), part * by)
        setattr(module, kind, nn.Parameter(new, requires_grad=old.requires_grad))


def _inner_width(block: nn.Module) -> int:
    names = ("up_proj", "down_proj")
    linears = [getattr(getattr(block, "mlp", None), name, None) for name in names]
    if not all(isinstance(module, nn.Linear) for module in linears):
        raise ModelError("hidden outliers need an mlp with plain linears up_proj and down_proj. Use hidden=0.")
    return int(linears[0].out_features)  # type: ignore[union-attr]


def _draw(count: int, width: int, generator: torch.Generator) -> tuple[int, ...]:
    if not 1 <= count <= width:
        raise UsageError(f"{count} outlier channels of {width} cannot be planted. Use 1 to {width}.")
    return tuple(sorted(torch.randperm(width, generator=generator)[:count].tolist()))
