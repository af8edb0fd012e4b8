"""The work folder: bytes in and out, jobs that are killed at any moment, other jobs, other processes, other files."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from optimizer import work_folder
from optimizer.errors import OutputError
from optimizer.work_folder import STATE, WorkFolder, container_memory, device_memory, system_memory

JOB = {"model": "a", "recipe": {"passes": [{"bits": 4}, {"bits": 8}], "layout": "packed"}, "calibration": None}
DTYPES = (
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    torch.bfloat16, torch.float16, torch.float32,
)  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path / "out" / ".model.work")


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def header(file: Path) -> Any:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def every_type() -> dict[str, Tensor]:
    """Every bit pattern of a byte in every type, NaNs of all kinds among them; and odd shapes."""
    raw = torch.arange(256, dtype=torch.uint8)
    tensors = {
        str(dtype): (raw % 2 if dtype == torch.bool else raw).clone().view(dtype).reshape(2, -1) for dtype in DTYPES
    }
    odd = {"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).t()}
    return tensors | odd


# Files


def test_tensors_come_back_bit_for_bit(work: WorkFolder) -> None:
    tensors = every_type()
    with work.opened(JOB):
        work.write_tensors("x.safetensors", tensors)
        found = work.map_tensors("x.safetensors")
    assert list(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    assert header(work.path / "x.safetensors")["__metadata__"] == {"format": "pt"}


def test_tensors_come_back_in_the_order_of_their_names(work: WorkFolder) -> None:
    tensors = {f"{i:05}": torch.full((1 + i % 3,), i, dtype=(torch.int8, torch.float32)[i % 2]) for i in range(30)}
    with work.opened(JOB):
        work.write_tensors("x", dict(reversed(tensors.items())))
        assert [int(tensor[0]) for tensor in work.map_tensors("x").values()] == list(range(30))


def test_the_same_content_gives_the_same_bytes(work: WorkFolder) -> None:
    tensors = every_type()
    with work.opened(JOB):
        work.write_tensors("a", tensors)
        work.write_tensors("b", {name: tensors[name].clone() for name in reversed(tensors)})
        work.write_record("c", {"x": 1, "y": [2.5, None, "é"]})
        work.write_record("d", {"y": (2.5, None, "é"), "x": 1})
    assert (work.path / "a").read_bytes() == (work.path / "b").read_bytes()
    assert (work.path / "c").read_bytes() == (work.path / "d").read_bytes()


def test_writing_into_mapped_tensors_does_not_reach_their_file(work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_tensors("x", {"a": torch.arange(5000.0)})
        before = (work.path / "x").read_bytes()
        mapped = work.map_tensors("x")["a"]
        mapped.zero_()
        assert (work.path / "x").read_bytes() == before
        assert torch.equal(work.map_tensors("x")["a"], torch.arange(5000.0))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say what is mapped")
def test_tensors_are_mapped_and_outlive_the_name_of_their_file(work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_tensors("x", {"a": torch.arange(5000.0)})
        mapped = work.map_tensors("x")["a"]
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        (range_of_file,) = [line.split()[0] for line in lines if line.endswith(str(work.path / "x"))]
        low, high = (int(address, 16) for address in range_of_file.split("-"))
        assert low <= mapped.data_ptr() < high
        (work.path / "x").unlink()
        assert torch.equal(mapped, torch.arange(5000.0))


def test_records_come_back(work: WorkFolder) -> None:
    record = {"layers": [{"name": "ü", "error": 0.1 + 0.2, "tokens": None}], "tiny": 5e-324, "big": 2**63}
    with work.opened(JOB):
        work.write_record("part.json", record)
        assert work.read_record("part.json") == record
        assert work.read_record("other.json") is None


# A job that is killed


@contextmanager
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Death between writing a file and renaming it."""

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_file_is_whole_or_absent(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with work.opened(JOB):
        work.write_record("old.json", 1)
        work.write_tensors("old", {"a": torch.zeros(2)})
        for name in ("new", "old"):
            with killed(monkeypatch):
                work.write_record(f"{name}.json", 2)
            with killed(monkeypatch):
                work.write_tensors(name, {"a": torch.ones(2)})
    partials = {"new.json.partial", "new.partial", "old.json.partial", "old.partial"}
    assert {file.name for file in work.path.iterdir()} == {STATE, "old", "old.json", *partials}
    with work.opened(JOB):
        assert {file.name for file in work.path.iterdir()} == {STATE, "old", "old.json"}
        assert work.read_record("old.json") == 1
        assert work.map_tensors("old")["a"].tolist() == [0, 0]


def test_a_file_reaches_the_disk_before_it_gets_its_name(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    rename = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append(new), rename(old, new)))
    with work.opened(JOB):
        events.clear()
        for name, write in (("a", work.write_record), ("b", work.write_tensors)):
            write(name, {})
            file = work.path / name
            assert events == [file.stat().st_ino, file, work.path.stat().st_ino]
            events.clear()


