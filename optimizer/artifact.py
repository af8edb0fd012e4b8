"""The deployable folder: written whole or not at all, and checkable ever after.

Order of a write, each step on disk (fsync) before the next: all files into a hidden sibling `.name.staging-*`, then
`manifest.json`, then one atomic exchange with the old folder (`renameat2(RENAME_EXCHANGE)`, Linux), then the old one
is removed. Killed at any point, the final name holds the old folder, or the new one, complete. Where the exchange
does not exist the old folder is renamed to `.name.previous` first; if the write dies right there, the next write,
`read_manifest` or `verify_artifact` puts it back. A lock on `.name.lock` keeps two writers apart, so whatever is
staged beside a lock that could be taken belongs to a dead process.

`manifest.json` lists the sha256 of every file and seals itself, so any flipped byte of the folder is found. Its
`digest` covers what is deployed and leaves out the measurements (`report.*`, `README.md`), which differ from run to
run; for sorted paths it is what a shell computes as

    sha256sum config.json model.safetensors ... | sha256sum
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from optimizer import __version__
from optimizer.errors import ArtifactError, OutputError

MANIFEST = "manifest.json"
PRODUCT = "roofline-optimizer"
SCHEMA_VERSION = 1
MEASUREMENTS = ("report.*", "README.md")  # top-level names left out of the digest
LOCK_SECONDS = 60.0  # how long a second writer waits for the first

_PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "lm-eval")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # old kernel, file system, sandbox
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide an artifact's bytes; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceRecord(_Strict):
    """The model an artifact was made from: its name, the hub's commit if it came from there, and its digest."""

    name: str
    revision: str | None
    digest: str


class ManifestInfo(_Strict):
    """What the writer of an artifact knows; `write_artifact` adds the files and the digest."""

    source: SourceRecord
    verdict: str = Field(min_length=1)
    seeds: Mapping[str, int] = {}
    versions: Mapping[str, str] = Field(default_factory=installed_versions)


