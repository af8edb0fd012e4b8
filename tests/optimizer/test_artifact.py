"""The artifact folder: whole or not at all, whatever dies, and every later change found and named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimizer import artifact
from optimizer.artifact import (
    ManifestInfo,
    Mismatch,
    SourceRecord,
    check_output,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from optimizer.errors import ArtifactError, OutputError

ROOT = Path(__file__).resolve().parents[2]
INFO = ManifestInfo(
    source=SourceRecord(name="tiny", revision=None, digest="0" * 64),
    verdict="passed",
    seeds={"calibration": 7},
    versions={"python": "3"},
)
FILES = {
    "config.json": b'{"a": 1}\n',
    "model.safetensors": bytes(range(64)),
    "sub/deep/table.bin": b"xyz",
    "README.md": b"# card\n",
    "report.html": b"<p>12 ms</p>",
}


def builder(files: dict[str, bytes]) -> Callable[[Path], None]:
    def build(staging: Path) -> None:
        for name, content in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)

    return build


def write(out: Path, files: dict[str, bytes] | None = None, **options: object) -> artifact.Manifest:
    return write_artifact(out, build=builder(files or FILES), manifest=INFO, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An artifact alone in its parent; whatever a test does, nothing hidden may stay beside it."""
    folder = tmp_path / "parent" / "model"
    write(folder)
    yield folder
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_what_is_written_is_what_is_described(out: Path) -> None:
    manifest = read_manifest(out)
    raw = (out / "manifest.json").read_text()
    parsed = json.loads(raw)
    assert raw == json.dumps(parsed, indent=2, sort_keys=True) + "\n"
    assert parsed["product"] == "roofline-optimizer"
    assert parsed["source"] == {"name": "tiny", "revision": None, "digest": "0" * 64}
    assert parsed["seeds"] == {"calibration": 7}
    assert parsed["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in FILES.items()
    }
    assert {name: data for name, data in contents(out).items() if name != "manifest.json"} == FILES
    assert verify_artifact(out) == []
    assert manifest.files["sub/deep/table.bin"].bytes == 3
    for entry in [out, *out.rglob("*")]:
        assert stat.S_IMODE(entry.stat().st_mode) == (0o755 if entry.is_dir() else 0o644)


def test_the_digest_is_that_of_sha256sum_over_the_deployable_files(out: Path) -> None:
    names = sorted(set(FILES) - {"README.md", "report.html"})
    listing = subprocess.run(["sha256sum", *names], cwd=out, capture_output=True, check=True).stdout
    assert read_manifest(out).digest == hashlib.sha256(listing).hexdigest()


def test_measurements_do_not_change_the_digest_and_weights_do(out: Path, tmp_path: Path) -> None:
    digest = read_manifest(out).digest
    again = {**FILES, "report.html": b"<p>13 ms</p>", "report.json": b"{}", "README.md": b"# other\n"}
    assert write(tmp_path / "again", again).digest == digest
    assert write(tmp_path / "byte", {**FILES, "config.json": b'{"a": 2}\n'}).digest != digest
    renamed = {("conf.json" if name == "config.json" else name): data for name, data in FILES.items()}
    assert write(tmp_path / "name", renamed).digest != digest
    for index, name in enumerate(["sub/report.html", "report.d/table.bin", "readme.md"]):  # the model's, not ours
        assert write(tmp_path / f"own{index}", {**FILES, name: b"x"}).digest != digest


# ------------------------------------------------------------------------------------------------- crashes

