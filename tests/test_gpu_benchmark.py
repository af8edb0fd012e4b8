"""The benchmark behind the GPU claims runs: its code, on shapes and a device that say nothing of speed."""

from __future__ import annotations

import json
import math
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import caches, claims, decoding, kernels, models
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.decoding import Decoding, fill, idle_share
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.passes.base import view
from tests.backends.decoder_models import llama


class Bytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were, of tensors with or without data."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.fixture
def bench() -> Bench:
    small = Bench(torch.device("cpu"), shrink=32, repeats=1)
    kernels.ceilings(small)
    return small


MODELS = [models.steps, models.contexts, models.quantizers]
KERNELS = [
    kernels.gemv, kernels.gemm, kernels.prefill, kernels.attention, kernels.elementwise, caches.attention, caches.write,
]  # fmt: skip


@pytest.mark.parametrize("part", KERNELS)
def test_the_kernels_are_measured_beside_what_they_replace(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


@pytest.mark.slow
# Inductor imports torch.jit on first use, and PyTorch 2.13 deprecates its own call there.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("part", MODELS)
def test_whole_models_are_measured(part, bench):
    part(bench)
    assert bench.rows
    assert all(math.isfinite(value) and value > 0 for value in bench.rows.values())


def test_every_part_can_be_chosen_and_is_tried_here():
    assert {getattr(part, "func", part) for part in PARTS.values()} == {*KERNELS, *MODELS}
    assert [PARTS[name].keywords["size"] for name in ("steps-8b", "steps-1b")] == list(models.MODELS)


@pytest.mark.parametrize("part", KERNELS)
def test_at_life_size_what_is_called_on_a_gpu_takes_its_operands(part, monkeypatch):
    """Calls of a part on tensors without data, and that all operands at once fit half of a GPU of 80 GB."""
    cache = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: cache)
    # A PyTorch without CUDA knows its devices by name alone; there they are without a device at all.
    real = Bench(torch.device("cuda" if torch.backends.cuda.is_built() else "meta"))

    def seconds(candidates):
        for calls in candidates.values():
            for call in calls[:2]:
                call()
        return dict.fromkeys(candidates, 1e-3)

    monkeypatch.setattr(real, "seconds", seconds)
    real.bandwidth = 4e12
    with FakeTensorMode(allow_non_fake_inputs=True), Bytes() as held:
        part(real)
    assert real.rows
    assert all(math.isfinite(value) and value > 0 for value in real.rows.values())
    if part in (kernels.gemv, kernels.gemm):
        assert any("_weight_int4pack_mm" in name for name in real.rows)
    assert 1e8 < held.most < 40e9


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_a_step_behind_a_context_that_was_never_run(kind):
    runner = PagedRunner(view(llama()), compile=False, options=PagedOptions(kv=kind, block_size=8, cache_tokens=400))
    fill(runner.cache.storage)
    stored = [t.float() for layer in runner.cache.storage.layers for t in layer.tensors]
    assert all(bool(t.isfinite().all()) and float((t != 0).float().mean()) > 0.9 for t in stored)
    rows = [Decoding(runner, context) for context in (16, 128)]
    for row in (*rows, *rows):
        row.turn(9)
    assert [row.row.length for row in rows] == [16, 128]
    assert runner.ledger.steps["eager"] == 4 * 9
    assert not runner.ledger.steps["prefill"]
    rows[1].take_over()
    rows[1].go_on(1)
    logits, _ = rows[1].step()
    assert bool(logits.isfinite().all())
    assert int(rows[1].step.positions) == 130


def test_idle_time_is_what_no_kernel_covers():
    assert idle_share([(0, 4), (2, 3), (6, 8), (7, 10)]) == pytest.approx(0.2)
    assert idle_share([(5, 6)]) == 0


def test_idle_time_is_of_what_ran_on_the_device_while_the_step_went_on(monkeypatch):
    spans = [("CPU", 0, 100), ("CUDA", 10, 14), ("CUDA", 16, 20)]
    events = [
        SimpleNamespace(device_type=SimpleNamespace(name=name), time_range=SimpleNamespace(start=start, end=end))
        for name, start, end in spans
    ]
    steps = []

    class Profiler:
        def __enter__(self):
            steps.append(len(steps))
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_):
            steps.append("stopped")

    monkeypatch.setattr(decoding, "profile", lambda activities: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    row = Decoding(PagedRunner(view(llama()), compile=False), 16)
    assert row.idle_share(3) == pytest.approx(0.2)
    assert row.runner.ledger.steps["eager"] == 5
    assert row.row.length == 16
    assert steps == [0, "stopped"]


def made_up(value: float):
    def part(bench: Bench) -> None:
        for _, name, _, _ in claims.CLAIMS:
            bench.record(name, value)

    return part


def broken(bench: Bench) -> None:
    bench.record("half a part", 1.0)
    raise RuntimeError("a mistake")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The result and the page in another folder, and ceilings that take no time."""
    result, page = tmp_path / "results" / "gpu.json", tmp_path / "docs" / "gpu.md"
    monkeypatch.setattr(main, "RESULT", result)
    monkeypatch.setattr(main, "DOC", page)
    monkeypatch.setattr(main.kernels, "ceilings", lambda _bench: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Bench, "free", lambda _self: None)
    return result, page


def test_a_part_that_fails_costs_no_other_and_every_part_is_written_when_it_ends(places, monkeypatch, capsys):
    result, page = places
    seen = []

    def late(bench: Bench) -> None:
        seen.append(json.loads(result.read_text(encoding="utf-8")))
        bench.record("late", 3.0)

    monkeypatch.setattr(main, "PARTS", {"claims": made_up(0.5), "broken": broken, "late": late})
    assert main.run(["claims", "broken", "late"], True, result) == ["broken"]
    assert "a mistake" in capsys.readouterr().err
    assert set(seen[0]["rows"]) == {name for _, name, _, _ in claims.CLAIMS} | {"half a part"}
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["rows"]["late"] == 3.0
    assert list(found["seconds"]) == ["claims", "late"]
    assert found["command"] == "python -m benchmarks.gpu --parts claims,late"
    assert page.read_text(encoding="utf-8") == claims.page(found)
    assert "not yet measured |" not in page.read_text(encoding="utf-8")
    assert main.run(["claims"], True, result) == []  # a later run keeps what it does not measure
    assert json.loads(result.read_text(encoding="utf-8"))["rows"]["late"] == 3.0


def test_results_of_one_machine_are_joined_and_those_of_two_are_refused(places, monkeypatch, tmp_path):
    result, page = places
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, value in zip(files, (1.0, 2.0), strict=True):
        monkeypatch.setattr(main, "PARTS", {file.stem: made_up(value)})
        main.run([file.stem], True, file)
    assert not result.exists()
    monkeypatch.setattr(sys, "argv", ["gpu", "--join", *map(str, files)])
    main.main()
    found = claims.load(result)
    assert found is not None
    assert list(found["seconds"]) == ["a", "b"]
    assert set(found["rows"].values()) == {2.0}
    assert page.read_text(encoding="utf-8") == claims.page(found)
    result.write_text(json.dumps(found | {"device": "another"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"device another cannot hold figures of .*: give --out another file"):
        main.run(["b"], True, result)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--parts", "gemv,attn"], "unknown parts attn: use some of gemv, gemm"), ([], "needs a CUDA device"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_once(arguments, said, places, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit, match=said):
        main.main()
    assert not places[0].exists()


def test_each_claim_rests_on_one_row():
    names = [name for _, name, _, _ in claims.CLAIMS]
    assert len(set(names)) == len(names)
