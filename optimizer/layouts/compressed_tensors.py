"""compressed-tensors checkpoints, the default: any scheme, a different one for any layer.

https://github.com/vllm-project/compressed-tensors; transformers, vLLM and SGLang load them. Which of its compressors
stores a scheme is the library's own choice. A layer `[N, K]` with scales `[rows, G]` is stored as

    pack-quantized         integers     weight_packed int32 [N, ⌈K b / 32⌉] of q + 2^(b-1), low bits first;
                                        weight_shape int64 [2]; weight_zero_point int32, packed along N
    int-quantized          integers × rounded inputs      weight int8 [N, K]; weight_zero_point int8 [rows, G]
    float-quantized        FP8 × rounded inputs           weight float8_e4m3fn [N, K]
    naive-quantized        FP8                            the same
    nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], the lower nibble first; weight_global_scale [1]
    mxfp4-pack-quantized   the same without the global scale

with `weight_scale` in the model's type for packed integers (in its own where our kernels also round the inputs),
float32 for the other 8-bit elements, e4m3 for NVFP4 and e8m0 as uint8 for MXFP4. A static scale of the input is
`input_scale [1]`, that of NVFP4 `input_global_scale [1]`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import ModelError, UsageError
from optimizer.layouts.base import SCALE_TYPES, LayerReader, Layout, StoredLayer, exact, take
from optimizer.quant.formats import ActivationFormat, Format, Scheme
from optimizer.quant.packing import pack_nibbles, unpack_nibbles
from optimizer.quant.weight import QuantizedWeight

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_FP8 = torch.float8_e4m3fn


class CompressedTensors(Layout):
    """`quant_method: compressed-tensors`."""

    name = "compressed-tensors"

    def check(self, name: str, scheme: Scheme, n: int, k: int) -> None:
        """Everything but packed integers with one scale for a tensor or block."""
        format = scheme.weight
        format.groups(k)
        packed = format.kind == "int" and self._activation(scheme) is None
        if packed and format.granularity not in ("channel", "group"):
            raise UsageError(f"{name}: {format.name} weights alone have no packed form. Use rows or groups.")
        if format.bits == 4 and format.kind == "float" and k % 2:
            raise UsageError(f"{name}: 4-bit floats lie two in a byte, which does not divide {k} input features.")
        del n

    def expresses(self, activation: ActivationFormat) -> bool:
        """All but LLM.int8's outliers. Such a layer is stored weight-only: consumers then lose nothing."""
        return activation.outlier_threshold is None

    def layer_tensors(self, name: str, layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """See the table of the module."""
        weight, scheme = layer.weight, Scheme(layer.weight.format, layer.activation)
        self.check(name, scheme, *weight.q.shape)
        if self._compressor(scheme) == _PACKED:
            return _packed(name, weight, dtype if layer.activation is None else weight.scale.dtype)
        if weight.format.bits == 4 and weight.format.kind == "float":
            tensors = _packed_floats(name, weight)
        else:
            tensors = {f"{name}.weight": weight.q, f"{name}.weight_scale": _plain_scale(name, weight)}
            if weight.zero is not None:
                tensors[f"{name}.weight_zero_point"] = weight.zero
        if layer.input_scale is not None and layer.activation is not None:
            scale = exact(name, layer.input_scale, torch.float32).reshape(1)
            tensors[f"{name}.{_input_scale_name(layer.activation)}"] = scale
        return tensors

    def quantization_config(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """One group a scheme; a single one targets every linear layer but those in `ignore`."""
        groups: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            groups.setdefault(Scheme(scheme.weight, self._activation(scheme)), []).append(name)
        entries = {
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": scheme.weight.as_compressed_tensors(),
                "input_activations": activation_entry(scheme.activation),
                "output_activations": None,
                "format": self._compressor(scheme),
            }
            for index, (scheme, names) in enumerate(groups.items())
        }
        formats = {str(entry["format"]) for entry in entries.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else _MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": entries,
            "ignore": list(plain),
        }

    def quantized_layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Whatever is packed, or has a weight in int8 or e4m3."""
        names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
        return names + [
            key.removesuffix(".weight")
            for key, tensor in tensors.items()
            if key.endswith(".weight") and tensor.dtype in (torch.int8, _FP8)
        ]

    def reader(self, config: Mapping[str, Any]) -> LayerReader:
        """`ModelError` for a configuration that is not one, rotated or sparse weights, or a scheme we do not run."""
        groups = _groups(config)

        def read(name: str, tensors: MutableMapping[str, Tensor]) -> StoredLayer:
            scheme = _targeting(name, groups)
            activation = scheme.activation
            weight = _read(name, tensors, scheme.weight)
            scale = None
            if activation is not None and not activation.dynamic:
                part = _input_scale_name(activation)
                scale = take(tensors, name, part, SCALE_TYPES, (1,)).float()
            return StoredLayer(weight, activation, scale)

        return read

    def _activation(self, scheme: Scheme) -> ActivationFormat | None:
        activation = scheme.activation
        return activation if activation is not None and self.expresses(activation) else None

    def _compressor(self, scheme: Scheme) -> str:
        """The library's name for how a linear layer of this scheme is stored."""
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        entry = activation_entry(self._activation(scheme))
        theirs = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**scheme.weight.as_compressed_tensors()),
            input_activations=None if entry is None else QuantizationArgs(**entry),
        )
        return str(infer_module_format(torch.nn.Linear, theirs).value)


