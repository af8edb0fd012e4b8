"""transformers' own `generate` over a `BlockCache`: the same tokens as with its own cache, in the memory asked for."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from optimizer.backends import paged_cache, quantized_kv
from optimizer.backends.generate_cache import NAME, ROLLBACK, BlockCache, block_attention, block_cache
from optimizer.errors import ModelError, UsageError
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind
from tests.backends.decoder_models import llama, mistral, prompts
from tests.passes.small_architectures import ARCHITECTURES, LLAMA_LIKE, OF_ITS_OWN, build

WINDOW = 12
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3": ARCHITECTURES["qwen3"],
    "gemma3": lambda: build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, LLAMA_LIKE | OF_ITS_OWN | HYBRID),
    "gemma2": lambda: build(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, LLAMA_LIKE | OF_ITS_OWN | HYBRID | {"attn_logit_softcapping": 2.0}
    ),
    "mistral": lambda: mistral(window=WINDOW),
    "gpt2": ARCHITECTURES["gpt2"],
    "mixtral": ARCHITECTURES["mixtral"],
}


def made(model: Any, batch: int = 3, max_tokens: int = 256, **options: Any) -> BlockCache:
    """Small blocks, so that every row has several."""
    return block_cache(model, batch, max_tokens, **{"block_size": 8} | options)


def generate(model: Any, tokens: Tensor, mask: Tensor | None = None, new: int = 40, **options: Any) -> Any:
    chosen = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new, **chosen)


def through(model: Any, cache: BlockCache, *args: Any, **options: Any) -> Any:
    with block_attention(model):
        return generate(model, *args, past_key_values=cache, **options)


def run(model: Any, cache: BlockCache | None, *parts: Tensor, **options: Any) -> Tensor:
    """Logits `[B, S, V]` of tokens given part by part, by a loop of the user's own."""
    with torch.no_grad():
        if cache is None:
            return model(input_ids=torch.cat(parts, 1), use_cache=False, **options).logits
        with block_attention(model):
            return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], 1)


def stored(cache: BlockCache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.storage.layers for tensor in layer.tensors]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_with_transformers_own_cache(name: str) -> None:
    # 114 tokens: a window of 12 goes round its ring of 80.
    model = MODELS[name]()
    tokens, mask = prompts(3, 24)
    mask[1, :5], mask[2, :11] = 0, 0
    cache = made(model)
    assert isinstance(cache, hf.Cache)
    ragged, single = generate(model, tokens, mask, 90), generate(model, tokens[:1], new=90)
    assert torch.equal(through(model, cache, tokens, mask, 90), ragged)
    assert cache.get_seq_length() == 24 + 89
    cache.reset()
    assert torch.equal(through(model, cache, tokens[:1], new=90), single)


def test_draws_with_the_same_seed_are_the_same() -> None:
    model = llama()
    tokens, mask = prompts(3, 20, ragged=True)
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 40}
    torch.manual_seed(5)
    expected = generate(model, tokens, mask, **sampling)
    torch.manual_seed(5)
    assert torch.equal(through(model, made(model), tokens, mask, **sampling), expected)
    assert not torch.equal(generate(model, tokens, mask, **sampling), expected)