CRASH = r"""
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from optimizer import artifact
assert "torch" not in sys.modules, "crash children must start quickly"
base, mode = Path(sys.argv[1]), sys.argv[2]
POINTS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock"}
INFO = artifact.ManifestInfo(source=artifact.SourceRecord(name="m", revision=None, digest=""), verdict="passed",
                             versions={})
if mode == "renames":
    artifact._exchange = lambda a, b: False

def build(tag):
    def run(staging):
        (staging / "sub").mkdir()
        for name in ("a.bin", "sub/b.bin"):
            with (staging / name).open("wb") as file:
                for part in range(2):
                    file.write(tag * 100)
                    file.flush()
                    os.fsync(file.fileno())  # a point to die between two halves of a file
    return run

def write(out, tag):
    return artifact.write_artifact(out, build=build(tag), manifest=INFO)

def arm(limit):
    calls = itertools.count()
    def point(*_):
        if next(calls) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    sync, exchange = os.fsync, artifact._exchange
    def fsync(fd):
        point(); sync(fd); point()
    def swap(a, b):
        point(); done = exchange(a, b); point(); return done
    os.fsync, artifact._exchange = fsync, swap
    sys.addaudithook(lambda event, _: point() if event in POINTS else None)

old = None if mode == "fresh" else write(base / "old" / "out", b"o").digest
new = write(base / "new" / "out", b"n").digest
states = []
for limit in itertools.count():
    parent = base / "work"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    out = parent / "out"
    if old is not None:
        shutil.copytree(base / "old" / "out", out)
    pid = os.fork()
    if pid == 0:
        try:
            arm(limit)
            write(out, b"n")
            os._exit(0)
        except BaseException as error:
            print("child failed:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        break
    assert status == -signal.SIGKILL, (limit, status)
    absent = not out.exists()
    if absent and old is None:
        states.append("none")
    else:
        if absent:
            assert mode == "renames", limit
            states.append("recovered")
        assert artifact.verify_artifact(out) == [], limit  # with two renames, this is what puts the old one back
        digest = artifact.read_manifest(out).digest
        assert digest in (old, new), limit
        if not absent:
            states.append("old" if digest == old else "new")
    write(out, b"n")  # a later write works, and clears up after the dead one
    assert artifact.verify_artifact(out) == [] and artifact.read_manifest(out).digest == new, limit
    assert os.listdir(parent) == ["out"], (limit, os.listdir(parent))
print(json.dumps(states))
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("fresh", ["none", "new"]), ("exchange", ["old", "new"]), ("renames", ["old", "recovered", "new"])],
)
def test_killed_at_any_point_the_folder_is_old_or_new(mode: str, expected: list[str], tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # where flushing is free
    base = memory / f"crash-{os.getpid()}-{mode}" if os.access(memory, os.W_OK) else tmp_path
    base.mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CRASH, str(base), mode], cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) > 25
    order = [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]
    assert order == expected  # each stage seen, and never back from new to old


def test_everything_is_on_disk_before_the_swap_and_the_manifest_last(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, exchange = os.fsync, artifact._exchange

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        staged = next((p for p in (path, *path.parents) if ".staging-" in p.name), None)
        events.append(str(path.relative_to(staged)) if staged else str(path))
        sync(descriptor)

    def swap(a: Path, b: Path) -> bool:
        events.append("swap")
        return exchange(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(artifact, "_exchange", swap)
    write(out)
    before, after = events[: events.index("swap")], events[events.index("swap") + 1 :]
    files = {*FILES, "manifest.json"}
    folders = {".", "sub", "sub/deep"}
    assert set(before) == files | folders
    assert before.index("manifest.json") > max(before.index(name) for name in FILES)
    assert min(before.index(name) for name in folders) > before.index("manifest.json")
    assert after == [str(out.parent)]


def test_a_rename_that_fails_half_way_is_undone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace, calls = contents(out), os.replace, []

    def failing(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(a, b)

    monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        write(out, {"other": b"1"})
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------- verification


def test_every_flipped_byte_is_found_and_named(out: Path) -> None:
    for name, data in FILES.items():
        for index in range(len(data)):
            flipped = bytearray(data)
            flipped[index] ^= 1 << (index % 8)
            (out / name).write_bytes(flipped)
            assert [m.path for m in verify_artifact(out)] == [name], (name, index)
        (out / name).write_bytes(data)
    assert verify_artifact(out) == []


def test_every_flipped_byte_of_the_manifest_is_found(out: Path) -> None:
    write(out, {"a": b"1"})
    data = (out / "manifest.json").read_bytes()
    unnoticed = []
    for index in range(len(data)):
        flipped = bytearray(data)
        flipped[index] ^= 1 << (index % 5)
        (out / "manifest.json").write_bytes(flipped)
        try:
            read_manifest(out)
            unnoticed.append((index, data[max(0, index - 20) : index + 20]))
        except ArtifactError:
            pass
    assert not unnoticed


def test_each_kind_of_damage_is_named(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "copy")
    copy = tmp_path / "copy"
    (copy / "config.json").unlink()
    (copy / "model.safetensors").write_bytes(FILES["model.safetensors"][:10])
    (copy / "README.md").write_bytes(FILES["README.md"] + b"more")
    (copy / "report.html").unlink()
    (copy / "report.html").symlink_to(out / "report.html")
    (copy / "stranger.txt").write_text("hello")
    shutil.rmtree(copy / "sub" / "deep")
    (copy / "sub" / "deep").symlink_to(out / "sub" / "deep")
    assert verify_artifact(copy) == [
        Mismatch("README.md", "is longer: 11 bytes instead of 7"),
        Mismatch("config.json", "is missing"),
        Mismatch("model.safetensors", "is truncated: 10 bytes instead of 64"),
        Mismatch("report.html", "is a symbolic link"),
        Mismatch("sub/deep/table.bin", "is missing"),
        Mismatch("stranger.txt", "is not in the manifest"),
        Mismatch("sub/deep", "is not in the manifest"),
    ]


def rewrite(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the manifest as somebody would who also keeps its digest and its seal right."""
    parsed = json.loads((out / "manifest.json").read_text())
    change(parsed)
    names = sorted(name for name in parsed["files"] if name not in ("README.md", "report.html"))
    listing = "".join(f"{parsed['files'][name]['sha256']}  {name}\n" for name in names)
    parsed["digest"] = hashlib.sha256(listing.encode()).hexdigest()
    parsed.pop("seal")
    unsealed = json.dumps(parsed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    parsed["seal"] = hashlib.sha256(unsealed.encode()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(parsed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def test_a_consistent_rewrite_is_read(out: Path) -> None:
    rewrite(out, lambda parsed: parsed.update(verdict="ungated"))
    assert read_manifest(out).verdict == "ungated"  # so the refusals below are not the seal's


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../b", "C:/x", "a\\b", "./a", "a//b", "", ".", "a\nb", "manifest.json"]
)
def test_a_path_that_leaves_the_folder_is_refused(path: str, out: Path) -> None:
    def add(parsed: dict) -> None:  # type: ignore[type-arg]
        parsed["files"][path] = {"sha256": "0" * 64, "bytes": 1}

    rewrite(out, add)
    with pytest.raises(ArtifactError, match="corrupt"):
        verify_artifact(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2, product_version="9.9"), "schema version 2.*use the version.*9.9"),
        (lambda m: m.update(product="other"), "corrupt.*product"),
        (lambda m: m.update(surprise=1), "corrupt.*surprise"),
        (lambda m: m.pop("verdict"), "corrupt.*verdict"),
        (lambda m: m.update(files={}), "corrupt.*files"),
        (lambda m: m["files"]["config.json"].update(bytes=-1), "corrupt.*bytes"),
        (lambda m: m["files"]["config.json"].update(bytes=True), "corrupt.*bytes"),
        (lambda m: m["files"]["config.json"].update(sha256="short"), "corrupt.*sha256"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(change: Callable[..., None], message: str, out: Path) -> None:
    rewrite(out, change)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(out)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a": 1', "\ud800", '"' + "9" * 5000])
def test_a_manifest_that_is_no_json_is_refused(text: str, out: Path) -> None:
    (out / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        verify_artifact(out)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_manifests_raise_only_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "fuzz"
    if not folder.exists():
        write(folder)
        (tmp_path / "good").write_bytes((folder / "manifest.json").read_bytes())
    good = (tmp_path / "good").read_bytes()
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 20)))
    bad = good[:start] + data.draw(st.binary(max_size=12)) + good[stop:]
    (folder / "manifest.json").write_bytes(bad)
    try:
        read_manifest(folder)
    except ArtifactError:
        assert bad != good
    else:
        assert bad == good


