from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from lm_eval.api.instance import Instance

from optimizer.errors import DataError, ModelError
from optimizer.evals import runner_lm
from optimizer.evals.runner import Runner
from optimizer.evals.runner_lm import RunnerLM
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer

PAIRS = [
    ("def fill(text, width=70):\n    return", " wrap(text)"),
    ("x", " = 1"),
    ("", "import os\n"),
    ("if text:", "\n    text = text.strip()\n"),
    ("self.width = width\n" * 12, "self.width"),
    ("a", "b"),
    ("long " * 30, "é ∑ 😀"),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("t", n, 1))
        for n, each in enumerate(arguments)
    ]


def adapter(max_context: int = 512, **options) -> RunnerLM:
    return RunnerLM(SmallRunner(small_model(), max_context), small_tokenizer(), **options)


def score_directly(context: list[int], continuation: list[int], window: int = 512) -> tuple[float, bool]:
    """One row, one forward, no padding, log-softmax token by token."""
    row = (context + continuation)[-(window + 1) :]
    with torch.inference_mode():
        logits = small_model()(torch.tensor([row[:-1]])).logits[0].double()
    total, greedy = 0.0, True
    for offset, token in enumerate(reversed(continuation)):
        step = logits[len(row) - 2 - offset]
        total += float(step[token] - torch.logsumexp(step, 0))
        greedy &= int(step.argmax()) == token
    return total, greedy


def test_the_small_runner_is_a_runner():
    assert isinstance(SmallRunner(small_model()), Runner)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_loglikelihoods_of_ragged_batches_equal_single_forwards(batch_size):
    model, tokenizer = adapter(batch_size=batch_size), small_tokenizer()
    found = model.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        if context:
            trimmed = tokenizer.encode(context.rstrip())
            split = next(k for k in range(len(trimmed), -1, -1) if trimmed[:k] == whole[:k])
        else:
            split = 0
        expected, expected_greedy = score_directly(whole[:split] or [0], whole[split:])
        assert value == pytest.approx(expected, abs=2e-4)
        assert greedy == expected_greedy
    assert model.non_finite == 0


def test_no_text_is_lost_at_the_seam():
    """The colon and the newline are one token; splitting by length would drop the newline."""
    tokenizer, model = small_tokenizer(), adapter()
    context, continuation = model._encode_pair("if text:\n", "    text = 1")
    assert tokenizer.decode(context + continuation) == "if text:\n    text = 1"
    assert tokenizer.decode(continuation).startswith(":\n")
    assert len(tokenizer.encode("if text:")) == len(context) + 1


def test_a_context_swallowed_by_the_first_token_becomes_the_prefix():
    model, tokenizer = adapter(), small_tokenizer()
    whole = tokenizer.encode("self")
    assert len(whole) == 1
    assert model._encode_pair("s", "elf") == ([0], whole)


def test_equal_to_lm_evals_own_adapter_where_no_token_spans_the_seam():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=small_model(), tokenizer=small_tokenizer(), batch_size=3, max_length=40, device="cpu")
        clean = [PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[4], PAIRS[6]]
        expected = theirs.loglikelihood(instances("loglikelihood", clean), disable_tqdm=True)
        texts = [(text * 3,) for text, _ in PAIRS if text]
        rolling = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    model = adapter(max_length=40, batch_size=3)
    for found, wanted in zip(model.loglikelihood(instances("loglikelihood", clean)), expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=2e-4)
        assert found[1] == wanted[1]
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) == pytest.approx(rolling, abs=1e-3)


def test_an_overlong_context_loses_its_left_end():
    context, continuation = "name = value\n" * 40, "return name"
    (found,) = adapter(max_length=24).loglikelihood(instances("loglikelihood", [(context, continuation)]))
    whole = small_tokenizer().encode(context + continuation)
    tail = small_tokenizer().encode(continuation)
    split = len(whole) - len(tail) - (1 if whole[-len(tail) :] == tail else 0)
    expected = score_directly(whole[:split], whole[split:], window=24)
    assert found[0] == pytest.approx(expected[0], abs=2e-4)


def test_rolling_scores_every_token_once_with_the_most_context():
    text = "".join(f"value_{n} = wrap(text, {n})\n" for n in range(12))
    tokens, window = small_tokenizer().encode(text), 32
    assert len(tokens) > 3 * window
    (found,) = adapter(max_length=window).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    expected, done = 0.0, 0
    while done < len(tokens):
        until = min(len(tokens), done + window)
        row = [0, *tokens[:until]][-(window + 1) :]
        fresh = until - done
        expected += score_directly(row[:-fresh], row[-fresh:])[0]
        done = until
    assert found == pytest.approx(expected, abs=1e-3)


