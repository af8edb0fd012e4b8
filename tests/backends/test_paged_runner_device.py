"""The paged runner and its engine on a device, steps replayed: the tokens of transformers, alone and as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.sampling import Sampling
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind
from tests.backends.decoder_models import llama, prompts
from tests.passes import small_architectures

pytestmark = [
    pytest.mark.gpu,
    # Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # off, so that float32 means float32
]

TIE = 2e-3
"""float32 sums in another order move logits of up to 40 by about 1e-4; two tokens this near may change places."""


def paged(model: Any, *, compile: bool = True, **options: Any) -> PagedRunner:
    """Small blocks and chunks, so that every sequence has several of both."""
    return PagedRunner(view(model), compile=compile, options=PagedOptions(**{"block_size": 8, "chunk": 7} | options))


def generated(model: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        tokens.cuda(), attention_mask=mask.cuda(), max_new_tokens=new, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip


def assert_same_choices(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """The same tokens, up to a place where the model's own logits of the two lie within `TIE`."""
    if found == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[:at]], device="cuda")).logits[0, -1].float()
    assert abs(float(logits[found[at]] - logits[expected[at]])) < TIE, f"token {at} of {len(expected)} differs"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_greedy_tokens_are_transformers_own(name: str) -> None:
    torch._dynamo.reset()
    model = small_architectures.ARCHITECTURES[name]().cuda()
    runner = paged(model)
    tokens = small_architectures.tokens(3, 24)
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :11] = 0, 0
    for rows in (1, 3):
        expected = generated(model, tokens[:rows], mask[:rows], 60).tolist()
        found = runner.generate(tokens[:rows], mask[:rows], max_new_tokens=60).tolist()
        for row in range(rows):
            prompt = tokens[row][mask[row].bool()].tolist()
            assert_same_choices(model, prompt, found[row][24:], expected[row][24:])
    assert runner.ledger.steps["replayed"] == 2 * 59, runner.ledger.notes


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_caches_give_the_logits_that_they_give_on_a_cpu(kind: KvKind) -> None:
    # What is stored is rounded alike, but for entries on a tie of the rounding, which float32 sums in another order
    # may move by one step: 1/127 of a value at most in int8, 1/16 in fp8, in one of hundreds of entries.
    torch._dynamo.reset()
    tokens = torch.cat([prompts(2, 20)[0], prompts(2, 12, seed=3)[0]], 1)
    found = {}
    for device in ("cpu", "cuda"):
        runner = paged(llama().to(device), compile=device == "cuda", kv=kind)
        first = [runner.prefill(tokens[:, :20])]
        found[device] = torch.stack([*first, *(runner.decode(tokens[:, i]) for i in range(20, 32))], 1).cpu()
    error = (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm()
    assert error < 0.01


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 40, 0.95)], ids=["greedy", "drawn"])
def test_requests_batched_as_they_come_get_the_tokens_they_get_alone(sampling: Sampling) -> None:
    torch._dynamo.reset()
    model = llama().cuda()
    runner = paged(model, share_prefixes=False)
    every = [row[: 5 + 4 * i].tolist() for i, row in enumerate(prompts(6, 30)[0])]
    alone = [runner.generate_batch([p], max_new_tokens=24, sampling=sampling, seed=9)[0] for p in every]
    engine = Engine(runner)
    requests = []
    for prompt in every:  # one more joins every third step
        requests.append(engine.submit(prompt, max_new_tokens=24, sampling=sampling, seed=9))
        for _ in range(3):
            engine.step()
    while engine.busy:
        engine.step()
    assert engine.stats.peak_rows > 2
    for prompt, request, expected in zip(every, requests, alone, strict=True):
        if sampling.temperature:
            assert request.tokens == expected
        else:
            assert_same_choices(model, prompt, request.tokens, expected)
    assert "graph" not in runner.ledger.notes
    assert not runner.ledger.steps["compiled"] + runner.ledger.steps["eager"]
