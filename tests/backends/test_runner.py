"""Runners against transformers' own forward and `generate`: same tokens, same logits, one graph a bucket.

Random models wander over their whole vocabulary, so a key in a wrong slot or a mask off by one shows within tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from optimizer.backends.compiled import CompiledRunner, bucket
from optimizer.backends.linear import QuantizedLinear
from optimizer.backends.runner import BaseRunner, EagerRunner, left_pad
from optimizer.errors import UsageError
from optimizer.evals.runner import Runner
from optimizer.quant.formats import Format
from optimizer.quant.rtn import quantize_rtn
from tests.backends.decoder_models import VOCAB, llama, mistral, prompts

# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

NEW = 260  # from a prompt of 20 this leaves the first bucket of 256 tokens


@pytest.fixture(scope="module", autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def compiled(model: Any) -> CompiledRunner:
    """One runner for all compiled tests, so that each bucket is compiled once."""
    return CompiledRunner(model)


@pytest.fixture(params=[EagerRunner, CompiledRunner])
def runner(request: pytest.FixtureRequest, model: Any) -> BaseRunner:
    """Both runners without a compiler: what is checked here is the same Python in either case."""
    kind = request.param
    return kind(model) if kind is EagerRunner else kind(model, compile=False)  # type: ignore[no-any-return]


def static(model: Any, **options: Any) -> CompiledRunner:
    """The static cache without a compiler."""
    return CompiledRunner(model, compile=False, **options)


def reference(model: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """transformers' `generate`, with no end token to stop at."""
    return model.generate(  # type: ignore[no-any-return]
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def forward(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits `[B, S, V]` from one plain forward without any cache."""
    with torch.no_grad():
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False).logits.float()  # type: ignore[no-any-return]


def assert_real_logits_close(got: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Equal where a token is real. float32 sums in another order: logits up to 40 from two layers agree to 1e-3."""
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=1e-4)


# The compiled runner: three graphs for the module (batch 1 at 256 and 512, batch 4 at 512).


def test_compiled_tokens_are_transformers_own_and_each_bucket_is_one_graph(
    model: Any, compiled: CompiledRunner
) -> None:
    tokens, mask = prompts(1, 20)
    expected = reference(model, tokens, mask, NEW)
    assert torch.equal(EagerRunner(model).generate(tokens, max_new_tokens=NEW), expected)

    counters.clear()
    short = compiled.generate(tokens, max_new_tokens=100)
    assert torch.equal(short, expected[:, :120])
    assert counters["stats"]["unique_graphs"] == 1
    # By hand from the prompt, so that the sequence outgrows the bucket of 256 and moves to that of 512.
    logits, produced = compiled.prefill(tokens), []
    for _ in range(NEW):
        produced.append(logits.argmax(-1))
        logits = compiled.decode(produced[-1])
    assert torch.equal(torch.cat([tokens, torch.stack(produced, 1)], 1), expected)
    assert counters["stats"]["unique_graphs"] == 2
    assert sorted(compiled._steps) == [(1, 256), (1, 512)]
    # Nothing is compiled again, whatever order the buckets are asked in, and nothing broke the graph.
    before = dict(counters["stats"])
    assert torch.equal(compiled.generate(tokens, max_new_tokens=NEW), expected)
    assert torch.equal(compiled.generate(tokens, max_new_tokens=3), expected[:, :23])
    assert dict(counters["stats"]) == before
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_a_ragged_batch_of_four_compiled(model: Any, compiled: CompiledRunner) -> None:
    tokens, mask = prompts(4, 20, ragged=True)
    expected = reference(model, tokens, mask, NEW)
    counters.clear()
    assert torch.equal(compiled.generate(tokens, mask, max_new_tokens=NEW), expected)
    assert counters["stats"]["unique_graphs"] == 1
    # Three rows run in the same graph with a spare row.
    assert torch.equal(compiled.generate(tokens[:3], mask[:3], max_new_tokens=NEW), expected[:3])
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_step_takes_tokens_of_any_stride_and_integer_type(model: Any, compiled: CompiledRunner) -> None:
    # Its graph has no guards, so what it is given must be what it was compiled for.
    tokens, mask = prompts(4, 20, ragged=True)
    compiled.generate(tokens, mask, max_new_tokens=NEW)  # compiles, unless that was done before
    results = []
    for step in (tokens[:, 5], tokens[:, 5].contiguous(), tokens[:, 5].int(), tokens[:1, 5].expand(4)):
        compiled._wanted = 20 + NEW
        compiled.prefill(tokens, mask)
        results.append(compiled.decode(step))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[3][0], results[0][0])
    assert not torch.equal(results[3][1], results[0][1])


