"""The exported graph: its interface, its logits beside PyTorch's, and what is refused before or while it is made."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from optimizer.backends.onnx_attention import Layers, Standard, rotary_tables
from optimizer.backends.onnx_export import MODEL_FILE, Exported, _step_of, export, float_copy, past_names
from optimizer.backends.onnx_runner import open_session
from optimizer.backends.runner import EagerRunner
from optimizer.errors import ModelError, UsageError
from optimizer.quant.formats import Format, Scheme
from tests.optimizer.quantized_models import fresh_llama, quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip

MAMBA = hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)


def made(kind: type[Any], config: type[Any], **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(**SIZES | options)).eval()


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


IN_OPERATOR, BEFORE = "GroupQueryAttention with rotary embedding", "GroupQueryAttention"
MODELS: dict[str, Callable[[], Any]] = {
    "mistral, a window of 5, untied": lambda: made(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=5),
}
SLOW = {
    "llama, tied": lambda: fresh_llama(dtype=torch.float32),
    "qwen3": lambda: made(hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=32),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4)).eval(),
    "qwen2, biases": lambda: made(hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "bfloat16": lambda: fresh_llama(dtype=torch.bfloat16),
    "phi3": lambda: made(hf.Phi3ForCausalLM, hf.Phi3Config, pad_token_id=0),
    "windows in some layers": lambda: made(
        hf.Qwen2ForCausalLM, hf.Qwen2Config, use_sliding_window=True, sliding_window=5,
        num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"],
    ),
    "phi3, half of a head rotated": lambda: made(
        hf.Phi3ForCausalLM, hf.Phi3Config, pad_token_id=0, hidden_size=256, **rope("default", partial_rotary_factor=0.5)
    ),
    "llama3 frequencies": lambda: made(
        hf.LlamaForCausalLM, hf.LlamaConfig, **rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "gemma2, capped scores": lambda: made(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, head_dim=16, num_hidden_layers=2, sliding_window=5,
        query_pre_attn_scalar=16, attn_logit_softcapping=2.0, initializer_range=0.3,
    ),
    "smollm3, a layer without rotation": lambda: made(
        hf.SmolLM3ForCausalLM, hf.SmolLM3Config, num_hidden_layers=2, no_rope_layers=[1, 0], pad_token_id=0
    ),
    "glm, neighbours rotated": lambda: made(hf.GlmForCausalLM, hf.GlmConfig, head_dim=16, pad_token_id=0),
    "llama, int4 and int8": lambda: quantize(
        fresh_llama(dtype=torch.float32),
        lambda name: None if name == "lm_head" else Scheme(Format(4 if "mlp" in name else 8, group_size=32)),
    ),
}  # fmt: skip


class Raw:
    """The graph through plain ONNX Runtime, with none of our runner: `session.run`, which copies the cache."""

    def __init__(self, folder: Path, model: Any, room: int) -> None:
        self.session = open_session(folder / MODEL_FILE)
        self.layers, self.room = model.config.num_hidden_layers, room
        _, self.heads, _, self.width = self.session.get_inputs()[3].shape

    def __call__(self, tokens: Tensor, mask: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        empty = torch.zeros(len(tokens), self.heads, self.room, self.width).numpy()
        past = past or [empty] * (2 * self.layers)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        feeds = {name: value.numpy() for name, value in given.items()}
        logits, *present = self.session.run(None, feeds | dict(zip(past_names(self.layers), past, strict=True)))
        return torch.from_numpy(logits), present


ROWS, PROMPT, ALL = 3, 6, 14
LEFT = torch.ones(ROWS, ALL, dtype=torch.long)
LEFT[1, :4] = 0


def expected_logits(model: Any, prompt: int = ALL) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, logits of PyTorch for the left-padded batch, and the bound: sums of a thousand terms in another order.

    The first `prompt` tokens are run at once and the others one by one: frequencies may depend on the length so far.
    """
    tokens = torch.randint(model.config.vocab_size, (ROWS, ALL), generator=torch.Generator().manual_seed(0))
    runner = EagerRunner(float_copy(model, torch.float32))
    parts = [runner.prefill(tokens[:, :prompt], LEFT[:, :prompt], all_logits=True)]
    parts += [runner.decode(tokens[:, step])[:, None] for step in range(prompt, ALL)]
    expected = torch.cat(parts, 1)
    return tokens, expected, 1e-5 * expected.abs().max()


