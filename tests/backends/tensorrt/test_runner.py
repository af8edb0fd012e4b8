"""The runner of engines, over a stand-in of the runtime; on a machine with a GPU, over TensorRT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx_bindings")

from optimizer.backends.onnx_export import MODEL_FILE, export
from optimizer.backends.runner import EagerRunner, left_pad
from optimizer.backends.tensorrt import runner as under_test
from optimizer.backends.tensorrt.build import BuildOptions, build_engines
from optimizer.backends.tensorrt.engine import Profile
from optimizer.backends.tensorrt.provider import Provider, find_provider, this_gpu
from optimizer.backends.tensorrt.runner import TensorRTRunner
from optimizer.errors import ArtifactError, DeviceError, UsageError
from optimizer.evals.runner import Runner
from tests.backends.decoder_models import VOCAB, llama
from tests.backends.tensorrt.stand_in import Engine, module

BATCH, PROMPT, CONTEXT = 2, 24, 64


def profile(name: str, new: tuple[int, int, int], past: tuple[int, int, int]) -> Profile:
    total = tuple(a + b for a, b in zip(new, past, strict=True))
    return Profile(name, {
        "batch_size": (1, BATCH, BATCH), "sequence_length": new, "past_sequence_length": past,
        "total_sequence_length": (total[0], total[1], total[2]),
    })  # fmt: skip


PROFILES = (profile("prefill", (1, 8, PROMPT), (0, 0, 0)), profile("decode", (1, 1, 1), (1, 16, CONTEXT - 1)))


def model() -> Any:
    return llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export as the command writes it, with real engines, and the graph they were built from beside it."""
    root = tmp_path_factory.mktemp("engines")
    (root / "graph").mkdir()
    export(model(), root / "graph", dialect="tensorrt")
    build_engines(root / "graph" / MODEL_FILE, root / "out" / "engines", BuildOptions(PROFILES, ("sm89",)))
    model().config.to_json_file(root / "out" / "config.json")
    return root


@pytest.fixture
def runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTRunner:
    return opened(folder, monkeypatch)


def opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, engine: bool = True, target: str = "sm89"
) -> TensorRTRunner:
    monkeypatch.setattr(under_test, "this_gpu", lambda: target)
    record = under_test.read_engines(folder / "out" / "engines")
    stand_in = Engine(folder / "graph" / MODEL_FILE, record.profiles, record.inputs, VOCAB) if engine else None
    provider = Provider("tensorrt_rtx", module(stand_in), find_provider("tensorrt_rtx").version)
    return TensorRTRunner(folder / "out" / "engines", provider=provider, device="cpu")


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return left_pad([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths], 2)


@pytest.mark.parametrize("lengths", [(1,), (9,), (PROMPT,), (3, 17), (1, 1)])
def test_greedy_tokens_are_those_of_the_model(runner: TensorRTRunner, lengths: Any) -> None:
    tokens, mask = prompts(*lengths)
    expected = EagerRunner(model()).generate(tokens, mask, max_new_tokens=24)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=24), expected)
    assert runner.ledger.steps["tensorrt"] == 23


def test_scores_of_every_token_and_the_protocol(runner: TensorRTRunner) -> None:
    assert isinstance(runner, Runner)
    assert runner.dtype == torch.float32
    assert runner.max_context == CONTEXT
    tokens, mask = prompts(5, 12)
    expected = EagerRunner(model()).prefill(tokens, mask, all_logits=True)
    found = runner.prefill(tokens, mask, all_logits=True)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=64 * 2**-24 * 50)


def test_what_a_profile_does_not_take_is_refused_with_the_option(runner: TensorRTRunner) -> None:
    for tokens in (torch.ones(BATCH + 1, 4, dtype=torch.long), torch.ones(1, PROMPT + 1, dtype=torch.long)):
        with pytest.raises(UsageError, match="larger --batch or --prompt"):
            runner.prefill(tokens)
    with pytest.raises(UsageError, match="exceed the context of 64"):
        runner.generate(torch.ones(1, PROMPT, dtype=torch.long), max_new_tokens=CONTEXT)


def test_a_refusal_of_the_runtime_is_an_error(runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._contexts["prefill"], "execute_async_v3", lambda _: False)
    with pytest.raises(DeviceError, match=r"refused a prefill of \[1, 4\] tokens after 0"):
        runner.prefill(torch.ones(1, 4, dtype=torch.long))


def test_an_engine_that_cannot_be_loaded_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="the magic tag does not match"):
        opened(folder, monkeypatch, engine=False)
    with pytest.raises(DeviceError, match="this GPU is sm90"):
        opened(folder, monkeypatch, target="sm90")


def test_a_changed_engine_never_reaches_the_runtime(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    engine = copy / "out" / "engines" / "sm89.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        opened(copy, monkeypatch)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    provider, target = find_provider(), this_gpu()
    if provider.cross_compiles and target not in provider.targets:
        pytest.skip(f"{provider.name} {provider.version} builds for {', '.join(provider.targets)}, not {target}")
    (tmp_path / "graph").mkdir()
    export(model(), tmp_path / "graph", dialect="tensorrt")
    build_engines(tmp_path / "graph" / MODEL_FILE, tmp_path / "out" / "engines", BuildOptions(PROFILES))
    model().config.to_json_file(tmp_path / "out" / "config.json")
    runner = TensorRTRunner(tmp_path / "out" / "engines")
    tokens, mask = prompts(3, 17)
    expected = EagerRunner(model()).generate(tokens, mask, max_new_tokens=24)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=24).cpu(), expected)
