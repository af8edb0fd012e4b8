from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from optimizer.evals.reference import build_tasks, corpus
from optimizer.evals.tasks import processing

TASKS = Path(processing.__file__).parent
NAMES = ("reference_cloze", "reference_next_line", "reference_perplexity")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (build_tasks.HELD_OUT / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return build_tasks.read_modules()


def test_the_files_are_what_the_modules_build(tmp_path, modules):
    (tmp_path / "modules").mkdir()
    for name, text in modules.items():
        (tmp_path / "modules" / f"{name}.py.txt").write_text(text, encoding="utf-8")
    build_tasks.write(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        assert path.read_bytes() == (build_tasks.HELD_OUT / path.name).read_bytes()
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_every_held_out_module_is_there_with_its_licence(modules):
    assert sorted(modules) == sorted(corpus.HELD_OUT)
    licence = (build_tasks.HELD_OUT / "PSF-LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licence


def test_nothing_held_out_is_trained_on():
    trained = set(corpus.training_files())
    assert trained
    assert not trained & set(corpus.held_out_files())


def test_the_data_is_small_enough_to_ship():
    size = sum(path.stat().st_size for path in build_tasks.HELD_OUT.rglob("*") if path.is_file())
    assert size < 1_500_000


def test_perplexity_documents_join_to_the_modules(modules):
    documents = rows("perplexity.jsonl")
    assert max(len(row["text"]) for row in documents) <= build_tasks.DOCUMENT_CHARACTERS
    joined = dict.fromkeys(modules, "")
    for row in sorted(documents, key=lambda row: row["part"]):
        joined[row["module"]] += row["text"]
    assert joined == modules


def test_the_right_next_line_is_the_next_line(modules):
    items = rows("next_line.jsonl")
    assert len(items) >= 600
    for row in items:
        lines = modules[row["module"]].splitlines(keepends=True)
        assert row["choices"][row["answer"]] == lines[row["line"] - 1]
        assert "".join(lines[: row["line"] - 1]).endswith("\n" + row["context"])
        assert 200 <= len(row["context"]) <= 380


def test_the_wrong_next_lines_are_plausible_and_wrong(modules):
    lines = {name: set(text.splitlines(keepends=True)) for name, text in modules.items()}
    for row in rows("next_line.jsonl"):
        assert sum(choice in lines[row["module"]] for choice in row["choices"]) >= 2
        truth = row["choices"][row["answer"]]
        assert len({choice.strip() for choice in row["choices"]}) == 4
        for choice in row["choices"]:
            assert len(choice) - len(choice.lstrip()) == len(truth) - len(truth.lstrip())
            assert 0.6 <= len(choice.strip()) / len(truth.strip()) <= 1.67
            assert not choice.lstrip().startswith("#")
            assert choice.endswith("\n")
            assert choice not in row["context"]


def test_no_next_line_is_prose(modules):
    """By a second way of telling: a docstring's lines are those of the first statement that holds it."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {
        (name, number)
        for name, text in modules.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, owners) and ast.get_docstring(node) is not None
        for number in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    assert len(prose) > 1000
    assert not prose & {(row["module"], row["line"]) for row in rows("next_line.jsonl")}


def test_the_answers_are_spread_and_unique():
    items = rows("next_line.jsonl")
    places = [sum(row["answer"] == place for row in items) for place in range(4)]
    assert min(places) > 0.2 * len(items)
    assert len({row["choices"][row["answer"]].strip() for row in items}) == len(items)


def test_a_choice_cannot_be_guessed_by_its_length():
    """Always taking the shortest, or the longest, must stay near the chance of one in four."""
    items = rows("next_line.jsonl")
    for pick in (min, max):
        right = sum(pick(row["choices"], key=len) == row["choices"][row["answer"]] for row in items)
        assert 0.15 < right / len(items) < 0.35


def test_the_cloze_target_is_what_the_filter_finds_in_the_true_text(modules):
    task = yaml.load((TASKS / "reference_cloze.yaml").read_text().replace("!function", ""), yaml.SafeLoader)
    pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
    items = rows("cloze.jsonl")
    assert len(items) >= 300
    for row in items:
        text = modules[row["module"]]
        follows = {
            match.group() for found in re.finditer(re.escape(row["context"]), text)
            if (match := re.search(pattern, text[found.end() :].split("\n")[0]))
        }  # fmt: skip
        assert row["target"] in follows
        assert row["kind"] == "brackets" or re.search(rf"\b{row['target']}\b", row["context"])


def test_no_cloze_target_dominates():
    items = rows("cloze.jsonl")
    targets = [row["target"] for row in items if row["kind"] == "identifier"]
    assert max(targets.count(target) for target in set(targets)) <= len(targets) / 20
    assert len({(row["context"], row["target"]) for row in items}) == len(items)


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="next-line items"):
        build_tasks.build({"tiny": "def wrap(text):\n    return text\n"})


@pytest.mark.parametrize("name", NAMES)
def test_task_files_name_themselves_and_data_that_exists(name):
    task = yaml.load((TASKS / f"{name}.yaml").read_text().replace("!function", ""), yaml.SafeLoader)
    assert task["task"] == name
    assert task["custom_dataset"] == "processing.load"
    assert (build_tasks.HELD_OUT / task["dataset_kwargs"]["file"]).is_file()
    assert all("higher_is_better" in entry for entry in task["metric_list"])


def test_lm_eval_itself_finds_the_tasks_from_any_folder(tmp_path, monkeypatch):
    """As `lm_eval --include_path <tasks>` does; the text must reach the model unchanged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert sorted(manager.all_tasks) == list(NAMES)
    tasks = manager.load(list(NAMES))["tasks"]
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=3)
    first, second, third = (rows(name)[0] for name in ("next_line.jsonl", "cloze.jsonl", "perplexity.jsonl"))
    asked = [request.args for request in tasks["reference_next_line"].instances[:4]]
    assert asked == [(first["context"], choice) for choice in first["choices"]]
    assert tasks["reference_cloze"].instances[0].args[0] == second["context"]
    assert tasks["reference_perplexity"].instances[0].args == (third["text"],)
    assert list(tmp_path.iterdir()) == []
