"""The gate inside the job: every kind of floor refuses a model or a setting that is ruined in its respect."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from optimizer import pipeline
from optimizer.backends.runner import EagerRunner
from optimizer.errors import DeviceError, OptimizerError, UsageError
from optimizer.evals.gate import Floor
from optimizer.evals.roofline import Load, OpCost, StepCost
from optimizer.passes.base import Context
from optimizer.passes.quantize import Quantize
from optimizer.pipeline import Outcome, Phase, apply_passes, choose_device, run
from optimizer.progress import Progress
from optimizer.source import Source, load_source
from tests.optimizer.small_jobs import (
    CEILINGS,
    PASSES,
    PERPLEXITY,
    RECOVERY,
    Ruin,
    recipe,
    with_ruinous_passes,
    without_measuring_the_machine,
)
from tests.optimizer.tiny_models import tiny_llama

RUINED = ({"name": "ruin"}, {"name": "decode", "compile": False})
TASKS = {"reference_perplexity": 2, "reference_next_line": 4}
QUALITY = (
    {"metric": "quality.reference_perplexity.byte_perplexity.loss", "at_most": 0.05},
    {"metric": "quality.kl.mean", "at_most": 0.001},
    {"metric": "quality.kl.p99", "at_most": 0.001},
    {"metric": "quality.kl.top1_agreement", "at_least": 0.9},
)
"""Floors of quality that two documents, or the held-out text, are enough for."""
TOKENS = torch.randint(3, 300, (1, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        with_ruinous_passes(patch)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(tiny_llama(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32))


@pytest.fixture(scope="module")
def sound(source: Source) -> Outcome:
    """A job in which nothing is wrong, judged by floors of every kind."""
    floors = [
        {"metric": PERPLEXITY, "at_most": 1.05},
        {"metric": RECOVERY, "at_least": 0.9},
        {"metric": "decode.speedup", "at_least": 0.01},
        {"metric": "ttft.speedup", "at_least": 0.01},
        {"metric": "throughput.speedup", "at_least": 0.01},
        {"metric": "decode.mbu", "at_least": 1e-9},
        {"metric": "prefill.mfu", "at_least": 1e-9},
        {"metric": "weights.ratio", "at_most": 0.9},
        {"metric": "weights.bytes", "at_most": 300_000},
        {"metric": "tpot.seconds", "at_most": 60},
        {"metric": "ttft.seconds", "at_most": 60},
        {"metric": "throughput.tokens_per_second", "at_least": 1e-3},
        {"metric": "decode.attainable", "at_least": 1e-9},
        {"metric": "prefill.attainable", "at_least": 1e-9},
        {"metric": "decode.speedup@b2c6", "at_least": 0.01},
        {"metric": "decode.attainable@b2c6", "at_least": 1e-9},
        *QUALITY,
    ]
    return run(source, recipe(*floors, tasks=TASKS, cells=[{"batch": 2, "context": 6, "output": 3}]))


@pytest.fixture(scope="module")
def ruined(source: Source) -> Outcome:
    """A job whose pass really destroys the model: the quality floors are judged on what it then says."""
    floors = [
        {"metric": PERPLEXITY, "at_most": 1.05},
        {"metric": RECOVERY, "at_least": 0.9},
        {"metric": "weights.ratio", "at_most": 0.9},
        {"metric": "weights.bytes", "at_most": 300_000},
        {"metric": "decode.speedup", "at_least": 0.01},
        {"metric": "decode.spedup", "at_least": 0.01},
        *QUALITY,
    ]
    return run(source, recipe(*floors, passes=RUINED, tasks=TASKS))


def verdicts(outcome: Outcome) -> dict[str, bool]:
    return {item.floor.metric: item.passed for item in outcome.verdict.floors}


def test_a_sound_model_holds_every_kind_of_floor(sound: Outcome) -> None:
    assert all(verdicts(sound).values()), [item.reason for item in sound.verdict.floors if not item.passed]
    assert sound.verdict.passed
    assert len(sound.verdict.floors) == 20


def test_a_ruined_model_fails_both_kinds_of_quality_floor(ruined: Outcome, sound: Outcome) -> None:
    assert not ruined.verdict.passed
    assert verdicts(ruined)[PERPLEXITY] is False
    assert verdicts(ruined)[RECOVERY] is False
    assert [verdicts(ruined)[str(floor["metric"])] for floor in QUALITY] == [False] * 4
    assert ruined.evidence[PERPLEXITY].value > 1.05
    before = {(item.task, item.metric): item.baseline for item in sound.comparisons}
    assert before == {(item.task, item.metric): item.baseline for item in ruined.comparisons}


def test_a_model_that_did_not_shrink_fails_both_kinds_of_size_floor(ruined: Outcome) -> None:
    assert verdicts(ruined)["weights.ratio"] is False
    assert verdicts(ruined)["weights.bytes"] is False
    assert ruined.evidence["weights.ratio"].value == pytest.approx(1.0)


def test_a_floor_on_what_was_not_measured_fails_and_names_the_nearest(ruined: Outcome) -> None:
    (item,) = [item for item in ruined.verdict.floors if item.floor.metric == "decode.spedup"]
    assert not item.passed
    assert item.measurement is None
    assert "was not measured; the nearest measured are decode.speedup" in item.reason


class SlowPrefill(EagerRunner):
    """Answers right, 0.2 s late."""

    def generate(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        time.sleep(0.2)
        return super().generate(tokens, mask, **options)


class SlowDecode(EagerRunner):
    """Takes 0.2 s more for every token after the first."""

    def generate(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        receive, seen = options.pop("on_token"), []

        def late(token: Tensor) -> None:
            time.sleep(0.2 if seen else 0)
            seen.append(token)
            receive(token)

        return super().generate(tokens, mask, on_token=late, **options)


@pytest.mark.parametrize(
    ("kind", "missed"),
    [
        (
            SlowDecode,
            {
                "decode.speedup",
                "throughput.speedup",
                "decode.mbu",
                "decode.attainable",
                "tpot.seconds",
                "throughput.tokens_per_second",
            },
        ),
        (SlowPrefill, {"ttft.speedup", "prefill.mfu", "prefill.attainable", "ttft.seconds"}),
    ],
)
def test_a_slow_runner_fails_each_kind_of_speed_floor(
    kind: type[EagerRunner], missed: set[str], sound: Outcome, source: Source
) -> None:
    # The runner sleeps 0.2 s where the sound one takes milliseconds, so each limit lies far from both.
    limits = {
        "decode.speedup": {"at_least": 0.75},
        "ttft.speedup": {"at_least": 0.75},
        "throughput.speedup": {"at_least": 0.75},
        "decode.mbu": {"at_least": sound.speed.phases["decode", "baseline"].cost.required_bytes / (0.15 * 1e11)},
        "prefill.mfu": {"at_least": sound.speed.phases["prefill", "baseline"].cost.flops / (0.15 * 1e11)},
        "decode.attainable": {"at_least": sound.speed.phases["decode", "baseline"].floor_seconds / 0.15},
        "prefill.attainable": {"at_least": sound.speed.phases["prefill", "baseline"].floor_seconds / 0.15},
        "tpot.seconds": {"at_most": 0.15},
        "ttft.seconds": {"at_most": 0.15},
        "throughput.tokens_per_second": {"at_least": 10},
    }
    slow = kind(source.model, source.tokenizer)
    speed = pipeline.measure_speed(
        EagerRunner(source.model, source.tokenizer), slow, sound.speed.workload, CEILINGS, sound.recipe, Progress()
    )
    evidence = pipeline._speed_evidence(speed)
    floors = [Floor(metric, **limit) for metric, limit in limits.items()]
    verdict = pipeline.judge(floors, evidence)
    failed = {item.floor.metric for item in verdict.floors if not item.passed}
    assert missed <= failed
    assert not verdict.passed


def test_the_verdict_of_the_job_follows_the_speed_it_measured(
    source: Source, sound: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "measure_speed", lambda *_: sound.speed)
    floors = [{"metric": "decode.speedup", "at_least": sound.speed.decode.low - 1e-9}]
    assert run(source, recipe(*floors)).verdict.passed
    floors = [{"metric": "decode.speedup", "at_least": sound.speed.decode.low + 1e-9}]
    assert not run(source, recipe(*floors)).verdict.passed  # the pessimistic end counts, not the median
    by_value = [{"metric": "decode.speedup", "at_least": sound.speed.decode.median - 1e-9, "bound": "value"}]
    assert run(source, recipe(*by_value)).verdict.passed


def test_speed_is_compared_with_the_original_in_its_own_type(sound: Outcome, source: Source) -> None:
    cost = sound.speed.phases["decode", "baseline"].cost
    dense = sum(p.numel() * p.element_size() for p in source.model.parameters())
    assert cost.weight_bytes == pytest.approx(dense, rel=0.01)  # a tied head counts once: it is the embedding
    assert sound.speed.phases["decode", "optimized"].cost.weight_bytes < cost.weight_bytes
    assert sound.baseline_weight_bytes > sound.weight_bytes


def test_mfu_and_mbu_are_shares_of_the_measured_ceilings() -> None:
    cost = StepCost(Load(1, 1), (OpCost("w", "linear", flops=2e9, weight_bytes=0.9e9, kv_bytes=0.1e9),))
    phase = Phase(cost, seconds=0.5, peak_flops=1e10, bandwidth=4e9)
    assert phase.mfu == pytest.approx(0.4)
    assert phase.mbu == pytest.approx(0.5)


def test_attainable_is_the_share_of_the_time_that_the_roofline_asks() -> None:
    cost = StepCost(Load(1, 1), (OpCost("w", "linear", flops=2e9, weight_bytes=0.9e9, kv_bytes=0.1e9),))
    assert Phase(cost, seconds=0.5, peak_flops=1e10, bandwidth=4e9).floor_seconds == pytest.approx(0.25)  # bytes bind
    assert Phase(cost, seconds=0.5, peak_flops=5e9, bandwidth=4e9).floor_seconds == pytest.approx(0.4)  # FLOP bind


def test_each_cell_is_measured_as_the_workload_is(sound: Outcome) -> None:
    (cell,) = sound.cells
    assert (cell.workload.batch, cell.workload.prompt, cell.workload.output) == (2, 6, 3)
    speed = {name for name in sound.evidence if name.partition(".")[0] in ("decode", "ttft", "prefill", "tpot")}
    assert {name for name in speed if "@" not in name} == {name.partition("@")[0] for name in speed if "@" in name}
    attained = sound.evidence["decode.attainable@b2c6"]
    shares = [cell.phases["decode", "optimized"].floor_seconds / each for each in cell.optimized.tpot_rounds]
    assert attained.value == pytest.approx(sorted(shares)[1])
    assert attained.low <= attained.value <= attained.high


def test_the_page_on_the_gate_lists_what_can_be_named_and_nothing_else(sound: Outcome) -> None:
    page = (Path(__file__).parents[2] / "docs/gate.md").read_text(encoding="utf-8")
    rows = re.search(r"\| metric \| what it is.*?\n\n", page, re.DOTALL)[0].strip().splitlines()[2:]  # type: ignore[index]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    known = {name.replace("<task>", r"\w+").replace("<metric>", r"\w+").replace(".", r"\.") for name in listed}
    names = {name.partition("@")[0] for name in sound.evidence}
    assert not [name for name in names if not any(re.fullmatch(pattern, name) for pattern in known)]
    assert not [pattern for pattern in known if not any(re.fullmatch(pattern, name) for name in names)]


@pytest.mark.parametrize("limit", [None, 10])
def test_a_cell_beyond_the_context_is_refused_before_any_work(source: Source, limit: int | None) -> None:
    context = limit or source.model.config.max_position_embeddings
    passes = [{"name": "decode", "compile": False} | ({"max_context": limit} if limit else {})]
    with pytest.raises(UsageError, match=f"workload cell b1c{context}: prompt {context} .* {context} positions"):
        run(source, recipe(passes=passes, cells=[{"batch": 1, "context": context}], prompt=4))


def test_a_sequential_job_stops_where_it_is_clear(source: Source) -> None:
    tasks = {"reference_perplexity": 2, "reference_next_line": 40}
    floors = [
        {"metric": "quality.reference_next_line.acc.loss", "at_most": 0.9},
        {"metric": PERPLEXITY, "at_most": 1.05},
    ]
    job = recipe(*floors, tasks=tasks, sequential=True)
    found = run(source, job)
    items = {item.task: item.samples for item in found.comparisons}
    assert found.verdict.passed
    assert items["reference_perplexity"] == 2  # its floor is no loss, so it is evaluated whole
    assert 8 <= items["reference_next_line"] < 40
    assert {m.task: len(m.documents) for m in found.quality[0].metrics}["reference_next_line"] == 40
    whole = run(source, recipe(*floors, tasks=tasks))
    assert {item.task: item.samples for item in whole.comparisons} == tasks


def test_a_bfloat16_original_is_evaluated_exactly_where_bfloat16_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = load_source(tiny_llama(tmp_path / "m", dtype=torch.bfloat16))
    baseline = EagerRunner(bf16.model, bf16.tokenizer)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    reference = pipeline._reference(baseline)
    assert reference.dtype == torch.float32
    assert baseline.dtype == torch.bfloat16
    for ours, theirs in zip(reference.model.parameters(), bf16.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert pipeline._reference(baseline) is baseline


def test_an_original_in_float32_is_its_own_reference(source: Source) -> None:
    baseline = EagerRunner(source.model, source.tokenizer)
    assert pipeline._reference(baseline) is baseline


def test_the_costs_name_every_phase(sound: Outcome) -> None:
    assert list(sound.costs) == [
        "baseline quality", "measure ceilings", "pass quantize", "pass merge_linears", "pass decode", "compile",
        "optimized quality", "divergence", "speed",
    ]  # fmt: skip
    assert all(seconds >= 0 for seconds in sound.costs.values())


def test_a_baseline_measured_before_is_used_and_changes_no_verdict(
    source: Source, sound: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe({"metric": PERPLEXITY, "at_most": 1.05}, tasks=TASKS)
    baseline = pipeline.measure_baseline(pipeline.original_runner(source), asked, Progress())
    monkeypatch.setattr(pipeline, "measure_baseline", lambda *_: pytest.fail("the baseline was measured again"))
    outcome = run(source, asked, baseline=baseline)
    assert outcome.ceilings == baseline.ceilings
    assert outcome.evidence[PERPLEXITY] == sound.evidence[PERPLEXITY]
    assert not {"baseline quality", "measure ceilings"} & outcome.costs.keys()


def test_a_baseline_of_other_documents_is_refused(source: Source) -> None:
    other = recipe({"metric": PERPLEXITY, "at_most": 1.05}, tasks={"reference_perplexity": 1})
    baseline = pipeline.measure_baseline(pipeline.original_runner(source), other, Progress())
    with pytest.raises(OptimizerError, match="reference_"):
        run(source, recipe({"metric": PERPLEXITY, "at_most": 1.05}, tasks=TASKS), baseline=baseline)


def test_the_passes_are_reported_in_order_with_what_they_matched(sound: Outcome) -> None:
    assert [(step.name, report.matched) for step, report in sound.passes] == [
        ("quantize", 14), ("merge_linears", 4), ("decode", 1),
    ]  # fmt: skip
    assert len(PASSES) == 3


def test_a_failing_pass_leaves_what_the_earlier_ones_made(source: Source) -> None:
    class Fails(Ruin):
        def run(self, model: Any, ctx: Context) -> Any:
            super().run(model, ctx)
            raise RuntimeError("no")

    model = pipeline.view(source.model)
    Quantize().run(model, Context())
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="no"):
        apply_passes(model, [Fails()], Context(), Progress())
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_model_without_tokenizer_is_refused(source: Source) -> None:
    bare = Source(source.model, None, "bare", None, None, "0" * 64)
    with pytest.raises(UsageError, match="bare has no tokenizer"):
        run(bare, recipe())


@pytest.mark.parametrize(("name", "device"), [("cpu", "cpu"), ("CPU", None), ("cpu:0", "cpu"), ("xpu", None)])
def test_choose_device(name: str, device: str | None) -> None:
    if device is None:
        with pytest.raises(UsageError, match="Use cpu, cuda or auto"):
            choose_device(name)
    else:
        assert choose_device(name).type == device


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device(None).type == choose_device("auto").type == expected
    assert choose_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        choose_device("cuda")
