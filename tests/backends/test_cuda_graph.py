"""Captured steps: what a replay gives, what is put back, and what happens where a step cannot be captured.

Without a device the runtime is replaced by one that records calls and makes them again, which is all that the logic
needs; on a device the same is asked of real steps, to the bit, with nothing allocated and nobody waited for.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends import cuda_graph
from optimizer.backends.cuda_graph import WARM_UP, GraphedStep
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.backends.paged_step import Step
from optimizer.errors import DeviceError
from optimizer.passes.base import view
from optimizer.quant.kv import KvKind
from tests.backends.decoder_models import VOCAB, llama, prompts
from tests.backends.fake_cuda import FakeCuda, install

pytestmark = [
    # Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # off, so that float32 means float32
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

ROWS = (1, 2, 4, 8)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)


class Counter:
    """A step that returns twice its buffer and its buffer, and then advances it, as a decode step does."""

    def __init__(self, fake: FakeCuda) -> None:
        self.buffer, self.runs = torch.tensor([3]), 0
        self.run = fake.recorded(self.forward, (torch.zeros(1), torch.zeros(1, dtype=torch.long)))

    def forward(self) -> tuple[Tensor, Tensor]:
        self.runs += 1
        found = self.buffer * 2.0, self.buffer.clone()
        self.buffer.add_(1)
        return found


def test_capturing_puts_the_buffers_back(fake: FakeCuda) -> None:
    counter = Counter(fake)
    step = GraphedStep(counter.run, [counter.buffer])
    step.capture()
    assert counter.buffer.tolist() == [3]
    assert counter.runs == WARM_UP + 1  # and one replay, which is compared
    logits, chosen = step()
    assert (logits.tolist(), chosen.tolist(), counter.buffer.tolist()) == ([6.0], [3], [4])


def test_the_first_call_captures_and_later_ones_replay(fake: FakeCuda) -> None:
    counter = Counter(fake)
    step = GraphedStep(counter.run, [counter.buffer])
    assert [step()[1].item() for _ in range(3)] == [3, 4, 5]
    counter.buffer.fill_(40)
    assert step()[1].item() == 40
    assert fake.captures == 1
    assert counter.runs == WARM_UP + 1 + 4
    assert fake.current is fake.default


def test_results_survive_the_next_replay(fake: FakeCuda) -> None:
    counter = Counter(fake)
    step = GraphedStep(counter.run, [counter.buffer])
    first, second = step(), step()
    assert [t.item() for t in first] == [6.0, 3]
    assert [t.item() for t in second] == [8.0, 4]
    assert first[0].data_ptr() not in {t.data_ptr() for t in step.outputs}


def test_a_replay_that_gives_other_numbers_is_not_used(fake: FakeCuda) -> None:
    counter = Counter(fake)
    step = GraphedStep(counter.run, [counter.buffer])

    def wrong() -> tuple[Tensor, Tensor]:
        logits, chosen = counter.run()
        if fake.capturing is not None:  # what was captured is not what was run
            (_, outputs), function = fake.capturing.calls[0], counter.forward
            fake.capturing.calls[0] = (lambda: (function()[0] + 1e-6, function()[1]), outputs)
        return logits, chosen

    step.run = wrong
    assert [t.item() for t in step()] == [6.0, 3]
    assert "other numbers" in step.reason
    assert step.graph is None
    assert [t.item() for t in step()] == [8.0, 4]
    assert fake.captures == 1  # it is not tried again


def test_a_step_that_cannot_be_captured_runs_as_it_is(fake: FakeCuda) -> None:
    counter = Counter(fake)

    def waits() -> tuple[Tensor, Tensor]:
        if fake.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with device assertions")
        return counter.run()

    step = GraphedStep(waits, [counter.buffer])
    assert [step()[1].item() for _ in range(2)] == [3, 4]
    # The first error is the reason, not what the end of the capture says of it; its further lines are advice.
    assert step.reason.endswith("CUDA graph: operation not permitted when stream is capturing")
    assert step.graph is None
    assert fake.current is fake.default
    assert fake.pools_ended == 1
    assert len(cuda_graph._BROKEN) == 1
    other = Counter(fake)
    assert GraphedStep(other.run, [other.buffer])()[1].item() == 3
    assert fake.captures == 1


def test_a_capture_that_fails_at_its_end_names_that_reason(fake: FakeCuda) -> None:
    counter = Counter(fake)
    fake.ending = "capture was invalidated"
    with pytest.raises(DeviceError, match="capture was invalidated"):
        GraphedStep(counter.run, [counter.buffer]).capture()
    assert fake.current is fake.default


def test_steps_share_a_pool_for_as_long_as_there_are_any(fake: FakeCuda) -> None:
    counters = [Counter(fake) for _ in range(2)]
    steps = [GraphedStep(c.run, [c.buffer]) for c in counters]
    for step in steps:
        step.capture()
    assert steps[0]._pool is steps[1]._pool is cuda_graph._POOLS[0]
    del step
    steps.clear()
    gc.collect()
    assert not cuda_graph._POOLS  # the next step gets a new one: PyTorch has given up the memory of this


def paged(model: Any, *, compile: bool = True, **options: Any) -> PagedRunner:
    """Small blocks and chunks, so that every sequence has several of both."""
    return PagedRunner(view(model), compile=compile, options=PagedOptions(**{"block_size": 8, "chunk": 7} | options))


def test_the_ledger_says_how_steps_ran_and_why(fake: FakeCuda) -> None:
    tokens, _ = prompts(1, 12)
    expected = paged(llama(), compile=False).generate(tokens, max_new_tokens=6)
    for fails in (False, True):
        runner = paged(llama(), compile=False)
        step = runner.step(1)
        like = torch.zeros(1, 1, VOCAB), torch.zeros(1, 1, dtype=torch.long)
        step._graph = GraphedStep(fake.recorded(step.uncaptured, like), step.buffers)
        if fails:
            fake.ending = "the stream was waited for"
        assert torch.equal(runner.generate(tokens, max_new_tokens=6), expected)
        assert runner.ledger.steps["eager"] == (5 if fails else 0)
        assert runner.ledger.steps["replayed"] == (0 if fails else 5)
        assert ("the stream was waited for" in runner.ledger.notes.get("graph", "")) == fails


# On a device.


def on_device() -> Any:
    return llama().cuda()


def bound(runner: PagedRunner, rows: int, length: int = 20) -> Step:
    """The step of a bucket, with that many sequences in it."""
    tokens, mask = prompts(rows, length, ragged=length > 3 * rows)
    runner.prefill(tokens, mask)
    step = runner.step(rows)
    step.bind(runner._rows, [[int(row[-1])] for row in tokens])
    step.reserve([8] * rows)
    return step


def both_ways(step: Step) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A step replayed, and the same uncaptured from the same buffers, which it leaves advanced by one."""
    before = [buffer.clone() for buffer in step.buffers]
    replayed = step()
    for buffer, value in zip(step.buffers, before, strict=True):
        buffer.copy_(value)
    with torch.inference_mode(False), torch.no_grad():
        return replayed, step.uncaptured()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("rows", ROWS)
