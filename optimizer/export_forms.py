"""The forms that a model takes in a job that exports: how each is written, what runs it, what was measured of it."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from optimizer.backends.aot_package import PACKAGE as PACKAGE_FILE
from optimizer.backends.aot_package import PackageRunner, read_package
from optimizer.backends.onnx_export import DATA_FILE, MODEL_FILE
from optimizer.backends.onnx_runner import OnnxRunner
from optimizer.backends.runner import BaseRunner
from optimizer.backends.tensorrt.engine import BuiltEngine, EngineSet
from optimizer.backends.tensorrt.runner import TensorRTRunner
from optimizer.errors import DeviceError
from optimizer.evals.quality import MetricComparison
from optimizer.evals.timing import GenerationTiming
from optimizer.export_command import ENGINES, PACKAGE, write_onnx
from optimizer.export_engines import EngineOptions, products, write_engines, write_package
from optimizer.passes.base import view
from optimizer.progress import Progress
from optimizer.recipe import ExportSpec


class ExportFolder:
    """A folder of an export that is not saved yet; it goes with this object, and so with all that hold it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optimizer-export-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Form:
    """One form of the model: what runs it, how large it is, how long it took to build, and what was measured of it.

    Without a `runner`, `reason` says why it cannot run here. `to` is what the recipe calls it, empty for PyTorch's.
    """

    name: str
    runtime: str
    bytes: int
    build_seconds: float | None = None
    runner: BaseRunner | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    to: str = ""
    folder: ExportFolder | None = None
    timing: GenerationTiming | None = None
    comparisons: tuple[MetricComparison, ...] = ()


class ExportedRunner(BaseRunner):
    """What the job exported, opened by the runner of its runtime; `model` is the module that it was exported from.

    A class of this kind stands before the runner's own, so that sizes are those of the export.
    """

    files: ClassVar[tuple[str, ...]]
    """Those that hold its weights."""
    folder: Path
    _kept: ExportFolder

    def of(self, kept: ExportFolder, model: Any) -> ExportedRunner:
        """This runner, for what `kept` holds of `model`."""
        self._kept, self.folder, self.model = kept, kept.path, model
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files that hold the weights, and the program with them."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values a token keeps, in the export's own type."""
        return super().original_kv_bytes_per_token

    @property
    def original_kv_bytes_per_token(self) -> int:
        """The same in the type of the model it was exported from."""
        stored = next(self.model.parameters()).dtype
        return super().original_kv_bytes_per_token * stored.itemsize // self.dtype.itemsize


class _Graph(ExportedRunner, OnnxRunner):
    files = (MODEL_FILE, DATA_FILE)


class _Package(ExportedRunner, PackageRunner):
    files = (f"{PACKAGE}/{PACKAGE_FILE}",)


class _Engine(ExportedRunner, TensorRTRunner):
    @property
    def weight_bytes(self) -> int:
        """Bytes of the engine for this GPU."""
        return self.engine.bytes


@dataclass(frozen=True)
class Shape:
    """What an export must take for the job: rows at once, tokens of a prompt, and tokens in all."""

    batch: int
    prompt: int
    context: int


def engine_options(spec: ExportSpec, shape: Shape) -> EngineOptions:
    """Engines for the targets of `spec` that take what the job asks."""
    return EngineOptions(tuple(spec.targets or ()), shape.batch, shape.prompt, shape.context)


def _write_onnx(
    model: Any, tokenizer: Any, kept: ExportFolder, spec: ExportSpec, _shape: Shape, _progress: Progress
) -> list[Form]:
    dtype, began = spec.dtype or "float32", time.perf_counter()
    write_onnx(model, tokenizer, kept.path, dtype=dtype, int8_inputs=bool(spec.int8_inputs))
    seconds = time.perf_counter() - began
    runner = _Graph(kept.path, tokenizer).of(kept, model)
    rounded = ", inputs of quantized layers rounded to int8" if spec.int8_inputs else ""
    runtime = f"ONNX Runtime, {dtype}{rounded}"
    return [Form("onnx", runtime, runner.weight_bytes, seconds, runner, to=spec.to, folder=kept)]


def _write_aot(
    model: Any, tokenizer: Any, kept: ExportFolder, spec: ExportSpec, shape: Shape, progress: Progress
) -> list[Form]:
    began = time.perf_counter()
    write_package(view(model), tokenizer, kept.path, batch=shape.batch, context=shape.context, progress=progress.update)
    seconds = time.perf_counter() - began
    folder = kept.path / PACKAGE
    record = read_package(folder)
    runner = _Package(folder, record, tokenizer).of(kept, model)
    runtime = f"AOTInductor, {record.dtype}, {record.batch} × {record.context} tokens"
    return [Form("aot", runtime, runner.weight_bytes, seconds, runner, to=spec.to, folder=kept)]


def _write_tensorrt(
    model: Any, tokenizer: Any, kept: ExportFolder, spec: ExportSpec, shape: Shape, _progress: Progress
) -> list[Form]:
    dtype, began = spec.dtype or "float16", time.perf_counter()
    record, *_ = write_engines(model, tokenizer, kept.path, dtype, engine_options(spec, shape))
    shared = time.perf_counter() - began - sum(engine.seconds for engine in record.engines)
    runner, reason = _engine_runner(kept, model, tokenizer)
    forms = []
    for engine in record.engines:
        mine = runner is not None and runner.engine == engine
        why = "" if mine else reason or f"this GPU does not run engines for {engine.target}"
        forms.append(Form(
            f"tensorrt {engine.target}", f"{_PROVIDERS[record.provider]} {record.version}, {dtype}", engine.bytes,
            shared + engine.seconds, runner if mine else None, why,
            _held(engine, record), spec.to, kept,
        ))  # fmt: skip
    return forms


_PROVIDERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


def _engine_runner(kept: ExportFolder, model: Any, tokenizer: Any) -> tuple[_Engine | None, str]:
    """What runs the engine of this machine's GPU, or why none does."""
    if not torch.cuda.is_available():
        return None, "PyTorch sees no GPU here"
    try:
        runner = _Engine(kept.path / ENGINES, tokenizer)
    except DeviceError as error:
        return None, str(error)
    runner.of(kept, model)
    return runner, ""


def _held(engine: BuiltEngine, record: EngineSet) -> tuple[str, ...]:
    """What became of the quantized weights, read from the engine."""
    if engine.note or not record.weights:
        return (engine.note,) if engine.note else ()
    notes = [f"all {record.weights} quantized weights in their own type"]
    if engine.fell_back:
        fallen = ", ".join(engine.fell_back)
        notes = [f"{len(engine.fell_back)} of {record.weights} quantized weights fell back: {fallen}"]
    return (*notes, *([products(engine, record.rounded)] if record.rounded else []))


WRITERS: dict[str, Callable[..., list[Form]]] = {
    "onnx": _write_onnx,
    "tensorrt": _write_tensorrt,
    "aot": _write_aot,
}
"""What writes and opens each target of a recipe's `export`."""