def activation_entry(activation: ActivationFormat | None) -> dict[str, Any] | None:
    """The `input_activations` of a config group; NVFP4's are `local`: dynamic scales under a static one."""
    if activation is None:
        return None
    entry: dict[str, Any] = {
        "num_bits": activation.bits,
        "type": activation.kind,
        "symmetric": True,
        "strategy": activation.granularity,
        "group_size": None if activation.group_size == -1 else activation.group_size,
        "dynamic": activation.dynamic,
    }
    if _is_nvfp4(activation):
        entry |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    return entry


def activation_format(entry: Mapping[str, Any] | None) -> ActivationFormat | None:
    """Read an `input_activations` entry back; `ModelError` for inputs that are rounded in another way than ours."""
    if entry is None:
        return None
    size, granularity, dynamic = entry.get("group_size"), entry.get("strategy"), entry.get("dynamic")
    if granularity == "tensor_group" and dynamic == "local":
        granularity, dynamic = "group", False
    if granularity not in ("tensor", "token", "group") or not isinstance(dynamic, bool) or not entry.get("symmetric"):
        raise ModelError(
            f"input activations {dict(entry)!r:.200} cannot be loaded. Symmetric ones per tensor, token or group can."
        )
    return ActivationFormat(entry["num_bits"], entry["type"], granularity, dynamic, -1 if size is None else size)


def _is_nvfp4(activation: ActivationFormat) -> bool:
    return activation.bits == 4 and not activation.dynamic


def _input_scale_name(activation: ActivationFormat) -> str:
    return "input_global_scale" if _is_nvfp4(activation) else "input_scale"


def _packed(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Integers, packed by the library's own code."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {
        f"{name}.weight_packed": torch.cat([pack_to_int32(rows, weight.format.bits) for rows in weight.q.split(256)]),
        f"{name}.weight_scale": exact(name, weight.scale, dtype),
        f"{name}.weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(weight.zero, weight.format.bits, packed_dim=0)
    return tensors


def _packed_floats(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    tensors = {f"{name}.weight_packed": pack_nibbles(weight.q), f"{name}.weight_scale": weight.scale}
    if weight.format.scale == "e8m0":
        tensors[f"{name}.weight_scale"] = weight.scale.view(torch.uint8)
    elif weight.global_scale is not None:
        tensors[f"{name}.weight_global_scale"] = exact(name, weight.global_scale, torch.float32).reshape(1)
    return tensors


def _plain_scale(name: str, weight: QuantizedWeight) -> Tensor:
    scale = exact(name, weight.scale, torch.float32)
    return scale.reshape(1) if weight.format.granularity == "tensor" else scale


def _groups(config: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    """Targets and scheme of each group, as the library's own model of the configuration reads them."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    sparsity = config.get("sparsity_config") or {}
    if config.get("transform_config") or (isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense"):
        raise ModelError("compressed-tensors checkpoints with transforms or sparsity cannot be loaded.")
    try:
        parsed = QuantizationConfig.model_validate(dict(config))
        groups = [group.model_dump() for group in parsed.config_groups.values()]
    except (ValidationError, ValueError, KeyError, TypeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"quantization_config is not one of compressed-tensors: {error}") from None
    found = []
    for group in groups:
        if group["weights"] is None or group["output_activations"] is not None:
            raise ModelError(f"the config group of {group['targets']} rounds outputs, or no weights.")
        weights = Format.from_compressed_tensors(group["weights"])
        found.append((group["targets"], Scheme(weights, activation_format(group["input_activations"]))))
    return found


def _targeting(name: str, groups: list[tuple[list[str], Scheme]]) -> Scheme:
    """The scheme of a layer: a group that names it comes first, then one with a pattern, then one for all."""

    def rank(target: str) -> int:
        if target.startswith("re:"):
            try:
                return 1 if re.match(target[3:], name) else 3
            except re.error as error:
                raise ModelError(f"target {target!r:.80} is not a regular expression: {error}.") from None
        return 0 if target == name else 2 if target == "Linear" else 3

    ranked = [(rank(target), index) for index, (targets, _) in enumerate(groups) for target in targets]
    best, index = min(ranked, default=(3, 0))
    if best == 3:
        raise ModelError(f"{name} is packed, but no config group of the checkpoint targets it.")
    return groups[index][1]


def _read(name: str, tensors: MutableMapping[str, Tensor], format: Format) -> QuantizedWeight:
    if format.kind == "float" and format.bits == 4:
        return _read_floats(name, tensors, format)
    if format.kind == "int" and f"{name}.weight_packed" in tensors:
        return _read_packed(name, tensors, format)
    q = take(tensors, name, "weight", [torch.int8 if format.kind == "int" else _FP8], (-1, -1))
    if format.kind == "int" and format.bits < 8 and not bool(((q >= format.q_min) & (q <= format.q_max)).all()):
        raise ModelError(f"{name}.weight holds integers that do not fit {format.bits} bits.")
    shape = _scale_shape(name, format, *q.shape)
    scale = take(tensors, name, "weight_scale", SCALE_TYPES, shape)
    zero = None if format.symmetric else take(tensors, name, "weight_zero_point", [torch.int8], shape)
    return QuantizedWeight(q, scale, zero, format)


def _read_packed(name: str, tensors: MutableMapping[str, Tensor], format: Format) -> QuantizedWeight:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    n, k = take(tensors, name, "weight_shape", [torch.int64, torch.int32], (2,)).tolist()
    if n < 1 or k < 1:
        raise ModelError(f"{name}.weight_shape is [{n}, {k}], which no weight has. Write or copy the checkpoint again.")
    words = take(tensors, name, "weight_packed", [torch.int32], (n, -(-k * format.bits // 32)))
    shape = torch.Size(_scale_shape(name, format, n, k))
    scale = take(tensors, name, "weight_scale", SCALE_TYPES, shape)
    zero = None
    if not format.symmetric:
        packed = take(tensors, name, "weight_zero_point", [torch.int32], (-(-n * format.bits // 32), shape[1]))
        zero = unpack_from_int32(packed, format.bits, shape, packed_dim=0)
    return QuantizedWeight(unpack_from_int32(words, format.bits, torch.Size([n, k])), scale, zero, format)


def _read_floats(name: str, tensors: MutableMapping[str, Tensor], format: Format) -> QuantizedWeight:
    q = unpack_nibbles(take(tensors, name, "weight_packed", [torch.uint8], (-1, -1)))
    shape = _scale_shape(name, format, *q.shape)
    if format.scale == "e4m3":
        scale = take(tensors, name, "weight_scale", [_FP8], shape)
        return QuantizedWeight(q, scale, None, format, take(tensors, name, "weight_global_scale", SCALE_TYPES, (1,)))
    codes = take(tensors, name, "weight_scale", [torch.uint8], shape)
    if bool((codes == 255).any()):
        raise ModelError(f"{name}.weight_scale holds 255, which is NaN in e8m0. Write or copy the checkpoint again.")
    return QuantizedWeight(q, codes.view(torch.float8_e8m0fnu), None, format)


def _scale_shape(name: str, format: Format, n: int, k: int) -> tuple[int, int]:
    try:
        return format.scale_shape(n, k)
    except UsageError as error:
        raise ModelError(f"{name}: {error}") from None