def test_logits_of_earlier_steps_are_not_overwritten(model: Any, compiled: CompiledRunner) -> None:
    tokens, _ = prompts(1, 20)
    kept = [compiled.prefill(tokens)]
    copies = [kept[0].clone()]
    for _ in range(5):
        kept.append(compiled.decode(kept[-1].argmax(-1)))
        copies.append(kept[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_the_callers_modes_and_threads_are_left_alone(compiled: CompiledRunner) -> None:
    tokens, _ = prompts(1, 20)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.enable_grad():
        logits = compiled.prefill(tokens)
        logits = compiled.decode(logits.argmax(-1))
        assert torch.is_grad_enabled()
        assert not logits.requires_grad
    with torch.inference_mode():
        logits = compiled.prefill(tokens)
    after = compiled.decode(logits.argmax(-1))  # state made inside must be writable outside
    with torch.inference_mode():
        compiled.decode(after.argmax(-1))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_compiled_bfloat16_model_is_as_exact_as_bfloat16_allows() -> None:
    rounded = llama(num_hidden_layers=1).bfloat16()
    widened = llama(num_hidden_layers=1)
    widened.load_state_dict(rounded.state_dict())
    tokens, mask = prompts(1, 24)
    runner, eager = CompiledRunner(rounded), EagerRunner(rounded)
    truth = forward(widened, tokens, mask)[:, 23]
    runner.prefill(tokens[:, :23])
    eager.prefill(tokens[:, :23])
    got, plain = runner.decode(tokens[:, 23]), eager.decode(tokens[:, 23])
    assert got.dtype == torch.float32
    # A dozen roundings in sequence (norms, projections, scores, MLP, logits), each at most 2^-8 of the largest value.
    bound = 12 * 2.0**-8 * float(truth.abs().max())
    assert float((got - truth).abs().max()) <= bound
    assert float((plain - truth).abs().max()) <= bound


def test_a_compiled_sliding_window_grows_into_its_window_and_leaves_it() -> None:
    model = mistral(window=32, num_hidden_layers=1)
    tokens, mask = prompts(2, 20, ragged=True)
    got = CompiledRunner(model).generate(tokens, mask, max_new_tokens=80)
    assert torch.equal(got, reference(model, tokens, mask, 80))


# Without a compiler: the same bookkeeping.


@pytest.mark.parametrize("length", [5, 32, 33, 100])
def test_a_sliding_window_with_prompts_around_its_length(length: int) -> None:
    model = mistral(window=32)
    tokens, mask = prompts(2, length, ragged=length > 5)
    expected = reference(model, tokens, mask, 60)
    assert torch.equal(static(model).generate(tokens, mask, max_new_tokens=60), expected)
    assert torch.equal(EagerRunner(model).generate(tokens, mask, max_new_tokens=60), expected)


def test_a_sliding_window_that_outgrows_its_bucket() -> None:
    model = mistral(window=32)
    tokens, mask = prompts(2, 250, ragged=True)
    expected = reference(model, tokens, mask, 20)
    runner = static(model)
    runner.generate(tokens[:, :9], max_new_tokens=4)  # leaves nothing behind that the next prompt would meet
    logits, produced = runner.prefill(tokens, mask), []
    for _ in range(20):
        produced.append(logits.argmax(-1))
        logits = runner.decode(produced[-1])
    assert torch.equal(torch.stack(produced, 1), expected[:, 250:])
    assert sorted(runner._steps) == [(2, 256), (2, 512)]


def test_prefill_logits_are_those_of_a_plain_forward(model: Any, runner: BaseRunner) -> None:
    tokens, mask = prompts(3, 17, ragged=True)
    expected = forward(model, tokens, mask)
    every = runner.prefill(tokens, mask, all_logits=True)
    assert every.shape == (3, 17, VOCAB)
    assert every.dtype == torch.float32
    assert_real_logits_close(every, expected, mask)
    torch.testing.assert_close(runner.prefill(tokens, mask), expected[:, -1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("all_logits", [False, True])
def test_decode_continues_any_prefill(model: Any, runner: BaseRunner, batch: int, all_logits: bool) -> None:
    tokens, mask = prompts(batch, 24, ragged=True)
    expected = forward(model, tokens, mask)
    runner.prefill(tokens[:, :16], mask[:, :16], all_logits=all_logits)
    for position in range(16, 24):
        got = runner.decode(tokens[:, position])
        assert got.shape == (batch, VOCAB)
        torch.testing.assert_close(got, expected[:, position], atol=1e-3, rtol=1e-4)


def test_a_prompt_of_one_token_and_a_prompt_that_fills_its_bucket(model: Any, runner: BaseRunner) -> None:
    for length in (1, 255, 256, 257):
        tokens, mask = prompts(1, length)
        assert torch.equal(runner.generate(tokens, max_new_tokens=3), reference(model, tokens, mask, 3))


def test_padding_never_changes_a_row(model: Any, runner: BaseRunner) -> None:
    tokens, _ = prompts(1, 12)
    junk, _ = prompts(1, 9, seed=5)
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(tokens)], 1)
    alone = runner.generate(tokens, max_new_tokens=30)
    padded = runner.generate(torch.cat([junk, tokens], 1), mask, max_new_tokens=30)
    assert torch.equal(padded[:, 21:], alone[:, 12:])


def test_requests_do_not_see_each_other(model: Any, runner: BaseRunner) -> None:
    long, _ = prompts(4, 60)
    short, _mask = prompts(2, 9, seed=3, ragged=False)
    fresh = runner.generate(short, max_new_tokens=20)
    runner.generate(long, max_new_tokens=30)
    runner.prefill(long[:2])  # abandoned
    assert torch.equal(runner.generate(short, max_new_tokens=20), fresh)


def test_generation_defaults_of_the_model_do_not_bend_greedy(model: Any, runner: BaseRunner) -> None:
    tokens, mask = prompts(1, 10)
    expected = reference(model, tokens, mask, 40)
    first = int(expected[0, 12])
    defaults = model.generation_config
    changed = type(defaults).from_dict(defaults.to_dict())
    changed.repetition_penalty, changed.eos_token_id, changed.max_length = 1.5, first, 13
    model.generation_config = changed
    try:
        assert torch.equal(runner.generate(tokens, max_new_tokens=40), expected)
        assert model.generation_config is changed
    finally:
        model.generation_config = defaults


def test_tokens_are_streamed_in_order(runner: BaseRunner) -> None:
    tokens, _ = prompts(2, 10)
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"eos_token_id": VOCAB - 1}):
        seen: list[Tensor] = []
        out = runner.generate(tokens, max_new_tokens=12, on_token=seen.append, **options)
        assert torch.equal(torch.stack(seen, 1), out[:, 10:])


