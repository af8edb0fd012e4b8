"""What `optimizer export --to` can write, and the options that each target takes; any other is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimizer.errors import UsageError
from optimizer.progress import Progress

Written = tuple[dict[str, Any], str]  # as data, and as text


def export_to(
    model: str, out: Path, to: str, options: dict[str, Any], *, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Written:  # fmt: skip
    """Export to the target `to`; `options` that are None were not given. What was written, as data and as text.

    Raises `UsageError` for an unknown target or an option that it does not take, and what the target raises.
    """
    if to not in TARGETS:
        raise UsageError(f"--to is {to!r}; use one of {', '.join(TARGETS)}.")
    write, taken = TARGETS[to]
    given = {name: value for name, value in options.items() if value not in (None, False, ())}
    if wrong := sorted(set(given) - set(taken)):
        flags, known = (", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (wrong, taken))
        raise UsageError(f"--to {to} takes no {flags}; it takes {known}.")
    return write(model, out, given, trust_remote_code, progress or Progress())


def _onnx(model: str, out: Path, given: dict[str, Any], trust_remote_code: bool, _: Progress) -> Written:
    from optimizer.export_command import data, describe, export_model

    result = export_model(model, out, trust_remote_code=trust_remote_code, **given)
    return data(result), describe(result)


def _tensorrt(model: str, out: Path, given: dict[str, Any], trust_remote_code: bool, _: Progress) -> Written:
    from optimizer.artifact import check_output
    from optimizer.export_command import DTYPES, load_for_export
    from optimizer.export_engines import EngineOptions, describe_engines, engine_data, export_engines

    check_output(out)
    dtype = given.pop("dtype", "float16")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    targets = tuple(given.pop("target", ()))
    loaded, tokenizer, source = load_for_export(model, trust_remote_code)
    given.setdefault("context", min(1024, _positions(loaded)))
    given.setdefault("prompt", min(512, given["context"]))
    result = export_engines(loaded, tokenizer, source, out, dtype, EngineOptions(targets, **given))
    return engine_data(result), describe_engines(result)


def _positions(model: Any) -> int:
    """How many tokens the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024


def _aot(model: str, out: Path, given: dict[str, Any], trust_remote_code: bool, progress: Progress) -> Written:
    from optimizer.artifact import check_output
    from optimizer.export_command import load_for_export
    from optimizer.export_engines import describe_package, export_aot, package_data

    check_output(out)
    loaded, tokenizer, source = load_for_export(model, trust_remote_code)
    shape = {"batch": 1, "context": min(1024, _positions(loaded))} | given
    result = export_aot(loaded, tokenizer, source, out, progress=progress.update, **shape)
    return package_data(result), describe_package(result)


TARGETS: dict[str, tuple[Callable[..., Written], tuple[str, ...]]] = {
    "onnx": (_onnx, ("dtype", "int8_inputs")),
    "tensorrt": (
        _tensorrt, ("dtype", "target", "batch", "prompt", "context", "weight_streaming", "version_compatible")
    ),
    "aot": (_aot, ("batch", "context")),
}  # fmt: skip
"""What writes each target, and the options that it takes."""
