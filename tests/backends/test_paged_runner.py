"""The paged runner against transformers' own `generate` and forward: the same tokens, whatever the cache is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from scipy import stats
from torch import Tensor
from torch._dynamo.utils import counters

from optimizer.backends import quantized_kv
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kv_layout import FEW_TOKENS, KeyValueLayout, LayerShape, windowed
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.paged_step import uniform
from optimizer.backends.sampling import Sampling, probabilities
from optimizer.errors import ModelError, UsageError
from optimizer.evals.architecture import from_module
from optimizer.evals.runner import Runner
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind
from tests.backends.decoder_models import VOCAB, llama, mistral, prompts
from tests.passes import small_architectures
from tests.passes.small_architectures import ARCHITECTURES, LLAMA_LIKE, OF_ITS_OWN, build

# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

FALCON = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}
BLOOM = {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4}
FALCONS: dict[str, dict[str, Any]] = {
    "a group of all heads": {"multi_query": True},
    "groups of heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "a group a head": {"multi_query": False, "parallel_attn": False, "bias": True},
}
"""One of each kind that there is: 7 B, 40 B, and those before."""


@pytest.fixture(scope="module", autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def paged(model: Any, *, compile: bool = False, max_context: int | None = None, **options: Any) -> PagedRunner:
    """Small blocks and chunks, so that every sequence has several of both."""
    settings = PagedOptions(**{"block_size": 8, "chunk": 7} | options)
    return PagedRunner(view(model), compile=compile, max_context=max_context, options=settings)


def reference(model: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def forward(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits `[B, S, V]` of one forward without a cache; `mask [B, 1, S, S]` bool."""
    with torch.no_grad():
        position = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
        return model(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False).logits.float()  # type: ignore[no-any-return]


def stepped(runner: PagedRunner, tokens: Tensor, prompt: int) -> Tensor:
    """Logits `[B, S - prompt + 1, V]` after the prompt and after each later token, given one at a time."""
    found = [runner.prefill(tokens[:, :prompt])]
    found += [runner.decode(tokens[:, i]) for i in range(prompt, tokens.shape[1])]
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_of_a_ragged_batch_are_transformers_own(name: str) -> None:
    model = ARCHITECTURES[name]()
    tokens = small_architectures.tokens(3, 24)
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :11] = 0, 0
    expected = reference(model, tokens, mask, 60)
    runner = paged(model)
    assert isinstance(runner, Runner)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=60), expected)
    assert runner.ledger.steps["eager"] == 59
    by_request = runner.generate_batch([row[m.bool()].tolist() for row, m in zip(tokens, mask, strict=True)],
                                       max_new_tokens=60)  # fmt: skip
    assert by_request == expected[:, 24:].tolist()


def gemma2(**changes: Any) -> Any:
    """Scores that a cap moves a lot, and a window in every other layer that most of a text has left."""
    options = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 2, "sliding_window": 20} | changes
    return build(hf.Gemma2ForCausalLM, hf.Gemma2Config, LLAMA_LIKE | OF_ITS_OWN | options)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_capped_scores_and_windows_that_alternate(compile: bool) -> None:
    model = gemma2()
    tokens = small_architectures.tokens(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    runner = paged(model, compile=compile)
    assert runner.layout.windows == (0, 20)
    expected = reference(model, tokens, mask, 60)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=60), expected)
    plain = gemma2(attn_logit_softcapping=None)
    assert not torch.equal(reference(plain, tokens, mask, 60), expected)  # so the cap was there


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.08)])
def test_an_8_bit_cache_under_capped_scores_stays_within_the_bounds(kind: KvKind, bound: float) -> None:
    # Those of `test_long_generation`, which derives them.
    model, tokens = gemma2(), small_architectures.tokens(2, 60)
    exact = forward(model, tokens)[:, 29:]
    for recent in (0, 16):
        found = stepped(paged(model, kv=kind, recent=recent), tokens, 30)
        error = ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
        assert bound / 100 < float(error) < bound


