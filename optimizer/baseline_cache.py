"""Baselines kept between runs: what was measured of an original model, under a key of everything that it rests on.

A run in CI evaluates the same original again and again. Its quality, document by document, and the ceilings of the
machine are kept here; its *speed* never is: a speed-up is measured side by side in one run or not at all.

One file a baseline, `<key>.json`: the first line is the sha256 of the rest, which is JSON. It is written whole (another
name, flushed, renamed) and only after everything in it was measured. A file that is not as it was written is refused,
and the baseline measured again. The checksum finds damage, not malice: whoever can write the folder can write a
checksum too. A lock keeps two jobs from measuring the same baseline at once; the second waits and reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optimizer.artifact import installed_versions
from optimizer.backends.runner import BaseRunner
from optimizer.evals.ceilings import Ceilings, describe
from optimizer.evals.quality import MetricResult, QualityResult
from optimizer.pipeline import WINDOW, Baseline, measure_baseline
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import Source

SCHEMA = 1
LAYERS = ("optimizer", *(f"optimizer.{layer}" for layer in ("passes", "backends", "quant", "evals")))
CODE = {".py", ".yaml", ".jsonl", ".json", ".h", ".cpp"}
"""Files of this package that a baseline may rest on; the embedded model is in the digest of the weights."""


@dataclass
class BaselineCache:
    """Baselines in `folder`. `notes` gathers what a reader of the results should know: hits, damage, a full disk."""

    folder: Path
    notes: list[str] = field(default_factory=list)

    def baseline(
        self,
        original: BaseRunner,
        *,
        source: Source,
        recipe: Recipe,
        progress: Progress,
        calibration: Path | None = None,
    ) -> Baseline:
        """The kept baseline of this model, evaluation, machine and code; else measured now, and kept."""
        of = rests_on(original, source, recipe, calibration)
        file = self.folder / f"{hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]}.json"
        with self._alone(file, progress):
            if (kept := self._read(file, of)) is not None:
                return kept
            found = measure_baseline(original, recipe, progress)
            if found.quality.non_finite:
                self.notes.append("the baseline has log-likelihoods that are not finite, so it was not kept")
            else:
                self._write(file, of, found)
            return found

    @contextmanager
    def _alone(self, file: Path, progress: Progress) -> Iterator[None]:
        """Hold the lock of one baseline. Where the folder takes no lock, go on without: a cache is no condition."""
        lock = FileLock(file.with_suffix(".lock"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                with progress.phase("wait for the baseline that another job measures"):
                    lock.acquire()
        except OSError as error:
            self.notes.append(f"the baseline cache {self.folder} cannot be used: {error}")
        try:
            yield
        finally:
            lock.release()

    def _read(self, file: Path, of: Mapping[str, Any]) -> Baseline | None:
        try:
            raw = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.notes.append(f"the kept baseline {file} cannot be read ({error}), so it was measured again")
            return None
        checksum, _, body = raw.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            self.notes.append(f"the kept baseline {file} was damaged (its sha256 differs), so it was measured again")
            return None
        try:
            content = json.loads(body)
            if content["of"] != json.loads(json.dumps(of)):
                raise ValueError("it is of something else")
            found = _baseline(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # UsageError of Ceilings is a ValueError
            self.notes.append(f"the kept baseline {file} does not fit ({error}), so it was measured again")
            return None
        self.notes.append(
            f"quality of the baseline and ceilings of the machine were kept from {content['measured_at']}"
        )
        return found

    def _write(self, file: Path, of: Mapping[str, Any], found: Baseline) -> None:
        body = _dumps(
            {
                "of": of,
                "measured_at": found.ceilings.measured_at,
                "metrics": [asdict(metric) for metric in found.quality.metrics],
                "lm_eval": found.quality.lm_eval,
                "ceilings": found.ceilings.to_dict(),
            }
        ).encode()
        staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
        try:
            with staged.open("xb") as stream:
                stream.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                stream.flush()
                os.fsync(stream.fileno())
            staged.replace(file)
        except OSError as error:
            self.notes.append(f"the baseline could not be kept in {self.folder}: {error}")
        finally:
            with suppress(OSError):
                staged.unlink()


def kept_digest(folder: Path) -> str:
    """sha256 over the names of the baselines in a folder, for the keys of CI caches; empty where there are none."""
    names = sorted(path.name for path in folder.glob("*.json"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest() if names else ""


def rests_on(original: BaseRunner, source: Source, recipe: Recipe, calibration: Path | None = None) -> dict[str, Any]:
    """Everything that a baseline depends on: model, tokenizer, data, evaluation, versions, machine and our code."""
    tasks = [Path(name) for name in recipe.evaluation.tasks if Path(name).is_file()]
    device, cores, isa = describe(original.device)
    return {
        "schema": SCHEMA,
        "weights": source.digest,
        "tokenizer": _tokenizer_digest(source.tokenizer),
        "dtype": str(original.dtype),
        "calibration": None if calibration is None else _file_digest(calibration),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        # The slices of a sequential evaluation, and with them its few-shot prompts, follow from the floors.
        "floors": [f.model_dump(mode="json") for f in recipe.floors] if recipe.evaluation.sequential else None,
        "task_files": {str(path): _file_digest(path) for path in tasks},
        "batch": recipe.workload.batch,
        "window": WINDOW,
        "versions": installed_versions() | _versions("datasets", "tokenizers", "numpy"),
        "machine": [original.device.type, device, cores, isa],
        "code": code_digest(),
    }


@cache
def code_digest() -> str:
    """sha256 over every file of this package that a measurement may rest on."""
    total = hashlib.sha256()
    for layer in LAYERS:
        folder = Path(next(iter(import_module(layer).__path__)))
        for file in sorted(path for path in folder.rglob("*") if path.suffix in CODE and path.is_file()):
            total.update(f"{layer}/{file.relative_to(folder).as_posix()} {_file_digest(file)}\n".encode())
    return total.hexdigest()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _file_digest(path: Path) -> str | None:
    """None for a file that is not there: whoever needs it says so."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over what decides which tokens a text becomes: all of a fast tokenizer, a slow one's words and options."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    options = {key: str(value) for key, value in getattr(tokenizer, "init_kwargs", {}).items() if "path" not in key}
    return hashlib.sha256(
        f"{type(tokenizer).__name__}\n{text}\n{json.dumps(options, sort_keys=True)}".encode()
    ).hexdigest()


def _baseline(content: Mapping[str, Any]) -> Baseline:
    """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for what is no baseline."""
    metrics = []
    for kept in content["metrics"]:
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in kept.items()}
        metrics.append(MetricResult(**fields))
    return Baseline(QualityResult(tuple(metrics), 0, content["lm_eval"]), Ceilings.from_dict(content["ceilings"]))


def _dumps(content: Any) -> str:
    """JSON in which every float has its own digits, and NaN its name; lm-eval's odd values become text."""
    return json.dumps(content, skipkeys=True, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # numpy's and torch's scalars
        return value.item()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
