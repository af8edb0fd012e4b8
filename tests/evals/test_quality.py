from __future__ import annotations

import logging
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from optimizer.errors import DataError, UsageError
from optimizer.evals import quality
from optimizer.evals.gate import Floor, judge
from optimizer.evals.quality import MetricResult, QualityResult, compare, evaluate, evidence
from optimizer.evals.tasks.processing import HELD_OUT
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer

ALL = ["reference_perplexity", "reference_next_line", "reference_cloze"]
LIMIT = {"reference_perplexity": 3, "reference_next_line": 8, "reference_cloze": 4}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No connection is opened and no file written where the caller happens to be."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")

    def refuse(*_args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def baseline() -> QualityResult:
    return evaluate(SmallRunner(small_model()), small_tokenizer(), ALL, limit=LIMIT)


@pytest.fixture(scope="module")
def ruined() -> QualityResult:
    return evaluate(SmallRunner(small_model(seed=1)), small_tokenizer(), ALL, limit=LIMIT)


def metric(result: QualityResult, task: str, name: str) -> MetricResult:
    (found,) = [item for item in result.metrics if (item.task, item.metric) == (task, name)]
    return found


def test_every_metric_of_every_task(baseline):
    found = {(item.task, item.metric, item.filter): item for item in baseline.metrics}
    assert set(found) == {
        ("reference_perplexity", "word_perplexity", "none"),
        ("reference_perplexity", "byte_perplexity", "none"),
        ("reference_perplexity", "bits_per_byte", "none"),
        ("reference_next_line", "acc", "none"),
        ("reference_next_line", "acc_norm", "none"),
        ("reference_cloze", "exact_match", "first_token"),
    }
    for (task, _, _), item in found.items():
        assert item.higher_is_better == (task != "reference_perplexity")
        assert len(item.documents) == len(set(item.documents)) == len(item.totals) == LIMIT[task]
        assert item.stderr is not None
        assert item.stderr >= 0
    assert baseline.non_finite == 0
    assert "samples" not in baseline.lm_eval
    assert set(baseline.lm_eval["results"]) == set(ALL)


def test_perplexity_is_that_of_a_direct_computation(baseline):
    texts = [line["text"] for line in quality._load(["reference_perplexity"], 0)["tasks"][ALL[0]].eval_docs][:3]
    total, size = 0.0, 0
    for text in texts:
        tokens = [0, *small_tokenizer().encode(text)]
        for start in range(1, len(tokens), 512):  # windows as long as the model, each token scored once
            until = min(len(tokens), start + 512)
            row = tokens[max(0, until - 513) : until]
            with torch.inference_mode():
                steps = small_model()(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
            fresh = until - start
            total += float(steps[-fresh:].gather(1, torch.tensor(row[-fresh:])[:, None]).sum())
        size += len(text.encode())
    assert metric(baseline, ALL[0], "byte_perplexity").value == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert metric(baseline, ALL[0], "bits_per_byte").value == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_values_follow_from_the_samples(baseline):
    for item in baseline.metrics:
        mean = sum(item.totals) / sum(item.weights)
        expected = {"mean": mean, "perplexity": math.exp(-mean), "bits": -mean / math.log(2)}[item.kind]
        assert item.value == pytest.approx(expected)


def test_the_choice_is_the_likeliest_line(baseline):
    rows = quality._load(["reference_next_line"], 0)["tasks"]["reference_next_line"].eval_docs
    right = []
    for row in list(rows)[:8]:
        scores = []
        for choice in row["choices"]:
            whole = small_tokenizer().encode(row["context"] + choice)
            shared = small_tokenizer().encode(row["context"].rstrip())
            split = next(k for k in range(len(shared), -1, -1) if shared[:k] == whole[:k])
            with torch.inference_mode():
                steps = small_model()(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            targets = torch.tensor(whole[split:])
            scores.append(float(steps[split - 1 :].gather(1, targets[:, None]).sum()))
        right.append(float(scores.index(max(scores)) == row["answer"]))
    assert metric(baseline, "reference_next_line", "acc").totals == tuple(right)


def test_the_caller_finds_everything_as_it_was(capfd):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    logger = logging.getLogger("lm_eval")
    level, folder = logger.level, Path.cwd()
    evaluate(SmallRunner(small_model()), small_tokenizer(), ["reference_next_line"], limit=1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert dict(os.environ) == before[3]
    assert (logger.level, Path.cwd()) == (level, folder)
    assert capfd.readouterr() == ("", "")


def test_state_is_restored_after_a_failure():
    state = torch.get_rng_state()
    with pytest.raises(DataError):
        evaluate(SmallRunner(small_model()), small_tokenizer(), ["reference_next_line"], limit=1, max_length=2)
    assert torch.equal(torch.get_rng_state(), state)
    import lm_eval.api.task
    from tqdm import tqdm

    assert issubclass(lm_eval.api.task.tqdm, tqdm)


def test_the_same_run_gives_the_same_result(baseline):
    again = evaluate(SmallRunner(small_model()), small_tokenizer(), ALL, limit=LIMIT)
    assert again.metrics == baseline.metrics


def test_importing_it_is_light():
    heavy = "('lm_eval', 'transformers', 'scipy', 'datasets')"
    code = f"import sys, optimizer.evals.quality; print([name for name in {heavy} if name in sys.modules])"
    root = Path(quality.__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_limits_apply_by_task():
    result = evaluate(SmallRunner(small_model()), small_tokenizer(), ALL[1:], limit={"reference_cloze": 2, ALL[1]: 3})
    assert {item.task: len(item.totals) for item in result.metrics} == {"reference_next_line": 3, "reference_cloze": 2}
    one = evaluate(SmallRunner(small_model()), small_tokenizer(), ["reference_cloze"], limit=1)
    assert one.metrics[0].stderr is None


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "reference_cloze"),
        (["reference_cloze"], {"limit": 0}, "at least 1"),
        (["reference_cloze"], {"limit": {"reference_nextline": 4}}, "reference_nextline"),
        (["reference_cloze"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_requests(tasks, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate(SmallRunner(small_model()), small_tokenizer(), tasks, **options)


def test_an_unknown_task_names_its_neighbours(monkeypatch):
    monkeypatch.setattr(quality, "_task_manager", lambda _defaults, manager=quality._task_manager: manager(False))
    with pytest.raises(UsageError, match="nearest are reference_next_line"):
        evaluate(SmallRunner(small_model()), small_tokenizer(), ["reference_nextline"])


def test_any_lm_eval_task_can_be_named(tmp_path_factory):
    """A task of the user's own, by path: log-likelihood, with a dataset made in the file beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.py").write_text(
        "from datasets import Dataset\n"
        "def load(**_):\n"
        "    return {'test': Dataset.from_list([{'q': 'import', 'a': ' os'}, {'q': 'def', 'a': ' f'}])}\n"
    )
    (folder / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function rows.load\ntest_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: q\ndoc_to_target: a\ntarget_delimiter: ""\nmetric_list:\n'
        "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    result = evaluate(SmallRunner(small_model()), small_tokenizer(), [str(folder / "mine.yaml")])
    assert {(item.task, item.metric, item.kind) for item in result.metrics} == {
        ("mine", "perplexity", "perplexity"),
        ("mine", "acc", "mean"),
    }
    assert [item.ratio_name for item in compare(result, result)] == ["perplexity ratio", "recovery"]


def test_a_model_is_its_own_equal(baseline):
    for item in compare(baseline, baseline):
        if item.baseline > 0:
            assert (item.ratio.value, item.ratio.low, item.ratio.high) == (1.0, 1.0, 1.0)
        assert (item.difference.value, item.difference.low, item.difference.high) == (0.0, 0.0, 0.0)
        assert item.flips is None or item.flips.p_value == 1.0


def test_comparison_of_two_models(baseline, ruined):
    for item in compare(baseline, ruined, resamples=500):
        assert item.baseline == metric(baseline, item.task, item.metric).value
        assert item.optimized == metric(ruined, item.task, item.metric).value
        assert item.difference.value == pytest.approx(item.optimized - item.baseline)
        assert item.samples == LIMIT[item.task]
        if item.baseline > 0:
            assert item.ratio.value == pytest.approx(item.optimized / item.baseline)
        assert (item.flips is None) == (item.task == "reference_perplexity")
        if item.flips:
            change = (item.flips.gained - item.flips.lost) / item.samples
            assert item.difference.value == pytest.approx(change)
    names = {item.metric: item.ratio_name for item in compare(baseline, ruined, resamples=500)}
    assert names["byte_perplexity"] == "perplexity ratio"
    assert names["bits_per_byte"] == "ratio"
    assert names["acc"] == "recovery"


def test_runs_that_do_not_pair_are_refused(baseline):
    short = evaluate(SmallRunner(small_model()), small_tokenizer(), ALL, limit=LIMIT | {"reference_cloze": 3})
    with pytest.raises(DataError, match="reference_cloze exact_match: the baseline answered 4 documents"):
        compare(baseline, short)
    with pytest.raises(DataError, match="only one of the two runs holds"):
        compare(baseline, replace(baseline, metrics=baseline.metrics[1:]))
    changed = replace(baseline.metrics[0], documents=("0:beef", *baseline.metrics[0].documents[1:]))
    with pytest.raises(DataError, match="not the same ones"):
        compare(baseline, replace(baseline, metrics=(changed, *baseline.metrics[1:])))


def scored(values: list[float], name: str = "acc", rule: str = "none", **options) -> MetricResult:
    documents = tuple(f"{n}:x" for n in range(len(values)))
    weights = (1.0,) * len(values)
    mean = sum(values) / len(values)
    return MetricResult("t", name, rule, mean, True, None, "mean", documents, tuple(values), weights, **options)


def test_evidence_carries_the_interval_and_direction(baseline, ruined):
    comparisons = compare(baseline, ruined, resamples=500)
    found = evidence(comparisons)
    ratios = {
        "quality.reference_perplexity.word_perplexity.ratio",
        "quality.reference_perplexity.byte_perplexity.ratio",
        "quality.reference_perplexity.bits_per_byte.ratio",
        "quality.reference_next_line.acc.recovery",
        "quality.reference_next_line.acc_norm.recovery",
        "quality.reference_cloze.exact_match.recovery",
    }
    losses = {name.rpartition(".")[0] + ".loss" for name in ratios}
    binary = [name.removesuffix(".recovery") for name in ratios if name.endswith(".recovery")]
    flips = {f"{name}.{kind}_rate" for name in binary for kind in ("flip", "lost", "gained")}
    assert set(found) == ratios | losses | flips
    byte = next(item for item in comparisons if item.metric == "byte_perplexity")
    measured = found["quality.reference_perplexity.byte_perplexity.ratio"]
    assert (measured.value, measured.low, measured.high) == (byte.ratio.value, byte.ratio.low, byte.ratio.high)
    assert measured.samples == 3


def test_filters_are_not_lost():
    run = QualityResult((scored([1, 0, 1], rule="strict"), scored([1, 1, 1], rule="flexible")), 0)
    found = evidence(compare(run, run))
    assert {name for name in found if name.endswith(".recovery")} == {
        "quality.t.acc,strict.recovery", "quality.t.acc,flexible.recovery",
    }  # fmt: skip
    assert {name for name in found if name.endswith(".loss")} == {
        "quality.t.acc,strict.loss", "quality.t.acc,flexible.loss",
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["none", "strict"])
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("kind", ["mean", "perplexity", "bits"])
def test_a_loss_is_positive_where_the_model_is_worse_whatever_the_direction(rule, better, kind):
    generator = random.Random(0)
    values = [generator.uniform(0.2, 0.8) if kind == "mean" else -generator.uniform(1, 3) for _ in range(100)]
    step = 0.1 if (better and kind == "mean") or kind != "mean" else -0.1

    def run(change: float) -> QualityResult:
        wanted = replace(scored([v + change for v in values], "m", rule), kind=kind, higher_is_better=better)
        return QualityResult((wanted, scored([1.0] * 100, "m", "other")), 0)

    name, limit = f"quality.t.m,{rule}.loss", Floor(f"quality.t.m,{rule}.loss", at_most=0.02)
    worse, gain = (evidence(compare(run(0), run(change), resamples=100)) for change in (-step, step))
    assert worse[name].low > 0 > gain[name].high
    assert not judge([limit], worse).passed
    assert judge([limit], gain).passed


def test_flips_see_what_an_equal_accuracy_hides():
    before, after = [1.0] * 50 + [0.0] * 50, [0.0] * 10 + [1.0] * 40 + [1.0] * 10 + [0.0] * 40
    pair = [QualityResult((scored(values),), 0) for values in (before, after)]
    found = evidence(compare(*pair))
    assert found["quality.t.acc.recovery"].value == 1
    assert found["quality.t.acc.flip_rate"].value == 0.2
    assert found["quality.t.acc.lost_rate"].value == found["quality.t.acc.gained_rate"].value == 0.1
    exact = binomtest(20, 100).proportion_ci(0.95)
    assert (found["quality.t.acc.flip_rate"].low, found["quality.t.acc.flip_rate"].high) == (exact.low, exact.high)
    assert not judge([Floor("quality.t.acc.flip_rate", at_most=0.1)], found).passed


def test_alpha_sets_the_bounds_and_a_level_overrules_it():
    pair = [QualityResult((scored(values),), 0) for values in ([1.0] * 40, [0.0] + [1.0] * 39)]
    loose, tight = (compare(*pair, alpha=alpha)[0].loss for alpha in (0.2, 0.01))
    assert tight.high > loose.high
    assert compare(pair[0], replace(pair[1], levels={"t": 0.01}), alpha=0.2)[0].loss == tight


def test_a_ruined_model_fails_each_quality_floor():
    good = [1.0] * 80 + [0.0] * 20

    def run(scores: list[float], nats: float) -> QualityResult:
        perplexity = replace(scored([nats] * 100, "ppl"), kind="perplexity", higher_is_better=False)
        return QualityResult((scored(scores), perplexity), 0)

    before, worse = run(good, -2.0), run([0.0] * 20 + good[20:], -2.2)
    floors = [
        Floor("quality.t.acc.recovery", at_least=0.9),
        Floor("quality.t.ppl.ratio", at_most=1.1),
        Floor("quality.t.acc.loss", at_most=0.05),
        Floor("quality.t.ppl.loss", at_most=0.1),
        Floor("quality.t.acc.flip_rate", at_most=0.05),
        Floor("quality.t.acc.lost_rate", at_most=0.05),
    ]
    assert judge(floors, evidence(compare(before, before))).passed
    verdict = judge(floors, evidence(compare(before, worse)))
    assert [item.passed for item in verdict.floors] == [False] * 6


def test_a_metric_without_paired_samples_cannot_pass_an_interval():
    run = QualityResult((MetricResult("t", "f1", "none", 0.8, True),), 0)
    found = evidence(compare(run, run))
    assert found["quality.t.f1.recovery"].value == 1.0
    assert not judge([Floor("quality.t.f1.recovery", at_least=0.5)], found).passed
    assert "not measured" in judge([Floor("quality.t.f1.loss", at_most=0.5)], found).floors[0].reason
    assert judge([Floor("quality.t.f1.recovery", at_least=0.5, bound="value")], found).passed


@pytest.mark.parametrize("broken", ["nan", "huge"])
def test_a_broken_model_is_a_verdict_and_not_an_error(baseline, broken):
    damage = {"nan": lambda x: torch.full_like(x, math.nan), "huge": lambda x: x * -1e5}[broken]
    result = evaluate(SmallRunner(small_model(), damage=damage), small_tokenizer(), ALL, limit=LIMIT)
    assert (result.non_finite > 0) == (broken == "nan")
    found = evidence(compare(baseline, result, resamples=200))
    floor = Floor("quality.reference_perplexity.word_perplexity.ratio", at_most=1e300)
    assert not judge([floor], found).passed


def test_the_data_is_that_of_the_package():
    assert Path(quality.__file__).resolve().parent / "reference" / "held_out" == HELD_OUT