def test_an_end_token_stops_its_row_and_the_last_stops_all(model: Any, runner: BaseRunner) -> None:
    tokens, _mask = prompts(2, 10)
    free = runner.generate(tokens, max_new_tokens=40)[:, 10:]
    only_first = next(i for i in range(2, 40) if free[0, i] not in free[1] and free[0, i] not in free[0, :i])
    end = int(free[0, only_first])
    got = runner.generate(tokens, max_new_tokens=40, eos_token_id=end)[:, 10:]
    assert torch.equal(got[0, : only_first + 1], free[0, : only_first + 1])
    assert (got[0, only_first:] == end).all()
    assert torch.equal(got[1], free[1])
    both = [end, int(free[1, only_first + 1])]
    stopped = runner.generate(tokens, max_new_tokens=40, eos_token_id=both)[:, 10:]
    assert stopped.shape[1] <= only_first + 2
    assert all(any(int(t) in both for t in row) for row in stopped)


def test_seeded_sampling_repeats_and_leaves_the_global_generator(runner: BaseRunner) -> None:
    tokens, _ = prompts(2, 10)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first = runner.generate(tokens, seed=1, **options)
    assert torch.equal(runner.generate(tokens, seed=1, **options), first)
    assert not torch.equal(runner.generate(tokens, seed=2, **options), first)
    assert not torch.equal(runner.generate(tokens, **options), runner.generate(tokens, **options))
    assert torch.equal(torch.get_rng_state(), state)


