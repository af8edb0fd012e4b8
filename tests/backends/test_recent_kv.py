"""Recent tokens in the model's type beside 8-bit blocks, against attention that reads each key in the type it says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from optimizer.backends.block_pool import OutOfBlocks
from optimizer.backends.drafting import Draft, PromptLookup
from optimizer.backends.engine import Engine
from optimizer.backends.kv_layout import FEW_TOKENS
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.sampling import Sampling
from optimizer.backends.schedule import Limits
from optimizer.backends.speculation import Speculation
from optimizer.errors import UsageError
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind, round_kv
from tests.backends.decoder_models import llama, mistral, prompts

# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

KINDS: tuple[KvKind, ...] = ("int8", "fp8")
RECENT = 16  # a ring of 32 slots, which every text here goes round several times


@pytest.fixture(scope="module", autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def paged(model: Any, *, compile: bool = False, **options: Any) -> PagedRunner:
    """Small blocks and chunks, so that every sequence has several of both."""
    settings = PagedOptions(**{"block_size": 8, "chunk": 7, "kv": "int8", "recent": RECENT} | options)
    return PagedRunner(view(model), compile=compile, options=settings)


def mixed(
    kind: KvKind, recent: int, kept: int, window: int, sinks: int, module: Any, query: Tensor, key: Tensor,
    value: Tensor, _mask: Any, scaling: float = 1.0, **_options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over one whole text: query t reads key p exactly where
    p ≥ max(t + 1 - recent, kept), and as it was rounded elsewhere."""
    groups = query.shape[1] // key.shape[1]
    exact = [t.double().repeat_interleave(groups, 1) for t in (key, value)]
    rounded = [round_kv(t, kind).double().repeat_interleave(groups, 1) for t in (key, value)]
    place = torch.arange(key.shape[2])
    near = (place > place[:, None] - recent) & (place >= kept)
    seen = place <= place[:, None]
    if window:
        seen &= (place > place[:, None] - window) | (place < sinks)
    scores = torch.where(near, *(query.double() @ keys[0].mT for keys in (exact, rounded))) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights * near) @ exact[1] + (weights * ~near) @ rounded[1]
    return out.to(query.dtype).transpose(1, 2), None


def expected(
    model: Any, tokens: Tensor, kind: KvKind, *, recent: int = RECENT, kept: int = 0, window: int = 0, sinks: int = 0
) -> Tensor:
    """Logits `[B, S, V]` of one forward that attends so."""
    AttentionInterface.register("mixed", partial(mixed, kind, recent, kept, window, sinks))
    simulated = view(model)
    simulated.config._attn_implementation = "mixed"
    with torch.no_grad():
        return simulated(input_ids=tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]


def stepped(runner: PagedRunner, tokens: Tensor, prompt: int) -> Tensor:
    """Logits `[B, S - prompt + 1, V]` after the prompt and after each later token, given one at a time."""
    found = [runner.prefill(tokens[:, :prompt])]
    found += [runner.decode(tokens[:, i]) for i in range(prompt, tokens.shape[1])]
    return torch.stack(found, 1)


def text(batch: int, length: int) -> Tensor:
    return prompts(batch, length, seed=3)[0]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    # float32 sums in another order move logits of up to 40 by 1e-3 at most.
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_each_token_reads_the_last_ones_exactly_and_the_others_rounded(kind: KvKind, chunk: int) -> None:
    model, tokens = llama(), text(2, 90)
    wanted = expected(model, tokens, kind)
    found = paged(model, kv=kind, chunk=chunk).prefill(tokens, all_logits=True)
    assert_close(found, wanted)
    assert_close(stepped(paged(model, kv=kind, chunk=chunk), tokens, 41), wanted[:, 40:])
    for other in (expected(model, tokens, kind, recent=0), expected(model, tokens, kind, recent=RECENT - 1)):
        assert (other - wanted).abs().max() > 1e-2  # a token more or less shows


def test_a_text_that_fits_the_ring_is_as_without_rounding() -> None:
    model, tokens = llama(), text(2, 30)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
    assert_close(stepped(paged(model, recent=30), tokens, 9), exact[:, 8:])


@pytest.mark.parametrize(("recent", "window", "sinks"), [(16, 24, 3), (40, 24, 20), (24, 24, 0)])
def test_windows_and_sinks(recent: int, window: int, sinks: int) -> None:
    model, tokens = llama(), text(2, 80)
    wanted = expected(model, tokens, "fp8", recent=recent, window=window, sinks=sinks)
    runner = paged(model, kv="fp8", recent=recent, window=window, sinks=sinks)
    assert_close(stepped(runner, tokens, 37), wanted[:, 36:])
    own = mistral(window=window)
    assert_close(stepped(paged(own, recent=recent), tokens, 37), expected(own, tokens, "int8", recent=recent,
                                                                          window=window)[:, 36:])  # fmt: skip


