"""Packages compiled ahead of time: the tokens of the model they came from, and every check before one is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.aot_export import export_package
from optimizer.backends.aot_package import PackageRunner, load_package, read_package
from optimizer.backends.runner import EagerRunner, left_pad
from optimizer.errors import ArtifactError, DeviceError, UsageError
from optimizer.evals.runner import Runner
from tests.backends.decoder_models import VOCAB, llama

CONTEXT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "out"
    record = export_package(llama(num_hidden_layers=1), out, batch=2, context=CONTEXT)
    assert read_package(out) == record
    assert record.entries == ("decode", "prefill", "score")
    assert record.ops == ()
    return out


@pytest.fixture(scope="module")
def runner(folder: Path) -> PackageRunner:
    return load_package(folder)


@pytest.fixture(scope="module")
def eager() -> EagerRunner:
    return EagerRunner(llama(num_hidden_layers=1))


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return left_pad([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths], 2)


def test_it_is_a_runner(runner: PackageRunner) -> None:
    assert isinstance(runner, Runner)


@pytest.mark.parametrize("lengths", [(1,), (2,), (9,), (1, 1), (3, 17), (60, 5)])
def test_greedy_tokens_are_those_of_the_model(runner: PackageRunner, eager: EagerRunner, lengths: Any) -> None:
    tokens, mask = prompts(*lengths)
    expected = eager.generate(tokens, mask, max_new_tokens=32)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=32), expected)


@pytest.mark.parametrize("lengths", [(1,), (2,), (40,), (3, 17)])
def test_scores_of_every_token(runner: PackageRunner, eager: EagerRunner, lengths: Any) -> None:
    tokens, mask = prompts(*lengths)
    expected = eager.prefill(tokens, mask, all_logits=True)
    found = runner.prefill(tokens, mask, all_logits=True)
    assert found.shape == expected.shape
    real = mask.bool()
    # float32 sums of 64 terms in another order: 64 · 2^-24 of logits of up to about 50.
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=64 * 2**-24 * 50)
    assert found.isfinite().all()


def test_a_request_leaves_nothing_behind(runner: PackageRunner) -> None:
    tokens, mask = prompts(7)
    before = runner.generate(tokens, mask, max_new_tokens=8)
    runner.generate(*prompts(50, 20), max_new_tokens=30)
    assert torch.equal(runner.generate(tokens, mask, max_new_tokens=8), before)


def test_more_rows_and_more_tokens_than_it_was_made_for(runner: PackageRunner) -> None:
    with pytest.raises(UsageError, match="compiled for 2 rows, and 3"):
        runner.prefill(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(UsageError, match="exceeds the context of 96"):
        runner.prefill(torch.ones(1, 97, dtype=torch.long))


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_flipped_byte_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    damaged = copy_of(folder, tmp_path / "p")
    content = bytearray((damaged / "model.pt2").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "model.pt2").write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):
        load_package(damaged)
    (damaged / "model.pt2").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_package(damaged)


@pytest.mark.parametrize(("key", "value"), [("torch", "2.0.0"), ("isa", "AVX2-of-1913")])
def test_another_version_or_processor_is_refused(folder: Path, tmp_path: Path, key: str, value: str) -> None:
    other = copy_of(folder, tmp_path / "p")
    record = json.loads((other / "package.json").read_text())
    (other / "package.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(DeviceError, match="Export it again here"):
        load_package(other)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1}', '{"schema": 9}'])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "package.json").write_text(text)
    with pytest.raises(ArtifactError, match="not the record of a package"):
        load_package(tmp_path)


def test_what_a_package_cannot_hold_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 to 1024 tokens"):
        export_package(llama(), tmp_path / "p", context=4096)
    (tmp_path / "q").mkdir()
    with pytest.raises(UsageError, match="no package"):
        export_package(llama(), tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


_FRESH = """
import sys, torch
import optimizer.backends.linear  # registers the ops
from optimizer.backends.aot_package import load_package
from pathlib import Path
runner = load_package(Path(sys.argv[1]))
assert not any(name.startswith("optimizer.passes") for name in sys.modules)
print(runner.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)[0].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_package_in_a_process_without_our_passes(tmp_path: Path, bits: int) -> None:
    from optimizer.passes.base import Context
    from optimizer.passes.quantize import Quantize

    model = llama(num_hidden_layers=1).bfloat16()
    Quantize(bits=bits, group_size=64).run(model, Context(tokenizer=None, batch=1))
    record = export_package(model, tmp_path / "p", context=CONTEXT, scoring=False)
    assert record.ops
    assert all(op.startswith("optimizer.") for op in record.ops)
    with pytest.raises(UsageError, match="no `score` entry"):
        load_package(tmp_path / "p").prefill(torch.tensor([[5, 6, 7]]), all_logits=True)
    out = subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path / "p")], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    expected = EagerRunner(model).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)[0].tolist()
    assert json.loads(out.stdout.strip().splitlines()[-1]) == expected
