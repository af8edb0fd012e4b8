"""The files and variables by which a CI system learns the results of `optimizer ci`.

GitHub reads outputs and the summary from files that it names in the environment; GitLab reads a dotenv report.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from optimizer.baseline_cache import kept_digest
from optimizer.ci_comment import SUMMARY_BYTES, comment, summary
from optimizer.ci_config import CiConfig
from optimizer.ci_result import JobResult, exit_code, verdict
from optimizer.errors import OutputError
from optimizer.junit import junit_xml
from optimizer.report import _write_atomically

DOTENV_BYTES = 5_000
"""GitLab refuses dotenv reports of more than 5 KiB."""


def document(results: Sequence[JobResult]) -> dict[str, object]:
    """Everything as plain data: what `--json` prints and `results.json` holds."""
    return {
        "verdict": verdict(results),
        "exit_code": exit_code(results),
        "jobs": [result.to_dict() for result in results],
    }


def write_files(config: CiConfig, results: Sequence[JobResult]) -> None:
    """Write `junit.xml`, `summary.md`, `comment.md`, `results.json` and `optimizer.env`, each whole or not at all."""
    out, price = Path(config.out), config.price_per_hour
    _write_atomically(out / "junit.xml", junit_xml(results, name=config.title))
    _write_atomically(out / "summary.md", summary(results, config.title, price_per_hour=price))
    _write_atomically(out / "comment.md", comment(results, config.title, price_per_hour=price))
    _write_atomically(out / "results.json", json.dumps(document(results), indent=2) + "\n")
    _write_atomically(out / "optimizer.env", dotenv(outputs(config, results)))


def outputs(config: CiConfig, results: Sequence[JobResult], root: Path = Path()) -> dict[str, str]:
    """The outputs of the step, paths seen from `root`. What each job has is a line for each job, in order."""

    def lines(values: Sequence[object]) -> str:
        return "\n".join("" if value is None else str(value) for value in values)

    out = root / config.out
    return {
        "verdict": verdict(results),
        "exit-code": str(exit_code(results)),
        "jobs": lines([result.job.name for result in results]),
        "decode-speedup": lines([None if r.speedup is None else f"{r.speedup:.4g}" for r in results]),
        "artifact": lines([None if r.artifact is None else root / r.artifact for r in results]),
        "digest": lines([result.digest for result in results]),
        "report": lines([root / r.reports[0] if r.reports else None for r in results]),
        "out": str(out),
        "junit": str(out / "junit.xml"),
        "summary": str(out / "summary.md"),
        "comment": str(out / "comment.md"),
        "results": str(out / "results.json"),
        "baselines": "" if config.cache is None else kept_digest(Path(config.cache)),
    }


def append_github(config: CiConfig, results: Sequence[JobResult]) -> None:
    """Append the outputs and the summary where GitHub asks for them; elsewhere nothing."""
    if path := os.environ.get("GITHUB_OUTPUT"):
        _append(path, github_output(outputs(config, results, Path.cwd())))
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        room = SUMMARY_BYTES - _size(path)
        _append(path, summary(results, config.title, price_per_hour=config.price_per_hour, limit=room))


def github_error(message: str) -> None:
    """Tell GitHub that there is no verdict, because the configuration cannot be used."""
    if path := os.environ.get("GITHUB_OUTPUT"):
        _append(path, github_output({"verdict": "error", "exit-code": "2"}))
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        from optimizer.ci_comment import fenced

        _append(path, f"## Nothing was optimized\n\n{fenced(message)}\n")


def github_output(values: Mapping[str, str]) -> str:
    """Values of any text in the syntax of `$GITHUB_OUTPUT`: between delimiters that no value can have known."""
    text = ""
    for name, value in values.items():
        delimiter = f"optimizer_{secrets.token_hex(16)}"
        text += f"{name}<<{delimiter}\n{_unicode(value)}\n{delimiter}\n"
    return text


def dotenv(values: Mapping[str, str]) -> str:
    """GitLab's dotenv report: names in capitals, several lines joined by commas, anything odd percent-encoded.

    It allows no line breaks, spaces, quotes or comments, and `DOTENV_BYTES` in all: the values that come too late for
    that are left out.
    """
    text = ""
    for name, value in values.items():
        plain = ",".join(quote(line, safe="/:.+-_~@=", errors="replace") for line in value.split("\n"))
        line = f"OPTIMIZER_{name.upper().replace('-', '_')}={plain}\n"
        if len(text) + len(line) <= DOTENV_BYTES:
            text += line
    return text


def _append(path: str, text: str) -> None:
    try:
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}, which the environment names, cannot be written: {error}.") from None


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _unicode(text: str) -> str:
    """`text` without lone surrogates, which a file name can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