def compare_shared(model: Any, folder: Path) -> Exported:
    """A ragged batch padded on the right, as the operator wants it; then step by step past any window.

    The mask is what onnxruntime-genai gives: that of the prompt, and a one for every later token.
    """
    tokens, expected, bound = expected_logits(model, PROMPT)
    exported = export(model, folder)
    assert exported.shared_buffer
    graph = Raw(folder, model, room=ALL + 3)
    shift = [int(row.argmax()) for row in LEFT]  # tokens of the row that are padding
    rolled = torch.stack([row.roll(-by) for row, by in zip(tokens, shift, strict=True)])
    mask = torch.stack([row.roll(-by) for row, by in zip(LEFT[:, :PROMPT], shift, strict=True)])
    logits, cache = graph(rolled[:, :PROMPT], mask)
    for row, by in enumerate(shift):
        assert (logits[row, : PROMPT - by] - expected[row, by:PROMPT]).abs().max() <= bound
    for step in range(PROMPT, ALL):
        mask = torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        assert (positions[1] == step - shift[1]).all()
        logits, cache = graph(tokens[:, step : step + 1], mask, cache)
        assert (logits[:, 0] - expected[:, step]).abs().max() <= bound
    assert cache[0].shape == (ROWS, graph.heads, ALL + 3, graph.width)
    return exported


