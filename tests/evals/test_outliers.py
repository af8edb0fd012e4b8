"""Planted outliers are large, and change no logit: what is measured on the planted model is known exactly."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from optimizer.errors import ModelError, UsageError
from optimizer.evals.outliers import plant_outliers
from tests.backends.decoder_models import llama, mistral, prompts, qwen2

TOKENS = prompts(2, 12)[0]
REFERENCE = Path(__file__).resolve().parents[2] / "evals" / "reference"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def inputs(model: Any) -> dict[str, Tensor]:
    """What every linear of the blocks is given, `[T, K]`."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def phi3() -> Any:
    sizes = llama().config
    config = transformers.Phi3Config(
        vocab_size=sizes.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, mistral, qwen2, phi3])
def test_every_logit_is_the_same_bit_for_bit(build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    hidden = 0 if build is phi3 else 3
    planted, what = plant_outliers(model, channels=3, scale=256, hidden=hidden)
    assert torch.equal(logits(planted), logits(model))
    assert len(what.sites) == (4 if build is phi3 else 6)


def test_the_activations_of_the_channels_grow_by_the_scale_and_no_other_does() -> None:
    model = llama()
    planted, what = plant_outliers(model, channels=3, scale=64, hidden=2)
    before, after = inputs(model), inputs(planted)
    for name, x in after.items():
        kind = name.rpartition(".")[2]
        channels = what.hidden if kind == "down_proj" else () if kind == "o_proj" else what.channels
        factor = torch.ones(x.shape[1])
        factor[list(channels)] = 64
        assert torch.equal(x, before[name] * factor)
        if channels:
            peaks = [float((y.abs().amax() / y.abs().median()).item()) for y in (before[name], x)]
            assert peaks[1] > 5 * peaks[0]


def test_the_model_given_is_left_alone_and_only_what_changes_is_copied() -> None:
    model = llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    planted, _ = plant_outliers(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert planted.lm_head.weight is planted.model.embed_tokens.weight is model.lm_head.weight
    changed = {n.rpartition(".")[0].rpartition(".")[2] for n, t in planted.state_dict().items() if t is not before[n]}
    same = {name for name, tensor in planted.named_parameters() if tensor is model.get_parameter(name)}
    assert {name.split(".")[-2] for name in same} == {"embed_tokens", "o_proj", "down_proj", "norm"}
    assert {"q_proj", "input_layernorm"} <= changed


def test_channels_follow_the_seed_and_are_the_same_in_every_layer() -> None:
    model = llama()
    planted, what = plant_outliers(model, channels=5, scale=4, seed=9)
    assert plant_outliers(model, channels=5, scale=4, seed=9)[1] == what
    assert plant_outliers(model, channels=5, scale=4, seed=10)[1].channels != what.channels
    for name, module in planted.named_modules():
        if name.endswith("layernorm"):
            ratio = module.weight / model.get_submodule(name).weight
            assert tuple((ratio == 4).nonzero().flatten().tolist()) == what.channels
            assert int((ratio == 1).sum()) == 64 - 5
    assert what.describe() == f"channels {list(what.channels)} times 4 at 4 places"
    more = plant_outliers(model, channels=1, scale=4, hidden=1)[1]
    assert more.describe().startswith(
        f"channels {list(more.channels)} and hidden channels {list(more.hidden)} of every"
    )


def quantized(x: Tensor) -> Tensor:
    """To INT8 with one scale for each row, and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return (x / scale).round() * scale


def loss(model: Any, tokens: Tensor, *, weights: bool, activations: bool) -> float:
    """Mean loss a token with the linears of the blocks in naive INT8."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            if weights:
                module.weight = nn.Parameter(quantized(module.weight.detach()))
            if activations:
                module.register_forward_pre_hook(lambda _, args: (quantized(args[0]),))
    with torch.no_grad():
        return float(model(tokens, labels=tokens, use_cache=False).loss)


def test_naive_int8_fails_on_the_reference_model_because_of_its_activations() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE / "model")
    lines = (REFERENCE / "held_out" / "perplexity.jsonl").read_text("utf-8").splitlines()
    ids = [token for line in lines[:12] for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    tokens = torch.tensor(ids[:1024]).view(2, 512)
    planted, _ = plant_outliers(model)
    exact = loss(planted, tokens, weights=False, activations=False)
    assert exact == loss(model, tokens, weights=False, activations=False)
    plain = math.expm1(loss(model, tokens, weights=True, activations=True) - exact)
    weights = math.expm1(loss(planted, tokens, weights=True, activations=False) - exact)
    both = math.expm1(loss(planted, tokens, weights=True, activations=True) - exact)
    assert both > 0.1  # of the perplexity: five times what a W8A8 scheme may lose
    assert plain < both / 10
    assert weights < both / 10


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, 100.0, float("inf"), float("nan")])
def test_a_scale_that_would_round_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="no power of two"):
        plant_outliers(llama(), scale=scale)


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channels": 65}, {"channels": -1}, {"hidden": 129}, {"hidden": -1}]
)
def test_more_channels_than_there_are_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be planted"):
        plant_outliers(llama(), **options)


def test_a_type_in_which_it_does_not_cancel_is_refused() -> None:
    # float16 ends at 2^-24 below and 65504 above.
    for scale in (2.0**14, 2.0**20):
        with pytest.raises(ModelError, match=r"not exact in torch\.float16"):
            plant_outliers(llama().half(), scale=scale)


def test_models_of_another_kind_are_refused() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    gemma = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**sizes, num_key_value_heads=2, head_dim=16, intermediate_size=64)
    )
    with pytest.raises(ModelError, match=r"model\.layers\.0\.input_layernorm \(GemmaRMSNorm\) must multiply by its"):
        plant_outliers(gemma)
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=64))
    with pytest.raises(ModelError, match=r"input_layernorm \(LayerNorm\)"):
        plant_outliers(neox)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=32))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no block with input_layernorm"):
        plant_outliers(gpt2)
    with pytest.raises(ModelError, match="Use hidden=0"):
        plant_outliers(phi3(), hidden=1)
