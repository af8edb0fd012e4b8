"""AWQ checkpoints in the `gemm` version, as vLLM, SGLang and GPTQModel load them (arXiv:2306.00978).

A layer `[N, K]` in 4 bits and groups of `g`, unsigned codes `u = q + 8`, lies transposed:

    name.qweight  int32 [K, N / 8], codes along N, in the order 0 2 4 6 1 3 5 7 within a word
    name.qzeros   int32 [G, N / 8], zero points in the same order; 8 where the format is symmetric
    name.scales   float16 [G, N]

Every reader applies the zero points, so a symmetric layer is one whose zero points are all 8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.layouts.base import (
    SCALE_TYPES,
    LayerReader,
    Layout,
    StoredLayer,
    exact,
    number,
    one_scheme,
    require_dynamic,
    take,
)
from optimizer.quant.formats import ActivationFormat, Format, Scheme
from optimizer.quant.packing import pack_awq, unpack_awq
from optimizer.quant.weight import QuantizedWeight

_WORD = 8  # codes in one
_MIDDLE = 8


class AWQ(Layout):
    """`quant_method: awq`."""

    name = "awq"
    scale_dtype = torch.float16

    def check(self, name: str, scheme: Scheme, n: int, k: int) -> None:
        """4-bit integers in groups, `N % 8 == 0` and `K % g == 0`."""
        format = scheme.weight
        if (format.kind, format.bits, format.granularity) != ("int", 4, "group"):
            raise UsageError(
                f"{name}: AWQ checkpoints hold 4-bit integers in groups, not {format.name}. "
                "Use bits: 4 with a group_size, or layout compressed-tensors."
            )
        if n % _WORD:
            raise UsageError(
                f"{name}: AWQ packs 8 output features a word, which does not divide {n}. "
                "Leave this layer as it is, or use layout compressed-tensors."
            )
        format.groups(k)
        require_dynamic(name, self, scheme.activation)

    def expresses(self, activation: ActivationFormat) -> bool:
        """Never: AWQ checkpoints are weight-only."""
        del activation
        return False

    def layer_tensors(self, name: str, layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """`qweight`, `qzeros` and `scales`."""
        del dtype
        weight = layer.weight
        self.check(name, Scheme(weight.format, layer.activation), *weight.q.shape)
        zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
        return {
            f"{name}.qweight": pack_awq((weight.q + _MIDDLE).to(torch.uint8).t()),
            f"{name}.qzeros": pack_awq((zero + _MIDDLE).to(torch.uint8).t()),
            f"{name}.scales": exact(name, weight.scale, torch.float16).t().contiguous(),
        }

    def quantization_config(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """One scheme for all; consumers look for the plain names inside a layer's name, so none may lie in one."""
        format = one_scheme(self.name, schemes).weight
        for name in plain:
            if inside := next((other for other in schemes if name in other), None):
                raise UsageError(
                    f"{name} is not quantized, but consumers would take {inside} for it. "
                    "Quantize both or neither, or use layout compressed-tensors."
                )
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": format.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain) or None,
        }

    def quantized_layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Whatever has a `qweight`."""
        return [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]

    def reader(self, config: Mapping[str, Any]) -> LayerReader:
        """Only the gemm version in 4 bits; `ModelError` for others."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        bits = number(config, "bits", "w_bit")
        if version != "gemm" or bits != 4:
            raise ModelError(f"AWQ version {version!r:.80} with {bits} bits cannot be loaded. gemm with 4 bits can.")
        format = Format(4, False, number(config, "group_size", "q_group_size"))

        def read(name: str, tensors: MutableMapping[str, Tensor]) -> StoredLayer:
            return StoredLayer(_read(name, tensors, format))

        return read


def _read(name: str, tensors: MutableMapping[str, Tensor], format: Format) -> QuantizedWeight:
    words = take(tensors, name, "qweight", [torch.int32], (-1, -1))
    k, n = words.shape[0], words.shape[1] * _WORD
    try:
        groups = format.groups(k)
    except UsageError as error:
        raise ModelError(f"{name}.qweight: {error}") from None
    scale = take(tensors, name, "scales", SCALE_TYPES, (groups, n)).t().contiguous()
    zeros = unpack_awq(take(tensors, name, "qzeros", [torch.int32], (groups, n // _WORD)))
    q, zero = ((codes.to(torch.int8) - _MIDDLE).t().contiguous() for codes in (unpack_awq(words), zeros))
    if not zero.any():
        return QuantizedWeight(q, scale, None, Format(4, True, format.group_size))
    return QuantizedWeight(q, scale, zero, format)
