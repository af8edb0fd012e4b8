"""Where calibration data comes from: what the caller gave, a file, or the built-in text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import DataError
from optimizer.passes.calibration import Calibration, calibrate_on

if TYPE_CHECKING:
    from optimizer.recipe import CalibrationSpec

BUILT_IN = "the Python standard library's source"
"""What is calibrated on when nothing is given: right for the built-in model, a stopgap for any other."""


def load_calibration(data: Any, tokenizer: Any, config: Any, spec: CalibrationSpec) -> Calibration:
    """Rows of `spec.samples` × `spec.length` tokens from `data`, or from the built-in text when it is None.

    `data` is what `calibrate_on` takes, or the `Path` of a `.txt`, `.json`, `.jsonl` or `.parquet` file. Raises
    `DataError`.
    """
    text = config.get_text_config(decoder=True)
    length = min(spec.length, getattr(text, "max_position_embeddings", None) or spec.length)
    source = ""
    if data is None:
        data, source = _built_in(), BUILT_IN
    elif isinstance(data, Path):
        data, source = _read(data), data.name
    return calibrate_on(
        data, tokenizer, samples=spec.samples, length=length, packed=spec.packed, vocabulary=text.vocab_size,
        source=source,
    )  # fmt: skip


def _built_in() -> Iterator[str]:
    """Modules of the running interpreter that the reference model was trained on, in a fixed shuffled order."""
    from optimizer.evals.reference.corpus import read, training_files

    files = training_files()
    random.Random(0).shuffle(files)
    for file in files:
        yield from read([file])


def _read(path: Path) -> Any:
    """The rows of a file, by its ending."""
    if not path.is_file():
        raise DataError(f"calibration file {path} does not exist.")
    if reader := {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix.lower()):
        return _guarded(path, reader)
    with _readable(path):
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else text


def _guarded(path: Path, reader: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    """Rows as they are asked for, so that a large file is read no further than needed."""
    with _readable(path):
        yield from reader(path)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:  # not splitlines(), which cuts at U+2028 inside a string
        yield from (json.loads(line) for line in lines if line.strip())


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """`DataError` for a file that is not what its ending says; pyarrow's errors for one are of these kinds, too."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"calibration file {path} cannot be read: {error}. Give UTF-8 text, JSON or Parquet.") from None