class FileRecord(_Strict):
    """One file of an artifact."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(ManifestInfo):
    """`manifest.json`. `files` are relative POSIX paths; `digest` covers the deployable ones."""

    schema_version: Literal[1] = 1
    product: Literal["roofline-optimizer"] = "roofline-optimizer"
    product_version: str
    files: Mapping[str, FileRecord] = Field(min_length=1)
    digest: str

    @field_validator("files")
    @classmethod
    def _inside(cls, files: Mapping[str, FileRecord]) -> Mapping[str, FileRecord]:
        for path in files:
            if problem := _path_problem(path):
                raise ValueError(f"the path {path!r:.120} {problem}")
        return files

    def to_json(self) -> str:
        """The one text that `manifest.json` has for this content: keys sorted, `seal` the sha256 of the rest."""
        content = self.model_dump(mode="json")
        seal = hashlib.sha256(_dumps(content).encode()).hexdigest()
        return _dumps({**content, "seal": seal})


def _dumps(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class Mismatch(NamedTuple):
    """One file that is not as the manifest says."""

    path: str
    problem: str


def deployable_digest(files: Mapping[str, FileRecord]) -> str:
    """sha256 over the `sha256sum` listing of the deployable files in order of their paths."""
    kept = sorted(path for path in files if "/" in path or not any(fnmatchcase(path, m) for m in MEASUREMENTS))
    return hashlib.sha256("".join(f"{files[path].sha256}  {path}\n" for path in kept).encode()).hexdigest()


def check_output(out: str | Path, required_bytes: int = 0, *, overwrite: bool = True) -> None:
    """Refuse, before any work, an `out` that could not be written at the end of it. Changes nothing on disk.

    `required_bytes` is what the new artifact will take; while it is written the old one stays, so this much must be
    free. Raises OutputError for a file, a link, a folder that this package did not write or that holds other files,
    an existing artifact without `overwrite`, a parent that cannot be written, and a disk that is too small.
    """
    out = _absolute(out)
    if "\0" in str(out):
        raise OutputError(f"The path {str(out)!r:.120} holds a NUL character: choose another name")
    with _disk_errors(out):
        _check_output(out, required_bytes, overwrite=overwrite)


def _check_output(out: Path, required_bytes: int, *, overwrite: bool) -> None:
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link to {out.readlink()}: name the folder itself")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        _require_ours(out, overwrite=overwrite)
    parent = _existing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write in {parent}, where {out.name} would be: choose a folder that you may write")
    free = shutil.disk_usage(parent).free
    if free < required_bytes:
        raise OutputError(
            f"{out} needs {required_bytes / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB free: free "
            f"{(required_bytes - free) / 1e9:.3f} GB or choose another disk"
        )


def _existing(out: Path) -> Path:
    """The nearest folder above `out` that exists."""
    return next(folder for folder in out.parents if folder.exists())


def _require_ours(out: Path, *, overwrite: bool) -> None:
    try:
        manifest = _read(out)
    except ArtifactError as error:
        raise OutputError(
            f"{out} is not empty and no artifact of {PRODUCT} ({error}): it is left alone; choose another folder, or "
            "delete this one yourself"
        ) from error
    strangers = sorted(path for path, _ in _walk(out) if path not in manifest.files and path != MANIFEST)
    if strangers:
        raise OutputError(f"{out} holds files that {PRODUCT} did not write ({_listed(strangers)}): move them elsewhere")
    if not overwrite:
        raise OutputError(f"{out} holds an artifact already: choose another folder, or allow it to be overwritten")


def write_artifact(
    out: str | Path,
    *,
    build: Callable[[Path], None],
    manifest: ManifestInfo,
    overwrite: bool = True,
    required_bytes: int = 0,
) -> Manifest:
    """Let `build(staging)` write the files, then make them appear at `out` at once, with their manifest.

    `build` gets an empty folder on the same disk; it may write regular files in any depth, but no links and no
    `manifest.json`. Whatever `build` raises passes through after the staging is removed; a full disk becomes an
    OutputError. In each case `out` is as it was. Files get mode 0644. Returns the manifest as written.
    """
    out = _absolute(out)
    check_output(out, required_bytes, overwrite=overwrite)
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out), _disk_errors(out):
        _recover(out)
        _remove_stale(out)
        check_output(out, required_bytes, overwrite=overwrite)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.staging-{os.getpid()}-", dir=out.parent))
        try:
            _run_build(build, staging)
            sealed = _seal(staging, manifest)
            _swap(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # after the swap this is the old artifact
        return sealed


def _run_build(build: Callable[[Path], None], staging: Path) -> None:
    """Only a full disk is ours to explain, also where a library wraps it (safetensors, torch); the rest passes."""
    try:
        build(staging)
    except Exception as error:
        full = os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) in _DISK_FULL
        if full and not isinstance(error, OutputError):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise _BuildError(error) from error


class _BuildError(Exception):
    """Carries an exception of `build` past the handler that explains our own disk errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except _BuildError as carried:
        raise carried.error from carried.error.__cause__
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise OutputError(
                f"The disk is full, so {out} is as it was; without the new files it has "
                f"{shutil.disk_usage(_existing(out)).free / 1e9:.3f} GB free: free more, or choose another disk"
            ) from error
        reason = f"{error.strerror or error} ({error.filename or out})"
        raise OutputError(f"Cannot write {out}: {reason}: choose a folder that you may write") from error


def _seal(staging: Path, info: ManifestInfo) -> Manifest:
    """Hash and flush every file, write the manifest last, flush every folder."""
    files: dict[str, FileRecord] = {}
    folders = {staging}
    for path, entry in _walk(staging):
        if problem := _path_problem(path) or _kind_problem(entry):
            raise ArtifactError(f"The build wrote {path!r:.120}, which {problem}: an artifact holds regular files only")
        folders.update(folder for folder in entry.parents if folder.is_relative_to(staging))
        entry.chmod(0o644)
        files[path] = FileRecord(sha256=_sha256(entry), bytes=entry.stat().st_size)
        _fsync(entry)
    if not files:
        raise ArtifactError("The build wrote no file, so there is no artifact: nothing was changed")
    manifest = Manifest(**dict(info), product_version=__version__, files=files, digest=deployable_digest(files))
    target = staging / MANIFEST
    target.write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    target.chmod(0o644)
    _fsync(target)
    for folder in sorted(folders, reverse=True):  # children before parents
        folder.chmod(0o755)
        _fsync(folder)
    return manifest


