"""Builds engines from ONNX by a strongly typed network, for GPUs here or elsewhere, and says what became of weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer.backends.tensorrt.engine import SCHEMA, SIDECAR, BuiltEngine, EngineSet, Profile
from optimizer.backends.tensorrt.plan import Weight, fell_back, multiplied_otherwise, read_plan
from optimizer.backends.tensorrt.provider import Provider, collecting_log, find_provider, this_gpu
from optimizer.errors import ArtifactError, ModelError, UsageError

_FIRST = {"int4": (80, "int8"), "fp4": (80, "int8"), "fp8_e4m3": (89, "int8")}
"""The first architecture that TensorRT compiles each type for, and what older ones can have instead."""
_REMEDIES = (
    (r"[Zz]ero point", "TensorRT knows symmetric weights only: quantize with `symmetric: true`"),
    (
        r"libnvinfer_lean",
        "Version compatibility needs TensorRT's lean runtime, which this package lacks: leave it out",
    ),
    (r"int4", "Target sm80 or later, or export int8"),
)
"""What to do about an error, by what its text says."""
_SHORT = {
    "INT4": "int4", "FP4": "fp4", "INT8": "int8", "FP8": "fp8_e4m3", "HALF": "half", "BF16": "bf16", "FLOAT": "float",
}  # fmt: skip
"""Types as a plan writes them, by TensorRT's name."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `targets` are architectures as `sm89`; empty takes the GPU of this machine."""

    profiles: tuple[Profile, ...]
    targets: tuple[str, ...] = ()
    weight_streaming: bool = False
    version_compatible: bool = False
    max_context: int | None = None
    """Positions the model was made for; a profile beyond them is refused."""
    timing_cache: Path | None = None
    """Kernel timings of earlier builds, read and renewed. TensorRT for RTX times nothing while it builds."""


