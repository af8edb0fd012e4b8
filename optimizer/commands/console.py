"""What every command shares: options of the same meaning, JSON on stdout, and errors as exit codes."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or `reference` for the embedded model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Text (.txt) or rows (.jsonl, .json, .parquet) to calibrate on; else built-in text.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
RemoteCode = Annotated[bool, typer.Option(help="Run Python code that the model's repository ships.")]


def echo_json(document: Any) -> None:
    """One JSON document on stdout; a value that is not finite, which JSON cannot say, becomes null."""
    typer.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_runner(model: str, device: str, trust_remote_code: bool) -> Any:
    """An artifact on the runner it is served by; any other model as Hugging Face runs it."""
    from optimizer.artifact import MANIFEST
    from optimizer.backends.runner import EagerRunner
    from optimizer.pipeline import choose_device
    from optimizer.source import load_source

    if (Path(model) / MANIFEST).is_file():
        from optimizer.api import load

        return load(model, device=device)
    source = load_source(model, device=choose_device(device), trust_remote_code=trust_remote_code)
    return EagerRunner(source.model, source.tokenizer)


class errors_to_exit:  # noqa: N801 (reads as a statement)
    """Print a typed error as one line (or a JSON object) on stderr and leave with its exit code.

    Anything else is a defect: it keeps its traceback, and leaves with 3 like every failure while running.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        from optimizer.errors import OptimizerError

        if isinstance(error, OptimizerError):
            self._leave(type(error).__name__, str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            self._leave("Interrupted", "interrupted", 130)
        if isinstance(error, BrokenPipeError):  # the reader of our output went away: what a shell calls SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141)
        if isinstance(error, Exception) and not isinstance(error, typer.Exit | typer.Abort):
            import traceback

            traceback.print_exception(error)
            self._leave(type(error).__name__, str(error) or "no message", 3)

    def _leave(self, kind: str, message: str, code: int) -> NoReturn:
        text = json.dumps({"error": kind, "message": message}) if self.as_json else f"error: {message}"
        typer.echo(text, err=True)
        raise typer.Exit(code)
