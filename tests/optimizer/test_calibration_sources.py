"""Calibration from files, from the built-in text, and at the model's own length."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, LlavaConfig

from optimizer.calibration import BUILT_IN, load_calibration
from optimizer.errors import DataError
from optimizer.evals.reference.corpus import held_out_files, read
from optimizer.passes.calibration import Calibration
from optimizer.recipe import CalibrationSpec
from tests.optimizer.tiny_models import byte_tokenizer

CONFIG = LlamaConfig(vocab_size=320, max_position_embeddings=256)
SPEC = CalibrationSpec(samples=8, length=128)
TEXTS = ["naïve " * 60, "line one\nline two " * 20, "cut\u2028here\u0085or\u000bthere " * 20]


def load(data: Any, spec: CalibrationSpec = SPEC, config: Any = CONFIG) -> Calibration:
    return load_calibration(data, byte_tokenizer(), config, spec)


def parquet(path: Path, **columns: list[Any]) -> Path:
    from pyarrow import parquet as files
    from pyarrow import table

    files.write_table(table(columns), path)
    return path


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# Files


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    file = written(tmp_path / "data.txt", "".join(TEXTS))
    calibration = load(file)
    assert calibration.digest == load("".join(TEXTS)).digest
    assert calibration.source == "data.txt"


@pytest.mark.parametrize("name", ["data.jsonl", "DATA.JSONL"])
def test_rows_of_json_lines(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in TEXTS]
    file = written(tmp_path / name, "\r\n\n".join(lines))
    assert load(file).digest == load(TEXTS).digest


@pytest.mark.parametrize("rows", [TEXTS, [{"text": text} for text in TEXTS], [[5, 6] * 100, [7] * 500], [5, 6] * 300])
def test_a_json_document(rows: Any, tmp_path: Path) -> None:
    assert load(written(tmp_path / "data.json", json.dumps(rows))).digest == load(rows).digest


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    many = [f"{text} {number}" for number in range(40) for text in TEXTS]  # several batches of the reader
    spec = CalibrationSpec(samples=10_000, length=128)
    assert load(parquet(tmp_path / "data.parquet", text=many), spec).digest == load(many, spec).digest
    assert load(parquet(tmp_path / "[1].PARQUET", input_ids=[[5] * 300, [6] * 300])).tokens == 601


def test_a_parquet_file_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = parquet(tmp_path / "data.parquet", text=TEXTS)
    load(file)
    assert list(tmp_path.iterdir()) == [file]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl"])
def test_a_byte_order_mark_is_no_text(ending: str, tmp_path: Path) -> None:
    text = "x" * 600 if ending == "txt" else json.dumps(["x" * 600] if ending == "json" else "x" * 600)
    file = written(tmp_path / f"data.{ending}", text, "utf-8-sig")
    assert load(file).digest == load("x" * 600).digest


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", b'["x"', "delimiter"),
        ("a.json", b"", "Expecting value"),
        ("a.json", b"[" * 100_000, "recursion"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "Expecting value"),
        ("a.jsonl", b'"\xff"', "utf-8"),
        ("a.txt", b"\xff\xfe\x00", "utf-8"),
        ("a.txt.gz", b"\x1f\x8b\x08", "utf-8"),
        ("a.parquet", b"", "Parquet"),
        ("a.parquet", b"PAR1 no PAR1", "Parquet"),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?is)file .*{name} cannot be read: .*{why}.*Give UTF-8 text, JSON or Parq"):
        load(tmp_path / name)


def test_a_parquet_file_cut_or_changed_in_its_middle_is_named(tmp_path: Path) -> None:
    file = parquet(tmp_path / "data.parquet", text=[str(random.Random(i).random()) * 40 for i in range(500)])
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        load(file)
    file.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    with pytest.raises(DataError, match="cannot be read"):
        load(file, CalibrationSpec(samples=10_000, length=128))


def test_a_file_that_is_absent_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(DataError, match=f"calibration file {path} does not exist"):
            load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "not dict"),
        ("a.json", "5", "not int"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.txt", " ", "is empty"),
        ("a.jsonl", '{"body": "x"}', "row 0 has the columns body"),
        ("a.jsonl", '"x"\n5', "row 1, of type int"),
    ],
)
def test_a_file_of_something_else_is_refused_as_data_is(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(written(tmp_path / name, content))


def test_a_long_file_is_read_no_further_than_needed(tmp_path: Path) -> None:
    good = [json.dumps("x" * 200)] * 20
    assert load(written(tmp_path / "a.jsonl", "\n".join([*good, "not JSON"]))).tokens == 8 * 128


# The built-in text


def test_the_built_in_text_is_the_same_every_time_and_moves_no_generator() -> None:
    before = random.getstate()
    first = load(None)
    assert random.getstate() == before
    random.seed(2)  # nor does one decide
    assert load(None).digest == first.digest
    random.setstate(before)
    assert first.source == BUILT_IN
    assert [len(row) for row in first.rows] == [128] * 8


def test_the_built_in_text_holds_nothing_that_is_evaluated() -> None:
    from optimizer import calibration

    held_out = {text for text in read(held_out_files()) if text}
    texts: Iterator[str] = calibration._built_in()
    assert not held_out & set(texts)


# The length


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, 256),
        (LlamaConfig(vocab_size=320, max_position_embeddings=4096), 512),
        (GPT2Config(vocab_size=320, n_positions=64), 64),
        (LlavaConfig(text_config=LlamaConfig(vocab_size=320, max_position_embeddings=100)), 100),
    ],
    ids=["llama", "long", "gpt2", "llava"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_no_longer_than_the_models_positions(config: Any, expected: int, packed: bool) -> None:
    rows = load(["x" * 2000] * 10, CalibrationSpec(samples=10, length=512, packed=packed), config).rows
    assert [len(row) for row in rows] == [expected] * 10


def test_ids_are_held_against_the_models_vocabulary() -> None:
    with pytest.raises(DataError, match="has token 320; the model's ids are 0 to 319"):
        load([[320] * 600])