def compare_growing(model: Any, folder: Path) -> None:
    """Standard operators: a batch padded on the left, in one go, in pieces, and step by step past any window."""
    tokens, expected, bound = expected_logits(model)
    assert not export(model, folder, dialect="tensorrt").shared_buffer
    graph = Raw(folder, model, room=0)
    real = LEFT.bool()
    whole, _ = graph(tokens, LEFT)
    assert (whole - expected)[real].abs().max() <= bound
    logits, cache = graph(tokens[:, :6], LEFT[:, :6])
    pieces = [logits]
    for start, end in ((6, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
        logits, cache = graph(tokens[:, start:end], LEFT[:, :end], cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= bound
    assert cache[0].shape == (ROWS, graph.heads, ALL, graph.width)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind = model.config._attn_implementation, model.config.dtype
    home = sys.modules[type(model).__module__]
    rotate = home.apply_rotary_pos_emb
    assert compare_shared(model, tmp_path).attention == IN_OPERATOR
    assert (model.config._attn_implementation, model.config.dtype) == kind
    assert home.apply_rotary_pos_emb is rotate
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_logits_of_more_architectures(name: str, tmp_path: Path) -> None:
    compare_shared(SLOW[name](), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "qwen3", "gpt2", "windows in some layers", "gemma2, capped scores"])
def test_logits_in_standard_operators(name: str, tmp_path: Path) -> None:
    compare_growing({**MODELS, **SLOW}[name](), tmp_path)


def test_the_attention_repeats_no_keys() -> None:
    """Against PyTorch's own, on heads in groups and a mask with a row that sees nothing."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((6, 3), (2, 7), (2, 7))
    )
    seen = torch.rand(2, 1, 3, 7, generator=generator) > 0.3
    seen[0, 0, 1] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    found, _ = Standard(Layers(fresh_llama().config)).attend(nn.Identity(), query, key, value, added)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, added, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def longrope() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 8}
    return made(
        hf.Phi3ForCausalLM, hf.Phi3Config, pad_token_id=0, original_max_position_embeddings=8,
        **rope("longrope", **factors),
    )  # fmt: skip


ATTENTIONS = {
    "frequencies of the text's length": (longrope, BEFORE, ""),
    "a norm after the rotation": (
        lambda: made(hf.HunYuanDenseV1ForCausalLM, hf.HunYuanDenseV1Config, head_dim=16), BEFORE,
        "HunYuanDenseV1Attention does something between its rotary embedding and its attention",
    ),
    "neighbours rotated": (SLOW["glm, neighbours rotated"], BEFORE, ""),
    "heads that are too odd": (
        lambda: made(hf.LlamaForCausalLM, hf.LlamaConfig, head_dim=12), Standard.operator,
        "heads of 12 features are no multiple of 8",
    ),
}  # fmt: skip


QUICK = {"a norm after the rotation", "heads that are too odd"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTIONS]
)
def test_attention_that_the_operator_cannot_say_is_said_otherwise_and_why(name: str) -> None:
    make, operator, why = ATTENTIONS[name]
    model = make()
    step, _, reason = _step_of(float_copy(model, torch.float32), torch.float32, "onnxruntime")
    assert (step.attention.operator, reason) == (operator, why)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frequencies of the text's length", "a norm after the rotation"])
def test_logits_with_the_rotation_before_the_operator(name: str, tmp_path: Path) -> None:
    """longrope changes its frequencies at 8 tokens, while the text grows from 6 to 14."""
    assert compare_shared(ATTENTIONS[name][0](), tmp_path).attention == BEFORE


def test_tables_of_rotation_are_only_those_that_the_model_uses() -> None:
    llama = fresh_llama(dtype=torch.float32, layers=1)
    tables = rotary_tables(llama, torch.float32)
    assert tables is not None
    angle = torch.arange(256)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(tables, (angle.cos(), angle.sin()), rtol=0, atol=2e-5)
    gpt2 = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    assert rotary_tables(gpt2, torch.float32) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: made(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=2), "routes tokens to experts"),
        (lambda: hf.MambaForCausalLM(MAMBA), "mamba keeps LinearAttentionLayer between tokens"),
    ],
    ids=["mixtral", "mamba"],
)
def test_architectures_that_are_not_exported(model: Callable[[], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        export(model(), tmp_path)
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """A norm with an operator that ONNX has no translation for."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.special.bessel_j0(x)


def test_an_operator_without_translation_is_named_with_its_module_and_line(tmp_path: Path) -> None:
    model = fresh_llama(dtype=torch.float32, layers=1)
    model.model.norm = Odd()
    with pytest.raises(ModelError, match=r"bessel_j0.*of model\.model\.norm.*test_onnx_export\.py.*line \d+"):
        export(model, tmp_path)


def test_a_forward_that_cannot_be_traced_is_a_typed_error(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    model = fresh_llama(dtype=torch.float32, layers=1)
    model.model.norm = Branches()
    with pytest.raises(ModelError, match="cannot be traced for ONNX"):
        export(model, tmp_path)


def test_a_model_in_another_type_is_written_from_its_own_weights(tmp_path: Path) -> None:
    """Large weights, tied or not, taken as they are (embedding) and transposed (head, square projections)."""
    model = made(
        hf.LlamaForCausalLM, hf.LlamaConfig, vocab_size=1024, hidden_size=1024, num_attention_heads=16,
        num_key_value_heads=2,
    ).to(torch.bfloat16)  # fmt: skip
    export(model, tmp_path, dtype=torch.float16)
    graph = onnx.load(str(tmp_path / MODEL_FILE)).graph
    written = [onnx.numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 2]
    layer = model.model.layers[0].self_attn
    for weight, transposed in ((model.model.embed_tokens, False), (model.lm_head, True), (layer.q_proj, True)):
        expected = weight.weight.detach().half()
        expected = (expected.t() if transposed else expected).numpy()
        assert sum(found.shape == expected.shape and bool((found == expected).all()) for found in written) == 1


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx and onnxscript; install them with: pip install"):
        export(fresh_llama(), tmp_path)