def _swap(staging: Path, out: Path) -> None:
    """Put `staging` at `out` atomically; an old artifact ends up at `staging`."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(staging, out)  # noqa: PTH105 - also onto an empty folder
        _fsync(out.parent)
        return
    if _exchange(staging, out):
        _fsync(out.parent)
        return
    previous = _previous(out)
    os.replace(out, previous)  # noqa: PTH105
    try:
        os.replace(staging, out)  # noqa: PTH105
    except BaseException:
        os.replace(previous, out)  # noqa: PTH105
        raise
    _fsync(out.parent)
    os.replace(previous, staging)  # noqa: PTH105


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step of the file system; False where that is not possible (renameat2(2))."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _recover(out: Path) -> None:
    """Finish a swap that died between its two renames, or just after them. The caller holds the lock."""
    previous = _previous(out)
    if not previous.exists():
        return
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(previous)
    else:
        os.replace(previous, out)  # noqa: PTH105
        _fsync(out.parent)


def _remove_stale(out: Path) -> None:
    """Remove what writers that were killed have left. The caller holds the lock, so no live one has a staging."""
    pattern = re.compile(re.escape(f".{out.name}.staging-") + r"\d+-\w+")
    for entry in list(out.parent.iterdir()):
        if pattern.fullmatch(entry.name):
            shutil.rmtree(entry)


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """The only writer of `out`. The lock file goes while held: filelock (3.21) never keeps an unlinked one."""
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise OutputError(
            f"Another process has been writing {out} for {LOCK_SECONDS:.0f} s: wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise OutputError(f"Cannot lock {path} ({error.strerror}): choose a folder that you may write") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an artifact. ArtifactError if there is none, or if it is not exactly as it was written."""
    path = _absolute(path)
    if not path.exists() and _previous(path).exists():
        with _lock(path):
            _recover(path)
    return _read(path)


def _read(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}, so it is no artifact: write it again with optimizer run")
    try:
        text = file.read_bytes().decode()
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {found!r:.40} instead of an object")
        found.pop("seal", None)  # compared below, as part of the text
        schema = found.get("schema_version")
        if found.get("product") == PRODUCT and schema != SCHEMA_VERSION:
            raise ArtifactError(
                f"{file} has schema version {schema!r:.40}, this {PRODUCT} ({__version__}) reads {SCHEMA_VERSION}: use "
                f"the version that wrote it ({found.get('product_version')!r:.40})"
            )
        manifest = Manifest.model_validate(found)
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{file} is corrupt ({_reason(error)}): write the artifact again") from error
    if manifest.to_json() != text or manifest.digest != deployable_digest(manifest.files):
        raise ArtifactError(f"{file} was changed after it was written: write the artifact again")
    return manifest


def verify_artifact(path: str | Path) -> list[Mismatch]:
    """Every file of the artifact that is missing, changed, cut short, or not in the manifest; empty means intact.

    Raises ArtifactError when the manifest itself is missing or corrupt. Files are streamed.
    """
    path = _absolute(path)
    manifest = read_manifest(path)
    found = dict(_walk(path))
    problems: list[Mismatch] = []
    for name, record in sorted(manifest.files.items()):
        if problem := _file_problem(found.get(name), record):
            problems.append(Mismatch(name, problem))
    unexpected = sorted(found.keys() - manifest.files.keys() - {MANIFEST})
    return problems + [Mismatch(name, "is not in the manifest") for name in unexpected]


def _file_problem(file: Path | None, record: FileRecord) -> str | None:
    if file is None:
        return "is missing"
    if problem := _kind_problem(file):
        return problem
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return f"is {'truncated' if size < record.bytes else 'longer'}: {size} bytes instead of {record.bytes}"
        return None if _sha256(file) == record.sha256 else "was changed: its sha256 differs from the manifest's"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative POSIX path, path) of everything below `root` that is no folder, sorted; links are not followed."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in sorted(files + links):
            entry = Path(folder) / name
            yield entry.relative_to(root).as_posix(), entry


def _path_problem(path: str) -> str | None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or str(pure) != path:
        return "is no plain relative path"
    if not path.isprintable() or "\\" in path or ":" in path:
        return "has characters that not every file system can hold"
    return "is reserved" if path == MANIFEST else None


def _kind_problem(entry: Path) -> str | None:
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    return None if stat.S_ISREG(mode) else "is no regular file"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absolute(path: str | Path) -> Path:
    """Absolute and without `..`, but a link stays visible as one."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - resolve() would follow the link


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    return str(error)[:200]
