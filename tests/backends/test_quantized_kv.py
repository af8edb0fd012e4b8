"""Attention over a rounded cache against a cache that really stores 8 bits, in every runner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.quantized_kv import register
from optimizer.backends.runner import EagerRunner
from optimizer.errors import UsageError
from optimizer.quant.kv import KvKind, dequantize_kv, quantize_kv
from tests.backends.decoder_models import llama, prompts

# Inductor, when it is first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

KINDS: tuple[KvKind, ...] = ("int8", "fp8")
both = pytest.mark.parametrize("kind", KINDS)


class StoredCache:
    """transformers' attention interface over entries that are quantized once, when they arrive, and kept so."""

    def __init__(self, kind: KvKind) -> None:
        self.kind = kind
        self.stored: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}

    def read(self, layer: int, name: str, states: Tensor) -> Tensor:
        entries = self.stored.setdefault((layer, name), [])
        known = sum(q.shape[2] for q, _ in entries)
        entries.append(quantize_kv(states[:, :, known:], self.kind))
        return torch.cat([dequantize_kv(q, scale, states.dtype) for q, scale in entries], dim=2)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        key, value = (self.read(module.layer_idx, n, t) for n, t in (("key", key), ("value", value)))
        return sdpa_attention_forward(module, query, key, value, mask, **options)


def logits_of(model: Any, attention: str, runner: type[Any], tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Logits of the prompt's last token and of ten given ones after it, `[11, B, V]`."""
    model.set_attn_implementation(attention)
    running = runner(model, **options)
    steps, _ = prompts(tokens.shape[0], 10, seed=7)
    first = running.prefill(tokens, mask)
    return torch.stack([first, *(running.decode(steps[:, i]) for i in range(10))])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_a_cache_that_stores_8_bits(kind: KvKind, dtype: torch.dtype) -> None:
    model, (tokens, mask) = llama(dtype=dtype).to(dtype), prompts(2, 9)
    AttentionInterface.register("stored", StoredCache(kind))
    AttentionMaskInterface.register("stored", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    expected = logits_of(model, "stored", EagerRunner, tokens, mask)
    got = logits_of(model, register(kind), EagerRunner, tokens, mask)
    # The same cache; attention of one token may be summed in another order, which bfloat16 then rounds elsewhere.
    tolerance = 1e-4 if dtype == torch.float32 else 2.0**-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@both
def test_it_costs_a_little_quality_and_not_none(kind: KvKind) -> None:
    model, (tokens, mask) = llama(), prompts(2, 9)
    exact = logits_of(model, "sdpa", EagerRunner, tokens, mask)
    rounded = logits_of(model, register(kind), EagerRunner, tokens, mask)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < {"int8": 0.05, "fp8": 0.2}[kind]


def test_int8_is_nearer_than_fp8() -> None:
    model, (tokens, mask) = llama(), prompts(2, 9)
    exact, int8, fp8 = (
        logits_of(model, name, EagerRunner, tokens, mask) for name in ("sdpa", register("int8"), register("fp8"))
    )
    assert float((int8 - exact).norm()) < float((fp8 - exact).norm())


@both
def test_a_static_cache_with_padding_gives_the_same(kind: KvKind) -> None:
    model, (tokens, mask) = llama(), prompts(3, 12, ragged=True)
    name = register(kind)
    expected = logits_of(model, name, EagerRunner, tokens, mask)
    got = logits_of(model, name, CompiledRunner, tokens, mask, compile=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def compiled_and_not(kind: KvKind) -> None:
    model, (tokens, mask) = llama(num_hidden_layers=1), prompts(1, 9)
    name = register(kind)
    expected = logits_of(model, name, CompiledRunner, tokens, mask, compile=False)
    got = logits_of(model, name, CompiledRunner, tokens, mask)
    torch.testing.assert_close(got[0], expected[0])
    # Rounding sees float32 values that were computed in another order: an element may fall to the other side.
    assert float((got - expected).norm() / expected.norm()) < {"int8": 0.01, "fp8": 0.05}[kind]


@both
def test_the_step_is_one_graph(kind: KvKind, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with = torch.compile

    def quickly(step: Any, *, backend: str, fullgraph: bool, dynamic: bool, options: Any) -> Any:
        assert backend == "inductor"
        return compile_with(step, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quickly)
    compiled_and_not(kind)


@pytest.mark.slow
@both
def test_the_step_compiles_with_inductor(kind: KvKind) -> None:
    compiled_and_not(kind)


def test_a_visible_nan_stays_visible() -> None:
    model, (tokens, mask) = llama(num_hidden_layers=1), prompts(1, 4)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("inf")
    assert logits_of(model, register("int8"), EagerRunner, tokens, mask).isnan().any()


def test_names_differ_by_kind_and_registering_again_changes_nothing() -> None:
    assert register("int8") == register("int8") == "optimizer-int8-kv"
    assert register("fp8") == "optimizer-fp8-kv"


def test_another_kind_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="Invalid KV cache kind 'int4'"):
        register("int4")  # type: ignore[arg-type]
