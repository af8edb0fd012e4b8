"""What `optimizer compare` compares: a model, an artifact, another tool's checkpoint, an endpoint, by its kind.

`OPENERS` is the table of kinds. The first whose `matches` takes a name opens it, so a kind is added by one line. A name
may carry a label: `int4=out/run/artifact`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.artifact import MANIFEST, read_manifest
from optimizer.endpoint import Endpoint, is_endpoint, parse_endpoint
from optimizer.errors import ExportError, ModelError, UsageError

if TYPE_CHECKING:
    from optimizer.backends.runner import BaseRunner

_LABEL = re.compile(r"([\w.+ -]{1,60})=(.+)", re.DOTALL)
_ENGINES = ("*.engine", "*.plan")  # what TensorRT and TensorRT-LLM call theirs


@dataclass(frozen=True)
class Options:
    """How variants are opened. `api_key_variable` names the environment variable that holds an endpoint's key."""

    device: str = "auto"
    trust_remote_code: bool = False
    api_key_variable: str | None = None
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class Variant:
    """One thing to compare, opened. It has a `runner`, which runs here, or an `endpoint`, which runs elsewhere.

    `stored_bytes` are its weight files on disk; `digest` is over what is deployed; `verdict` is the gate's where it
    went through one.
    """

    name: str
    given: str
    kind: str
    runner: BaseRunner | None = None
    endpoint: Endpoint | None = None
    digest: str | None = None
    stored_bytes: int | None = None
    verdict: str | None = None
    recipe: str | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Opener:
    """A kind of variant: which names are of it, and how one is opened; `open` is None, with the reason, for now."""

    kind: str
    matches: Callable[[str], bool]
    open: Callable[[str, Options], Variant] | None
    reason: str = ""


def open_variants(
    names: Sequence[str], options: Options, progress: Callable[[str, int, int], None] | None = None
) -> list[Variant]:
    """Open each in order, under names that differ. Raises a typed error for the first that cannot be opened."""
    if len(names) < 2:
        raise UsageError(f"compare was given {len(names)} variants; name at least two, the baseline first")
    parsed = [split_label(name) for name in names]
    openers = [find_opener(given) for _, given in parsed]  # refuses what it can before any weight is read
    found: list[Variant] = []
    for index, ((label, given), open_one) in enumerate(zip(parsed, openers, strict=True)):
        variant = open_one(given, options)
        found.append(replace(variant, name=_unused(label or variant.name, [v.name for v in found])))
        if progress is not None:
            progress("variants", index + 1, len(names))
    return found


def split_label(name: str) -> tuple[str | None, str]:
    """`label=variant` in its two parts; a path that exists or an endpoint is never taken apart."""
    found = _LABEL.fullmatch(name)
    if found is None or is_endpoint(name) or _exists(name):
        return None, name
    return found[1].strip() or None, found[2]


def find_opener(name: str) -> Callable[[str, Options], Variant]:
    """What opens a name, by its kind. Raises `ExportError` for a kind that this version cannot run."""
    opener = next(opener for opener in OPENERS if opener.matches(name))
    if opener.open is None:
        raise ExportError(f"{name} is {opener.reason}. Give the artifact or model folder it was made from.")
    if is_endpoint(name):
        parse_endpoint(name)
    return opener.open


def _unused(name: str, taken: list[str]) -> str:
    count = 2
    unique = name
    while unique in taken:
        unique, count = f"{name} ({count})", count + 1
    return unique


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except OSError:  # longer than the file system takes
        return False


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    try:
        return path if path.is_dir() else None
    except OSError:
        return None


def _holds(name: str, *patterns: str) -> bool:
    path = Path(name).expanduser()
    folder = _folder(name)
    if folder is None:
        return any(path.match(pattern) for pattern in patterns) and _exists(name)
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _is_artifact(name: str) -> bool:
    folder = _folder(name)
    return folder is not None and (folder / MANIFEST).is_file()


