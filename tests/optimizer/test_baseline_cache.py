"""Kept baselines: equal to the measured ones, under a key of everything they rest on, never trusted when damaged."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers.utils import logging

from optimizer import baseline_cache
from optimizer.backends.runner import EagerRunner
from optimizer.baseline_cache import BaselineCache, code_digest, kept_digest, rests_on
from optimizer.evals.quality import compare
from optimizer.pipeline import Baseline, original_runner, run
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import Source, load_source
from tests.optimizer.small_jobs import recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import tiny_llama

TASKS = {"reference_perplexity": 2}


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(tiny_llama(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32))


@pytest.fixture(scope="module")
def original(source: Source) -> EagerRunner:
    return original_runner(source)


@pytest.fixture(scope="module")
def kept(source: Source, original: EagerRunner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Baseline]:
    folder = tmp_path_factory.mktemp("cache")
    cache = BaselineCache(folder)
    measured = cache.baseline(original, source=source, recipe=recipe(tasks=TASKS), progress=Progress())
    assert cache.notes == []
    return folder, measured


@pytest.fixture
def copied(kept: tuple[Path, Baseline], tmp_path: Path) -> Path:
    """A copy of the kept baseline, to be damaged."""
    (file,) = kept[0].glob("*.json")
    copy = tmp_path / "cache" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def counted(kept: tuple[Path, Baseline], monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes whose baseline was measured during the test, which takes no time."""
    found: list[Recipe] = []

    def measure(_: Any, given: Recipe, __: Any) -> Baseline:
        found.append(given)
        return kept[1]

    monkeypatch.setattr(baseline_cache, "measure_baseline", measure)
    return found


def ask(folder: Path, source: Source, original: EagerRunner, given: Recipe | None = None) -> tuple[Baseline, list[str]]:
    cache = BaselineCache(folder)
    found = cache.baseline(original, source=source, recipe=given or recipe(tasks=TASKS), progress=Progress())
    return found, cache.notes


def test_a_kept_baseline_is_the_measured_one_to_the_last_bit(
    kept: tuple[Path, Baseline], source: Source, original: EagerRunner, counted: list[Recipe]
) -> None:
    found, notes = ask(kept[0], source, original)
    assert not counted
    assert found.quality.metrics == kept[1].quality.metrics
    assert found.ceilings == kept[1].ceilings
    assert len(found.quality.metrics[0].documents) == 2
    assert [note for note in notes if "were kept from" in note] == notes
    assert len(notes) == 1
    compare(found.quality, kept[1].quality)  # the same documents


def test_a_job_with_a_kept_baseline_is_compared_with_it_and_still_timed(
    kept: tuple[Path, Baseline], source: Source
) -> None:
    progress = Progress()
    cache = BaselineCache(kept[0])
    given = recipe(tasks=TASKS)
    outcome = run(
        source, given, progress=progress,
        baseline=lambda runner: cache.baseline(runner, source=source, recipe=given, progress=progress),
    )  # fmt: skip
    assert "baseline quality" not in progress.seconds
    assert {"optimized quality", "speed"} <= progress.seconds.keys()  # speed is never kept
    by_key = {metric.key: metric.value for metric in kept[1].quality.metrics}
    assert {(c.task, c.metric, c.filter): c.baseline for c in outcome.comparisons} == by_key
    assert len(cache.notes) == 1


@pytest.mark.parametrize("position", [0, 40, 64, 65, 1000, -1])
def test_a_flipped_byte_is_refused_and_measured_again(
    position: int, copied: Path, source: Source, original: EagerRunner, counted: list[Recipe]
) -> None:
    good = copied.read_bytes()
    damaged = bytearray(good)
    damaged[position] ^= 1
    copied.write_bytes(bytes(damaged))
    _, notes = ask(copied.parent, source, original)
    assert len(counted) == 1
    assert len(notes) == 1
    assert "measured again" in notes[0]
    assert ask(copied.parent, source, original)[1][0].startswith("quality of the baseline")  # whole once more


@pytest.mark.parametrize("content", [b"", b"\n", b"{}", b"\xff" * 100])
def test_what_is_no_baseline_is_refused(
    content: bytes, copied: Path, source: Source, original: EagerRunner, counted: list[Recipe]
) -> None:
    copied.write_bytes(content)
    _, notes = ask(copied.parent, source, original)
    assert len(counted) == 1
    assert "measured again" in notes[0]


@pytest.mark.parametrize(
    "change", [{"of": {}}, {"metrics": [{"task": "x"}]}, {"ceilings": {}}, {"metrics": 5}, {"ceilings": None}]
)
def test_a_whole_file_of_something_else_is_refused(
    change: dict[str, Any], copied: Path, source: Source, original: EagerRunner, counted: list[Recipe]
) -> None:
    import hashlib

    body = json.dumps(json.loads(copied.read_bytes().partition(b"\n")[2]) | change).encode()
    copied.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    _, notes = ask(copied.parent, source, original)
    assert len(counted) == 1
    assert "does not fit" in notes[0]


