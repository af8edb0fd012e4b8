"""The exported graph: its interface, its logits beside PyTorch's, and what is refused before or while it is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from optimizer.backends import onnx_export
from optimizer.backends.onnx_export import MODEL_FILE, export, float_copy, past_names
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
    "llama, int4 and int8": lambda: quantize(
        fresh_llama(dtype=torch.float32),
        lambda name: None if name == "lm_head" else Scheme(Format(4 if "mlp" in name else 8, group_size=32)),
    ),
}  # fmt: skip


class Raw:
    """The graph through plain ONNX Runtime, with none of our runner."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.session = open_session(folder / MODEL_FILE)
        shape = self.session.get_inputs()[3].shape
        self.layers, self.heads, self.width = model.config.num_hidden_layers, shape[1], shape[3]

    def __call__(self, tokens: Tensor, mask: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        empty = torch.zeros(len(tokens), self.heads, 0, self.width).numpy()
        past = past or [empty] * (2 * self.layers)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        feeds = {name: value.numpy() for name, value in given.items()}
        logits, *present = self.session.run(None, feeds | dict(zip(past_names(self.layers), past, strict=True)))
        return torch.from_numpy(logits), present


def compare(model: Any, folder: Path) -> None:
    """Logits of every real token of a padded batch, in one go, in pieces, and step by step past any window."""
    export(model, folder)
    graph, vocab = Raw(folder, model), model.config.vocab_size
    tokens = torch.randint(vocab, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    expected = EagerRunner(float_copy(model, torch.float32)).prefill(tokens, mask, all_logits=True)
    bound = 1e-5 * float(expected.abs().max())
    whole, _ = graph(tokens, mask)
    real = mask.bool()
    assert (whole - expected)[real].abs().max() <= bound
    logits, cache = graph(tokens[:, :6], mask[:, :6])
    pieces = [logits]
    for start, end in ((6, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
        logits, cache = graph(tokens[:, start:end], mask[:, :end], cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= bound
    assert cache[0].shape == (3, graph.heads, 14, graph.width)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind = model.config._attn_implementation, model.config.dtype
    compare(model, tmp_path)
    assert (model.config._attn_implementation, model.config.dtype) == kind
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_logits_of_more_architectures(name: str, tmp_path: Path) -> None:
    compare(SLOW[name](), tmp_path)


def test_the_attention_repeats_no_keys() -> None:
    """Against PyTorch's own, on heads in groups and a mask with a row that sees nothing."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((6, 3), (2, 7), (2, 7))
    )
    seen = torch.rand(2, 1, 3, 7, generator=generator) > 0.3
    seen[0, 0, 1] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    found, _ = onnx_export._attention(nn.Identity(), query, key, value, added)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, added, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


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


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx and onnxscript; install them with: pip install"):
        export(fresh_llama(), tmp_path)