def _is_quantized(name: str) -> bool:
    from optimizer.inspection import inspect_checkpoint

    folder = _folder(name)
    if folder is None or not (folder / "config.json").is_file():
        return False
    if (folder / "quantize_config.json").is_file():
        return True
    try:
        return inspect_checkpoint(folder).quantization_config is not None
    except ModelError:  # it is opened as a model, which says what is wrong with it
        return False


def _open_artifact(name: str, options: Options) -> Variant:
    from optimizer.api import load
    from optimizer.recipe import Recipe

    folder = Path(name).expanduser()
    manifest = read_manifest(folder)
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    stored = sum(record.bytes for path, record in manifest.files.items() if path.endswith(".safetensors"))
    notes = () if manifest.verdict == "passed" else (f"The gate's verdict on this artifact is {manifest.verdict}.",)
    return Variant(
        recipe.name, name, "artifact", load(folder, device=options.device), digest=manifest.digest,
        stored_bytes=stored, verdict=manifest.verdict, recipe=recipe.name, notes=notes,
    )  # fmt: skip


def _is_export(name: str) -> bool:
    from optimizer.export_command import is_export

    folder = _folder(name)
    return folder is not None and is_export(folder)


def _open_export(name: str, options: Options) -> Variant:
    from optimizer.export_command import load_export

    folder = Path(name).expanduser()
    runner = load_export(folder, device=options.device)
    manifest = read_manifest(folder)
    stored = sum(record.bytes for path, record in manifest.files.items() if not path.endswith(".json"))
    note = f"Exported from {manifest.source.name}, run by {type(runner).__name__}."
    return Variant(
        folder.resolve().name, name, "export", runner, digest=manifest.digest, stored_bytes=stored,
        verdict=manifest.verdict, notes=(note,),
    )  # fmt: skip


def _open_quantized(name: str, options: Options) -> Variant:
    from optimizer.api import load
    from optimizer.inspection import inspect_checkpoint

    folder = Path(name).expanduser()
    info = inspect_checkpoint(folder)
    method = str((info.quantization_config or {}).get("quant_method", "gptq"))
    note = f"A {method} checkpoint of another tool, run by this package's kernels, which is not how that tool runs it."
    return Variant(
        folder.resolve().name, name, "quantized checkpoint", load(folder, device=options.device), digest=info.digest,
        stored_bytes=_weight_files(folder), notes=(note,),
    )  # fmt: skip


def _open_model(name: str, options: Options) -> Variant:
    from optimizer.backends.runner import EagerRunner
    from optimizer.pipeline import choose_device
    from optimizer.source import load_source, resolve

    source = load_source(name, device=choose_device(options.device), trust_remote_code=options.trust_remote_code)
    folder, _, _ = resolve(name, trust_remote_code=options.trust_remote_code)
    runner: Any = EagerRunner(source.model, source.tokenizer)
    return Variant(source.name, name, "model", runner, digest=source.digest, stored_bytes=_weight_files(folder))


def _open_endpoint(name: str, options: Options) -> Variant:
    endpoint = parse_endpoint(name, options.api_key_variable, timeout_seconds=options.timeout_seconds)
    note = "It ran on another machine, on a clock of its own: its times are not paired with those of the others."
    return Variant(f"{endpoint.model} @ {endpoint.host}", name, "endpoint", endpoint=endpoint, notes=(note,))


def _weight_files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


_ONNX = "an ONNX model that `optimizer export` did not write, whose inputs are not known"
_TENSORRT = "a TensorRT engine that `optimizer export` did not write, whose tensors are not known"

OPENERS = (
    Opener("endpoint", is_endpoint, _open_endpoint),
    Opener("export", _is_export, _open_export),
    Opener("artifact", _is_artifact, _open_artifact),
    Opener("onnx", lambda name: _holds(name, "*.onnx") and not _holds(name, "*.safetensors"), None, _ONNX),
    Opener("tensorrt", lambda name: _holds(name, *_ENGINES), None, _TENSORRT),
    Opener("quantized checkpoint", _is_quantized, _open_quantized),
    Opener("model", lambda _: True, _open_model),
)
