"""Show every linear map of a model as an `nn.Linear`, and know what each is called in a checkpoint.

Quantizers work on `nn.Linear [N, K]`. Two kinds of layers are stored in another way and are replaced, in the module
tree only, by views of their own weights: transformers' `Conv1D` (GPT-2), which holds `[K, N]`, and the fused experts
of mixture-of-experts models (`optimizer.backends.experts`).

The module tree and the files on the hub may use different names (`mlp.experts.3.down_proj` is
`block_sparse_moe.experts.3.w2` in a Mixtral checkpoint). transformers knows how to go from one to the other;
`checkpoint_names` asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from optimizer.backends.experts import Experts, is_fused_experts
from optimizer.errors import ModelError, UsageError

FUSED_NAMES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
"""Where the layers of an expert lie in the fused module: its parameter, and which of the merged weights."""


def linearize(model: nn.Module) -> tuple[str, ...]:
    """Replace every `Conv1D` and every fused experts module of `model`; returns the names of what was replaced.

    Weights are shared with what they replace, never copied or written to; type, device, `requires_grad`, the training
    flag and the sharing of tied weights stay. Raises `ModelError` for experts of an unknown layout, with nothing
    changed.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(model, Conv1D) or is_fused_experts(model):
        raise UsageError(f"{type(model).__name__} is itself the layer to replace. Give the model that contains it.")
    made: dict[nn.Module, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    places: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Conv1D):
            made.setdefault(module, _as_linear(module, weights))
        elif is_fused_experts(module):
            made.setdefault(module, Experts.from_fused(module, name))
        else:
            continue
        places.append(name)
    for name in places:
        model.set_submodule(name, made[model.get_submodule(name)])
    return tuple(places)


def _as_linear(conv: Any, weights: dict[int, nn.Parameter]) -> nn.Linear:
    """A linear layer `[N, K]` whose weight is the transposed view of a `Conv1D` `[K, N]`."""
    linear = nn.Linear(conv.weight.shape[0], conv.weight.shape[1], bias=False, device="meta")
    view = nn.Parameter(conv.weight.detach().t(), requires_grad=conv.weight.requires_grad)
    linear.weight = weights.setdefault(id(conv.weight), view)
    linear.bias = conv.bias
    return linear.train(conv.training)


@dataclass(frozen=True)
class CheckpointNames:
    """The names of a model's modules and tensors in its checkpoint files, and back."""

    model: str
    modules: Mapping[str, str]
    tensors: Mapping[str, str]
    merged: frozenset[str] = frozenset()
    """Tensors that the files hold as parts of others, or rearranged."""

    def to_checkpoint(self, name: str) -> str:
        """The name on disk of a module (`…experts.3.down_proj`) or of a tensor, stored (`….weight`) or new.

        A tensor that the module does not hold, such as `.weight_packed`, goes where its module goes.
        """
        if name in self.merged:
            raise UsageError(f"{name!r} is stored merged or rearranged in files of {self.model}. Linearize it first.")
        return _renamed(name, self.modules, self.tensors, f"{self.model} has no such module, or stores it merged")

    def from_checkpoint(self, name: str) -> str:
        """The module or tensor of the model that a name on disk stands for."""
        modules, tensors = self._inverse
        return _renamed(name, modules, tensors, f"no module of {self.model} is stored there")

    @cached_property
    def _inverse(self) -> tuple[dict[str, str], dict[str, str]]:
        return {disk: own for own, disk in self.modules.items()}, {disk: own for own, disk in self.tensors.items()}


def checkpoint_names(model: nn.Module) -> CheckpointNames:
    """How a linearized `model` is named in the files that `save_pretrained` of the original would write.

    Derived from transformers' own conversion rules, so it holds for the layout the model was loaded from. Models that
    are not from transformers keep their names. A layer that the files hold merged with others or rearranged has no
    name there; looking it up raises `UsageError`.
    """
    rules = _Rules(model)
    paths = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    modules = {path: on_disk for path in paths if (on_disk := rules.module(path)) is not None}
    stored = model.state_dict(keep_vars=True)
    tensors = {name: on_disk for name in stored if (on_disk := rules.tensor(name)) is not None}
    for names in (modules, tensors):
        if len(set(names.values())) < len(names):
            taken = list(names.values())
            twice = next(disk for disk in taken if taken.count(disk) > 1)
            raise ModelError(
                f"{type(model).__name__} would store {' and '.join(n for n, d in names.items() if d == twice)} "
                f"both as {twice}. Save it with save_pretrained instead."
            )
    return CheckpointNames(type(model).__name__, modules, tensors, frozenset(stored.keys() - tensors.keys()))


def _renamed(name: str, modules: Mapping[str, str], tensors: Mapping[str, str], why: str) -> str:
    if name in tensors:
        return tensors[name]
    if name in modules:
        return modules[name]
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise UsageError(f"{name!r} has no counterpart: {why}. Use a name that named_modules or the files list.")
    return f"{modules[path]}.{leaf}"


class _Rules:
    """transformers' conversion rules from module tree to files, applied to names only."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import core_model_loading as loading

        rules = [rule.reverse_transform() for rule in reversed(_conversions(model))]
        self.renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        self.apply = loading.apply_renamings
        self.per_expert = (loading.SplitModulelist, loading.Chunk)
        self.experts = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Experts)}

    def module(self, path: str) -> str | None:
        """Where a module lies: beside the `weight` it has or could have."""
        on_disk = self.tensor(f"{path}.weight")
        return on_disk.removesuffix(".weight") if on_disk is not None and on_disk.endswith(".weight") else None

    def tensor(self, name: str) -> str | None:
        """The name on disk, or None where the files hold no such tensor on its own."""
        parts = name.split(".")
        parent = ".".join(parts[:-3])
        if parent in self.experts and parts[-2] in FUSED_NAMES:
            return self._expert_tensor(parent, int(parts[-3]), parts[-2], parts[-1])
        if any(converter.rename_source_key(name)[1] is not None for converter in self.converters):
            return None
        return str(self.apply(name, self.renamings))

    def _expert_tensor(self, parent: str, expert: int, layer: str, leaf: str) -> str | None:
        fused, index = FUSED_NAMES[layer]
        for converter in self.converters:
            key, matched = converter.rename_source_key(f"{parent}.{fused}")
            if matched is None:
                continue
            first, template = converter.target_patterns[0], converter.target_patterns[index]
            if not all(isinstance(op, self.per_expert) for op in converter.operations) or "*" not in template:
                return None
            on_disk = self.apply(key.replace(first, template).replace("*", str(expert)), self.renamings)
            return f"{str(on_disk).removesuffix('.weight')}.{leaf}"
        return None


def _conversions(model: nn.Module) -> list[Any]:
    """The rules `model` was loaded with or, when it was made from a config, those of its architecture.

    As `save_pretrained` does, a rule that adds or removes a prefix counts only if loading used it.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not isinstance(model, PreTrainedModel):
        return []
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    return [
        rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, PrefixChange)
    ]