def test_rows_of_other_lengths_and_with_nothing_yet() -> None:
    model = llama()
    tokens, mask = prompts(4, 60, ragged=True)
    mask[3, :50] = 0
    found = paged(model).prefill(tokens, mask, all_logits=True)
    for row in range(4):
        real = mask[row].bool()
        assert_close(found[row][real], expected(model, tokens[row][real][None], "int8")[0])


def test_a_found_prefix_is_read_in_8_bits_and_own_tokens_are_not() -> None:
    model, tokens = llama(), text(1, 80)
    runner = paged(model)
    whole = runner.prefill(tokens[:, :50])
    wanted = expected(model, tokens, "int8", kept=48)
    found = stepped(runner, tokens, 50)
    assert runner._rows[0].cached == runner._rows[0].kept == 48
    # The prefix itself was computed with its recent tokens exact, which the simulation of one forward does not do.
    by_hand = paged(model, share_prefixes=False)
    row = by_hand.cache.open([])
    by_hand.extend([row], [tokens[0, :48].tolist()])
    row.kept = 48
    again = [by_hand.extend([row], [tokens[0, :n].tolist()])[0] for n in range(50, 81)]
    assert_close(found[0], torch.stack(again))
    assert (found[:, 0] - whole).abs().max() > 1e-3
    assert (found[:, 20:] - wanted[:, 69:]).abs().max() < 1.0  # and the two are near


def test_tokens_taken_back_are_forgotten_and_what_left_the_ring_is_read_rounded() -> None:
    model, tokens = llama(), text(1, 90)
    runner = paged(model, share_prefixes=False)
    for cut in (70, 40):
        row = runner.cache.open([])
        runner.extend([row], [tokens[0, :80].tolist()])
        runner.cache.truncate(row, cut)
        assert row.kept == min(cut, 80 + FEW_TOKENS - runner.layout.ring)
        other = torch.cat([tokens[:, :cut], prompts(1, 30, seed=9)[0]], 1)
        plain = paged(model, share_prefixes=False)
        base = plain.cache.open([])
        plain.extend([base], [other[0, :cut].tolist()])
        base.kept = row.kept
        for end in range(cut + 1, cut + 30, 5):
            assert_close(*(r.extend([s], [other[0, :end].tolist()]) for r, s in ((runner, row), (plain, base))))
        runner.cache.close(row)


def test_requests_that_come_go_and_are_put_back_get_the_tokens_they_get_alone() -> None:
    # Nothing is shared at first; those that were put back would find their own tokens, in 8 bits.
    single, runner = paged(llama(), share_prefixes=False), paged(llama(), cache_tokens=160, max_batch=3)
    every = [row[: 5 + 4 * i].tolist() for i, row in enumerate(prompts(6, 40)[0])]
    sampling = Sampling(0.9, 40, 0.95)
    alone = [single.generate_batch([p], max_new_tokens=40, sampling=sampling, seed=9)[0] for p in every]
    engine = Engine(runner, Limits(8, 30))
    assert engine.limits.max_batch == 3
    requests = []
    for prompt in every:
        requests.append(engine.submit(prompt, max_new_tokens=40, sampling=sampling, seed=9))
        engine.step()
    gone = engine.submit(every[0], max_new_tokens=40)
    engine.step()
    engine.cancel(gone)
    while engine.busy:
        engine.step()
    assert [r.tokens for r in requests] == alone
    assert engine.stats.preemptions > 0
    assert not any(request.cached for request in requests)
    assert engine.stats.peak_rows == 3
    assert runner.cache.bytes_in_use == 0


@pytest.mark.parametrize("branches", [1, 3])
def test_guesses_change_no_token(branches: int) -> None:
    model = llama()
    row = prompts(1, 20)[0][0].tolist()
    prompt = row + row + row[:7]  # repeats, so that some guesses stand
    (wanted,) = paged(model).generate_batch([prompt], max_new_tokens=60)
    runner = paged(model)
    speculation = Speculation(lambda: PromptLookup(2, 1, branches), 7)
    engine = Engine(runner, speculation=speculation)
    request = engine.submit(prompt, max_new_tokens=60)
    while engine.busy:
        engine.step()
    assert request.tokens == wanted
    assert engine.stats.steps < 60


