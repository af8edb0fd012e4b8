"""A view shares tensors and nothing else; a transaction that fails leaves the module tree as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizer.passes.base import transaction, view
from tests.backends.decoder_models import llama


def tree(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_view_costs_no_memory_and_hides_replacements(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    before = tree(model)
    copy = view(model)
    assert [t.data_ptr() for t in copy.parameters()] == [t.data_ptr() for t in model.parameters()]
    assert [t.data_ptr() for t in copy.buffers()] == [t.data_ptr() for t in model.buffers()]
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
    copy.model.layers[0].mlp.gate_proj = nn.Identity()
    copy.config.hidden_act = "changed"
    assert tree(model) == before
    assert model.config.hidden_act == "silu"


@pytest.mark.parametrize("failing", range(4))
def test_a_failure_at_any_layer_puts_every_module_back(failing: int) -> None:
    model = llama()
    before = tree(model)
    tokens = torch.tensor([[5, 6, 7]])
    expected = model(tokens).logits

    def replace_until_failing() -> None:
        for index, name in enumerate(
            ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "lm_head", "model.norm"]
        ):
            if index == failing:
                raise KeyboardInterrupt
            model.set_submodule(name, nn.ModuleDict({"inner": nn.Identity()}))

    with pytest.raises(KeyboardInterrupt), transaction(model):
        replace_until_failing()
    assert tree(model) == before
    assert torch.equal(model(tokens).logits, expected)


def test_added_and_removed_modules_are_undone_in_order() -> None:
    model = llama()
    before = tree(model)

    def rearrange() -> None:
        block = model.model.layers[0].mlp
        del block.up_proj
        block.extra = nn.Linear(2, 2)
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"), transaction(model):
        rearrange()
    assert tree(model) == before


def test_success_keeps_the_changes() -> None:
    model = llama()
    with transaction(model):
        model.lm_head = nn.Identity()
    assert isinstance(model.lm_head, nn.Identity)
