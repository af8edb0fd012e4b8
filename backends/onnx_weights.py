"""Weights on their way into a graph: cast one at a time while the file is written, so no model is held twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


class Postponed:
    """`model`, a copy for tracing in `dtype`, in which memory that nothing has touched stands for each large weight.

    `fill` gives the graph's constants the weights themselves. Those of linear layers and embeddings are put off, which
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

    def fill(self, graph: Any) -> None:
        """Put the weights into an ONNX IR graph, each to be cast when it is written, and forgotten again."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        for value in graph.initializers.values():
            raw = torch.as_tensor(value.const_value.raw)  # the converter has torch's tensors, and views by numpy
            source = self._sources.get(raw.data_ptr())
            if source is None:
                continue
            source = source if raw.is_contiguous() else source.t()
            assert source.shape == raw.shape, f"{value.name} was {source.shape}, and is {raw.shape} in the graph"

            def made(source: Tensor = source) -> Any:
                return TorchTensor(source.cpu().to(self._dtype).contiguous())

            value.const_value = ir.LazyTensor(made, value.const_value.dtype, value.const_value.shape, name=value.name)