def test_a_replay_is_the_step_itself_to_the_bit(rows: int, kind: KvKind | None) -> None:
    torch._dynamo.reset()
    runner = paged(on_device().bfloat16(), kv=kind)
    step = bound(runner, rows)
    seen = []
    for turn in range(4):
        step.tokens[:rows, 0] = torch.randint(3, VOCAB, (rows,), generator=torch.Generator().manual_seed(turn)).cuda()
        (logits, chosen), (own_logits, own_chosen) = both_ways(step)
        assert torch.equal(logits, own_logits)
        assert torch.equal(chosen, own_chosen)
        assert bool(logits[:rows].isfinite().all())
        seen.append(logits[:rows].clone())
    assert not any(torch.equal(seen[0], later) for later in seen[1:])  # the inputs did change
    step = bound(runner, rows, length=33)  # other sequences, in other blocks
    for mine, own in zip(*both_ways(step), strict=True):
        assert torch.equal(mine, own)
    assert runner.ledger.steps["replayed"] == 5
    assert not runner.ledger.steps["compiled"] + runner.ledger.steps["eager"]
    assert "graph" not in runner.ledger.notes


@pytest.mark.gpu
def test_nothing_is_allocated_and_nobody_waits_in_a_replayed_step() -> None:
    torch._dynamo.reset()
    step = bound(paged(on_device()), 2)
    for _ in range(3):  # capture, and let the allocator have room for the copies of the results
        step()
    torch.cuda.synchronize()
    assert step._graph is not None
    assert step._graph.graph is not None
    before = torch.cuda.memory_stats()
    step._graph.graph.replay()
    after = torch.cuda.memory_stats()
    assert after["allocation.all.allocated"] == before["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    later = torch.cuda.memory_stats()
    assert later["allocation.all.allocated"] == after["allocation.all.allocated"] + 2  # logits and tokens, copied out
    assert later["segment.all.allocated"] == before["segment.all.allocated"]  # no cudaMalloc


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the profiler's advice to its users
def test_a_replayed_step_is_one_launch_and_the_copies_of_its_results() -> None:
    torch._dynamo.reset()
    step = bound(paged(on_device()), 2)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        step()
        step()
    names = [event.name for event in found.events()]
    assert sum("GraphLaunch" in name for name in names) == 2
    # The profiler itself synchronizes the device when it stops, but no stream; nothing is brought to the host.
    assert not [name for name in names if "StreamSynchronize" in name or "DtoH" in name or "cudaMalloc" in name]


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_runs_uncaptured_and_says_so() -> None:
    torch._dynamo.reset()
    tokens, mask = prompts(2, 20, ragged=True)
    expected = paged(on_device()).generate(tokens, mask, max_new_tokens=12)
    runner = paged(on_device())
    step = runner.step(2)

    def waits() -> tuple[Tensor, Tensor]:
        logits, chosen = step.uncaptured()
        assert chosen.sum().item() >= 0
        return logits, chosen

    step._graph = GraphedStep(waits, step.buffers)
    stream = torch.cuda.current_stream()
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=12), expected)
    assert "cannot be captured" in step._graph.reason
    assert "captur" in step._graph.reason.partition(": ")[2]
    assert step._graph.reason in runner.ledger.notes["graph"]
    assert runner.ledger.steps["compiled"] == 11
    assert not runner.ledger.steps["replayed"]
    # Nothing of the capture that failed is left: not its stream, nor its hold on memory and random numbers.
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert bool(torch.randn(1000, device="cuda").isfinite().all())
    torch.cuda.empty_cache()
    other = bound(runner, 4)
    for mine, own in zip(*both_ways(other), strict=True):
        assert torch.equal(mine, own)
    assert runner.ledger.steps["replayed"] == 1


@pytest.mark.gpu
def test_a_runner_after_all_others_are_gone_is_captured_too() -> None:
    for _ in range(2):
        torch._dynamo.reset()
        gc.collect()
        runner = paged(on_device())
        runner.generate(prompts(1, 12)[0], max_new_tokens=4)
        assert runner.ledger.steps["replayed"] == 3, runner.ledger.notes
        del runner