def test_a_job_that_fails_goes_on_with_what_it_had(work: WorkFolder) -> None:
    def fail() -> None:
        with work.opened(JOB):
            work.write_record("part.json", 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with work.opened(JOB):
        assert work.read_record("part.json") == 1


def test_a_job_that_ends_with_nothing_finished_leaves_no_folder(work: WorkFolder) -> None:
    with pytest.raises(ZeroDivisionError), work.opened(JOB):
        raise ZeroDivisionError
    assert not work.path.exists()
    with work.opened({"model": "b"}):  # so another job is not refused for it
        work.write_record("part.json", 1)
    assert work.read_record("part.json") == 1


def test_what_cannot_be_written_is_an_error_that_says_so_and_what_is_finished_stays(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.strerror(errno.ENOSPC)

    def fails(error: Exception) -> Callable[..., None]:
        def write(*_args: Any, **_options: Any) -> None:
            raise error

        return write

    with work.opened(JOB):
        work.write_tensors("old", {"a": torch.zeros(2)})
        monkeypatch.setattr("safetensors.torch.save_file", fails(SafetensorError(f"I/O error: {full} (os error 28)")))
        with pytest.raises(OutputError, match=rf"{re.escape(str(work.path))}.*{full}.*run the same again"):
            work.write_tensors("new", {"a": torch.ones(2)})
        monkeypatch.setattr(Path, "write_text", fails(OSError(errno.ENOSPC, full)))
        with pytest.raises(OutputError, match=full):
            work.write_record("new.json", 1)
    monkeypatch.undo()
    with work.opened(JOB):
        assert work.map_tensors("old")["a"].tolist() == [0, 0]


def test_a_job_that_was_killed_while_claiming_its_folder_can_be_begun_again(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch), work.opened(JOB):
        pytest.fail("claimed without a state")
    assert [file.name for file in work.path.iterdir()] == [f"{STATE}.partial"]
    with work.opened(JOB):
        assert [file.name for file in work.path.iterdir()] == [STATE]
        assert work.read_record(STATE) == JOB


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_half_thrown_away_is_never_gone_on_with(
    restart: bool, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with work.opened(JOB):
        work.write_record("part.json", 1)
        work.write_tensors("part", {})

    def die(folder: Path, **_: Any) -> None:
        (folder / "part").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_folder.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt), work.opened(JOB, restart=restart):
            work.remove()
    with pytest.raises(OutputError, match=r"is not empty and holds no state\.json"), work.opened(JOB):
        pytest.fail("went on with a part of the work")


def test_remove_leaves_nothing_beside_the_result(work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_tensors("x", {"a": torch.zeros(2)})
        work.remove()
    assert list(work.path.parent.iterdir()) == []
    work.remove()  # of nothing


# Another job


@pytest.mark.parametrize(
    ("there", "now", "difference"),
    [
        ({"model": "a"}, {"model": "b"}, 'model: "a" there, "b" now'),
        ({"a": {"b": [{"bits": 4}]}}, {"a": {"b": [{"bits": 8}]}}, "a.b.0.bits: 4 there, 8 now"),
        ({"a": [1, 2]}, {"a": [1, 2, {"x": 3}]}, 'a.2: nothing there, {"x": 3} now'),
        ({"a": [1, 2]}, {"a": [3]}, "a.0: 1 there, 3 now; a.1: 2 there, nothing now"),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2}}, "a.b: 1 there, nothing now"),
        ({"a": 1}, {"a": 1, "b": None}, "b: nothing there, null now"),
        ({"a": None}, {}, "a: null there, nothing now"),
        ({"a": None}, {"a": "x"}, 'a: null there, "x" now'),
        ({"a": {}}, {"a": []}, "a: {} there, [] now"),
        ({"a": {"0": 1}}, {"a": [1]}, 'a: {"0": 1} there, [1] now'),
        ({"a": 1}, {"a": True}, "a: 1 there, true now"),
        ({"a": 1}, {"a": "1"}, 'a: 1 there, "1" now'),
        ({"z": 1, "b": 2, "k": 0}, {"z": 3, "b": 4, "k": 0}, "b: 2 there, 4 now; z: 1 there, 3 now"),
        ({"a": "x" * 500}, {"a": "y"}, f'a: "{"x" * 79} there, "y" now'),
    ],
)
def test_the_work_of_another_job_is_refused_with_the_difference(
    there: Any, now: Any, difference: str, work: WorkFolder
) -> None:
    with work.opened(there):
        work.write_record("part.json", 1)
    with pytest.raises(OutputError) as refused, work.opened(now):
        pytest.fail("took the work of another job")
    assert f"the unfinished work of another job ({difference}). Go on" in str(refused.value)
    assert "--restart" in str(refused.value)
    assert work.read_record(STATE) == there
    assert work.read_record("part.json") == 1
    with work.opened(now, restart=True):
        assert [file.name for file in work.path.iterdir()] == [STATE]
        assert work.read_record(STATE) == now