def build_engines(onnx: Path, out: Path, options: BuildOptions, provider: Provider | None = None) -> EngineSet:
    """Build an engine for each target from an ONNX file into the folder `out`; the record that `engine.json` holds.

    The folder is written beside its place and moved there when it is complete, so an older one stays until then.

    Raises `ModelError` naming the ONNX node that TensorRT cannot take, `UsageError` for profiles and targets that
    cannot work, `DeviceError` where the provider or the GPU is missing.
    """
    provider = provider or find_provider()
    targets = targets_of(options, provider)
    if not options.profiles:
        raise UsageError("there are no profiles. Give at least one, bounding each dynamic dimension.")
    log = collecting_log(provider)
    builder = provider.module.Builder(log)
    network, _parser = _parse(onnx, builder, provider, log)  # the network's weights lie in the parser's memory
    inputs = {t.name: _dimensions(t) for t in (network.get_input(i) for i in range(network.num_inputs))}
    outputs = {t.name: _dimensions(t) for t in (network.get_output(i) for i in range(network.num_outputs))}
    weights = _quantized_weights(network, provider)
    _check(inputs, weights, targets, options)
    built = []
    if out.exists() and not (out / SIDECAR).is_file():
        raise UsageError(f"{out} exists and is no engine folder. Name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        staging = Path(name) / "engines"
        staging.mkdir()
        for target in targets:
            built.append(_build(builder, network, log, target, inputs, weights, options, provider, staging))
        record = EngineSet(
            provider.name, provider.version, _sha256(onnx), options.profiles, inputs, outputs, tuple(built),
            len(weights), sum(weight.rounded for weight in weights), _float32_layers(network, provider),
        )  # fmt: skip
        _write(staging / SIDECAR, json.dumps({"schema": SCHEMA} | asdict(record), indent=1).encode())
        if out.exists():
            out.rename(Path(name) / "old")
        staging.rename(out)
    return record


def targets_of(options: BuildOptions, provider: Provider) -> tuple[str, ...]:
    """The architectures to build for. `UsageError` for one that the provider cannot, `DeviceError` for none at all."""
    if provider.cross_compiles:
        wanted = options.targets or (this_gpu(),)
        if unknown := [target for target in wanted if target not in provider.targets]:
            raise UsageError(
                f"{provider.name} {provider.version} cannot build for {', '.join(unknown)}; it builds for "
                f"{', '.join(provider.targets)}."
            )
        return tuple(dict.fromkeys(wanted))
    here = this_gpu()
    if options.targets and set(options.targets) != {here}:
        raise UsageError(
            f"{provider.name} builds for the GPU it runs on, {here}, not for {', '.join(options.targets)}. Build on "
            "that GPU, or use tensorrt_rtx."
        )
    return (here,)


def _parse(onnx: Path, builder: Any, provider: Provider, log: Any) -> tuple[Any, Any]:
    trt = provider.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not onnx.is_file():
        raise ModelError(f"{onnx} does not exist. Export the model to ONNX first.")
    if not parser.parse_from_file(str(onnx)):
        problems = "; ".join(_problems(parser, onnx) or log.errors) or "no reason given"
        raise ModelError(f"TensorRT cannot take {onnx.name}: {problems}.{_remedy(problems)}")
    return network, parser


def _problems(parser: Any, onnx: Path) -> list[str]:
    """Each parser error with its node, and the module and source line that the exporter recorded for that node."""
    places = _places(onnx) if parser.num_errors else {}
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = places.get(error.node_name(), "")
        found.append(f"{error.node_operator() or 'graph'} {error.node_name()!r}: {error.desc()}{where}")
    return found


def _remedy(problems: str) -> str:
    return next((f" {remedy}." for pattern, remedy in _REMEDIES if re.search(pattern, problems)), "")


def _places(onnx: Path) -> dict[str, str]:
    """Where each ONNX node came from, from what torch's exporter writes into a node's metadata."""
    try:
        from onnx import load
    except ImportError:
        return {}
    found = {}
    for node in load(str(onnx), load_external_data=False).graph.node:
        meta = {entry.key: entry.value for entry in node.metadata_props}
        lines = re.findall(r'File "([^"]+)", line (\d+)', meta.get("pkg.torch.onnx.stack_trace", ""))
        module = meta.get("pkg.torch.onnx.name_scopes", "")
        source = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
        if module or source:
            found[node.name] = f" (module {module}, {source})"
    return found


def _dimensions(tensor: Any) -> tuple[str, ...]:
    return tuple(
        str(size) if size >= 0 else tensor.get_dimension_name(axis) or f"{tensor.name}.{axis}"
        for axis, size in enumerate(tensor.shape)
    )


def _quantized_weights(network: Any, provider: Provider) -> tuple[Weight, ...]:
    """The constants that the network dequantizes."""
    dequantize = provider.module.LayerType.DEQUANTIZE
    constant = provider.module.LayerType.CONSTANT
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made = {layer.get_output(0).name: layer for layer in layers if layer.type == constant}
    rounded = _with_rounded_inputs(layers, provider)
    found = []
    for layer in layers:
        if layer.type != dequantize or layer.get_input(0).name not in made:
            continue
        tensor = layer.get_input(0)
        found.append(Weight(layer.name, tuple(tensor.shape), _SHORT[tensor.dtype.name], layer.name in rounded))
    return tuple(found)


def _with_rounded_inputs(layers: Sequence[Any], provider: Provider) -> set[str]:
    """The names of dequantizations of weights whose product has quantized and dequantized inputs."""
    kinds = provider.module.LayerType
    maker = {layer.get_output(0).name: layer for layer in layers}

    def origin(tensor: Any) -> Any:
        layer = maker.get(tensor.name)
        while layer is not None and layer.type == kinds.SHUFFLE:
            layer = maker.get(layer.get_input(0).name)
        return layer

    found = set()
    for layer in layers:
        if layer.type != kinds.MATRIX_MULTIPLY:
            continue
        x, weight = (origin(layer.get_input(index)) for index in (0, 1))
        if x is None or weight is None or {x.type, weight.type} != {kinds.DEQUANTIZE}:
            continue
        elements = origin(x.get_input(0))
        if elements is not None and elements.type == kinds.QUANTIZE:
            found.add(weight.name)
    return found


def _check(
    inputs: Mapping[str, Sequence[str]], weights: Sequence[Weight], targets: Sequence[str], options: BuildOptions
) -> None:
    for profile in options.profiles:
        for name, dim in ((name, dim) for name, dims in inputs.items() for dim in dims):
            *_, most = profile.bounds(dim)
            positions = not dim.isdecimal() and "batch" not in dim
            if positions and options.max_context is not None and most > options.max_context:
                raise UsageError(
                    f"profile {profile.name!r}: {name} has {dim} up to {most}, and the model was made for "
                    f"{options.max_context} positions. Bound it by that."
                )
    for kind in {weight.type for weight in weights} & _FIRST.keys():
        first, instead = _FIRST[kind]
        if old := [target for target in targets if int(target[2:]) < first]:
            raise UsageError(
                f"{', '.join(old)} has no kernels for {kind} weights. Target sm{first} or later, or export {instead}."
            )


def _build(
    builder: Any, network: Any, log: Any, target: str, inputs: Mapping[str, Sequence[str]], weights: Sequence[Weight],
    options: BuildOptions, provider: Provider, folder: Path,
) -> BuiltEngine:  # fmt: skip
    trt = provider.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if provider.cross_compiles:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    for wanted, flag in (
        (options.weight_streaming, "WEIGHT_STREAMING"),
        (options.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    for profile in options.profiles:
        made = builder.create_optimization_profile()
        for name, dims in inputs.items():
            least, best, most = zip(*(profile.bounds(dim) for dim in dims), strict=True)
            made.set_shape(name, least, best, most)
        config.add_optimization_profile(made)
    cache = _timing_cache(config, options.timing_cache)
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if serialized is None:
        problems = "; ".join(log.errors) or "no reason given"
        raise ModelError(f"TensorRT could not build an engine for {target}: {problems}.{_remedy(problems)}")
    content = bytes(serialized)
    if options.timing_cache is not None and cache is not None:
        _write(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    file = f"{target}.engine"
    _write(folder / file, content)
    seen = _seen(content, weights, len(options.profiles))
    return BuiltEngine(target, file, hashlib.sha256(content).hexdigest(), len(content), seconds, **seen)


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ArtifactError(f"{path} is not a timing cache of this TensorRT. Delete it.")
    return cache


def _seen(content: bytes, weights: Sequence[Weight], profiles: int) -> dict[str, Any]:
    try:
        plan = read_plan(content)
    except ArtifactError as error:
        return {"note": str(error)}
    return {
        "constant_bytes": {kind: size // profiles for kind, size in plan.bytes_by_type().items()},
        "operations": len(plan.operations),
        "fell_back": fell_back(weights, plan, profiles),
        "products": plan.products(),
        "multiplied_otherwise": multiplied_otherwise(weights, plan, profiles),
    }


def _float32_layers(network: Any, provider: Provider) -> tuple[str, ...]:
    """Layers with a float32 result, where the network's outputs or matrix products are of a shorter type."""
    trt = provider.module
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    if all(layer.get_output(0).dtype == trt.DataType.FLOAT for layer in products):
        return ()
    kinds = (trt.LayerType.CONSTANT, trt.LayerType.CAST, trt.LayerType.SHUFFLE)
    return tuple(
        layer.name for layer in layers if layer.type not in kinds and layer.get_output(0).dtype == trt.DataType.FLOAT
    )


def _write(path: Path, content: bytes) -> None:
    """Write beside the place and rename, so that a reader never sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
