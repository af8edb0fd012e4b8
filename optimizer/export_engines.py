"""`optimizer export --to tensorrt` and `--to aot`: machine code for named GPUs, or for the machine that exports.

Both write a folder as every artifact is written, whole or not at all, with its manifest. Engines are built from a graph
in TensorRT's dialect, which is first run by ONNX Runtime beside the PyTorch model: no GPU is needed for either.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer.artifact import ManifestInfo, SourceRecord, write_artifact
from optimizer.backends.aot_export import export_package
from optimizer.backends.aot_package import PackageRecord, load_package
from optimizer.backends.onnx_export import MODEL_FILE
from optimizer.backends.tensorrt.build import BuildOptions, build_engines, targets_of
from optimizer.backends.tensorrt.engine import BuiltEngine, EngineSet, Profile
from optimizer.backends.tensorrt.provider import Provider, find_provider
from optimizer.errors import PassError, UsageError
from optimizer.export_command import BOUND, ENGINES, PACKAGE, reference, rehearse, write_configuration, write_onnx


@dataclass(frozen=True)
class EngineOptions:
    """What engines admit: up to `batch` rows, prompts of up to `prompt` tokens, `context` tokens in all."""

    targets: tuple[str, ...] = ()
    batch: int = 1
    prompt: int = 512
    context: int = 1024
    weight_streaming: bool = False
    version_compatible: bool = False


@dataclass(frozen=True)
class EngineExport:
    """Engines that were written, and how far the logits of their graph are from PyTorch's (share of the largest)."""

    folder: Path
    engines: EngineSet
    kernels: dict[str, str]
    bytes: int
    difference: float
    bound: float


@dataclass(frozen=True)
class PackageExport:
    """A package that was written, and how far its logits are from PyTorch's (share of the largest)."""

    folder: Path
    package: PackageRecord
    bytes: int
    difference: float
    bound: float