@pytest.mark.parametrize(
    ("there", "now"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
        ({"shape": (1, 2)}, {"shape": [1, 2]}),
        ({3: "x"}, {"3": "x"}),
        ({"a": float("nan")}, {"a": float("nan")}),
        ({}, {}),
    ],
)
def test_the_same_job_said_in_another_way_is_the_same(there: Any, now: Any, work: WorkFolder) -> None:
    with work.opened(there):
        work.write_record("part.json", 1)
    with work.opened(now):
        assert work.read_record("part.json") == 1


def test_restart_of_nothing_begins(work: WorkFolder) -> None:
    with work.opened(JOB, restart=True):
        assert work.read_record(STATE) == JOB


# Another process

HOLD = """
import sys
from pathlib import Path
from optimizer.work_folder import WorkFolder
with WorkFolder(Path(sys.argv[1])).opened({"job": 1}):
    print("held", flush=True)
    input()
"""


@contextmanager
def held_elsewhere(work: WorkFolder) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(work.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_in_which_another_process_works_is_refused(restart: bool, work: WorkFolder) -> None:
    lock = work.path.with_name(f"{work.path.name}.lock")
    with held_elsewhere(work) as other:
        with (
            pytest.raises(OutputError, match="another process is working in"),
            work.opened({"job": 1}, restart=restart),
        ):
            pytest.fail("worked beside another process")
        assert work.read_record(STATE) == {"job": 1}
        assert lock.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert lock.exists()  # killed, it left its lock file, which holds nothing
        with work.opened({"job": 1}):
            assert work.read_record(STATE) == {"job": 1}
    assert not lock.exists()


def test_a_folder_is_open_once_in_a_process_too(work: WorkFolder) -> None:
    with work.opened(JOB), pytest.raises(OutputError, match="another process"), WorkFolder(work.path).opened(JOB):
        pytest.fail("opened twice")
    with work.opened(JOB):
        pass


def test_the_lock_goes_whatever_happens(work: WorkFolder) -> None:
    with work.opened({"a": 1}):
        work.write_record("part.json", 1)
    with pytest.raises(OutputError), work.opened({"a": 2}):
        pass
    with pytest.raises(ZeroDivisionError), work.opened({"a": 1}):
        raise ZeroDivisionError
    with pytest.raises(TypeError), work.opened({"a": object()}):
        pass
    assert [file.name for file in work.path.parent.iterdir()] == [work.path.name]


# Other files in its place


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_or_a_link_in_its_place_is_refused_and_left(restart: bool, work: WorkFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / STATE).write_text(json.dumps(JOB), encoding="utf-8")
    work.path.parent.mkdir()
    for make in (
        lambda: work.path.write_text("mine", encoding="utf-8"),
        lambda: work.path.symlink_to(elsewhere),
        lambda: work.path.symlink_to(tmp_path / "nothing"),
    ):
        make()
        with pytest.raises(OutputError, match=r"is no folder\. Remove it"), work.opened(JOB, restart=restart):
            pytest.fail("took what is no folder")
        assert work.path.is_symlink() or work.path.read_text(encoding="utf-8") == "mine"
        work.path.unlink()
    assert [file.name for file in elsewhere.iterdir()] == [STATE]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "thesis.partial", "part-00000.json"])
