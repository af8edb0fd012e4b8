"""What a checkpoint layout is: how one quantized layer lies in a file, and what the configuration says of all.

A layout works on one layer at a time, so a writer that never holds the whole model can use it. What it stores is what
was evaluated: a scale that its file cannot hold exactly is refused, never rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import ActivationFormat, Scheme
from optimizer.quant.weight import QuantizedWeight

SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a floating-point scale may be stored in."""


class StoredLayer(NamedTuple):
    """One quantized layer: its weight, how its input is rounded, and the scale of that where it is static."""

    weight: QuantizedWeight
    activation: ActivationFormat | None = None
    input_scale: Tensor | None = None


LayerReader = Callable[[str, MutableMapping[str, Tensor]], StoredLayer]
"""Takes the tensors of one layer, by its name, out of a mapping. `ModelError` for what is missing or does not fit."""


class Layout(ABC):
    """A checkpoint format. Names of layers are those on disk."""

    name: ClassVar[str]
    """As recipes name it, and `quantization_config.quant_method`."""

    scale_dtype: ClassVar[torch.dtype | None] = None
    """The type in which integer weights must have their scales; None for the weight's own."""

    @abstractmethod
    def check(self, name: str, scheme: Scheme, n: int, k: int) -> None:
        """`UsageError` with a remedy when a layer `[n, k]` of this scheme cannot be stored."""

    @abstractmethod
    def expresses(self, activation: ActivationFormat) -> bool:
        """Whether the format itself can say that inputs are rounded so."""

    @abstractmethod
    def layer_tensors(self, name: str, layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one layer by name, without its bias; `dtype` is the model's."""

    @abstractmethod
    def quantization_config(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """The `quantization_config` of quantized layers by name; `plain` are the linear layers left as they were."""

    @abstractmethod
    def quantized_layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of the layers that lie in `tensors` in this format."""

    @abstractmethod
    def reader(self, config: Mapping[str, Any]) -> LayerReader:
        """What reads the layers under this `quantization_config`; `ModelError` for one that cannot be loaded."""

    def other_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """JSON files that consumers expect beside `config.json`, by name, given the `quantization_config`."""
        del config
        return {}


def require_dynamic(name: str, layout: Layout, activation: ActivationFormat | None) -> None:
    """`UsageError` for a static activation that the format has no place for."""
    if activation is not None and not activation.dynamic and not layout.expresses(activation):
        raise UsageError(
            f"{name}: {layout.name} checkpoints hold no static input scales ({activation.name}). "
            "Use layout compressed-tensors."
        )


def exact(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`, which must hold each value exactly: otherwise the file would not be what was evaluated."""
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale.float()):
        raise UsageError(
            f"{name}: scales in {scale.dtype} do not fit {dtype}, which this format stores. "
            f"Quantize with scale_dtype: {str(dtype).removeprefix('torch.')}."
        )
    return stored


def take(
    tensors: MutableMapping[str, Tensor], name: str, part: str, dtypes: Collection[torch.dtype], shape: Collection[int]
) -> Tensor:
    """Take `name.part` out of `tensors` in `shape`, where dimensions of 1 do not count (-1 stands for any size).

    `ModelError` when it is missing, has another type or shape, or holds a value that is not finite.
    """
    tensor = tensors.pop(f"{name}.{part}", None)
    if tensor is None:
        raise ModelError(f"{name} is quantized, but its {part} is missing. Write or copy the checkpoint again.")
    found, wanted = list(tensor.shape), list(shape)
    if -1 in wanted:
        fits = len(found) == len(wanted) and 0 not in found
    else:
        fits = [size for size in found if size != 1] == [size for size in wanted if size != 1]
    if tensor.dtype not in dtypes or not fits:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ModelError(
            f"{name}.{part} is {str(tensor.dtype).removeprefix('torch.')} {found}; it must be {kinds} "
            f"{['any' if size == -1 else size for size in wanted]}. Write or copy the checkpoint again."
        )
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor.float()).all():
        raise ModelError(f"{name}.{part} holds NaN or infinite values. Write or copy the checkpoint again.")
    return tensor if -1 in wanted else tensor.reshape(wanted)


def one_scheme(layout: str, schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme that all layers share; `UsageError` for a mixture that the format cannot describe."""
    first = next(iter(schemes))
    for name, scheme in schemes.items():
        if scheme.weight != schemes[first].weight:
            raise UsageError(
                f"{layout} checkpoints have one format for all layers, but {first} is {schemes[first].weight.name} and "
                f"{name} is {scheme.weight.name}. Use one format, or layout compressed-tensors."
            )
    return schemes[first]


def number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The integer under the first of `keys` that `config` has; `ModelError` for anything else."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"quantization_config.{keys[0]} must be a whole number, is {value!r:.80}.")
    return value