def test_no_artifact_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError, match="no artifact"):
            verify_artifact(path)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no artifact of roofline-optimizer"):
        write(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}


def test_files_added_to_an_artifact_are_not_destroyed(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write \(notes\.txt\)"):
        write(out, {"other": b"1"})
    assert (out / "notes.txt").read_text() == "mine"


def test_overwriting_can_be_forbidden_and_replaces_everything(out: Path) -> None:
    before = contents(out)
    with pytest.raises(OutputError, match="holds an artifact already"):
        write(out, overwrite=False)
    assert contents(out) == before
    write(out, {"other": b"1"})
    assert set(contents(out)) == {"other", "manifest.json"}


def test_odd_places_are_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(staging: Path) -> None:
        raise AssertionError("the build must not start")

    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for path, message in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "link", "symbolic link to .*real"),
        (tmp_path / "dangling", "symbolic link to .*absent"),
        (tmp_path / "file" / "below", "Cannot write in .*file"),
        (tmp_path / "nul\0", "NUL"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/"), "left alone"),
    ]:
        with pytest.raises(OutputError, match=message):
            write_artifact(path, build=never, manifest=INFO)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="choose a folder that you may write"):
        check_output(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_output(tmp_path / "a" / "b", required_bytes=2_000_000_000)
    with pytest.raises(OutputError, match=r"needs 5\.000 GB, the disk has 2\.000 GB free: free 3\.000 GB"):
        check_output(tmp_path / "a" / "b", required_bytes=5_000_000_000)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_the_old_artifact(error: Exception, out: Path) -> None:
    def build(staging: Path) -> None:
        (staging / "half").write_bytes(b"x" * 1000)
        raise error

    before = contents(out)
    with pytest.raises(OutputError, match="disk is full") as caught:
        write_artifact(out, build=build, manifest=INFO)
    assert caught.value.__cause__ is not None
    assert contents(out) == before
    assert verify_artifact(out) == []


def test_a_disk_that_fills_up_while_flushing_leaves_the_old_artifact(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    for survive in range(9):  # 5 files, the manifest, 3 folders
        calls = iter([*([None] * survive), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

        def fsync(descriptor: int, calls: Iterator[OSError | None] = calls) -> None:
            if error := next(calls, None):
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OutputError, match="disk is full"):
                write(out, {**FILES, "config.json": b"new"})
        assert contents(out) == before


@pytest.mark.parametrize("error", [KeyError("mine"), FileNotFoundError(2, "gone", "in.bin"), KeyboardInterrupt()])
def test_what_the_build_raises_passes_unchanged(error: BaseException, out: Path) -> None:
    def build(staging: Path) -> None:
        raise error

    before = contents(out)
    with pytest.raises(type(error)) as caught:
        write_artifact(out, build=build, manifest=INFO)
    assert caught.value is error
    assert contents(out) == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: None, "wrote no file"),
        (lambda s: (s / "empty").mkdir(), "wrote no file"),
        (lambda s: (s / "manifest.json").write_text("{}"), "is reserved"),
        (lambda s: (s / "link").symlink_to("/etc/hosts"), "is a symbolic link"),
        (lambda s: (s / "folder").symlink_to("/etc"), "is a symbolic link"),
        (lambda s: os.mkfifo(s / "pipe"), "is no regular file"),
        (lambda s: (s / "a\nb").write_text("x"), "has characters"),
    ],
)
def test_a_build_that_writes_what_no_artifact_may_hold(build: Callable[..., None], message: str, out: Path) -> None:
    before = contents(out)
    with pytest.raises(ArtifactError, match=message):
        write_artifact(out, build=build, manifest=INFO)
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------- concurrency