@pytest.mark.parametrize("name", FALCONS)
def test_falcon_attends_over_blocks_of_what_its_groups_have(name: str) -> None:
    model = build(hf.FalconForCausalLM, hf.FalconConfig, FALCON | FALCONS[name])
    tokens = small_architectures.tokens(3, 24)
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :11] = 0, 0
    expected, own = reference(model, tokens, mask, 40), {name: type(m) for name, m in model.named_modules()}
    runner = paged(model)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=40), expected)
    again = PagedRunner(view(runner.model), compile=False)  # a model that was switched before
    assert torch.equal(again.generate(tokens, mask, max_new_tokens=40), expected)
    assert {name: type(m) for name, m in model.named_modules()} == own
    assert runner.model.state_dict().keys() == model.state_dict().keys()
    heads = {"a group of all heads": 1, "groups of heads": 2, "a group a head": 4}[name]
    assert runner.kv_bytes_per_token == 2 * 2 * heads * 16 * 4
    assert from_module(model).kv_cache_bytes(1, 1) == runner.kv_bytes_per_token


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build(hf.FalconForCausalLM, hf.FalconConfig, FALCON | {"alibi": True}), "alibi"),
        (lambda: build(hf.BloomForCausalLM, hf.BloomConfig, BLOOM), "computes attention itself"),
    ],
    ids=["alibi", "bloom"],
)
def test_a_model_whose_attention_cannot_read_blocks_is_refused_with_the_reason(make: Any, reason: str) -> None:
    model = view(make())
    before, modules = model.config._attn_implementation, dict(model.named_modules())
    with pytest.raises(ModelError, match=reason):
        PagedRunner(model)
    assert model.config._attn_implementation == before
    assert dict(model.named_modules()) == modules


def test_compiled_steps_are_one_graph_a_bucket_and_give_the_same_tokens() -> None:
    model = llama()
    tokens, mask = prompts(4, 20, ragged=True)
    expected = reference(model, tokens, mask, 120)
    runner = paged(model, compile=True)
    counters.clear()
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=120), expected)
    assert torch.equal(runner.generate(tokens[:3], mask[:3], max_new_tokens=60), expected[:3, :80])
    assert (
        runner.generate_batch([tokens[3][mask[3].bool()].tolist()] * 3, max_new_tokens=60)
        == [expected[3, 20:80].tolist()] * 3
    )
    assert counters["stats"]["unique_graphs"] == 1  # three rows run in the bucket of four
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert runner.ledger.steps["compiled"] == 119 + 59 + 59
    assert not runner.ledger.steps["eager"]
    assert runner.ledger.compile_seconds > 0


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_8_bit_cache_computes_what_the_simulation_of_one_says(kind: KvKind) -> None:
    # The simulation rounds all keys and values before every attention, in torch operations; float32 sums in another
    # order move logits of up to 40 by 1e-3 at most. An entry that falls on a tie of the rounding would move them more.
    model = llama()
    tokens = torch.cat([prompts(2, 20)[0], prompts(2, 30, seed=3)[0]], 1)
    simulated = view(model)
    simulated.config._attn_implementation = quantized_kv.register(kind)
    expected = forward(simulated, tokens)[:, 19:]
    runner = paged(model, kv=kind)
    torch.testing.assert_close(stepped(runner, tokens, 20), expected, atol=2e-3, rtol=1e-3)
    exact = forward(model, tokens)[:, 19:]
    assert (expected - exact).abs().max() > 1e-2  # rounding shows, so the comparison above means something


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_size_of_a_chunk_changes_nothing(chunk: int, kind: KvKind | None) -> None:
    tokens, mask = prompts(3, 40, ragged=True)
    whole = paged(llama(), chunk=1000, kv=kind).prefill(tokens, mask)
    torch.testing.assert_close(paged(llama(), chunk=chunk, kv=kind).prefill(tokens, mask), whole, atol=1e-4, rtol=1e-4)


def test_logits_of_every_prompt_token_are_those_of_a_plain_forward() -> None:
    tokens, mask = prompts(3, 40, ragged=True)
    found = paged(llama()).prefill(tokens, mask, all_logits=True)
    for row in range(3):
        real = mask[row].bool()
        expected = forward(llama(), tokens[row][real][None])[0]
        torch.testing.assert_close(found[row][real], expected, atol=1e-3, rtol=1e-4)


