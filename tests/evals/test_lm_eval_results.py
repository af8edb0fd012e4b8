"""The files are those that lm-eval writes, read by lm-eval's own functions and compared with its own run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lm_eval
import pytest
from lm_eval import evaluator, utils
from lm_eval.loggers import EvaluationTracker

from optimizer.errors import OutputError
from optimizer.evals import lm_eval_results
from optimizer.evals.lm_eval_results import save_lm_eval_results, seeds
from optimizer.evals.quality import TASKS, QualityResult, evaluate
from optimizer.evals.runner_lm import RunnerLM
from optimizer.evals.sequential import merge
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer

NAMES = ["reference_perplexity", "reference_next_line", "reference_cloze"]


@pytest.fixture(scope="module")
def result() -> QualityResult:
    return evaluate(SmallRunner(small_model()), small_tokenizer(), NAMES, limit=4, max_length=256)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's own run of the same tasks on the same model, written by its command line's steps."""
    folder = tmp_path_factory.mktemp("theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # starts processes to describe the machine
        tracker = EvaluationTracker(output_path=str(folder))
        runner = RunnerLM(SmallRunner(small_model()), small_tokenizer(), batch_size=16, max_length=256)
        manager = lm_eval.tasks.TaskManager(include_path=str(TASKS), include_defaults=False)
        found = lm_eval.simple_evaluate(
            runner, tasks=list(NAMES), limit=4, bootstrap_iters=0, task_manager=manager, log_samples=True,
            evaluation_tracker=tracker, model_args={"pretrained": "model"},
        )  # fmt: skip
    samples = found.pop("samples")
    tracker.save_results_aggregated(found, samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task, rows)
    return folder / "model"


def read(folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    names = [str(path) for path in folder.iterdir()]
    (results,) = utils.get_results_filenames(names)
    samples = {}
    for name in utils.get_sample_results_filenames(names):
        lines = Path(name).read_text(encoding="utf-8").strip("\n").split("\n")
        samples[utils.get_file_task_name(Path(name).name)] = [json.loads(line) for line in lines]
    return json.loads(Path(results).read_text(encoding="utf-8")), samples


def test_the_files_are_named_and_read_as_lm_eval_s(result: QualityResult, theirs: Path, tmp_path: Path) -> None:
    written = save_lm_eval_results(result, tmp_path, model="model")
    assert sorted(path.parent.name for path in written) == ["model"] * 4
    assert len({utils.get_file_datetime(path.name).removesuffix(".json") for path in written}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left of the staging
    (ours, our_samples), (own, own_samples) = read(tmp_path / "model"), read(theirs)
    assert set(our_samples) == set(own_samples) == set(NAMES)
    for task in NAMES:
        pairs = list(zip(our_samples[task], own_samples[task], strict=True))
        for mine, other in pairs:
            assert set(mine) == set(other)
            for key in ("doc_id", "doc", "target", "arguments", "filter", "doc_hash", "prompt_hash", "target_hash"):
                assert mine[key] == other[key]
    assert ours["results"].keys() == own["results"].keys()
    for task, row in own["results"].items():
        assert row.keys() == ours["results"][task].keys()
        values = {key: value for key, value in row.items() if isinstance(value, float)}
        assert {key: ours["results"][task][key] for key in values} == pytest.approx(values, rel=1e-5)
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks", "task_hashes"):
        assert ours[key].keys() == own[key].keys(), key
    assert ours["task_hashes"] == own["task_hashes"]
    # What lm-eval adds of the machine and the tokenizer is in the report; everything else is there.
    missing = own.keys() - ours.keys()
    assert all(name.startswith("tokenizer") or name in ("eot_token_id", "max_length") for name in missing), missing


def test_lm_eval_s_table_shows_values_with_their_errors(result: QualityResult, tmp_path: Path) -> None:
    save_lm_eval_results(result, tmp_path, model="model")
    table = utils.make_table(read(tmp_path / "model")[0])
    width = max(len(metric.metric) for metric in result.metrics)
    for metric in result.metrics:
        named = [line for line in table.splitlines() if line.split("|")[5:6] == [metric.metric.ljust(width)]]
        assert len(named) == 1
        assert f"{metric.value:.4f}" in named[0]
        assert f"{metric.stderr:.4f}" in named[0]


def test_the_standard_error_of_an_accuracy_is_lm_eval_s(result: QualityResult, tmp_path: Path) -> None:
    save_lm_eval_results(result, tmp_path, model="model")
    row = read(tmp_path / "model")[0]["results"]["reference_next_line"]
    acc = [sample["acc"] for sample in result.samples["reference_next_line"]]
    assert row["acc_stderr,none"] == pytest.approx(lm_eval.api.metrics.mean_stderr(acc))


def test_the_run_is_described(result: QualityResult, tmp_path: Path) -> None:
    options = {"batch_size": 8, "limit": 4, **seeds(7)}
    save_lm_eval_results(result, tmp_path, model="org/model", options=options, seconds=12.5)
    document, _ = read(tmp_path / utils.sanitize_model_name("org/model"))
    assert document["model_name"] == "org/model"
    assert document["config"]["batch_size"] == 8
    assert document["config"]["fewshot_seed"] == document["config"]["random_seed"] == 7
    assert float(document["total_evaluation_time_seconds"]) == pytest.approx(12.5, abs=1)


def test_the_result_itself_stays_as_it_was(result: QualityResult, tmp_path: Path) -> None:
    row = dict(result.samples["reference_next_line"][0])
    before = json.dumps(result.lm_eval["results"], sort_keys=True)
    save_lm_eval_results(result, tmp_path, model="model")
    assert result.samples["reference_next_line"][0] == row
    assert json.dumps(result.lm_eval["results"], sort_keys=True) == before


def test_parts_are_written_as_one(tmp_path: Path) -> None:
    runner, parts = SmallRunner(small_model()), [range(2), range(2, 5)]
    found = merge(
        [evaluate(runner, small_tokenizer(), [NAMES[1]], documents={NAMES[1]: part}, max_length=256) for part in parts]
    )
    save_lm_eval_results(found, tmp_path, model="model")
    document, samples = read(tmp_path / "model")
    assert [row["doc_id"] for row in samples[NAMES[1]]] == [0, 1, 2, 3, 4]
    acc = sum(row["acc"] for row in samples[NAMES[1]]) / 5
    assert document["results"][NAMES[1]]["acc,none"] == pytest.approx(acc)
    assert "reference_next_line" in utils.make_table(document)


@pytest.mark.parametrize("name", ["..", ".", "", "../../up", "a/b:c*"])
def test_a_model_s_name_does_not_lead_out_of_the_folder(result: QualityResult, tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    written = save_lm_eval_results(result, inside, model=name)
    assert all(path.parent.parent == inside and path.parent.name not in ("", ".", "..") for path in written)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_a_folder_that_cannot_be_written_is_an_error(result: QualityResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_lm_eval_results(result, tmp_path / "file", model="model")


def test_what_lm_eval_only_logs_is_an_error(
    result: QualityResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *_: None)
    with pytest.raises(OutputError, match="wrote 1 of 4 files"):
        save_lm_eval_results(result, tmp_path, model="model")
    assert not list((tmp_path / "model").iterdir())


def test_a_broken_model_s_results_are_written(tmp_path: Path) -> None:
    broken = SmallRunner(small_model(), damage=lambda logits: logits * math.nan)
    found = evaluate(broken, small_tokenizer(), NAMES, limit=2, max_length=256)
    save_lm_eval_results(found, tmp_path, model="model")
    assert math.isnan(read(tmp_path / "model")[0]["results"]["reference_perplexity"]["byte_perplexity,none"])
    assert lm_eval_results.__doc__
