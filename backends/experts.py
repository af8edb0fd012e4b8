"""Mixture-of-experts layers as plain linear layers, one set for each expert.

transformers stores the experts of a layer fused: `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`. Quantizers,
calibration hooks and checkpoints know linear layers, so `Experts` shows every expert `e` as `{e}.gate_proj [I, H]`,
`{e}.up_proj [I, H]` and `{e}.down_proj [H, I]`. Their weights are views of the fused ones: nothing is copied.

    y_t = Σ_j  p_tj · down_e(act(gate_e(x_t)) · up_e(x_t)),   e = index_tj,  j over the experts chosen for token t
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError

FUSED_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the three-dimensional parameters by which a fused experts module is known."""

PLAIN_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""What transformers must say of a fused module for it to be taken apart; some of these came after the first release."""


class Expert(nn.Module):
    """One gated expert: `down(act(gate(x)) * up(x))` for `x [T, H]`."""

    def __init__(self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H]` to `[T, H]`, before the router's weight."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.ModuleList):
    """The experts of one layer; takes the place of a fused experts module of transformers.

    An expert is called with the tokens routed to it and not at all when there are none, so hooks on its layers see
    what it really reads. A compiled graph cannot depend on the routing: there every expert sees every token, and
    what was not routed to it is dropped.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__(experts)

    @classmethod
    def from_fused(cls, module: nn.Module, name: str = "") -> Experts:
        """Views of the weights of a fused module, on any device. `ModelError` names a layout that is not known."""
        gate_up, down = _checked_weights(module, name)
        half = gate_up.shape[1] // 2
        act_fn = cast(nn.Module, module.act_fn)
        experts = cls(
            Expert(_linear(gate_up, e, 0, half), _linear(gate_up, e, half, 2 * half),
                   _linear(down, e, 0, down.shape[1]), act_fn)
            for e in range(gate_up.shape[0])
        )  # fmt: skip
        return experts.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states [T, H]`, `top_k_index [T, k]` and `top_k_weights [T, k]` to `[T, H]`.

        An index outside `0 .. E - 1` stands for an expert held elsewhere and adds nothing. Sums are kept in at least
        float32 and rounded once.
        """
        x = hidden_states
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        if torch.compiler.is_compiling() or x.is_meta:
            for index, expert in enumerate(self):
                chosen = top_k_index == index  # [T, k]
                weight = (top_k_weights * chosen).sum(-1, keepdim=True)  # [T, 1]
                total = total + torch.where(chosen.any(-1, keepdim=True), expert(x) * weight, 0)
            return total.to(x.dtype)
        for index in top_k_index.unique().tolist():
            if 0 <= index < len(self):
                token, position = torch.where(top_k_index == index)  # [t], [t]
                out = self[index](x[token]) * top_k_weights[token, position, None]  # [t, H]
                total.index_add_(0, token, out.to(total.dtype))
        return total.to(x.dtype)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds expert weights stacked in three dimensions, of a known layout or not."""
    return any(p is not None and p.ndim == 3 and n in FUSED_WEIGHTS for n, p in module._parameters.items())


def _checked_weights(module: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """`gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` of a module that is nothing but these and `act_fn`."""
    kind = type(module).__name__
    parameters = dict(module.named_parameters())
    layout = {flag: getattr(module, flag, value) for flag, value in PLAIN_LAYOUT.items()}
    shapes = {key: list(p.shape) for key, p in parameters.items()}
    gate_up, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    known = (
        layout == PLAIN_LAYOUT
        and len(parameters) == 2
        and gate_up is not None
        and down is not None
        and gate_up.ndim == down.ndim == 3
        and gate_up.shape[1] == 2 * down.shape[2]
        and (gate_up.shape[0], gate_up.shape[2]) == (down.shape[0], down.shape[1])
        and isinstance(getattr(module, "act_fn", None), nn.Module)
        and _gates_plainly(module)
    )
    if not known:
        odd = [f"{flag} = {value}" for flag, value in layout.items() if value != PLAIN_LAYOUT[flag]]
        odd += [] if _gates_plainly(module) else ["a gate of its own (_apply_gate)"]
        raise ModelError(
            f"{name or kind}: the fused experts of {kind} have weights {shapes}"
            + (f" with {', '.join(odd)}" if odd else "")
            + ". Only gate_up_proj [E, 2I, H] and down_proj [E, H, I] with act_fn(gate) * up can be taken apart. "
            "Leave this model's experts as they are."
        )
    return cast(nn.Parameter, gate_up), cast(nn.Parameter, down)


def _gates_plainly(module: nn.Module) -> bool:
    """Whether `act_fn(gate) * up` is all that happens between the products, as far as transformers says."""
    from transformers.integrations import moe

    own = getattr(type(module), "_apply_gate", None)
    return own is not None and own is getattr(moe, "_default_apply_gate", None)


def _linear(fused: nn.Parameter, expert: int, start: int, stop: int) -> nn.Linear:
    """Rows `start:stop` of one expert as a linear layer that shares the memory of `fused [E, N, K]`."""
    linear = nn.Linear(fused.shape[2], stop - start, bias=False, device="meta")
    linear.weight = nn.Parameter(fused.detach()[expert, start:stop], requires_grad=fused.requires_grad)
    return linear
