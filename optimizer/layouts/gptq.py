"""GPTQ checkpoints, as vLLM, SGLang and GPTQModel load them (https://github.com/ModelCloud/GPTQModel).

A layer `[N, K]` in `b` bits and groups of `g`, unsigned codes `u = q + 2^(b-1)`, lies transposed:

    name.qweight  int32 [K b / 32, N], codes along K, low bits first
    name.qzeros   int32 [G, N b / 32], zero points along N: z - 1 in version 1 (`gptq`), z in `gptq_v2`
    name.scales   float16 [G, N]
    name.g_idx    int32 [K], the group of each input feature

Written are symmetric version 1 checkpoints in the order of the features (`desc_act: false`), which every consumer
runs. Read are both versions, symmetric and not. With `desc_act: true` the groups may be scattered over the features;
our kernels scale neighbours, so such a layer is refused.
"""

from __future__ import annotations

import re
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
from optimizer.quant.packing import WORD_BITS, pack_words, unpack_words
from optimizer.quant.weight import QuantizedWeight

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""What a `checkpoint_format` takes off each zero point before storing it."""


class GPTQ(Layout):
    """`quant_method: gptq`."""

    name = "gptq"
    scale_dtype = torch.float16

    def check(self, name: str, scheme: Scheme, n: int, k: int) -> None:
        """Symmetric integers by channel or group, with N and K that fill 32-bit words."""
        format = scheme.weight
        per_word = WORD_BITS // format.bits
        if format.kind != "int" or not format.symmetric or format.granularity not in ("channel", "group"):
            raise UsageError(
                f"{name}: GPTQ checkpoints hold symmetric 4 or 8-bit integers in groups or rows, not {format.name}. "
                "Use layout compressed-tensors."
            )
        if n % per_word or k % per_word:
            raise UsageError(
                f"{name}: GPTQ packs {per_word} weights a word, which does not divide [{n}, {k}]. "
                "Leave this layer as it is, or use layout compressed-tensors."
            )
        format.groups(k)
        require_dynamic(name, self, scheme.activation)

    def expresses(self, activation: ActivationFormat) -> bool:
        """Never: GPTQ checkpoints are weight-only."""
        del activation
        return False

    def layer_tensors(self, name: str, layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """`qweight`, `qzeros`, `scales` and `g_idx`."""
        del dtype
        weight = layer.weight
        n, k = weight.q.shape
        self.check(name, Scheme(weight.format, layer.activation), n, k)
        bits, groups = weight.format.bits, weight.format.groups(k)
        half = 2 ** (bits - 1)
        zeros = torch.full((groups, n), half - 1, dtype=torch.uint8, device=weight.q.device)
        return {
            f"{name}.qweight": pack_words(_unsigned(weight.q, bits), bits).t().contiguous(),
            f"{name}.qzeros": pack_words(zeros, bits),
            f"{name}.scales": exact(name, weight.scale, torch.float16).t().contiguous(),
            f"{name}.g_idx": torch.arange(k, dtype=torch.int32, device=weight.q.device) // (k // groups),
        }

    def quantization_config(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """One scheme for all; linear layers left as they are, but for the head, are excluded in `dynamic`."""
        format = one_scheme(self.name, schemes).weight
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": format.bits,
            "group_size": format.group_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": "lm_head" in schemes,
        }
        if excluded := [name for name in plain if name != "lm_head"]:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in excluded}
        return config

    def other_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`quantize_config.json`, which loaders older than `quantization_config` read."""
        return {"quantize_config.json": {key: value for key, value in config.items() if key != "quant_method"}}

    def quantized_layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Whatever has a `qweight`."""
        return [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]

    def reader(self, config: Mapping[str, Any]) -> LayerReader:
        """Both versions; `ModelError` for per-layer settings, other bits, and formats such as `marlin`."""
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _VERSIONS:
            raise ModelError(f"GPTQ checkpoint_format {version!r:.80} cannot be loaded. Convert it to gptq or gptq_v2.")
        overrides = config.get("dynamic") or {}
        if not isinstance(overrides, Mapping) or any(not str(key).startswith("-:") for key in overrides):
            raise ModelError("GPTQ checkpoints with settings of their own for some layers (dynamic) cannot be loaded.")
        symmetric = config.get("sym", True)
        format = Format(number(config, "bits"), bool(symmetric), number(config, "group_size", default=-1))

        def read(name: str, tensors: MutableMapping[str, Tensor]) -> StoredLayer:
            return StoredLayer(_read(name, tensors, format, _VERSIONS[version]))

        return read


def _unsigned(q: Tensor, bits: int) -> Tensor:
    return q.to(torch.int16).add(2 ** (bits - 1)).to(torch.uint8)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes.to(torch.int16).sub(2 ** (bits - 1)).to(torch.int8)


def _read(name: str, tensors: MutableMapping[str, Tensor], format: Format, less: int) -> QuantizedWeight:
    bits = format.bits
    words = take(tensors, name, "qweight", [torch.int32], (-1, -1))
    k, n = words.shape[0] * WORD_BITS // bits, words.shape[1]
    try:
        groups = format.groups(k)
    except UsageError as error:
        raise ModelError(f"{name}.qweight: {error}") from None
    scale = take(tensors, name, "scales", SCALE_TYPES, (groups, n))
    zeros = unpack_words(take(tensors, name, "qzeros", [torch.int32], (groups, n * bits // WORD_BITS)), bits)
    if f"{name}.g_idx" in tensors:
        _require_neighbours(name, take(tensors, name, "g_idx", [torch.int32, torch.int64], (k,)), k // groups)
    q = _signed(unpack_words(words.t(), bits), bits).contiguous()
    if format.symmetric:
        if bool((zeros != 2 ** (bits - 1) - less).any()):
            raise ModelError(f"{name}.qzeros are not in the middle, though the checkpoint says sym: true.")
        return QuantizedWeight(q, scale.t().contiguous(), None, format)
    if less and bool((zeros == 2**bits - 1).any()):
        raise ModelError(
            f"{name}.qzeros holds {2**bits - 1}, which version 1 readers take for {2**bits} or for 0. "
            "Convert the checkpoint to gptq_v2 where it was made."
        )
    return QuantizedWeight(q, scale.t().contiguous(), _signed(zeros + less, bits).t().contiguous(), format)


def _require_neighbours(name: str, groups: Tensor, size: int) -> None:
    if not torch.equal(groups.long(), torch.arange(len(groups), device=groups.device) // size):
        raise ModelError(
            f"{name}.g_idx scatters the groups over the input features (desc_act: true with runtime order). "
            "Use a checkpoint made with desc_act: false, or start from the unquantized model."
        )