def test_several_returned_sequences_are_rows_of_their_own() -> None:
    model = llama()
    tokens, mask = prompts(2, 20, ragged=True)
    sampling = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = generate(model, tokens, mask, **sampling)
    torch.manual_seed(5)
    assert torch.equal(through(model, made(model, 6), tokens, mask, **sampling), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beam_search_finds_the_same_beams(name: str) -> None:
    model = MODELS[name]()
    tokens, mask = prompts(2, 20, ragged=True)
    expected = generate(model, tokens, mask, 80, num_beams=3)
    assert not torch.equal(expected, generate(model, tokens, mask, 80))
    assert torch.equal(through(model, made(model, 6), tokens, mask, 80, num_beams=3), expected)
    with pytest.raises(UsageError, match=r"6 rows exceed batch=5.*beam"):
        through(model, made(model, 5), tokens, mask, num_beams=3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rejected_drafts_are_taken_back(name: str) -> None:
    model = MODELS[name]()
    tokens = prompts(1, 10)[0].repeat(1, 4)  # something to look up
    expected = generate(model, tokens, new=120)
    cache = made(model, 1)
    assert torch.equal(through(model, cache, tokens, new=120, prompt_lookup_num_tokens=9), expected)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("parts", [(20,) + (1,) * 30, (3, 30, 17)])
def test_an_8_bit_cache_computes_what_the_simulation_of_one_says(kind: KvKind, parts: tuple[int, ...]) -> None:
    # As for the paged runner: float32 sums in another order move logits of up to 40 by 1e-3 at most.
    model = llama()
    tokens = prompts(2, 50)[0]
    simulated = view(model)
    simulated.config._attn_implementation = quantized_kv.register(kind)
    expected = run(simulated, None, tokens)
    found = run(model, made(model, kv=kind), *tokens.split(parts, 1))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (expected - run(model, None, tokens)).abs().max() > 1e-2  # rounding shows


@pytest.mark.parametrize("parts", [(100,), (1,) * 100, (16,) * 6 + (4,), (3, 40, 1, 1, 55), (40, 100)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_parts_of_any_size_give_the_logits_of_the_whole(name: str, parts: tuple[int, ...]) -> None:
    model = MODELS[name]()
    tokens = prompts(2, sum(parts))[0]
    found = run(model, made(model), *tokens.split(parts, 1))
    torch.testing.assert_close(found, run(model, None, tokens), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("parts", [(100,), (1,) * 100, (40, 60)])
def test_a_window_with_sinks_sees_exactly_those_tokens(parts: tuple[int, ...]) -> None:
    model, window, sinks = llama(), 16, 4
    tokens = prompts(2, 100)[0]
    place = torch.arange(100)
    seen = (place <= place[:, None]) & ((place > place[:, None] - window) | (place < sinks))
    expected = run(model, None, tokens, attention_mask=seen.expand(2, 1, -1, -1))
    cache = made(model, window=window, sinks=sinks)
    torch.testing.assert_close(run(model, cache, *tokens.split(parts, 1)), expected, atol=1e-3, rtol=1e-4)
    # A block of 8 with the sinks and 10 for 16 + 64 tokens, for 2 rows, whatever they grow to.
    assert cache.bytes <= 3 * 11 * 8 * cache.layout.bytes_per_token()


def test_a_prompt_in_chunks_of_generate_starts_rows_where_their_padding_ends() -> None:
    model = llama()
    tokens, mask = prompts(3, 40)
    mask[:, :11], mask[1, :13], mask[2, :27] = 0, 0, 0  # nothing in the first chunk; the last row begins in the third
    assert torch.equal(through(model, made(model), tokens, mask, prefill_chunk_size=10), generate(model, tokens, mask))


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    model = llama()
    tokens, mask = prompts(3, 20, ragged=True)
    cache, own = made(model), hf.DynamicCache(config=model.config)
    end = int(generate(model, tokens, mask)[1, 25])  # so that a row is done early, and filled up with padding
    for turn in range(3):
        expected = generate(model, tokens, mask, 20, past_key_values=own, eos_token_id=end)
        assert torch.equal(through(model, cache, tokens, mask, 20, eos_token_id=end), expected)
        tokens = torch.cat([expected, prompts(3, 5 + 20 * turn, seed=turn + 1)[0]], 1)
        mask = torch.cat([mask, torch.ones(3, tokens.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        mask[1, 26:30] = 0  # the user hides the filling, which is in the cache


def test_padding_on_the_right_is_hidden() -> None:
    model = llama()
    tokens, mask = prompts(2, 12)
    mask[1, 9:] = 0
    assert torch.equal(through(model, made(model), tokens, mask), generate(model, tokens, mask))


def test_a_prefix_is_run_once_and_copied() -> None:
    model = llama()
    cache = made(model, 1)
    prefix = prompts(1, 30)[0]
    run(model, cache, prefix)
    for seed in (1, 2):
        tokens = torch.cat([prefix, prompts(1, 9, seed=seed)[0]], 1)
        assert torch.equal(through(model, copy.deepcopy(cache), tokens), generate(model, tokens))


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been() -> None:
    for name in ("llama", "mistral"):
        model = MODELS[name]()
        tokens, other = prompts(1, 130)[0], prompts(1, 50, seed=1)[0]
        cache = made(model)
        run(model, cache, tokens[:, :100])
        run(model, cache, tokens[:, 100:])
        cache.crop(-50)
        assert cache.get_seq_length() == 80
        found = run(model, cache, other)
        expected = run(model, None, tokens[:, :80], other)[:, 80:]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(UsageError, match=f"window of {WINDOW}. Crop at most {ROLLBACK}"):
        cache.crop(-100)
    with pytest.raises(UsageError, match="negative"):
        cache.crop(7)
    cache.crop(-130)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", [None, "int8"])
def test_rows_are_repeated_and_chosen(kind: KvKind | None) -> None:
    model = llama()
    tokens, more = prompts(3, 30)[0], prompts(4, 20, seed=1)[0]
    cache = made(model, 6, kv=kind)
    run(model, cache, tokens)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5, 5, 2]))
    again = made(model, 4, kv=kind)
    run(model, again, tokens[[0, 2, 2, 1]])
    assert torch.equal(run(model, cache, more), run(model, again, more))


def test_memory_is_what_the_tokens_take_and_grows_with_them() -> None:
    # A token: 2 layers, keys and values, 2 heads of 16 elements, in 2 bytes or in 1 and 4 for a scale.
    model = llama().bfloat16()
    tokens = prompts(2, 64)[0]
    exact, rounded = made(model, 4), made(model, 4, kv="int8")
    for cache, per_token in ((exact, 2 * 2 * 2 * 16 * 2), (rounded, 2 * 2 * 2 * (16 + 4))):
        assert cache.bytes == 0
        run(model, cache, tokens)
        assert cache.bytes == 2 * 64 * per_token
        run(model, cache, tokens[:, :1])
        assert cache.bytes == 2 * 64 * per_token * 3 // 2
        for _ in range(3):
            run(model, cache, tokens[:, :60])
        assert cache.bytes <= 4 * 256 * per_token
        held = cache.bytes
        cache.reset()
        run(model, cache, tokens)
        assert cache.bytes == held
    assert exact.bytes / rounded.bytes == 32 / 20


def test_padding_on_the_left_takes_no_memory() -> None:
    model = llama()
    tokens, mask = prompts(2, 64)
    mask[:, :40] = 0
    cache = made(model, max_tokens=32)
    assert torch.equal(through(model, cache, tokens, mask, 9), generate(model, tokens, mask, 9))
    assert cache.bytes <= 2 * 40 * cache.layout.bytes_per_token()


def test_a_layer_with_a_window_keeps_no_more_than_that() -> None:
    model = MODELS["mistral"]()
    cache = made(model, 1, max_tokens=1000)
    run(model, cache, prompts(1, 500)[0])
    assert cache.bytes == 80 * cache.layout.bytes_per_token()


def test_no_slot_is_written_twice_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel writes in any order, so of two tokens in a place of the ring either could stay.
    write, model = paged_cache.kv_write, MODELS["gemma3"]()

    def checked(*args: Any) -> None:
        real = args[-1][args[-1] >= 0]
        assert len(real.unique()) == len(real)
        write(*args)

    monkeypatch.setattr(paged_cache, "kv_write", checked)
    run(model, made(model), *prompts(3, 200)[0].split((100, 100), 1))


def test_padding_sees_itself() -> None:
    # Attention over nothing is NaN in some kernels, and 0 in PyTorch's for the CPU.
    model = MODELS["gemma3"]()
    cache = made(model)
    tokens, mask = prompts(3, 40, ragged=True)
    through(model, cache, tokens, mask, 1)
    assert all(seen is not None and bool(seen.any(-1).all()) for seen in cache._seen)


def test_what_another_sequence_left_behind_is_never_seen() -> None:
    model = MODELS["gemma3"]()
    tokens, mask = prompts(2, 30, ragged=True)
    cache = made(model)
    through(model, cache, tokens, mask, 80)
    for layer in cache.storage.layers:
        for tensor in layer.tensors:
            tensor.fill_(torch.nan)
    cache.reset()
    expected = generate(model, tokens, mask, 30)
    assert torch.equal(through(model, cache, tokens, mask, 5), expected[:, :35])
    longer = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], 1)[:, :55]
    assert torch.equal(through(model, cache, expected[:, :55], longer, 5), expected)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    model = llama()
    tokens, mask = prompts(3, 30, ragged=True)
    cache = made(model, 2, 40)
    with pytest.raises(UsageError, match="3 rows exceed batch=2"):
        through(model, cache, tokens, mask)
    through(model, cache, tokens[:2], mask[:2], 1)
    before = stored(cache)
    with block_attention(model):
        for part, wanted in (
            ({"input_ids": tokens[:2, :11]}, "41 tokens exceeds max_tokens=40"),
            ({"input_ids": tokens[:1, :4]}, "holds 2 rows and was given 1"),
            ({"input_ids": tokens[:2, :4], "attention_mask": mask[:2, :4]}, "former tokens too"),
            ({"input_ids": tokens[:2, :4], "attention_mask": torch.ones(2, 34)}, "Column 0 of row 1 was padding"),
            ({"input_ids": tokens[:2, :4], "attention_mask": torch.ones(2, 1, 4, 34)}, "2D"),
        ):
            with pytest.raises(UsageError, match=wanted):
                model(past_key_values=cache, **part)
    assert cache.get_seq_length() == 30
    assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))


def test_a_forward_that_failed_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    tokens, more = prompts(2, 30)[0], prompts(2, 20, seed=1)[0]
    cache = made(model)
    run(model, cache, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, cache, more[:, :7])
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(run(model, cache, more), run(model, None, tokens, more)[:, 30:], atol=1e-3, rtol=1e-4)


def test_it_works_in_inference_mode_and_with_gradients_on() -> None:
    model = llama()
    tokens = prompts(2, 40)[0]
    cache = made(model)
    with block_attention(model):
        with torch.inference_mode():
            model(input_ids=tokens[:, :20], past_key_values=cache)
        assert not any(tensor.is_inference() for layer in cache.storage.layers for tensor in layer.tensors)
        few = model(input_ids=tokens[:, 20:22], past_key_values=cache).logits
        many = model(input_ids=tokens[:, 22:], past_key_values=cache).logits
    found = torch.cat([few, many], 1)
    torch.testing.assert_close(found, run(model, None, tokens)[:, 20:], atol=1e-3, rtol=1e-4)
    found.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None  # rather than a part of what it should be


def test_a_model_whose_attention_cannot_read_blocks_is_refused_with_the_reason() -> None:
    model = ARCHITECTURES["falcon"]()
    before, modules = model.config._attn_implementation, dict(model.named_modules())
    with pytest.raises(ModelError, match="computes attention itself"):
        made(model)
    assert model.config._attn_implementation == before
    assert dict(model.named_modules()) == modules


def test_the_attention_is_set_and_put_back() -> None:
    model = llama(attn_implementation="eager")
    cache = made(model)
    assert model.config._attn_implementation == "eager"
    with block_attention(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ZeroDivisionError), block_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager"
    tokens = prompts(1, 20)[0]
    with pytest.raises(UsageError, match=f"'eager'.*{NAME}"):
        generate(model, tokens, past_key_values=cache)
    expected = generate(model, tokens)
    model.set_attn_implementation(NAME)
    assert torch.equal(generate(model, tokens, past_key_values=cache), expected)
    with pytest.raises(UsageError, match="given no BlockCache"):
        generate(model, tokens)


def test_a_mask_of_the_models_own_is_refused() -> None:
    options = LLAMA_LIKE | OF_ITS_OWN | {"use_bidirectional_attention": True}
    model = build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, options)
    cache = made(model)
    with pytest.raises(ModelError, match="mask of its own"):
        run(model, cache, prompts(1, 20)[0])


def test_wrong_options_are_refused() -> None:
    for bad in ({"block_size": 0}, {"window": -1}, {"sinks": 4}, {"batch": 0}, {"max_tokens": 0}):
        with pytest.raises(UsageError, match="Invalid"):
            block_cache(llama(), **bad)
    with pytest.raises(UsageError, match="no recent tokens"):
        block_cache(llama(), kv="int8", recent=16)
    with pytest.raises(UsageError, match="int4"):
        made(llama(), kv="int4")


def test_random_numbers_are_left_alone() -> None:
    model = llama()
    state = torch.random.get_rng_state()
    through(model, made(model), *prompts(2, 20))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_importing_it_imports_no_transformers() -> None:
    # 3 s, most of it PyTorch: nothing else in this suite notices an import at the top of the file.
    code = "import sys, optimizer.backends.generate_cache as m; assert 'transformers' not in sys.modules, m"
    subprocess.run([sys.executable, "-c", code], check=True)
