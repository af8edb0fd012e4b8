"""FP8 in blocks of 128 × 128, as DeepSeek-V3 defined it (arXiv:2412.19437) and transformers, vLLM and SGLang load it.

A layer `[N, K]` is stored as

    name.weight            float8_e4m3fn [N, K]
    name.weight_scale_inv  float32 [⌈N / 128⌉, ⌈K / 128⌉], what a block is multiplied by

and every consumer rounds the input of such a layer to FP8 in groups of 128, so only that scheme is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.layouts.base import SCALE_TYPES, LayerReader, Layout, StoredLayer, exact, take
from optimizer.quant.formats import ACTIVATIONS, BLOCK, FP8_BLOCK, ActivationFormat, Scheme
from optimizer.quant.weight import QuantizedWeight

_ACTIVATION = ACTIVATIONS["fp8-group"]


class FP8(Layout):
    """`quant_method: fp8`."""

    name = "fp8"

    def check(self, name: str, scheme: Scheme, n: int, k: int) -> None:
        """FP8 blocks with inputs in FP8 groups, any shape."""
        del n, k
        if scheme != Scheme(FP8_BLOCK, _ACTIVATION):
            raise UsageError(
                f"{name}: fp8 checkpoints hold {Scheme(FP8_BLOCK, _ACTIVATION).name} only, not {scheme.name}. "
                "Use layout compressed-tensors."
            )

    def expresses(self, activation: ActivationFormat) -> bool:
        """FP8 in groups of 128, which the format implies."""
        return activation == _ACTIVATION

    def layer_tensors(self, name: str, layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """`weight` and `weight_scale_inv`."""
        del dtype
        weight = layer.weight
        self.check(name, Scheme(weight.format, layer.activation), *weight.q.shape)
        scale = exact(name, weight.scale, torch.float32)
        return {f"{name}.weight": weight.q, f"{name}.weight_scale_inv": scale}

    def quantization_config(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """The same for every layer."""
        del schemes
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(plain) or None,
        }

    def quantized_layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Whatever has a weight in e4m3."""
        return [
            key.removesuffix(".weight")
            for key, tensor in tensors.items()
            if key.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn
        ]

    def reader(self, config: Mapping[str, Any]) -> LayerReader:
        """Blocks of 128 × 128 with dynamic activations; `ModelError` for others."""
        blocks, activations = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
        if blocks != [BLOCK, BLOCK] or activations != "dynamic":
            raise ModelError(
                f"fp8 checkpoints with weight_block_size {blocks!r:.80} and activation_scheme {activations!r:.80} "
                f"cannot be loaded. [{BLOCK}, {BLOCK}] with 'dynamic' can."
            )

        def read(name: str, tensors: MutableMapping[str, Tensor]) -> StoredLayer:
            q = take(tensors, name, "weight", [torch.float8_e4m3fn], (-1, -1))
            shape = FP8_BLOCK.scale_shape(*q.shape)
            scale = take(tensors, name, "weight_scale_inv", SCALE_TYPES, shape)
            return StoredLayer(QuantizedWeight(q, scale, None, FP8_BLOCK), _ACTIVATION)

        return read