def test_an_empty_text_has_likelihood_one():
    texts = [("",), ("import os",)]
    first, second = adapter().loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert first == 0.0
    assert second < 0


def test_batches_are_sorted_and_bounded(monkeypatch):
    model = adapter(batch_size=3)
    model.loglikelihood(instances("loglikelihood", PAIRS))
    widths = [shape[1] for shape in model.runner.shapes]
    assert widths == sorted(widths, reverse=True)
    assert all(shape[0] <= 3 for shape in model.runner.shapes)
    monkeypatch.setattr(runner_lm, "LOGITS_BYTES", 400 * 4 * 40)
    bounded = adapter(batch_size=3)
    bounded.loglikelihood(instances("loglikelihood", PAIRS))
    assert all(rows == 1 or rows * width <= 40 for rows, width, _ in bounded.runner.shapes)


def test_one_token_continuations_need_only_the_last_logits():
    model = adapter()
    model.loglikelihood(instances("loglikelihood", [("a = b", "("), ("import os", "(")]))
    assert [shape[2] for shape in model.runner.shapes] == [0]


@pytest.mark.parametrize("context", ["", "text"])
def test_an_empty_continuation_is_refused(context):
    with pytest.raises(DataError, match="empty continuation"):
        adapter().loglikelihood(instances("loglikelihood", [(context, "")]))


def test_a_continuation_longer_than_the_window_is_refused():
    with pytest.raises(DataError, match="1 to 8"):
        adapter(max_length=8).loglikelihood(instances("loglikelihood", [("a", " = b" * 40)]))


def test_the_window_never_exceeds_the_runner():
    assert adapter(max_context=64, max_length=512).max_length == 64
    assert adapter(max_context=64).max_length == 64
    assert adapter(max_context=64, max_length=16).max_length == 16


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        RunnerLM(SmallRunner(small_model()), tokenizer)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_are_counted(broken):
    runner = SmallRunner(small_model(), damage=lambda logits: torch.full_like(logits, broken))
    model = RunnerLM(runner, small_tokenizer())
    found = model.loglikelihood(instances("loglikelihood", PAIRS[:3]))
    assert model.non_finite == 3
    assert all(not math.isfinite(value) for value, _ in found)


def greedy(prompt: str, count: int) -> str:
    """Greedy continuation, one whole forward a token, no padding."""
    tokens = small_tokenizer().encode(prompt)
    start = len(tokens)
    with torch.inference_mode():
        for _ in range(count):
            following = int(small_model()(torch.tensor([tokens])).logits[0, -1].argmax())
            if following == 0:
                break
            tokens.append(following)
    return small_tokenizer().decode(tokens[start:], skip_special_tokens=True)


def test_generation_of_ragged_batches_is_greedy():
    prompts = [context for context, _ in PAIRS if context]
    requests = instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts])
    assert adapter(batch_size=4).generate_until(requests) == [greedy(prompt, 6) for prompt in prompts]


def test_generation_stops_at_the_first_stop_string_and_no_later():
    prompt = PAIRS[0][0]
    whole = greedy(prompt, 12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    model = adapter()
    (found,) = model.generate_until(instances("generate_until", [(prompt, {"until": [stop], "max_gen_toks": 200})]))
    assert found == whole.split(stop)[0]
    assert model.runner.steps < 12


def test_each_generation_option_gets_its_own_batch():
    prompts = [(PAIRS[0][0], {"until": ["zzz"], "max_gen_toks": 3}), (PAIRS[0][0], {"until": "zzz", "max_gen_toks": 5})]
    found = adapter().generate_until(instances("generate_until", prompts))
    assert found == [greedy(PAIRS[0][0], 3), greedy(PAIRS[0][0], 5)]


def test_an_overlong_prompt_leaves_room_to_generate():
    model = adapter(max_length=32)
    model.generate_until(instances("generate_until", [("name = value\n" * 40, {"until": [], "max_gen_toks": 8})]))
    assert model.runner.shapes[0][1] == 24
    with pytest.raises(DataError, match="max_gen_toks is 32"):
        model.generate_until(instances("generate_until", [("x", {"until": [], "max_gen_toks": 32})]))


def test_progress_ends_at_the_total():
    seen: list[tuple[str, int, int]] = []
    model = adapter(batch_size=2, progress=lambda *step: seen.append(step))
    model.loglikelihood(instances("loglikelihood", PAIRS))
    assert seen[-1] == ("loglikelihood", len(PAIRS), len(PAIRS))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