def test_blocks_that_left_a_sliding_window_are_given_back() -> None:
    model = mistral(window=32)
    tokens, mask = prompts(2, 90)
    runner = paged(model)
    assert runner.layout.windows == (32,)
    expected = reference(model, tokens, mask, 100)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=100), expected)
    stepped(runner, expected, 90)
    held = [sum(block >= 0 for block in row.table(0)) for row in runner._rows]
    assert max(held) <= runner.layout.blocks_for(10_000, 0)
    assert runner.cache.bytes_in_use <= 2 * 6 * 8 * runner.kv_bytes_per_token
    runner.close()
    with pytest.raises(UsageError, match="prefill"):
        runner.decode(torch.tensor([3, 3]))


def test_a_window_with_sinks_sees_exactly_those_tokens() -> None:
    model, window, sinks = llama(), 16, 4
    tokens, _ = prompts(2, 70)
    place = torch.arange(70)
    seen = (place <= place[:, None]) & ((place > place[:, None] - window) | (place < sinks))
    expected = forward(model, tokens, seen[None, None].expand(2, 1, -1, -1))
    runner = paged(model, window=window, sinks=sinks)
    torch.testing.assert_close(stepped(runner, tokens, 30), expected[:, 29:], atol=1e-3, rtol=1e-4)
    # 4 sinks take a block of 8, the window up to 3; no more is held after 70 tokens.
    assert runner.cache.bytes_in_use <= 2 * 4 * 8 * runner.kv_bytes_per_token


def test_prompts_that_begin_alike_are_run_once() -> None:
    model = llama()
    prompt = prompts(1, 50)[0]
    runner = paged(model)
    first = runner.prefill(prompt)
    chunks = runner.ledger.steps["prefill chunk"]
    again = runner.prefill(prompt)
    assert runner._rows[0].cached == 48
    assert runner.ledger.steps["prefill chunk"] == chunks + 1
    torch.testing.assert_close(again, first, atol=1e-4, rtol=1e-4)
    longer = torch.cat([prompt, prompts(1, 9, seed=5)[0]], 1)
    torch.testing.assert_close(runner.prefill(longer), forward(model, longer)[:, -1], atol=1e-3, rtol=1e-4)
    assert runner._rows[0].cached == 48
    fresh = paged(model, share_prefixes=False)
    fresh.prefill(prompt)
    fresh.prefill(prompt)
    assert fresh._rows[0].cached == 0


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_memory_in_use_is_what_the_roofline_says(kind: KvKind | None) -> None:
    # Blocks are filled to the token here; otherwise each row holds up to a block more.
    model = llama()
    runner = paged(model, kv=kind)
    runner.prefill(prompts(3, 64)[0])
    shape = from_module(model)
    if kind is None:
        assert runner.cache.bytes_in_use == shape.kv_cache_bytes(3, 64)
    predicted = 3 * 64 * runner.kv_bytes_per_token
    assert runner.cache.bytes_in_use == predicted
    stored = sum(t.numel() * t.element_size() for layer in runner.cache.storage.layers for t in layer.tensors)
    assert stored == runner.kv_cache_bytes == runner.cache.pools[0].blocks * 8 * runner.kv_bytes_per_token
    runner.reset(1)
    assert runner.cache.bytes_in_use == 0


def test_what_another_sequence_left_behind_is_never_seen() -> None:
    model = llama()
    tokens, mask = prompts(2, 30, ragged=True)
    expected = reference(model, tokens, mask, 30)
    runner = paged(model)
    for layer in runner.cache.storage.layers:
        for tensor in layer.tensors:
            tensor.fill_(torch.nan)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=30), expected)


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    runner = paged(llama())
    tokens, _ = prompts(3, 12)
    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "max_new_tokens": 25}
    together = runner.generate_batch(tokens.tolist(), sampling=Sampling(0.9, 40, 0.95), seed=7, max_new_tokens=25)
    alone = [runner.generate(row[None], **sampling, seed=7)[0, 12:].tolist() for row in tokens]
    assert together == alone
    assert runner.generate(tokens[:1], **sampling, seed=8)[0, 12:].tolist() != alone[0]