def test_only_a_whole_success_is_kept(
    tmp_path: Path, source: Source, original: EagerRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Baseline:
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline_cache, "measure_baseline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, source, original)
    assert not list(tmp_path.glob("*.json*"))
    (lock,) = tmp_path.glob("*.lock")
    with FileLock(lock, timeout=0):  # and nothing stays locked
        pass


def test_a_baseline_that_is_not_finite_is_not_kept(
    kept: tuple[Path, Baseline], tmp_path: Path, source: Source, original: EagerRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Baseline(replace(kept[1].quality, non_finite=3), kept[1].ceilings)
    monkeypatch.setattr(baseline_cache, "measure_baseline", lambda *_: broken)
    _, notes = ask(tmp_path, source, original)
    assert "not finite" in notes[0]
    assert not list(tmp_path.glob("*.json"))


def test_the_key_changes_with_everything_a_baseline_rests_on(
    source: Source, original: EagerRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tasks=TASKS)
    base = rests_on(original, source, given)
    (tmp_path / "c.txt").write_text("text", encoding="utf-8")
    (tmp_path / "task.yaml").write_text("task: a", encoding="utf-8")
    named = recipe(tasks={str(tmp_path / "task.yaml"): 2})
    of_file = rests_on(original, source, named)
    (tmp_path / "task.yaml").write_text("task: b", encoding="utf-8")
    assert rests_on(original, source, named) != of_file
    others = [
        rests_on(original, replace(source, digest="0"), given),
        rests_on(original, source, recipe(tasks=TASKS | {"reference_perplexity": 3})),
        rests_on(original, source, recipe(tasks=TASKS, batch=2)),
        rests_on(original, source, given, tmp_path / "c.txt"),
    ]
    monkeypatch.setattr(baseline_cache, "describe", lambda _: ("another machine", 2, "AVX2"))
    others.append(rests_on(original, source, given))
    monkeypatch.undo()
    monkeypatch.setattr(baseline_cache, "installed_versions", lambda: {"torch": "1"})
    others.append(rests_on(original, source, given))
    monkeypatch.undo()
    monkeypatch.setattr(baseline_cache, "code_digest", lambda: "0")
    others.append(rests_on(original, source, given))
    assert all(other != base for other in others)
    assert len({json.dumps(other, sort_keys=True) for other in others}) == len(others)


def test_the_key_leaves_out_what_a_baseline_does_not_rest_on(source: Source, original: EagerRunner) -> None:
    floors = ({"metric": "weights.ratio", "at_most": 0.1},)
    other = recipe(*floors, tasks=TASKS, passes=[{"name": "decode", "compile": False}], output=3)
    assert rests_on(original, source, other) == rests_on(original, source, recipe(tasks=TASKS))


def test_a_tokenizer_that_splits_otherwise_is_another_key(source: Source, original: EagerRunner) -> None:
    import copy

    tokenizer: Any = copy.deepcopy(source.tokenizer)
    tokenizer.add_tokens(["<new>"])
    given = recipe(tasks=TASKS)
    changed = rests_on(original, replace(source, tokenizer=tokenizer), given)
    assert changed["tokenizer"] != rests_on(original, source, given)["tokenizer"]


def test_the_code_has_a_digest_that_stays() -> None:
    first = code_digest()
    code_digest.cache_clear()
    assert code_digest() == first
    assert len(first) == 64


def test_two_jobs_at_once_measure_once(
    tmp_path: Path, kept: tuple[Path, Baseline], source: Source, original: EagerRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(*_: Any) -> Baseline:
        measured.append(threading.get_ident())
        time.sleep(0.3)
        return kept[1]

    monkeypatch.setattr(baseline_cache, "measure_baseline", measure)
    found: list[Baseline] = []
    jobs = [threading.Thread(target=lambda: found.append(ask(tmp_path, source, original)[0])) for _ in range(4)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join(30)
    assert len(measured) == 1
    assert [each.quality.metrics for each in found] == [kept[1].quality.metrics] * 4
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_second_job_waits_and_says_so(copied: Path, source: Source, original: EagerRunner) -> None:
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(copied.with_suffix(".lock")):
            held.set()
            free.wait(30)

    class Said(Progress):
        def started(self, name: str) -> None:
            if "another job" in name:
                free.set()

    threading.Thread(target=hold).start()
    assert held.wait(30)
    progress, cache = Said(), BaselineCache(copied.parent)
    cache.baseline(original, source=source, recipe=recipe(tasks=TASKS), progress=progress)
    assert free.is_set()
    assert "baseline quality" not in progress.seconds


def test_a_folder_that_cannot_be_used_costs_the_cache_and_not_the_job(
    tmp_path: Path, source: Source, original: EagerRunner, counted: list[Recipe]
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    _, notes = ask(tmp_path / "file" / "cache", source, original)
    assert len(counted) == 1
    assert any("cannot be used" in note for note in notes)


def test_the_digest_of_a_cache_changes_when_one_is_added(copied: Path) -> None:
    before = kept_digest(copied.parent)
    copied.with_name("0.json").write_text("x", encoding="utf-8")
    after = kept_digest(copied.parent)
    copied.with_name("0.lock").write_text("x", encoding="utf-8")
    assert before != after == kept_digest(copied.parent)
    assert kept_digest(copied.parent / "none") == ""
