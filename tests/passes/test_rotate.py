"""Rotations change what flows through a model and not what it says; where that cannot be so, they are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.checkpoint import load_checkpoint, save_checkpoint
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.evals.outliers import plant_outliers
from optimizer.passes import rotate
from optimizer.passes.base import Context, PassReport, Skip, transaction, view
from optimizer.passes.linearize import linearize
from optimizer.passes.rotate import Rotate, difference
from optimizer.quant.formats import Format
from optimizer.quant.hadamard import Rotation, rotation
from optimizer.quant.rtn import quantize_rtn

WIDTH, HEAD = 48, 12  # neither is a power of two
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": HEAD}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 20}),  # heads wider than H / 4
    "phi3": ("Phi3", {}),
    "gemma tied": ("Gemma", {"head_dim": HEAD, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": HEAD, **EXPERTS}),
    "qwen2-moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 40, **EXPERTS}),
}
TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def build(kind: str, changes: dict[str, Any], name: str = "ForCausalLM") -> Any:
    """A tiny random model whose biases and norm weights are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
        model = getattr(transformers, f"{kind}{name}")(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) / 2 + (1 if "norm" in key else 0))
                else:
                    parameter.normal_(0, 0.12)
    return model


def tiny(name: str) -> Any:
    return build(*MODELS[name])


def run(model: Any, **options: Any) -> PassReport:
    step = Rotate(**options)
    step.check(model, Context())
    with transaction(model):
        return step.run(model, Context())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def inputs(model: nn.Module, ending: str) -> dict[str, Tensor]:
    """What every module whose name has this ending is given, `[T, K]`."""
    seen: dict[str, Tensor] = {}
    hooked = view(model)
    for name, module in hooked.named_modules():
        if name.endswith(ending):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].detach().flatten(0, -2))
            )
    logits(hooked)
    assert seen
    return seen


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"heads": False}, {"seed": 7}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_stay(name: str, options: dict[str, Any]) -> None:
    model = tiny(name)
    before = logits(model)
    report = run(model, **options)
    assert difference(before, logits(model)) < 3e-6  # float32 through two layers
    assert report.matched == report.expected == 2


@pytest.mark.parametrize("name", MODELS)
def test_stream_and_values_are_really_rotated(name: str) -> None:
    model, plain = tiny(name), tiny(name)
    run(model, seed=3)
    q = rotation(WIDTH, seed=3).matrix().float()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        turned, straight = inputs(model, norm), inputs(plain, norm)
        for key, x in straight.items():
            torch.testing.assert_close(turned[key], x @ q, atol=3e-5, rtol=1e-4)
        gains = {float(m.weight.detach().min()) for n, m in model.named_modules() if n.endswith(norm)}
        assert gains == ({0.0} if name.startswith("gemma") else {1.0})
    width = getattr(model.config, "head_dim", None) or HEAD
    r = rotation(width, seed=3).matrix().float()
    turned, straight = inputs(model, "o_proj"), inputs(plain, "o_proj")
    for key, x in straight.items():
        torch.testing.assert_close(turned[key], (x.unflatten(-1, (-1, width)) @ r).flatten(-2), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "phi3", "gemma tied", "mixtral"])
