"""Walking blocks gives the model's own numbers, for every architecture, whatever the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer.errors import ModelError
from optimizer.passes import blocks as walking
from optimizer.passes.blocks import block_names, calibration_dtype, first_inputs, in_float32, tail_inputs
from optimizer.passes.calibration import Calibration
from tests.passes.small_architectures import ARCHITECTURES

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def rows(*lengths: int, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return Calibration(tuple(torch.randint(3, 300, (length,), generator=generator) for length in lengths))


@every_architecture
@torch.no_grad()
def test_block_by_block_is_the_model(name: str) -> None:
    # Rows of two lengths, in batches of two and one: masks and rotary tables differ between them.
    model = ARCHITECTURES[name]()
    model.config.final_logit_softcapping = None
    data = rows(24, 24, 24, 16)
    inputs = first_inputs(model, data, batch_tokens=48)
    assert [tuple(h.shape[:2]) for h in inputs.hidden] == [(2, 24), (1, 24), (1, 16)]
    for index, path in enumerate(block_names(model)):
        inputs.advance(model.get_submodule(path), index)
    head = model.get_output_embeddings()
    for batch, x in zip(data.batches(48), tail_inputs(model, inputs, head), strict=True):
        torch.testing.assert_close(head(x), model(input_ids=batch).logits, atol=2e-5, rtol=2e-5)


@every_architecture
def test_the_walk_leaves_no_trace(name: str) -> None:
    model = ARCHITECTURES[name]()
    before = {key: (value.data_ptr(), value._version) for key, value in model.state_dict().items()}
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    state = torch.random.get_rng_state()
    inputs = first_inputs(model, rows(16))
    list(tail_inputs(model, inputs, model.get_output_embeddings()))
    assert {key: (value.data_ptr(), value._version) for key, value in model.state_dict().items()} == before
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failure_inside_the_walk_leaves_no_trace_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    monkeypatch.setattr(walking, "_split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first_inputs(model, rows(16))
    assert not any("forward" in vars(m) for m in model.modules())


def test_blocks_that_give_tuples_are_walked_as_well() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states + self.linear(hidden_states), None

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(9, 4), nn.ModuleList([Block(), Block(), Block()])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            del use_cache
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden_states=hidden)[0]
            return hidden

    class Config:
        num_hidden_layers = 3

        def get_text_config(self, decoder: bool) -> Any:
            del decoder
            return self

    decoder: Any = Decoder()
    decoder.config, decoder.base_model, decoder.get_input_embeddings = Config(), decoder, lambda: decoder.embed
    tokens = torch.tensor([1, 2, 3, 4, 5])
    inputs = first_inputs(decoder, Calibration((tokens, tokens)))
    assert inputs.tuples
    for index, path in enumerate(block_names(decoder)):
        inputs.advance(decoder.get_submodule(path), index)
    with torch.no_grad():
        torch.testing.assert_close(inputs.hidden[0], decoder(torch.stack([tokens, tokens]), use_cache=False))


def test_a_model_without_blocks_is_refused() -> None:
    model = ARCHITECTURES["llama"]()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"no list of 7 decoder blocks.*method: rtn"):
        block_names(model)


def test_sixteen_bit_models_are_walked_in_float32_where_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["qwen2"]().to(torch.bfloat16)
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert calibration_dtype(model) == dtype
        inputs = first_inputs(model, rows(16))
        block = model.get_submodule(block_names(model)[0])
        inputs.advance(block, 0)
        assert inputs.hidden[0].dtype == dtype
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        assert (inputs.seen_by(block) is block) == native


def test_a_float32_view_has_the_same_values_and_shares_what_is_float32() -> None:
    block: Any = nn.ModuleDict({"a": nn.Linear(4, 4, dtype=torch.bfloat16), "b": nn.Linear(4, 4)})
    wide: Any = in_float32(block)
    assert wide["a"].weight.dtype == torch.float32
    assert torch.equal(wide["a"].weight, block["a"].weight.float())
    assert wide["b"].weight is block["b"].weight