def test_a_tree_sees_its_own_branch_exactly() -> None:
    model, tokens = llama(), text(1, 50)
    runner = paged(model, share_prefixes=False)
    row = runner.cache.open([])
    runner.extend([row], [tokens[0, :40].tolist()])
    branches = [tokens[0, 41:46].tolist(), [5, *tokens[0, 42:45].tolist()]]
    draft = Draft.tree(branches, 15)
    step = runner.step(1, 1 + len(draft))
    step.bind([row], [[int(tokens[0, 40]), *draft.tokens]], drafts=[draft])
    step.reserve([1 + len(draft)])
    _, chosen = step()
    for node, depth in enumerate(draft.depths):
        path, at = [], node - 1
        while at >= 0:
            path.append(draft.tokens[at])
            at = draft.parents[at]
        whole = torch.tensor([[*tokens[0, :41].tolist(), *path[::-1]]])
        assert whole.shape[1] == 41 + depth
        assert chosen[0, node] == expected(model, whole, "int8")[0, -1].argmax()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_in_use_is_what_the_layout_says(kind: KvKind) -> None:
    runner = paged(llama(), kv=kind, max_batch=4)
    runner.prefill(prompts(3, 64)[0])
    layout = runner.layout
    # Keys and values of 2 layers, 2 heads of 16: a byte each and a scale, and float32 in rings of 16 + 16.
    assert layout.bytes_per_token() == 2 * 2 * 2 * (16 + 4)
    assert layout.ring_bytes == 32 * 2 * 2 * 2 * 16 * 4
    assert runner.cache.bytes_in_use == 3 * (64 * layout.bytes_per_token() + layout.ring_bytes)
    held = [t for layer in runner.cache.storage.layers for t in (*layer.tensors, *layer.recent)]
    assert sum(t.numel() * t.element_size() for t in held) == runner.kv_cache_bytes
    assert runner.kv_cache_bytes == runner.cache.pools[0].blocks * 8 * layout.bytes_per_token() + 4 * layout.ring_bytes
    assert runner.kv_bytes_per_token == layout.bytes_per_token() + layout.ring_bytes // 1024
    own = 2 * 2 * 2 * 16 * 4
    without = runner.bytes_per_step(2, 0)
    assert runner.bytes_per_step(2, 10) - without == 2 * 10 * own
    assert runner.bytes_per_step(2, 100) - without == 2 * (16 * own + 84 * layout.bytes_per_token())
    runner.reset(1)
    assert runner.cache.bytes_in_use == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_nearer_to_the_model_than_8_bits_alone(kind: KvKind) -> None:
    model, tokens = llama(), text(4, 120)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits[:, 40:]
    errors = [
        float((stepped(paged(model, kv=kind, recent=recent), tokens, 41) - exact).norm() / exact.norm())
        for recent in (0, 16, 64)
    ]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.7 * errors[0]


def test_the_compiled_step_is_one_graph_and_gives_the_same_logits() -> None:
    model, tokens = llama(), text(2, 60)
    runner = paged(model, compile=True)
    runner.backend = "aot_eager"
    assert_close(stepped(runner, tokens, 20), expected(model, tokens, "int8")[:, 19:])
    assert runner.ledger.steps["compiled"] == 40
    assert not runner.ledger.steps["eager"]


@pytest.mark.slow
def test_the_step_compiles_with_inductor() -> None:
    model, tokens = llama(), text(2, 60)
    assert_close(stepped(paged(model, compile=True), tokens, 20), expected(model, tokens, "int8")[:, 19:])


def test_what_another_sequence_left_behind_is_never_seen() -> None:
    model, tokens = llama(), text(2, 60)
    runner = paged(model)
    for layer in runner.cache.storage.layers:
        for tensor in (*layer.tensors, *layer.recent):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    assert_close(stepped(runner, tokens, 20), expected(model, tokens, "int8")[:, 19:])


def test_more_rows_than_rings_are_refused_with_the_remedy() -> None:
    runner = paged(llama(), max_batch=2)
    with pytest.raises(UsageError, match="max_batch 2"):
        runner.prefill(prompts(3, 8)[0])
    rows = [runner.cache.open([]) for _ in range(3)]
    for row in rows[:2]:
        runner.cache.reserve(row, 8)
    with pytest.raises(OutOfBlocks, match="max_batch"):
        runner.cache.reserve(rows[2], 8)
    runner.cache.close(rows[0])
    runner.cache.reserve(rows[2], 8)
    for row in rows[1:]:
        runner.cache.close(row)
    assert runner.cache.bytes_in_use == 0


@pytest.mark.parametrize("options", [{"kv": None}, {"recent": 15}, {"recent": -1}, {"max_batch": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Invalid"):
        PagedOptions(**{"kv": "int8", "recent": 16} | options)