def test_the_callers_model_is_left_as_it_was(name: str) -> None:
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    places, config, ties = dict(model.named_modules()), model.config.to_dict(), dict(model.all_tied_weights_keys)
    state = torch.random.get_rng_state()
    run(view(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == places
    assert model.config.to_dict() == config
    assert model.all_tied_weights_keys == ties
    tied = name.endswith("tied")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_tied_head_is_untied_and_the_report_says_what_that_costs() -> None:
    model = tiny("llama tied")
    report = run(model)
    cost = 96 * WIDTH * 4
    assert f"lm_head is no longer tied to the embedding, for the last norm's weight is folded into it: {cost}" in (
        " ".join(report.notes)
    )
    assert report.bytes_after - report.bytes_before == cost
    assert model.config.tie_word_embeddings is False
    assert model.all_tied_weights_keys == {}
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not any("tied" in note for note in run(tiny("llama")).notes)
    assert not any("tied" in note for note in run(tiny("llama tied"), residual=False).notes)


def test_a_tied_head_stays_tied_where_the_last_norm_has_no_weight() -> None:
    model = tiny("llama tied")
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
    before = logits(model)
    report = run(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert report.bytes_after == report.bytes_before
    assert difference(before, logits(model)) < 3e-6


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_a_rotated_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    run(model)
    save_checkpoint(model, None, tmp_path)
    assert torch.equal(logits(load_checkpoint(tmp_path, torch.device("cpu"))), logits(model))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_rounded_once_to_the_models_type(dtype: torch.dtype) -> None:
    model, exact = tiny("llama with biases").to(dtype), tiny("llama with biases").to(dtype).double()
    run(model)
    run(exact)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact.state_dict()[key].to(dtype)), key


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_taken_apart_are_rotated_alike(name: str) -> None:
    fused, apart = tiny(name), tiny(name)
    assert linearize(apart)
    run(fused)
    run(apart)
    assert linearize(fused)
    assert {key: tensor.tolist() for key, tensor in fused.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in apart.state_dict().items()
    }


def test_block_by_block_is_the_same_as_the_pass() -> None:
    model, walked = tiny("qwen2"), tiny("qwen2")
    run(model, seed=5)
    stream = rotation(WIDTH, seed=5)
    with torch.no_grad():
        for name, block in rotate.decoder_blocks(walked).items():
            rotate.check_block_residual(name, block, WIDTH)
            rotate.check_block_heads(name, block)
            rotate.rotate_block(block, stream, rotate.head_rotation(block, 5))
        walked.set_input_embeddings(rotate.rotate_embedding(walked.model.embed_tokens, stream))
        walked.lm_head, walked.model.norm = rotate.rotate_head(walked.lm_head, walked.model.norm, stream)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, walked.state_dict()[key]), key


def test_large_weights_are_rotated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, turn = torch.randn(20, WIDTH, generator=generator), rotation(WIDTH, seed=0)
    gain = torch.randn(WIDTH, dtype=torch.float64, generator=generator)
    whole = rotate.turned(weight, gain, turn, None), rotate.turned(weight.mT, None, None, turn)
    q = turn.matrix()
    torch.testing.assert_close(whole[0], (weight.double() * gain @ q).float())
    torch.testing.assert_close(whole[1], (q.T @ weight.mT.double()).float())
    monkeypatch.setattr(rotate, "_PART", 100)
    assert torch.equal(rotate.turned(weight, gain, turn, None), whole[0])
    assert torch.equal(rotate.turned(weight.mT, None, None, turn), whole[1])


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("GPT2", {"n_embd": 48, "n_head": 4, "n_layer": 1}, "LMHeadModel", r"transformer\.h\.0\.ln_1 \(LayerNorm\)"),
    ("OPT", {"word_embed_proj_dim": 48, "ffn_dim": 64}, "ForCausalLM", r"layer_norm \(LayerNorm\) subtracts a mean"),
    ("Falcon", {}, "ForCausalLM", r"transformer\.h\.0\.\w+ \(LayerNorm\) subtracts a mean"),
    ("GPTNeoX", {}, "ForCausalLM", r"gpt_neox\.layers\.0\.\w+ \(LayerNorm\) subtracts a mean"),
    ("Cohere", {}, "ForCausalLM", r"input_layernorm \(CohereLayerNorm\) does not compute x / rms\(x\)"),
    ("Gemma2", {"head_dim": HEAD}, "ForCausalLM", r"layers\.0\.pre_feedforward_layernorm\.weight .* no known place"),
    ("Olmo2", {}, "ForCausalLM", r"model\.layers\.0 has no input_layernorm"),
    ("Olmo", {}, "ForCausalLM", r"input_layernorm \(OlmoLayerNorm\) is no norm with one weight"),
]


