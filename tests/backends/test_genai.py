"""onnxruntime-genai runs an exported folder as it is: its own API, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.backends.runner import EagerRunner, left_pad
from optimizer.export_command import write_onnx
from optimizer.quant.formats import Format, Scheme
from optimizer.source import load_source
from tests.optimizer.quantized_models import quantize

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

VARIABLE = "OPTIMIZER_GENAI_PYTHON"
PROMPTS = ["def main():\n    parser = argparse.", "import os\n", "class Node:\n    def __init__(self, value"]
NEW = 128


@pytest.fixture(scope="session")
def genai_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python that the variable names, or that of a new environment with the package from the index."""
    if named := os.environ.get(VARIABLE):
        return named
    folder = tmp_path_factory.mktemp("genai") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "onnxruntime-genai"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"onnxruntime-genai cannot be installed here; name a Python that has it in {VARIABLE}: {done.stderr}"
        )
    return python


def genai(python: str, folder: Path, prompts: list[list[int]], pad: int) -> list[list[int]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(Path(__file__).with_name("genai_greedy.py")), str(folder)]
    done = subprocess.run(
        command, env=environment, text=True, check=False,
        input=json.dumps({"prompts": prompts, "new": NEW, "pad": pad}), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]  # type: ignore[no-any-return]


def int4(model: Any) -> Any:
    return quantize(model, lambda name: None if name == "lm_head" else Scheme(Format(4, group_size=64)))


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_greedy_tokens_are_those_of_pytorch(kind: str, genai_python: str, tmp_path: Path) -> None:
    """Alone, and as a ragged batch, 128 tokens each."""
    source = load_source("reference")
    model = source.model.float()
    if kind == "int4":
        model = int4(model)
    write_onnx(model, source.tokenizer, tmp_path, dtype="float32")
    pad = source.tokenizer.pad_token_id
    rows = [source.tokenizer(text)["input_ids"] for text in PROMPTS]
    assert len(set(map(len, rows))) == len(rows)
    runner = EagerRunner(model)
    tokens, mask = left_pad(rows, pad)
    expected = runner.generate(tokens, mask, max_new_tokens=NEW)[:, tokens.shape[1] :].tolist()
    assert len({tuple(row) for row in expected}) == len(rows)
    assert genai(genai_python, tmp_path, rows, pad) == expected
    alone = runner.generate(torch.tensor(rows[:1]), max_new_tokens=NEW)[:, len(rows[0]) :].tolist()
    assert genai(genai_python, tmp_path, rows[:1], pad) == alone
