"""Models shown as plain linear layers: the same logits, the same memory, and the names that files use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.pytorch_utils import Conv1D

from optimizer.backends.experts import Experts
from optimizer.errors import ModelError, UsageError
from optimizer.passes.base import view
from optimizer.passes.linearize import checkpoint_names, linearize
from tests.passes.small_architectures import ARCHITECTURES, HIDDEN, LAYERS, build, logits

REPLACED = {
    "gpt2": [
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "mixtral": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "qwen3_moe": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
}
"""What is no linear layer in these models; the other architectures have none."""

TOLERANCE = 4 * LAYERS * (2 * HIDDEN) ** 0.5 * torch.finfo(torch.float32).eps
"""Other sum order in up to four products a layer of K ≤ 128 terms: √K ε each, relative to the largest logit."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_stay_and_the_original_is_untouched(name: str) -> None:
    model = ARCHITECTURES[name]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = logits(model)
    shown = view(model)
    assert sorted(linearize(shown)) == sorted(REPLACED.get(name, []))
    actual = logits(shown)
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert not any(isinstance(m, Conv1D) for m in shown.modules())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in shown.parameters()} == own
    assert linearize(shown) == ()


@pytest.mark.parametrize("name", REPLACED)
def test_works_without_data(name: str) -> None:
    with torch.device("meta"):
        model = type(ARCHITECTURES[name]())(ARCHITECTURES[name]().config)
    assert len(linearize(model)) == len(REPLACED[name])
    assert all(p.is_meta for p in model.parameters())
    expected = {n: p.shape for n, p in linearized(name).named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == expected


def linearized(name: str) -> Any:
    model = ARCHITECTURES[name]()
    linearize(model)
    return model


def test_flags_and_types_stay() -> None:
    model = ARCHITECTURES["gpt2"]().to(torch.bfloat16)
    block = model.transformer.h[0]
    block.mlp.c_fc.weight.requires_grad_(False)
    block.mlp.c_fc.train()
    linearize(model)
    layer = block.mlp.c_fc
    assert (layer.in_features, layer.out_features) == (HIDDEN, 4 * HIDDEN)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.training
    assert not block.mlp.c_proj.training


def test_tied_weights_stay_tied() -> None:
    model = linearized("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_sharing_between_layers_stays() -> None:
    first, second = Conv1D(6, 4), Conv1D(6, 4)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "c": first})
    assert linearize(model) == ("a", "b", "c")
    assert model["a"] is model["c"]
    assert model["b"] is not model["a"]
    assert model["b"].weight is model["a"].weight


def test_unknown_experts_are_named_and_nothing_is_changed() -> None:
    config = {
        "vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
        "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    model = build(GptOssForCausalLM, GptOssConfig, config)
    model.extra = Conv1D(4, 4)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts"):
        linearize(model)
    assert isinstance(model.extra, Conv1D)


def test_the_layer_itself_cannot_be_replaced() -> None:
    with pytest.raises(UsageError, match="Conv1D is itself"):
        linearize(Conv1D(4, 4))


def saved_names(model: nn.Module, path: Path) -> set[str]:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)  # type: ignore[operator]
    finally:
        if bars:
            logging.enable_progress_bar()
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("loaded", [False, True])
def test_names_are_those_that_save_pretrained_writes(name: str, loaded: bool, tmp_path: Path) -> None:
    model = ARCHITECTURES[name]()
    on_disk = saved_names(model, tmp_path)
    if loaded:
        model = type(model).from_pretrained(tmp_path)
    linearize(model)
    names = checkpoint_names(model)
    tied = set(model.all_tied_weights_keys)
    own = [n for n in model.state_dict() if n not in tied]
    assert {names.to_checkpoint(n) for n in own} == on_disk
    assert [names.from_checkpoint(names.to_checkpoint(n)) for n in own] == own
    modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [names.from_checkpoint(names.to_checkpoint(n)) for n in modules] == modules


def test_values_lie_under_the_names(tmp_path: Path) -> None:
    model = ARCHITECTURES["mixtral"]()
    saved_names(model, tmp_path)
    linearize(model)
    names = checkpoint_names(model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(names.to_checkpoint(name)), tensor), name


def test_names_of_the_hub() -> None:
    mixtral, qwen = checkpoint_names(linearized("mixtral")), checkpoint_names(linearized("qwen3_moe"))
    path = "model.layers.1.mlp.experts.3."
    disk = "model.layers.1.block_sparse_moe.experts.3."
    for layer, stored in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        assert mixtral.to_checkpoint(path + layer) == disk + stored
        for leaf in ("weight", "weight_packed", "weight_scale", "input_scale", "bias"):
            assert mixtral.to_checkpoint(f"{path}{layer}.{leaf}") == f"{disk}{stored}.{leaf}"
            assert mixtral.from_checkpoint(f"{disk}{stored}.{leaf}") == f"{path}{layer}.{leaf}"
            assert qwen.to_checkpoint(f"{path}{layer}.{leaf}") == f"{path}{layer}.{leaf}"
    assert mixtral.to_checkpoint("model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    assert mixtral.to_checkpoint("lm_head.weight_packed") == "lm_head.weight_packed"


def test_names_hold_after_layers_were_replaced() -> None:
    model = linearized("mixtral")
    model.model.layers[0].mlp.experts[1].up_proj = nn.Identity()
    path = "model.layers.0.mlp.experts.1.up_proj"
    assert checkpoint_names(model).to_checkpoint(path) == "model.layers.0.block_sparse_moe.experts.1.w3"


def test_unknown_names_are_refused() -> None:
    names = checkpoint_names(linearized("mixtral"))
    with pytest.raises(UsageError, match=r"experts\.9\.up_proj"):
        names.to_checkpoint("model.layers.0.mlp.experts.9.up_proj.weight")
    with pytest.raises(UsageError, match="no module of MixtralForCausalLM is stored there"):
        names.from_checkpoint("model.layers.0.mlp.experts.1.up_proj.weight")


def test_merged_on_disk_has_no_name() -> None:
    """Without being taken apart, a fused parameter is many tensors on disk."""
    with pytest.raises(UsageError, match="is stored merged"):
        checkpoint_names(ARCHITECTURES["mixtral"]()).to_checkpoint("model.layers.0.mlp.experts.down_proj")


def test_any_other_module_keeps_its_names() -> None:
    names = checkpoint_names(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))
    assert names.to_checkpoint("1.0.weight_packed") == "1.0.weight_packed"
    assert names.to_checkpoint("0") == names.from_checkpoint("0") == "0"


def test_experts_is_what_stands_in_the_tree() -> None:
    assert isinstance(linearized("qwen3_moe").model.layers[0].mlp.experts, Experts)