def test_writers_of_the_same_folder_take_turns(out: Path) -> None:
    inside = 0
    most = 0
    errors: list[BaseException] = []

    def work(tag: bytes) -> None:
        def build(staging: Path) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            builder({"a": tag, "b": tag})(staging)
            time.sleep(0.01)
            inside -= 1

        try:
            for _ in range(3):
                write_artifact(out, build=build, manifest=INFO)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(b"%d" % index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert most == 1
    assert verify_artifact(out) == []
    assert (out / "a").read_bytes() == (out / "b").read_bytes()


def test_a_writer_that_waits_too_long_says_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "LOCK_SECONDS", 0.05)
    held = FileLock(out.with_name(".model.lock"))
    with held, pytest.raises(OutputError, match="Another process"):
        write(out)
    out.with_name(".model.lock").unlink(missing_ok=True)


def test_only_our_own_dead_stagings_are_removed(tmp_path: Path) -> None:
    dead, other, user = (tmp_path / f".model.staging-{tail}" for tail in ("123-abc_9", "x.staging-9-live", "notes.txt"))
    for folder in (dead, other, user):
        folder.mkdir()
    write(tmp_path / "model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([other.name, user.name, "model"])


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    write(tmp_path / "a" / "b" / "c [x]*")
    assert verify_artifact(tmp_path / "empty") == verify_artifact(tmp_path / "a" / "b" / "c [x]*") == []
    assert read_manifest(tmp_path / "empty").digest == read_manifest(tmp_path / "a" / "b" / "c [x]*").digest


def test_versions_are_those_installed() -> None:
    found = artifact.installed_versions()
    import torch

    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert torch.__version__ == found["torch"]