@pytest.mark.parametrize(("kind", "changes", "head", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_models_with_another_stream_are_refused_before_work(
    kind: str, changes: dict[str, Any], head: str, message: str
) -> None:
    model = build(kind, changes, head)
    with pytest.raises(ModelError, match=message + r".*residual: false|" + message + ".*Leave rotate out"):
        Rotate().check(model, Context())
    report = Rotate(required=False).run(model, Context())
    assert report.matched == 0
    assert [type(skip) for skip in report.skipped] == [Skip]
    assert "leave rotate out" in report.skipped[0].reason


@pytest.mark.parametrize(("kind", "changes"), [("Gemma2", {"head_dim": HEAD}), ("Olmo2", {}), ("Cohere", {})])
def test_heads_alone_can_be_rotated_there(kind: str, changes: dict[str, Any]) -> None:
    model = build(kind, changes)
    before, values = logits(model), inputs(model, "o_proj")
    run(model, residual=False)
    assert difference(before, logits(model)) < 3e-6
    assert all(not torch.allclose(x, values[key], atol=1e-2) for key, x in inputs(model, "o_proj").items())


@pytest.mark.parametrize(
    ("kind", "changes", "head", "message"),
    [
        ("GPT2", {"n_embd": 48, "n_head": 4, "n_layer": 1}, "LMHeadModel", "no decoder block with a self_attn"),
        ("OPT", {"word_embed_proj_dim": 48, "ffn_dim": 64}, "ForCausalLM", r"self_attn\.out_proj.*heads: false"),
    ],
)
def test_heads_of_an_unknown_kind_are_refused(kind: str, changes: dict[str, Any], head: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Rotate(residual=False).check(build(kind, changes, head), Context())


def test_something_unknown_between_values_and_output_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.sub_norm = nn.RMSNorm(WIDTH)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.sub_norm\.weight \[48\] may act between"):
        Rotate(residual=False).check(model, Context())
    with pytest.raises(ModelError, match=r"sub_norm\.weight \[48\] has no known place"):
        Rotate(heads=False).check(model, Context())


def test_values_that_are_gated_are_refused() -> None:
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)  # queries and a gate
    with pytest.raises(ModelError, match="are not whole heads of 12"):
        Rotate().check(model, Context())


def test_a_second_norm_before_the_head_is_refused() -> None:
    model = tiny("llama")
    model.model.extra = nn.RMSNorm(WIDTH)
    with pytest.raises(ModelError, match=r"one norm should stand .* not model\.norm, model\.extra"):
        Rotate().check(model, Context())


def test_quantized_layers_come_after() -> None:
    model = tiny("llama")
    q_proj = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = QuantizedLinear(quantize_rtn(q_proj.weight, Format(8, True, -1)))
    for options in ({}, {"residual": False}):
        with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.data .*(no known place|may act between)"):
            Rotate(**options).check(model, Context())


def test_an_empty_rotation_is_refused() -> None:
    with pytest.raises(RecipeError, match="rotates nothing"):
        Rotate(residual=False, heads=False)


def skewed(turn: Rotation, x: Tensor) -> Tensor:
    """Not orthogonal: one channel is a percent too large."""
    y = x.clone()
    y[..., 0] *= 1.01
    return EXACT(turn, y)


EXACT = Rotation.apply


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"heads": False}], ids=str)
@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_a_wrong_rotation_is_caught_and_undone(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    before, places = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    monkeypatch.setattr(Rotation, "apply", skewed)
    with pytest.raises(PassError, match=r"rotate changed the logits of .* by .*residual: false or heads: false"):
        run(model, **options)
    assert dict(model.named_modules()) == places
    assert model.config.tie_word_embeddings is name.endswith("tied")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_weight_that_is_forgotten_is_caught(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to(dtype)
    monkeypatch.setattr(rotate, "_gain", lambda norm: torch.ones(WIDTH, dtype=torch.float64))
    with pytest.raises(PassError, match="changed the logits"):
        run(model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe"])
def test_rounding_is_not_taken_for_a_mistake_in_a_deep_narrow_model(name: str) -> None:
    kind, changes = MODELS[name]
    for dtype in (torch.bfloat16, torch.float16):
        assert run(build(kind, changes | {"num_hidden_layers": 12}).to(dtype)).matched == 12


def test_a_model_that_is_not_finite_is_named_as_such() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        run(model)


def peak(x: Tensor) -> float:
    """Largest activation over the median one."""
    return float(x.abs().max() / x.abs().median())


def kurtosis(x: Tensor) -> float:
    """The fourth moment over the square of the second: 3 for a normal distribution."""
    return float(x.pow(4).mean() / x.square().mean() ** 2)


def test_an_outlier_of_the_stream_is_spread() -> None:
    # Channel 5 of the stream is far above the rest from the embedding on, as in large models.
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 20
    before = inputs(model, "layernorm")
    run(model)
    after = inputs(model, "layernorm")
    assert len(after) == 4
    for key, x in after.items():
        assert peak(x) < peak(before[key]) / 4
        assert kurtosis(x) < 4 < 10 < kurtosis(before[key])


def test_planted_outliers_are_gone() -> None:
    # These come from the weights of norms, which are folded into the linears before anything is rotated.
    plain = tiny("llama")
    model, _ = plant_outliers(plain, channels=2, scale=128)
    before = inputs(model, "q_proj") | inputs(model, "up_proj")
    run(model)
    after = inputs(model, "q_proj") | inputs(model, "up_proj")
    assert difference(logits(plain), logits(model)) < 3e-6
    for key, x in after.items():
        assert peak(x) < 10 < 50 < peak(before[key])
        assert kurtosis(x) < 5 < 10 < kurtosis(before[key])