def test_both_runners_draw_the_same_tokens(model: Any) -> None:
    tokens, mask = prompts(3, 10, ragged=True)
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 0.7, "seed": 4}
    assert torch.equal(
        EagerRunner(model).generate(tokens, mask, **options), static(model).generate(tokens, mask, **options)
    )


def test_the_ledger_counts_what_ran(model: Any) -> None:
    tokens, _ = prompts(1, 10)
    eager, looped, cached = EagerRunner(model), EagerRunner(model), static(model)
    eager.generate(tokens, max_new_tokens=7)
    looped.generate(tokens, max_new_tokens=7, temperature=1.0)
    cached.generate(tokens, max_new_tokens=7)
    assert eager.ledger.steps == looped.ledger.steps == cached.ledger.steps == Counter(prefill=1, eager=6)
    assert eager.ledger.kernel_counts() == {"aten::linear": 2 * 7 + 1}
    assert eager.ledger.kernels["model.layers.1.mlp.down_proj"] == "aten::linear"


def test_the_ledger_of_a_compiled_runner_names_compiled_steps(compiled: CompiledRunner) -> None:
    tokens, _ = prompts(1, 20)
    compiled.generate(tokens, max_new_tokens=5)
    before = compiled.ledger.steps.copy()
    compiled.generate(tokens, max_new_tokens=5)
    assert compiled.ledger.steps - before == Counter(prefill=1, compiled=4)
    assert compiled.ledger.compile_seconds > 0


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param([[1, 1, 0]], id="right padding"),
        pytest.param([[1, 0, 1]], id="a hole"),
        pytest.param([[0, 0, 0]], id="nothing real"),
        pytest.param([[1, 1]], id="another length"),
        pytest.param([[1, 1, 1], [1, 1, 1]], id="another batch"),
    ],
)
def test_masks_that_are_not_left_padded_are_refused(runner: BaseRunner, mask: list[list[int]]) -> None:
    for call in (runner.prefill, runner.generate):
        with pytest.raises(UsageError, match="left-padded"):
            call(torch.tensor([[5, 6, 7]]), torch.tensor(mask))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[3, VOCAB]]), f"token {VOCAB} is outside"),
        (torch.tensor([[-1, 3]]), "token -1 is outside"),
        (torch.zeros(0, 4, dtype=torch.long), "at least one"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one"),
        (torch.tensor([3, 4]), r"\[batch, length\]"),
        (torch.tensor([[3.0, 4.0]]), "integers"),
        (torch.tensor([[True]]), "integers"),
        (torch.full((1, 1025), 3), "1025 tokens exceeds the context of 1024"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused(runner: BaseRunner, tokens: Tensor, message: str) -> None:
    for call in (runner.prefill, runner.generate):
        with pytest.raises(UsageError, match=message):
            call(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 1022}, r"3 prompt tokens and 1022 new .* context of 1024.*max_context"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_generation_options_are_checked_even_where_greedy_ignores_them(
    runner: BaseRunner, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        runner.generate(torch.tensor([[3, 4, 5]]), **options)


def test_an_option_that_does_not_exist_is_refused(runner: BaseRunner) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        runner.generate(torch.tensor([[3, 4, 5]]), max_tokens=5)  # type: ignore[call-arg]


def test_decode_needs_a_prefill_and_one_token_a_row(runner: BaseRunner) -> None:
    with pytest.raises(UsageError, match="before prefill"):
        runner.decode(torch.tensor([3]))
    tokens, _ = prompts(2, 5)
    runner.prefill(tokens)
    for wrong in (torch.tensor([3]), torch.tensor([[3], [4]]), torch.tensor(3)):
        with pytest.raises(UsageError, match="one token a row"):
            runner.decode(wrong)
    runner.reset(2)
    with pytest.raises(UsageError, match="before prefill"):
        runner.decode(torch.tensor([3, 4]))
    with pytest.raises(UsageError, match="Invalid batch 0"):
        runner.reset(0)


def test_a_prefill_that_failed_cannot_be_decoded_from(runner: BaseRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _ = prompts(1, 5)
    runner.prefill(tokens)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(runner.model, "forward", fail)
        with pytest.raises(MemoryError):
            runner.prefill(tokens)
    with pytest.raises(UsageError, match="before prefill"):
        runner.decode(tokens[:, 0])


@pytest.mark.parametrize("kind", [EagerRunner, CompiledRunner])
def test_a_full_context_is_an_error_and_not_a_wrong_answer(model: Any, kind: type[BaseRunner]) -> None:
    runner = kind(model, max_context=8) if kind is EagerRunner else static(model, max_context=8)
    tokens, mask = prompts(1, 6)
    assert torch.equal(runner.generate(tokens, max_new_tokens=2), reference(model, tokens, mask, 2))
    runner.prefill(tokens)
    runner.decode(tokens[:, 0])
    runner.decode(tokens[:, 0])
    with pytest.raises(UsageError, match="full at 8"):
        runner.decode(tokens[:, 0])
    with pytest.raises(UsageError, match="Invalid max_context 0"):
        kind(model, max_context=0)


def test_runners_satisfy_the_protocol_of_the_measuring_side(runner: BaseRunner) -> None:
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.max_context, runner.device.type) == (VOCAB, 1024, "cpu")


def test_bytes_of_a_step_by_hand(model: Any) -> None:
    runner = EagerRunner(model)
    # Keys and values: 2 layers, 2 heads of 16, 4 bytes. Weights: 2 layers, norms and the head; of the embedding, which
    # is not the head's here, a step only looks up rows.
    assert runner.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    rotary = 2 * 8  # frequencies for heads of 16, and the copy that transformers keeps of them
    read = (2 * layer + 64 + VOCAB * 64 + rotary) * 4
    assert runner.bytes_per_step(3, 100) == read + 3 * 100 * 512
    tied = EagerRunner(llama(tie_word_embeddings=True))
    assert tied.bytes_per_step(3, 100) == read + 3 * 100 * 512


def test_static_cache_bytes(model: Any) -> None:
    runner = static(model)
    tokens, _ = prompts(3, 5)
    assert runner.kv_cache_bytes == 0
    runner.generate(tokens, max_new_tokens=2)
    assert runner.kv_cache_bytes == 4 * 256 * runner.kv_bytes_per_token  # 3 rows run as 4


def test_a_quantized_model_reports_its_own_kernels_and_bytes(model: Any) -> None:
    quantized = llama()
    for name, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantized.set_submodule(name, QuantizedLinear(quantize_rtn(module.weight, Format(4, True, 32))))
    runner, dense = static(quantized), static(model)
    assert sum(n for kernel, n in runner.ledger.kernel_counts().items() if kernel.startswith("w4a16_linear[")) == 14
    assert runner.bytes_per_step(1, 1) < dense.bytes_per_step(1, 1)
    tokens, mask = prompts(3, 12, ragged=True)
    assert torch.equal(
        runner.generate(tokens, mask, max_new_tokens=40),
        EagerRunner(quantized).generate(tokens, mask, max_new_tokens=40),
    )


def test_warm_up_makes_the_bucket_that_a_request_will_use(model: Any) -> None:
    runner = static(model)
    runner.warm_up(batch=3, context=300)
    assert list(runner._steps) == [(4, 512)]
    tokens, mask = prompts(3, 20)
    assert torch.equal(runner.generate(tokens, max_new_tokens=280), reference(model, tokens, mask, 280))
    assert list(runner._steps) == [(4, 512)]


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 255, 256, 257)] == [1, 2, 4, 4, 8, 256, 256, 512]


def test_left_padding() -> None:
    tokens, mask = left_pad([[5], [6, 7, 8]], pad=2)
    assert tokens.tolist() == [[2, 2, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="at least one token"):
            left_pad(empty, pad=2)


def test_text_needs_a_tokenizer(runner: BaseRunner) -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        runner.generate_text("hello")
