"""The folder in which a long job keeps what it has finished, so that it can go on after being killed.

Every file is written under another name, flushed, and renamed: it is whole or absent. `state.json` says what the work
is of; a job that differs in any of it is refused with the difference, since its parts would not fit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from optimizer.errors import OutputError

STATE = "state.json"
_ABSENT = object()


@dataclass(frozen=True)
class WorkFolder:
    """Finished tensors and records of a job, in `path`."""

    path: Path

    @contextmanager
    def opened(self, state: Mapping[str, Any], *, restart: bool = False) -> Iterator[None]:
        """Claim the folder for a job described by `state`, alone; `restart` throws away what an earlier one left.

        A job that ends with nothing finished leaves no folder.

        Raises `OutputError` when another process works there, or when the folder holds the work of another job, or
        cannot be used.
        """
        lock = FileLock(self.path.with_name(f"{self.path.name}.lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(f"another process is working in {self.path}. Wait for it, or write elsewhere.") from None
        except OSError as error:
            raise OutputError(f"{self.path} cannot be used: {error}. Write elsewhere.") from None
        try:
            self._claim(json.loads(json.dumps(state)), restart)
            try:
                yield
            finally:
                if all(name == STATE or name.endswith(".partial") for name in self._files()):  # nothing is finished
                    self.remove()
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _claim(self, state: dict[str, Any], restart: bool) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(f"{self.path}, where finished parts are kept, is no folder. Remove it.")
        if restart and (self.path / STATE).is_file():  # nothing else is ours to throw away
            self.remove()
        if self._files() <= {f"{STATE}.partial"}:
            with self.writing():
                self.path.mkdir(exist_ok=True)
            self.write_record(STATE, state)
            return
        found = self.read_record(STATE)
        if found is None:
            raise OutputError(f"{self.path} is not empty and holds no {STATE}. Remove it, or write elsewhere.")
        if difference := "; ".join(_differences(found, state)):
            raise OutputError(
                f"{self.path} holds the unfinished work of another job ({difference}). Go on with that one, or throw "
                "its work away with --restart."
            )
        for leftover in self.path.glob("*.partial"):
            leftover.unlink()

    def _files(self) -> set[str]:
        return {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """`OutputError` for what cannot be written here: the disk is full, or the folder is no longer writable."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path} cannot be written to: {error}. What is finished is kept: make room there, and run the "
                "same again to go on."
            ) from error

    def write_record(self, name: str, record: Any) -> None:
        """Keep a JSON document."""
        with self.writing():
            partial = self._partial(name)
            partial.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
            self._finish(partial, name)

    def read_record(self, name: str) -> Any:
        """A kept JSON document, or None when there is none. `OutputError` for one that was damaged since."""
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            raise OutputError(f"{file} is damaged ({error}). Throw this work away with --restart.") from None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in a safetensors file."""
        from safetensors.torch import save_file

        with self.writing():
            partial = self._partial(name)
            save_file({key: tensors[key].contiguous() for key in sorted(tensors)}, partial, metadata={"format": "pt"})
            self._finish(partial, name)

    def map_tensors(self, name: str) -> dict[str, Tensor]:
        """Kept tensors by name, in its order, mapped from their file: the system may drop from memory what is unused.

        `OutputError` for a file that is gone or was damaged since.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path / name} is damaged ({error}). Throw this work away with --restart."
            ) from None

    def remove(self) -> None:
        """Throw everything away; first what says whose it is, so that a part of it is never gone on with."""
        (self.path / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _partial(self, name: str) -> Path:
        return self.path / f"{name}.partial"

    def _finish(self, partial: Path, name: str) -> None:
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(self.path / name)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _differences(found: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Where two JSON documents differ, such as `recipe.passes.0.bits: 4 there, 8 now`."""
    if isinstance(found, list) and isinstance(wanted, list):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            pair = found.get(key, _ABSENT), wanted.get(key, _ABSENT)
            yield from _differences(*pair, f"{path}.{key}".removeprefix("."))
        return
    there, now = ("nothing" if value is _ABSENT else json.dumps(value, sort_keys=True) for value in (found, wanted))
    if there != now:  # as text: 1 is not true, and NaN is NaN
        yield f"{path or 'all of it'}: {there:.80} there, {now:.80} now"


def system_memory() -> int:
    """Bytes of memory that a new job can use: what the kernel says is available, within the container's limit.

    0 where neither is known.
    """
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 0
    limit = container_memory(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, max(0, limit))


def container_memory(root: Path) -> int | None:
    """Bytes that the control group at `root` still allows, not counting file pages it can drop; None: no limit."""
    for limit_file, used_file in CGROUPS:
        try:
            limit, used = ((root / name).read_text(encoding="ascii").strip() for name in (limit_file, used_file))
            lines = (root / used_file).with_name("memory.stat").read_text(encoding="ascii").splitlines()
            stat = dict(line.split() for line in lines)
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            return int(limit) - int(used) + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return None


CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Where a container reads its memory limit and use: version 2 of control groups, and version 1."""


def device_memory(device: torch.device) -> int:
    """Free bytes of an accelerator's memory; those of the machine for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else system_memory()
