"""A model without data (meta device), and its tensors on disk, read when they are needed and let go again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.inspection import CheckpointInfo, no_model
from optimizer.passes.linearize import checkpoint_names, linearize


def empty_model(folder: Path, config: Any, device: torch.device) -> tuple[Any, frozenset[str]]:
    """The linearized model of `folder` without data, and the names of layers that its files hold transposed.

    Buffers that no file holds, such as rotary frequencies, have their values, on `device`. Raises `ModelError` where
    transformers cannot build what the configuration says.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    except Exception as error:  # each model's class looks its own values up, such as the name of an activation
        raise no_model(folder, error) from error
    transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
    linearize(model)
    for module in model.modules():
        module._buffers.update({key: None if b is None else b.to(device) for key, b in module._buffers.items()})
    return model.eval(), transposed


class LazyWeights:
    """The tensors of a checkpoint on disk, by their names in the linearized model.

    `stored` says what each is called in the files that are read, `unused` names those that are not the model's. Raises
    `ModelError` for a checkpoint that lacks a tensor, has one in another shape, or is quantized already.
    """

    def __init__(self, info: CheckpointInfo, model: Any, transposed: frozenset[str]) -> None:
        if info.quantization_config is not None:
            raise ModelError(f"{info.path} is quantized already. Start from the unquantized model.")
        self.info, self.model, self.transposed = info, model, transposed
        self.names = checkpoint_names(model)
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.dtypes = _dtypes(model)
        shared = {source: target for target, source in self.tied.items()}
        found = {name: self._on_disk(name) or self._on_disk(shared.get(name, name)) for name in model.state_dict()}
        missing = [name for name, stored in found.items() if stored is None and name not in self.tied]
        if missing:
            raise ModelError(
                f"{info.path} lacks {len(missing)} tensors of the model that config.json describes, first "
                f"{missing[0]}: config.json and the weights must belong together; download or save both again"
            )
        self.stored = {name: disk for name, disk in found.items() if disk is not None and name not in self.tied}
        self.unused = sorted(info.tensors.keys() - set(found.values()))
        self._check_shapes()
        self._check_ties()

    def _on_disk(self, name: str) -> str | None:
        """What the files call a tensor: with or without the name of the base model before it, as transformers reads."""
        if name in self.names.merged:
            return None
        disk, prefix = self.names.to_checkpoint(name), f"{self.model.base_model_prefix}."
        choices = (disk, disk.removeprefix(prefix), prefix + disk)
        return next((choice for choice in choices if choice in self.info.tensors), None)

    def _check_shapes(self) -> None:
        for name, expected in self.model.state_dict().items():
            if name in self.stored:
                shape = self.info.tensors[self.stored[name]].shape
                wanted = tuple(expected.t().shape if self.is_transposed(name) else expected.shape)
                if shape != wanted:
                    raise ModelError(
                        f"{self.stored[name]} is {list(shape)} in {self.info.path}, and {list(wanted)} by its "
                        "config.json: the two must belong together; download or save both again"
                    )

    def _check_ties(self) -> None:
        """A weight that the configuration ties to another must be that one, where the files hold both."""
        for target, source in self.tied.items():
            disk, other = self._on_disk(target), self.stored.get(source)
            if (
                disk is not None
                and other not in (None, disk)
                and not torch.equal(self._map(disk), self._map(str(other)))
            ):
                raise ModelError(
                    f"config.json of {self.info.path} ties {disk} to {other}, but the files hold two different "
                    "tensors. Set tie_word_embeddings: false in config.json."
                )

    def is_transposed(self, name: str) -> bool:
        """Whether the files hold this tensor as `[K, N]`."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and path in self.transposed

    def under(self, prefix: str, without: tuple[str, ...] = ()) -> list[str]:
        """The stored tensors whose names begin with `prefix`, but with none of `without`."""
        return [n for n in self.stored if n.startswith(prefix) and not (without and n.startswith(without))]

    def bytes(self, names: Iterable[str]) -> int:
        """Bytes that tensors take on disk."""
        return sum(self.info.tensors[self.stored[name]].bytes for name in names)

    def load(self, names: Iterable[str], device: torch.device) -> None:
        """Give tensors of the model their data. `ModelError` for one that is not finite."""
        for name in names:
            self._put(name, self._read(name, device))
        self._tie()

    def release(self, names: Iterable[str]) -> None:
        """Let go of the data of tensors."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            if isinstance(tensor := getattr(self.model.get_submodule(path), leaf, None), Tensor):
                self._put(name, tensor.detach().to("meta"))
        self._tie()

    def plain(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name on disk and data of tensors as they are in the model now, laid out as in the files."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(path), leaf).detach()
            yield self.names.to_checkpoint(name), tensor.t() if self.is_transposed(name) else tensor

    def _map(self, disk: str) -> Tensor:
        """A tensor mapped from its file, which is closed with it: what was read does not stay in memory."""
        from safetensors import SafetensorError, safe_open

        file = self.info.path / self.info.tensors[disk].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(disk)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{disk} cannot be read from {file}: {error}. Download or save it again.") from None

    def _read(self, name: str, device: torch.device) -> Tensor:
        """A copy, in the type in which transformers would load it."""
        tensor = self._map(self.stored[name])
        tensor = tensor.t() if self.is_transposed(name) else tensor
        tensor = tensor.to(device, self.dtypes[name] if tensor.is_floating_point() else tensor.dtype, copy=True)
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(tensor.aminmax())  # NaN where there is one; no copy, as isfinite makes several
            if not bool(torch.isfinite(ends).all()):
                raise ModelError(
                    f"{self.stored[name]} in {self.info.path} has values that are NaN or infinite: use a checkpoint "
                    "without them"
                )
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        parameter = leaf in owner._parameters
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)

    def _tie(self) -> None:
        """Let tied weights be what they are tied to, unless a quantized layer has taken their place."""
        for target, source in self.tied.items():
            path, _, leaf = target.rpartition(".")
            owner = self.model.get_submodule(path)
            if leaf in owner._parameters:
                setattr(owner, leaf, self.model.get_parameter(source))


def return_freed_memory() -> None:
    """Let the C library give what was freed back to the system: glibc else keeps much of it, block after block."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """The type in which transformers loads each floating-point tensor: some stay float32 whatever the model's type."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(model.dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    return {
        name: torch.float32 if kept is not None and kept.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }
