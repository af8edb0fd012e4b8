"""Checkpoints that other tools made: written here tensor by tensor from their formats' definitions, in plain integers.

The same reader was compared once, by hand, with llm-compressor 0.14 (W4A16, W4A16_ASYM, W8A8, W4A8, FP8, FP8_DYNAMIC,
FP8_BLOCK, NVFP4, NVFP4A16, MXFP4A16, and GPTQ with W4A16 and W8A8) on a one-layer Llama: every weight equal (to the
bfloat16 that it decodes NVFP4 to), and equal logits wherever both sides computed in float32. So it was with GPTQModel
7.7 (4 and 8 bits, symmetric and not, both versions), which also loads the GPTQ and AWQ files written here: weights
equal to within the rounding of the float16 that it decodes to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from optimizer.backends.linear import QuantizedLinear
from optimizer.checkpoint import load_checkpoint, save_checkpoint
from optimizer.errors import ModelError, UsageError
from optimizer.passes.linearize import linearize
from optimizer.quant.formats import ACTIVATIONS, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, NVFP4, Format, Scheme
from tests.optimizer.quantized_models import fresh_llama, quantize, quantized_llama
from tests.optimizer.tiny_models import tiny_gpt2

CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.up_proj"  # [256, 128]
N, K = 256, 128
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()  # type: ignore[no-any-return]


def foreign(
    folder: Path, quantization: dict[str, Any], layer: dict[str, Tensor], more: dict[str, Tensor] | None = None
) -> Path:
    """A Llama of one layer, everything plain but `LAYER`, which is stored as `layer`."""
    model = fresh_llama(hidden=128, layers=1, dtype=torch.float16, tied=False)
    tensors = dict(model.state_dict())
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{part}": tensor for part, tensor in layer.items()} | (more or {})
    config = json.loads(model.config.to_json_string()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / "model.safetensors")
    return folder


def read(folder: Path) -> QuantizedLinear:
    module = load_checkpoint(folder, CPU).get_submodule(LAYER)
    assert isinstance(module, QuantizedLinear)
    return module


def word(fields: list[int], bits: int) -> int:
    value = sum(field << (bits * i) for i, field in enumerate(fields))
    return value - 2**32 if value >= 2**31 else value


def words_down(u: np.ndarray, bits: int) -> Tensor:
    """`[K, N]` packed along K."""
    per = 32 // bits
    rows = [
        [word([int(u[r + i, c]) for i in range(per)], bits) for c in range(u.shape[1])] for r in range(0, len(u), per)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def words_across(u: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """`[R, C]` packed along C; field i of a word is its column `order[i]`."""
    per = 32 // bits
    order = order or tuple(range(per))
    rows = [[word([int(row[c + place]) for place in order], bits) for c in range(0, len(row), per)] for row in u]
    return torch.tensor(rows, dtype=torch.int32)


GENERATOR = np.random.default_rng(0)


def gptq(bits: int, size: int, *, symmetric: bool, less: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """A GPTQ layer and the weight it stands for."""
    groups, top = K // size, 2**bits
    u = GENERATOR.integers(0, top, (K, N))
    z = np.full((groups, N), top // 2) if symmetric else GENERATOR.integers(1, top, (groups, N))
    scales = torch.from_numpy(GENERATOR.uniform(0.001, 0.1, (groups, N))).half()
    order = np.arange(K) // size
    exact = torch.from_numpy((u - z[order]).astype(np.float32)) * scales.float()[order]
    layer = {
        "qweight": words_down(u, bits),
        "qzeros": words_across(z - less, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(order).int(),
    }
    return layer, exact.T


def gptq_config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False} | more


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "version"),
    [(4, 32, True, "gptq"), (4, 128, False, "gptq"), (8, 64, True, "gptq"), (8, 32, False, "gptq"),
     (4, 64, True, "gptq_v2"), (4, 32, False, "gptq_v2"), (8, 128, False, "gptq_v2")],
)  # fmt: skip
def test_gptq_is_read_exactly(bits: int, size: int, symmetric: bool, version: str, tmp_path: Path) -> None:
    layer, exact = gptq(bits, size, symmetric=symmetric, less=int(version == "gptq"))
    config = gptq_config(bits, size, sym=symmetric, checkpoint_format=version)
    module = read(foreign(tmp_path, config, layer))
    assert torch.equal(module.stored_weight().dequantize(), exact)
    assert module.scheme == Scheme(Format(bits, symmetric, size))


def test_a_zero_point_of_0_is_read_in_version_2_and_refused_in_version_1(tmp_path: Path) -> None:
    layer, _ = gptq(4, 128, symmetric=False, less=0)
    zeros = np.zeros((1, N), dtype=np.int64)
    layer["qzeros"] = words_across(zeros, 4)
    module = read(foreign(tmp_path, gptq_config(4, 128, sym=False, checkpoint_format="gptq_v2"), layer))
    assert module.stored_weight().zero is not None
    assert bool((module.stored_weight().zero == -8).all())
    layer["qzeros"] = words_across(zeros + 15, 4)  # 0 - 1, as tools that mask the field write it
    with pytest.raises(ModelError, match=r"up_proj\.qzeros holds 15, .* for 16 or for 0.*gptq_v2"):
        read(foreign(tmp_path, gptq_config(4, 128, sym=False), layer))


def test_gptq_files_of_older_tools_are_read(tmp_path: Path) -> None:
    # One file of another name, the settings beside it, biases of zeros for layers without one, rotary frequencies.
    layer, exact = gptq(4, 128, symmetric=True)
    more = {f"{LAYER}.bias": torch.zeros(N).half(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    foreign(tmp_path, {}, layer, more)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    module = read(tmp_path)
    assert torch.equal(module.stored_weight().dequantize(), exact)
    assert module.bias is None


def test_a_bias_that_is_not_zero_is_no_leftover(tmp_path: Path) -> None:
    layer, _ = gptq(4, 128, symmetric=True)
    foreign(tmp_path, gptq_config(4, 128), layer, {f"{LAYER}.bias": torch.ones(N).half()})
    with pytest.raises(ModelError, match=r"unexpected: model\.layers\.0\.mlp\.up_proj\.bias"):
        read(tmp_path)


def test_scattered_groups_are_refused_and_act_order_with_groups_of_neighbours_is_not(tmp_path: Path) -> None:
    layer, exact = gptq(4, 32, symmetric=True)
    config = gptq_config(4, 32, desc_act=True)
    assert torch.equal(read(foreign(tmp_path, config, layer)).stored_weight().dequantize(), exact)
    layer["g_idx"] = layer["g_idx"].flip(0)
    with pytest.raises(ModelError, match=r"up_proj\.g_idx scatters the groups.*desc_act: false"):
        read(foreign(tmp_path, config, layer))


@pytest.mark.parametrize("legacy", [False, True])
def test_awq_is_read_exactly(legacy: bool, tmp_path: Path) -> None:
    order, size = (0, 2, 4, 6, 1, 3, 5, 7), 64
    u, z = GENERATOR.integers(0, 16, (K, N)), GENERATOR.integers(0, 16, (K // size, N))
    scales = torch.from_numpy(GENERATOR.uniform(0.001, 0.1, z.shape)).half()
    group = np.arange(K) // size
    exact = (torch.from_numpy((u - z[group]).astype(np.float32)) * scales.float()[group]).T
    layer = {"qweight": words_across(u, 4, order), "qzeros": words_across(z, 4, order), "scales": scales}
    config: dict[str, Any] = {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    config |= {"w_bit": 4, "q_group_size": size} if legacy else {"bits": 4, "group_size": size}
    module = read(foreign(tmp_path, config, layer))
    assert torch.equal(module.stored_weight().dequantize(), exact)
    assert module.scheme == Scheme(Format(4, False, size))


# compressed-tensors as llm-compressor writes it: more keys than ours, other orders, presets, patterns.

E4M3 = torch.float8_e4m3fn


def group(
    weights: dict[str, Any], activations: dict[str, Any] | None = None, targets: str = "Linear"
) -> dict[str, Any]:
    common = {"actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}, "zp_dtype": None}
    full = {"dynamic": False, "group_size": None, "scale_dtype": None, "symmetric": True}
    inputs = None if activations is None else common | full | activations
    return {
        "config_groups": {
            "group_0": {"input_activations": inputs, "output_activations": None, "targets": [targets],
                        "weights": common | full | weights}
        },
        "format": "float-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.19.0",
    }  # fmt: skip


FP8_ARGS = {"num_bits": 8, "type": "float"}


def fp8_weight() -> Tensor:
    return torch.from_numpy(GENERATOR.uniform(-400, 400, (N, K)).astype(np.float32)).to(E4M3)


def test_fp8_with_one_scale_and_static_inputs(tmp_path: Path) -> None:
    q, scale, inputs = fp8_weight(), torch.tensor(0.25).bfloat16(), torch.tensor([0.5])
    config = group(FP8_ARGS | {"strategy": "tensor"}, FP8_ARGS | {"strategy": "tensor"})
    module = read(foreign(tmp_path, config, {"weight": q, "weight_scale": scale, "input_scale": inputs}))
    assert module.scheme == Scheme(FP8_TENSOR, ACTIVATIONS["fp8-static"])
    assert torch.equal(module.stored_weight().dequantize(), q.float() * 0.25)
    assert module.input_scale is not None
    assert module.input_scale.tolist() == [0.5]


@pytest.mark.parametrize("target", ["Linear", LAYER, r"re:.*mlp\..*_proj$"])
def test_fp8_with_a_scale_a_row_whatever_targets_it(target: str, tmp_path: Path) -> None:
    q, scale = fp8_weight(), torch.rand(N, 1) + 0.1
    inputs = FP8_ARGS | {"strategy": "token", "dynamic": True}
    config = group(FP8_ARGS | {"strategy": "channel"}, inputs, target)
    module = read(foreign(tmp_path, config, {"weight": q, "weight_scale": scale}))
    assert module.scheme == Scheme(FP8_CHANNEL, ACTIVATIONS["fp8"])
    assert torch.equal(module.stored_weight().dequantize(), q.float() * scale)


def test_a_group_that_names_a_layer_comes_before_one_for_all(tmp_path: Path) -> None:
    q, scale = fp8_weight(), torch.rand(N, 1) + 0.1
    config = group({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128})
    config["config_groups"]["group_1"] = group(FP8_ARGS | {"strategy": "channel"}, None, LAYER)["config_groups"][
        "group_0"
    ]
    module = read(foreign(tmp_path, config, {"weight": q, "weight_scale": scale}))
    assert module.scheme == Scheme(FP8_CHANNEL)


def test_a_preset_in_place_of_a_group(tmp_path: Path) -> None:
    q, scale = fp8_weight(), torch.rand(N, 1) + 0.1
    config = {"quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    module = read(foreign(tmp_path, config, {"weight": q, "weight_scale": scale}))
    assert module.scheme == Scheme(FP8_CHANNEL, ACTIVATIONS["fp8"])


def test_nvfp4(tmp_path: Path) -> None:
    codes = GENERATOR.integers(0, 16, (N, K))
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
    scale = torch.from_numpy(GENERATOR.uniform(1, 400, (N, K // 16)).astype(np.float32)).to(E4M3)
    layer = {
        "weight_packed": torch.from_numpy(codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([512.0]),
        "input_global_scale": torch.tensor([300.0]),
    }
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = group(args | {"scale_dtype": "torch.float8_e4m3fn"}, args | {"dynamic": "local"})
    module = read(foreign(tmp_path, config, layer))
    exact = torch.from_numpy(table[codes]) * (scale.float() / 512).repeat_interleave(16, 1)
    assert torch.equal(module.stored_weight().dequantize(), exact)
    assert module.scheme == Scheme(NVFP4, ACTIVATIONS["nvfp4"])


def test_block_fp8_with_ragged_blocks_and_bfloat16_scales(tmp_path: Path) -> None:
    q, scale = fp8_weight(), (torch.rand(2, 1) + 0.1).bfloat16()
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    module = read(foreign(tmp_path, config, {"weight": q, "weight_scale_inv": scale}))
    assert module.scheme == Scheme(FP8_BLOCK, ACTIVATIONS["fp8-group"])
    assert torch.equal(module.stored_weight().dequantize(), q.float() * scale.float().repeat_interleave(128, 0))


# What must not be read.

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' cannot be loaded; compressed-tensors, fp8, gptq, awq can"),
        ({}, "method 'None' cannot be loaded"),
        ([], r"config\.json does not describe a model"),
        (gptq_config(3, 128), "Invalid bits 3"),
        (gptq_config(-4, 128), "Invalid bits -4"),
        (gptq_config(4, 0), "Invalid group size 0"),
        (gptq_config(4, -7), "Invalid group size -7"),
        (gptq_config("4", 128), r"quantization_config\.bits must be a whole number, is '4'"),
        (gptq_config(True, 128), r"bits must be a whole number, is True"),
        ({"quant_method": "gptq"}, r"bits must be a whole number, is None"),
        (gptq_config(4, 128, checkpoint_format="marlin"), "checkpoint_format 'marlin' cannot be loaded"),
        (gptq_config(4, 128, dynamic={"+:.*": {"bits": 8}}), "settings of their own"),
        (gptq_config(4, 128, dynamic=7), "settings of their own"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version 'gemv' with 4 bits"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "with 8 bits cannot be loaded"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, r"up_proj"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "'static'"),
        (group(INT4 | {"num_bits": 2}), "Invalid bits 2"),
        (group(INT4 | {"group_size": -5}), "not one of compressed-tensors"),
        (group(INT4 | {"group_size": 48}), "Invalid group size 48"),
        (group(INT4 | {"actorder": "group"}), "actorder='group' has been removed"),
        (group(INT4 | {"surprise": 1}), "surprise"),
        (group(INT4, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}),
         "Symmetric ones per tensor, token or group can"),
        (group(INT4) | {"config_groups": {"W4A16X": ["Linear"]}}, "Unknown preset"),
        (group(INT4) | {"config_groups": 3}, "config_groups"),
        (group(INT4) | {"transform_config": {"R1": {}}}, "transforms or sparsity"),
        (group(INT4) | {"sparsity_config": {"format": "sparse-bitmask"}}, "transforms or sparsity"),
        (group(INT4, None, "re:("), "is not a regular expression"),
        (group(INT4, None, "Conv2d"), "no config group of the checkpoint targets it"),
    ],
)  # fmt: skip
def test_hostile_and_unsupported_configurations_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method == "compressed-tensors":
        layer = {"weight_packed": torch.zeros(N, 16, dtype=torch.int32), "weight_scale": torch.ones(N, 1)}
        layer["weight_shape"] = torch.tensor([N, K])
    else:
        layer = gptq(4, 128, symmetric=True)[0]
        if method == "awq":
            layer = {"qweight": torch.zeros(K, N // 8, dtype=torch.int32), "scales": torch.ones(1, N).half(),
                     "qzeros": torch.zeros(1, 1, dtype=torch.int32)}  # fmt: skip
    with pytest.raises(ModelError, match=message):
        read(foreign(tmp_path, config, layer))


Damage = Callable[[dict[str, Tensor]], Any]
WRITTEN = {
    "gptq": (Scheme(Format(4, True, 64)), torch.float16),
    "awq": (Scheme(Format(4, False, 64)), torch.float16),
    "fp8": (Scheme(FP8_BLOCK, ACTIVATIONS["fp8-group"]), None),
    "packed": (Scheme(Format(4, False, 64)), None),
    "int8": (Scheme(Format(8), ACTIVATIONS["int8-static"]), None),
    "nvfp4": (Scheme(NVFP4, ACTIVATIONS["nvfp4"]), None),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (scheme, scale_dtype) in WRITTEN.items():
        folders[name] = tmp_path_factory.mktemp(name)
        layout = name if name in ("gptq", "awq", "fp8") else "compressed-tensors"
        save_checkpoint(quantized_llama(scheme, scale_dtype=scale_dtype), None, folders[name], layout)
    return folders


PARTS = [
    (name, part)
    for name, parts in {
        "gptq": ("qweight", "qzeros", "scales"),
        "awq": ("qweight", "qzeros", "scales"),
        "fp8": ("weight", "weight_scale_inv"),
        "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
        "int8": ("weight", "weight_scale", "input_scale"),
        "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    }.items()
    for part in parts
]


def damaged(source: Path, folder: Path, part: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    new = change(tensors.pop(f"{LAYER}.{part}"))
    if new is not None:
        tensors[f"{LAYER}.{part}"] = new
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_missing_tensor_is_named(name: str, part: str, written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"its {part} is missing|missing: .*up_proj\.weight"):
        load_checkpoint(damaged(written[name], tmp_path, part, lambda t: None), CPU)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_another_shape_is_refused(name: str, part: str, written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"up_proj.*(it must be|weight)"):
        load_checkpoint(damaged(written[name], tmp_path, part, lambda t: torch.cat([t, t])), CPU)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_another_type_is_refused(name: str, part: str, written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"up_proj"):
        load_checkpoint(damaged(written[name], tmp_path, part, lambda t: t.double()), CPU)


@pytest.mark.parametrize(
    ("name", "part"), [pair for pair in PARTS if "scale" in pair[1] and pair != ("nvfp4", "weight_scale")]
)
def test_a_scale_that_is_not_finite_is_refused(name: str, part: str, written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"up_proj\.{part} holds NaN or infinite values"):
        load_checkpoint(damaged(written[name], tmp_path, part, lambda t: t * torch.inf), CPU)


def test_an_8_bit_weight_that_is_nan_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    nan = torch.full((N, K), 0x7F, dtype=torch.uint8).view(E4M3)
    with pytest.raises(ModelError, match=r"up_proj\.weight holds NaN"):
        load_checkpoint(damaged(written["fp8"], tmp_path, "weight", lambda t: nan), CPU)


@pytest.mark.parametrize("shape", [[-256, 128], [0, 128], [256, 2**62], [128, 256]])
def test_a_hostile_weight_shape_is_refused(shape: list[int], written: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(written["packed"], tmp_path, "weight_shape", lambda t: torch.tensor(shape))
    with pytest.raises(ModelError, match=r"up_proj\.weight_(shape|packed) is"):
        load_checkpoint(folder, CPU)


def test_symmetric_gptq_with_other_zero_points_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(written["gptq"], tmp_path, "qzeros", torch.zeros_like)
    with pytest.raises(ModelError, match="not in the middle, though the checkpoint says sym: true"):
        load_checkpoint(folder, CPU)


def test_8_bit_tensors_that_nothing_describes_are_refused(tmp_path: Path) -> None:
    save_checkpoint(fresh_llama(hidden=128, layers=1), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no quantization that says so: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_checkpoint(tmp_path, CPU)


def test_a_quantized_embedding_is_refused(tmp_path: Path) -> None:
    model = fresh_llama(hidden=128, layers=1)
    save_checkpoint(model, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(E4M3)
    tensors["model.embed_tokens.weight_scale"] = torch.ones(320, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = group(FP8_ARGS | {"strategy": "channel"})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r"quantized, but no linear layer: model\.embed_tokens"):
        load_checkpoint(tmp_path, CPU)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (3, "must be an object"),
        ({"activations": 3}, "must be a list"),
        ({"activations": [3]}, "must be an object"),
        ({"activations": [{"layers": ["q"], "format": {}}]}, "names 'q', which is no quantized layer"),
        ({"activations": [{"layers": [], "format": {"bits": "8"}}]}, "'bits': '8', which no format has"),
        ({"activations": [{"layers": [], "format": {"colour": 8}}]}, "'colour': 8, which no format has"),
        ({"activations": [{"layers": [LAYER], "format": {"bits": 5}}]}, r"up_proj: activations cannot be"),
    ],
)
def test_hostile_extras_are_refused(extras: Any, message: str, written: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((written["packed"] / "config.json").read_text(encoding="utf-8"))
    config["roofline_optimizer"] = extras
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((written["packed"] / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path, CPU)


# Names on disk that are not those of the module tree.


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_experts_are_stored_one_by_one_under_the_names_of_the_hub(layout: str, tmp_path: Path) -> None:
    model = mixtral()
    linearize(model)
    scheme = Scheme(Format(4, True, 64))
    quantize(model, lambda name: scheme if "experts" in name or "self_attn" in name else None, torch.float16)
    save_checkpoint(model, None, tmp_path, layout)
    names = load_file(tmp_path / "model.safetensors").keys()
    part = "qweight" if layout == "gptq" else "weight_packed"
    assert f"model.layers.0.block_sparse_moe.experts.2.w3.{part}" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    untouched = config["ignore"] if layout == "compressed-tensors" else next(iter(config["dynamic"])).replace("\\", "")
    assert "model.layers.0.block_sparse_moe.gate" in untouched
    assert torch.equal(logits(load_checkpoint(tmp_path, CPU)), logits(model))


def test_plain_fused_experts_are_stored_as_the_hub_has_them(tmp_path: Path) -> None:
    model = mixtral()
    save_checkpoint(model, None, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert MixtralForCausalLM.from_pretrained(tmp_path)(TOKENS).logits.equal(logits(model))
    # Taken apart, experts add up in another order.
    assert torch.allclose(logits(load_checkpoint(tmp_path, CPU)), logits(model), rtol=1e-4, atol=1e-5)


def test_transposed_layers_keep_their_form_on_disk_unless_quantized(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2(tmp_path / "source"))
    linearize(model)
    scheme = Scheme(Format(8))
    quantize(model, lambda name: scheme if name.endswith("mlp.c_fc") else None)
    out = tmp_path / "out"
    out.mkdir()
    save_checkpoint(model, None, out)
    tensors = load_file(out / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
    assert tensors["transformer.h.0.mlp.c_fc.weight_shape"].tolist() == [256, 64]
    assert torch.equal(logits(load_checkpoint(out, CPU)), logits(model))


def test_a_layout_error_names_the_layer_of_the_model(tmp_path: Path) -> None:
    model = quantized_llama(Scheme(Format(8)))
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj: AWQ checkpoints hold 4-bit"):
        save_checkpoint(model, None, tmp_path, "awq")