def test_tokens_are_drawn_from_the_distribution_asked_for() -> None:
    # 4,000 seeds, chi-square against what `probabilities` says; a false alarm has a chance of 1e-4.
    runner = paged(llama())
    logits = runner.prefill(prompts(1, 12)[0]) / 8
    sampling = Sampling(1.0, 30, 0.9)
    expected = probabilities(logits, sampling)[0].double()
    drawn = [int(runner.choose(logits, sampling, seed, 11)) for seed in range(4000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    assert not counts[expected == 0].any()
    common = expected * 4000 >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * 4000
    kept = wanted > 0
    assert stats.chisquare(observed[kept].numpy(), (wanted[kept] / wanted[kept].sum() * 4000).numpy()).pvalue > 1e-4


def test_random_numbers_are_even_over_seeds_and_positions() -> None:
    # A Kolmogorov-Smirnov test each way over 20,000 numbers; a false alarm has a chance of 1e-4.
    seeds = torch.arange(20_000)
    for numbers in (uniform(seeds, torch.full_like(seeds, 3)), uniform(torch.full_like(seeds, 5), seeds)):
        assert numbers.dtype == torch.float32
        assert bool((numbers >= 0).all() and (numbers < 1).all())
        assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-4
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.03


def test_an_end_token_fills_the_row() -> None:
    model = llama()
    tokens, mask = prompts(3, 12, ragged=True)
    plain = reference(model, tokens, mask, 20)
    end = int(plain[1, 15])
    runner = paged(model)
    out = runner.generate(tokens, mask, max_new_tokens=20, eos_token_id=end)
    first = plain[1, 12:].tolist().index(end)
    assert out[1, 12 + first :].unique().tolist() == [end]
    assert torch.equal(out[1, : 12 + first], plain[1, : 12 + first])


def test_the_layout_knows_groups_blocks_and_bytes() -> None:
    layout = KeyValueLayout((LayerShape(2, 16), LayerShape(2, 16, 32), LayerShape(4, 16)), torch.bfloat16, "int8", 8)
    assert layout.windows == (0, 32)
    assert layout.group_of == (0, 1, 0)
    assert layout.bytes_per_token() == 2 * 8 * (16 + 4)
    assert layout.bytes_per_token(1) == 2 * 2 * (16 + 4)
    assert layout.blocks_for(1000, 0) == 125
    assert layout.blocks_for(1000, 1) == 5
    assert layout.blocks_for(9, 1) == 2
    narrow = windowed(layout, 24, 3)
    assert [layer.window for layer in narrow.layers] == [24, 24, 24]
    assert narrow.blocks_for(1000, 0) == 1 + 3 + 1


def test_wrong_options_are_refused() -> None:
    for bad in ({"block_size": 0}, {"chunk": 0}, {"window": -1}, {"sinks": 4}):
        with pytest.raises(UsageError, match="Invalid"):
            PagedOptions(**bad)
    with pytest.raises(UsageError, match="int4"):
        paged(llama(), kv="int4")
    runner = paged(llama())
    with pytest.raises(UsageError, match=f"{FEW_TOKENS}"):
        runner.step(1, FEW_TOKENS + 1)
    with pytest.raises(UsageError, match="prefill"):
        paged(llama()).decode(torch.tensor([3]))


@pytest.mark.skipif(not cpu_kernels().loaded, reason=cpu_kernels().reason)
def test_a_step_in_bfloat16_stays_near_float32() -> None:
    # Both models are rounded to bfloat16 weights; activations in bfloat16 lose up to 2^-8 a layer.
    model = llama().bfloat16()
    tokens = torch.cat([prompts(2, 20)[0], prompts(2, 12, seed=3)[0]], 1)
    expected = forward(model.float(), tokens)[:, 19:]
    found = stepped(paged(model.bfloat16()), tokens, 20)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05
