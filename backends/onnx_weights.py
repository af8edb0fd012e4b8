"""Weights on their way into a graph: cast one at a time while the file is written, so no model is held twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1 << 20
"""Elements from which on a weight is cast late: memory that is not touched takes none from a megabyte on."""


def cast_copy(model: Any, dtype: torch.dtype, cast: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the module tree with `cast` of each floating-point parameter; packed weights are shared.

    Buffers stay as they are: rotary frequencies are float32 in every model, and quantized layers are replaced.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        kept = parameter.detach()
        if kept.is_floating_point() and kept.element_size() > 1:
            kept = cast(parameter).detach()
        shared[id(parameter)] = nn.Parameter(kept, requires_grad=False)
    own = copy.deepcopy(model, shared).cpu().eval()
    own.config.dtype = dtype
    return own


class _Cast(nn.Module):
    """A weight in another type, made anew whenever it is used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def computing_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the module tree that computes in `dtype` and shares large weights, each cast while it is used."""
    whole = {id(module.weight) for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)}
    late = {id(p) for p in model.parameters() if id(p) in whole and p.dtype != dtype and p.numel() >= LARGE}
    own = cast_copy(model, dtype, lambda p: p if id(p) in late else p.to(dtype))
    for module in list(own.modules()):
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype != dtype:
            nn.utils.parametrize.register_parametrization(module, "weight", _Cast(dtype), unsafe=True)
    return own


class Postponed:
    """`model`, a copy for tracing in `dtype`, in which memory that nothing has touched stands for each large weight.

    `save` gives the graph's constants the weights themselves. Those of linear layers and embeddings are put off, which
    the graph takes as they are or transposed; a weight that has the type already is shared.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sources: dict[int, Tensor] = {}  # by the address of what stands for it
        whole = {id(module.weight) for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)}

        def cast(parameter: Tensor) -> Tensor:
            if id(parameter) not in whole or parameter.dtype == dtype or parameter.numel() < LARGE:
                return parameter.to(dtype)
            untouched = torch.empty(parameter.shape, dtype=dtype)
            self._sources[untouched.data_ptr()] = parameter.detach()
            return untouched

        self.model = cast_copy(model, dtype, cast)

    def save(self, program: Any, file: Path) -> None:
        """Write an ONNX program of the copy with the weights themselves, each cast while it is written.

        The model is forgotten then: what PyTorch keeps of a program would keep it in memory.
        """
        self._fill(program.model.graph)
        program.save(file, external_data=True)
        self._sources.clear()

    def _fill(self, graph: Any) -> None:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        for value in graph.initializers.values():
            raw = value.const_value.raw  # the converter has torch's tensors, and views of them by numpy
            address = raw.data_ptr() if isinstance(raw, Tensor) else raw.ctypes.data
            if address not in self._sources:
                continue
            straight = raw.is_contiguous() if isinstance(raw, Tensor) else raw.flags.c_contiguous

            def made(address: int = address, straight: bool = straight) -> Any:
                source = self._sources[address] if straight else self._sources[address].t()
                return TorchTensor(source.cpu().to(self._dtype).contiguous())

            value.const_value = ir.LazyTensor(made, value.const_value.dtype, value.const_value.shape, name=value.name)