def profiles(options: EngineOptions) -> tuple[Profile, Profile]:
    """A prompt into an empty cache, and one token after up to all but one of the context."""

    def profile(name: str, new: tuple[int, int, int], past: tuple[int, int, int]) -> Profile:
        total = tuple(a + b for a, b in zip(new, past, strict=True))
        # With one fixed batch, TensorRT for RTX 1.7 keeps a copy of the weights for each profile: 46 MB instead of 28.
        batch = (1, options.batch, max(2, options.batch))
        return Profile(name, {
            "batch_size": batch, "sequence_length": new, "past_sequence_length": past,
            "total_sequence_length": (total[0], total[1], total[2]),
        })  # fmt: skip

    last = options.context - 1
    return (
        profile("prefill", (1, max(1, options.prompt // 4), options.prompt), (0, 0, 0)),
        profile("decode", (1, 1, 1), (1, max(1, last // 2), last)),
    )


def check_engines(config: Any, options: EngineOptions) -> tuple[Provider, BuildOptions]:
    """What is known before minutes of tracing: the TensorRT that builds, and how, for a model of this `config`.

    Raises:
        DeviceError: no TensorRT is installed, or a GPU to build for is neither named nor here.
        UsageError: a target or profile that cannot work.
    """
    provider = find_provider()
    if not options.context >= 2 or not 1 <= options.prompt <= options.context or options.batch < 1:
        raise UsageError(
            f"batch {options.batch}, prompt {options.prompt}, context {options.context}: give at least 1, 1 and 2, and "
            "no longer a prompt than the context."
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or options.context
    if options.context > limit:
        raise UsageError(
            f"context {options.context}: the model was made for {limit} positions. Give --context {limit}."
        )
    building = BuildOptions(
        profiles(options), options.targets, options.weight_streaming, options.version_compatible, limit
    )
    targets_of(building, provider)
    return provider, building


def write_engines(
    model: Any, tokenizer: Any, folder: Path, dtype: str, options: EngineOptions
) -> tuple[EngineSet, dict[str, str], float, float]:
    """Build engines of `model` into the existing `folder`, with its configuration and tokenizer.

    Returns their record, the operator of each linear layer, and how far the logits of the graph are from PyTorch's,
    beside the bound. Raises what `export_engines` does.
    """
    provider, building = check_engines(model.config, options)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".graph.") as name:
        graph = Path(name)
        exported, difference, bound = write_onnx(model, tokenizer, graph, dtype=dtype, dialect="tensorrt")
        record = build_engines(graph / MODEL_FILE, folder / ENGINES, building, provider)
    write_configuration(model, tokenizer, folder)
    return record, exported.kernels, difference, bound


def export_engines(
    model: Any, tokenizer: Any, source: SourceRecord, out: Path, dtype: str, options: EngineOptions
) -> EngineExport:
    """Build engines of `model` into the new folder `out`, for GPUs that need not be here.

    Raises:
        DeviceError: no TensorRT is installed, or a GPU to build for is neither named nor here.
        UsageError: weights that TensorRT cannot hold, a target or profile that cannot work.
        ModelError: an operator without counterpart, named with its module and source line.
        PassError: the graph does not compute what the model does.
    """
    check_engines(model.config, options)
    made: list[Any] = []
    size = _released(
        out, lambda folder: made.extend(write_engines(model, tokenizer, folder, dtype, options)), source, model
    )
    record, kernels, difference, bound = made
    return EngineExport(out, record, kernels, size, difference, bound)


def write_package(
    model: Any, tokenizer: Any, folder: Path, *, batch: int, context: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[PackageRecord, float, float]:  # fmt: skip
    """Compile `model` ahead of time into the existing `folder`, with its configuration and tokenizer.

    Returns the record, and how far its logits are from PyTorch's, beside the bound. Raises what `export_aot` does.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    bound = {"float32": BOUND["float32"], "float16": BOUND["float16"]}.get(dtype, _BFLOAT16_BOUND)
    expected = reference(model, dtype, rows=batch, context=context)
    record = export_package(model, folder / PACKAGE, batch=batch, context=context, progress=progress)
    write_configuration(model, tokenizer, folder)
    difference = rehearse(expected, load_package(folder / PACKAGE))
    if not difference <= bound:
        raise PassError(
            f"the package does not compute what the model does: logits differ by {difference:.3g} of the largest, and "
            f"{bound:.3g} is allowed. Nothing was written."
        )
    return record, difference, bound


def export_aot(
    model: Any, tokenizer: Any, source: SourceRecord, out: Path, *, batch: int, context: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> PackageExport:  # fmt: skip
    """Compile `model` ahead of time into the new folder `out`, for this machine and this PyTorch.

    Raises what `export_package` does, and `PassError` where the package does not compute what the model does.
    """
    made: list[Any] = []

    def build(folder: Path) -> None:
        made.extend(write_package(model, tokenizer, folder, batch=batch, context=context, progress=progress))

    size = _released(out, build, source, model)
    return PackageExport(out, made[0], size, made[1], made[2])


_BFLOAT16_BOUND = 0.1
"""bfloat16 numbers are 8e-3 apart, and both sides round after each of their own fusions."""


def _released(out: Path, build: Callable[[Path], None], source: SourceRecord, model: Any) -> int:
    """Write the folder as an artifact; its bytes."""
    needed = 2 * sum(parameter.nbytes for parameter in model.parameters())
    manifest = write_artifact(
        out, build=build, manifest=ManifestInfo(source=source, verdict="ungated"), required_bytes=needed
    )
    return sum(file.bytes for file in manifest.files.values())


def engine_data(result: EngineExport) -> dict[str, Any]:
    """The result as plain data."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(result.engines)))
    return {
        "folder": str(result.folder), "bytes": result.bytes, "kernels": result.kernels, **plain,
        "logit_difference": result.difference, "logit_bound": result.bound,
    }  # fmt: skip


def products(engine: BuiltEngine, rounded: int) -> str:
    """How the engine multiplies the weights whose inputs are rounded, in words."""
    kinds = " and ".join(kind for kind in engine.products if kind in _QUANTIZED_PRODUCTS)
    if wrong := len(engine.multiplied_otherwise):
        return f"{wrong} of {rounded} products with rounded inputs FELL BACK to wider types"
    return f"all {rounded} products with rounded inputs are {kinds}"


_QUANTIZED_PRODUCTS = ("int8 × int8", "fp8_e4m3 × fp8_e4m3")


def describe_engines(result: EngineExport) -> str:
    """The result as text."""
    lines = [f"{result.folder}: {result.engines.provider} {result.engines.version}, {result.bytes / 1e6:.1f} MB"]
    for engine in result.engines.engines:
        held = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in engine.constant_bytes.items() if size > 1e4)
        state = f"{len(engine.fell_back)} of {result.engines.weights} quantized weights FELL BACK"
        if not engine.fell_back:
            state = f"all {result.engines.weights} quantized weights in their own type"
        lines.append(
            f"{engine.target}: {engine.bytes / 1e6:.1f} MB in {engine.seconds:.1f} s, {engine.operations} operations; "
            + (engine.note or f"constants: {held}; {state}")
        )
        lines += [f"  {name}: {why}" for name, why in engine.fell_back.items()]
        if result.engines.rounded and not engine.note:
            lines.append(f"  {products(engine, result.engines.rounded)}")
            lines += [f"  {name}: {why}" for name, why in engine.multiplied_otherwise.items()]
    lines.append(f"{len(result.engines.float32_layers)} layers compute in float32, as the model's own casts ask")
    lines.append(
        "logits of the graph that they were built from differ from PyTorch's by at most "
        f"{result.difference:.2g} of the largest ({result.bound:.2g} allowed)"
    )
    lines.append("UNGATED: these engines have not run; quality and speed are to be measured on the GPU they are for")
    return "\n".join(lines)


def package_data(result: PackageExport) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "folder": str(result.folder), "bytes": result.bytes, **asdict(result.package),
        "logit_difference": result.difference, "logit_bound": result.bound,
    }  # fmt: skip


def describe_package(result: PackageExport) -> str:
    """The result as text."""
    package = result.package
    ops = f"ops of ours: {', '.join(package.ops)}" if package.ops else "no ops of ours"
    return (
        f"{result.folder}: AOTInductor package for PyTorch {package.torch} on {package.device} ({package.isa}), "
        f"{result.bytes / 1e6:.1f} MB in {package.seconds:.0f} s\n"
        f"entries {', '.join(package.entries)}; up to {package.batch} rows of {package.context} tokens; {ops}\n"
        f"logits differ from PyTorch's by at most {result.difference:.2g} of the largest ({result.bound:.2g} allowed)\n"
        "UNGATED: measure it with `optimizer eval` and `optimizer bench`"
    )