def test_a_folder_of_a_strangers_files_is_refused_and_left(name: str, restart: bool, work: WorkFolder) -> None:
    work.path.mkdir(parents=True)
    (work.path / name).write_text("mine", encoding="utf-8")
    (work.path / f"{STATE}.partial").write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match=r"is not empty and holds no state\.json"), work.opened(JOB, restart=restart):
        pytest.fail("took a stranger's folder")
    assert {file.name for file in work.path.iterdir()} == {name, f"{STATE}.partial"}


def test_an_empty_folder_is_taken(work: WorkFolder) -> None:
    work.path.mkdir(parents=True)
    with work.opened(JOB):
        assert work.read_record(STATE) == JOB


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": "a"', b"\0" * 64])
def test_a_damaged_state_is_named_and_restart_begins_again(content: bytes, work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_record("part.json", 1)
    (work.path / STATE).write_bytes(content)
    with pytest.raises(OutputError, match=r"state\.json is damaged .* --restart"), work.opened(JOB):
        pytest.fail("went on without a state")
    assert work.read_record("part.json") == 1
    with work.opened(JOB, restart=True):
        assert work.read_record("part.json") is None


@pytest.mark.parametrize("content", ["[]", "3", '"a"', "true"])
def test_a_state_of_another_kind_is_another_job(content: str, work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_record("part.json", 1)
    (work.path / STATE).write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match=r"another job \(all of it: .* there, "), work.opened(JOB):
        pytest.fail("went on without a state")


def test_damaged_tensors_are_named(work: WorkFolder) -> None:
    with work.opened(JOB):
        work.write_tensors("x", {"a": torch.arange(100.0)})
        file = work.path / "x"
        whole = file.read_bytes()
        for content in (b"", whole[:50], whole[:-1], b"\xff" * len(whole)):
            file.write_bytes(content)
            with pytest.raises(OutputError, match=r"x is damaged .* --restart"):
                work.map_tensors("x")
        file.unlink()
        with pytest.raises(OutputError, match="x is damaged"):
            work.map_tensors("x")


def test_a_place_that_cannot_hold_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "target").write_text("mine", encoding="utf-8")
    (tmp_path / "linked.lock").symlink_to(tmp_path / "target")
    (tmp_path / "folder.lock").mkdir()
    for path in (tmp_path / "file" / "work", tmp_path / "linked", tmp_path / "folder", tmp_path / ("x" * 252)):
        with pytest.raises(OutputError, match="cannot be used"), WorkFolder(path).opened(JOB):
            pytest.fail("worked without a lock")
    assert (tmp_path / "target").read_text(encoding="utf-8") == "mine"


# Memory


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system gives no estimate")
def test_the_memory_is_that_of_this_machine() -> None:
    all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 24 < system_memory() <= all_of_it
    assert 1 << 24 < device_memory(torch.device("cpu")) <= all_of_it


@pytest.mark.parametrize(
    ("content", "expected"),
    [("MemTotal: 9 kB\nMemAvailable:   5 kB\n", 5120), ("MemTotal: 9 kB\n", 0), ("", 0), (None, 0)],
)
def test_the_memory_is_the_kernels_estimate_or_unknown(
    content: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    if content is not None:
        file.write_text(content, encoding="ascii")
    monkeypatch.setattr(work_folder, "Path", lambda _: file)
    assert system_memory() == expected


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "4000", "memory.current": "1500", "memory.stat": "anon 1000\ninactive_file 500\n"}, 3000),
        ({"memory.max": "max", "memory.current": "1500", "memory.stat": "inactive_file 500\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "300",
                "memory/memory.stat": "cache 100\ntotal_inactive_file 50\n",
            },
            650,
        ),
        ({}, None),
    ],
)  # fmt: skip
def test_a_containers_limit_bounds_the_memory(files: dict[str, str], left: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert container_memory(tmp_path) == left
