"""A refused job, end to end on a small trained model: the planted culprit is found, taken back and gated again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers.utils import logging
from typer.main import get_command
from typer.testing import CliRunner

from optimizer import attribution, pipeline, probe, probe_speed, repair
from optimizer.api import Result, load, optimize
from optimizer.artifact import verify_artifact
from optimizer.backends.linear import linear_layers, stored_weight
from optimizer.backends.runner import EagerRunner
from optimizer.cli import app
from optimizer.errors import PassError
from optimizer.evals import timing
from optimizer.passes import registry
from optimizer.passes.base import Context, PassReport
from optimizer.quant.weight import QuantizedWeight
from optimizer.recipe import Recipe
from optimizer.report import Report
from tests.optimizer.small_jobs import Ruin, recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import byte_tokenizer, llama

PERPLEXITY = "quality.reference_perplexity.byte_perplexity.ratio"
FLOOR = {"metric": PERPLEXITY, "at_most": 1.1}
INT8 = {"name": "quantize", "bits": 8}
MERGE, DECODE = {"name": "merge_linears"}, {"name": "decode", "compile": False}
PLANTED = "model.layers.0.mlp.down_proj"
TOKENS = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Half:
    """A pass that only marks the model; where another has marked it already, it destroys it."""

    name: ClassVar[str] = "half"
    stored: ClassVar[bool] = True
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None: ...

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        if getattr(model, "marked", False):
            Ruin().run(model, ctx)
        model.marked = True  # type: ignore[assignment]
        return PassReport(self.name, 1, 1)


@dataclass(frozen=True)
class Fragile:
    """A pass that the others rest on: without it `needy` refuses."""

    name: ClassVar[str] = "fragile"
    stored: ClassVar[bool] = False
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None: ...

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        model.prepared = True  # type: ignore[assignment]
        return PassReport(self.name, 1, 1)


@dataclass(frozen=True)
class Needy(Fragile):
    """Refuses a model that `fragile` has not prepared."""

    name: ClassVar[str] = "needy"

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        if not getattr(model, "prepared", False):
            raise PassError("needy needs fragile")
        return PassReport(self.name, 1, 1)


class LateRunner(EagerRunner):
    """Ten times as slow as any other, by `made_up_times`."""


def made_up_times(runners: dict[str, Any], workload: Any, **_: Any) -> dict[str, Any]:
    """A runner takes 1 s for each token, a late one 10 s."""
    seconds = {name: 10.0 if isinstance(runner, LateRunner) else 1.0 for name, runner in runners.items()}
    return {
        name: timing._timing(workload, [(each * workload.output, [each] * workload.output)] * 5)
        for name, each in seconds.items()
    }


@dataclass(frozen=True)
class Late:
    """A pass that costs time and nothing else."""

    name: ClassVar[str] = "late"
    stored: ClassVar[bool] = False
    required: bool = True

    def check(self, model: nn.Module, ctx: Context) -> None: ...

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        del model
        ctx.make_runner = partial(_late)
        return PassReport(self.name, 1, 1)


def _late(model: nn.Module, tokenizer: Any) -> EagerRunner:
    return LateRunner(model, tokenizer)


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        other_half = type("OtherHalf", (Half,), {"name": "other_half"})
        for kind in (Half, other_half, Late, Ruin, Fragile, Needy):
            patch.setitem(registry.PASSES, kind.name, kind)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trained for a second on Python code, so that harm to it shows; rounding one layer to int8 ruins it.

    Planted in that layer is a weight so large that its row's other weights round to zero. It multiplies a feature that
    is always zero (its rows of `up_proj` are), so the model computes exactly what it did.
    """
    path = tmp_path_factory.mktemp("model") / "trained"
    with torch.random.fork_rng(devices=[]):
        model = llama(dtype=torch.float32)
        tokenizer = byte_tokenizer()
        ids = torch.tensor(tokenizer.encode(Path(argparse.__file__).read_text(encoding="utf-8")))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        draw = torch.Generator().manual_seed(0)
        for _ in range(60):
            starts = torch.randint(len(ids) - 65, (8,), generator=draw).tolist()
            rows = torch.stack([ids[start : start + 64] for start in starts])
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            mlp = model.model.layers[0].mlp
            mlp.up_proj.weight[5] = 0
            mlp.down_proj.weight[:, 5] = 1000 * mlp.down_proj.weight.abs().max()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def job(*floors: dict[str, Any], passes: Any, **keys: Any) -> Recipe:
    made = recipe(*floors, passes=passes, tasks={"reference_perplexity": 2})
    return made.updated({"repair_minutes": 60} | keys)


@pytest.fixture(scope="module")
def repaired(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("out") / "artifact"
    asked = job(FLOOR, {"metric": "weights.ratio", "at_most": 0.9}, passes=(INT8, MERGE, DECODE))
    return optimize(folder, asked, out=out), out


def test_the_planted_layer_is_found_and_left_as_it_is(repaired: tuple[Result, Path]) -> None:
    result, _ = repaired
    found = result.report.attribution
    assert found is not None
    assert result.passed
    (layers,) = [finding for finding in found.findings if finding.kind == "layers"]
    assert (layers.names, layers.guilty) == ([PLANTED], True)
    guilty = [finding.title for finding in found.findings if finding.kind == "pass" and finding.guilty]
    assert guilty == ["quantize"]
    assert result.outcome.recipe.passes[0]["ignore"] == ["lm_head", PLANTED]
    formats = {layer.name: layer.format for layer in result.report.layers}
    assert formats[PLANTED] == "float32"
    assert [name for name, format in formats.items() if format == "float32"] == [PLANTED, "lm_head"]


def test_the_report_says_what_was_reverted_why_and_what_the_recipe_as_given_missed(
    repaired: tuple[Result, Path],
) -> None:
    report = repaired[0].report
    found = report.attribution
    assert found is not None
    assert found.reverted == [f"quantize leaves {PLANTED} as it is"]
    assert found.refused[0].metric == PERPLEXITY
    assert "is missed" in found.refused[0].reason
    assert f"passed after reverting quantize leaves {PLANTED}" in report.summary
    for text in (report.to_markdown().replace("\\", ""), report.to_html()):
        assert PLANTED in text
        assert "Passed after reverting" in text
    assert Report.from_json(report.to_json()) == report


def test_the_search_used_documents_that_the_gate_does_not_judge(repaired: tuple[Result, Path]) -> None:
    found = repaired[0].report.attribution
    assert found is not None
    assert "none of which the gate judges" in found.documents
    assert found.complete


def test_a_repaired_candidate_is_judged_at_a_stricter_confidence_that_its_recipe_states(
    repaired: tuple[Result, Path],
) -> None:
    outcome = repaired[0].outcome
    assert outcome.recipe.evaluation.confidence == 0.975
    assert all(item.confidence == 0.975 for item in outcome.comparisons)
    assert outcome.refusal is not None
    assert outcome.refusal.attempts[0].confidence == 0.975


def test_the_artifact_is_of_the_repaired_recipe_loads_and_computes_the_same(
    repaired: tuple[Result, Path], folder: Path
) -> None:
    result, out = repaired
    assert verify_artifact(out) == []
    written = Recipe.from_yaml(out / "recipe.yaml")
    assert written == result.outcome.recipe
    assert written.name == "small-repaired"
    again = optimize(folder, written)  # a rerun of what it says gives the same model, at the first gate
    assert again.passed
    assert again.outcome.refusal is None
    expected = stored(result.model)
    logits = prefill(result.model)
    for runner in (load(out), again.model):
        found = stored(runner)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), name
        # The same weights at another place in memory: products may be summed in another order, in float32.
        torch.testing.assert_close(prefill(runner), logits, rtol=1e-4, atol=1e-5)


def stored(runner: Any) -> dict[str, torch.Tensor]:
    """Every linear layer's weight as it is used."""
    weights = {name: stored_weight(module) for name, module in linear_layers(runner.model).items()}
    return {name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in weights.items()}


def prefill(runner: Any) -> torch.Tensor:
    runner.reset(1)
    logits: torch.Tensor = runner.prefill(TOKENS)
    return logits


def test_two_passes_that_ruin_the_model_together_are_blamed_as_a_pair_and_one_is_dropped(folder: Path) -> None:
    passes = ({"name": "half"}, MERGE, {"name": "other_half"}, DECODE)
    result = optimize(folder, job(FLOOR, passes=passes))
    found = result.report.attribution
    assert found is not None
    (pair,) = [finding for finding in found.findings if finding.guilty]
    assert (pair.kind, pair.names) == ("pair", ["half", "other_half"])
    assert result.passed
    assert len(found.reverted) == 1
    assert {spec["name"] for spec in result.outcome.recipe.passes} in (
        {"half", "merge_linears", "decode"}, {"other_half", "merge_linears", "decode"},
    )  # fmt: skip


def test_a_pass_that_costs_the_speed_is_found_and_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pipeline, probe_speed):
        monkeypatch.setattr(module, "measure_generation", made_up_times)
    floors = ({"metric": "decode.speedup", "at_least": 0.9}, FLOOR)
    asked = job(*floors, passes=(MERGE, DECODE, {"name": "late"}))
    result = optimize(folder, asked)
    found = result.report.attribution
    assert found is not None
    values = {finding.title: (finding.without.value, finding.guilty) for finding in found.findings if finding.without}
    assert values == {"merge_linears": (1.0, False), "late": (10.0, True)}
    assert "late costs time: without it the job is 10.0× as fast" in found.causes
    assert result.passed
    assert found.reverted == ["without late"]
    refused = optimize(folder, asked, repair=False).report.attribution
    assert refused is not None
    assert (refused.proposed, refused.reverted, refused.attempts) == (["without late"], [], [])


def test_without_repair_the_loss_is_attributed_and_the_verdict_stands(folder: Path) -> None:
    asked = job(FLOOR, passes=(INT8, MERGE, DECODE))
    result = optimize(folder, asked, repair=False)
    found = result.report.attribution
    assert found is not None
    assert not result.passed
    assert found.attempts == []
    assert found.proposed
    assert [spec["name"] for spec in result.outcome.recipe.passes] == ["quantize", "merge_linears", "decode"]
    assert "carries the loss" in result.report.summary


def test_a_floor_that_the_original_misses_is_no_pass_to_blame_for(folder: Path) -> None:
    asked = job({"metric": PERPLEXITY, "at_most": 0.9}, passes=(MERGE, DECODE))
    result = optimize(folder, asked)
    found = result.report.attribution
    assert found is not None
    assert not result.passed
    assert "no pass carries this loss" in found.notes[0]
    assert "no pass carries this loss" in result.report.summary.lower()


def test_a_size_that_a_revert_would_miss_is_not_gated(folder: Path) -> None:
    """Quality needs one layer as it is; the floor on size leaves no room for it."""
    plain = optimize(folder, job(FLOOR, passes=(INT8, MERGE, DECODE)), repair_minutes=0)
    assert plain.report.attribution is None  # with no minutes nothing is searched
    size = plain.report.memory.weights_bytes_after / plain.report.memory.weights_bytes_before
    floors = (FLOOR, {"metric": "weights.ratio", "at_most": size + 1e-6})
    result = optimize(folder, job(*floors, passes=(INT8, MERGE, DECODE)))
    found = result.report.attribution
    assert found is not None
    assert not result.passed
    assert found.attempts == []
    assert any("quality is expected to hold, but weights.ratio" in note for note in found.notes)


def test_a_candidate_that_refuses_accuses_nobody(folder: Path) -> None:
    passes = ({"name": "fragile"}, {"name": "needy"}, {"name": "ruin"}, DECODE)
    result = optimize(folder, job(FLOOR, passes=passes))
    found = result.report.attribution
    assert found is not None
    assert [finding.title for finding in found.findings if finding.guilty] == ["ruin"]
    (fragile,) = [finding for finding in found.findings if finding.title == "fragile"]
    assert fragile.without is not None
    assert "needy needs fragile" in fragile.without.error
    assert result.passed
    assert found.reverted == ["without ruin"]


def test_a_failure_in_the_middle_of_the_search_leaves_the_verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    class Broken(repair.QualityProbe):
        def _measure(self, reverts: Any) -> Any:
            calls.append(reverts)
            if len(calls) == 4:
                raise RuntimeError("the device is gone")
            return super()._measure(reverts)

    monkeypatch.setattr(repair, "QualityProbe", Broken)
    result = optimize(folder, job(FLOOR, passes=(INT8, MERGE, DECODE)))
    found = result.report.attribution
    assert found is not None
    assert not result.passed
    assert "the search ended early: RuntimeError: the device is gone" in found.notes
    assert result.report.verdict == "failed"


def test_a_search_that_runs_out_of_time_says_so(folder: Path) -> None:
    result = optimize(folder, job(FLOOR, passes=(INT8, MERGE, DECODE), repair_minutes=1e-4))
    found = result.report.attribution
    assert found is not None
    assert not result.passed
    assert not found.complete
    assert any("give more" in note for note in found.notes)


def test_inplace_the_callers_model_becomes_the_repaired_one(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    result = optimize(model, job(FLOOR, passes=(INT8, MERGE, DECODE)), tokenizer=byte_tokenizer(), inplace=True)
    assert result.passed
    assert model.model.layers[0].mlp.down_proj is result.model.model.model.layers[0].mlp.down_proj


def test_the_command_says_why_what_was_gated_again_and_where_the_artifact_is(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(job(FLOOR, passes=(INT8, MERGE, DECODE)).to_yaml(), encoding="utf-8")
    command = ["run", str(folder), "--recipe", str(file), "--out", str(tmp_path / "out"), "--quiet"]
    refused = CliRunner().invoke(app, [*command, "--no-repair"])
    assert refused.exit_code == 1
    assert "because: quantize carries the loss" in refused.stdout
    assert "gated again" not in refused.stdout
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"refused as given: {PERPLEXITY} <= 1.1 is missed" in result.stdout
    assert f"gated again with quantize leaves {PLANTED} as it is: passed" in result.stdout
    assert (tmp_path / "out/artifact/manifest.json").is_file()


def test_the_page_on_attribution_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs/attribution.md").read_text(encoding="utf-8")
    fields = Recipe.model_fields
    for key in ("repair", "repair_minutes"):
        assert f"`{key}: {str(fields[key].default).lower().removesuffix('.0')}`" in page
    assert (repair.ATTEMPTS, "at most three are run in full" in page) == (3, True)
    assert (attribution.MOST_LAYERS, "More than four are" in page) == (4, True)
    assert (probe.FACTOR, "less than a third of the loss" in page, "by three at most" in page) == (3, True, True)
    options = {option for parameter in get_command(app).commands["run"].params for option in parameter.opts}
    options |= {option for parameter in get_command(app).commands["run"].params for option in parameter.secondary_opts}
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]+", page)) <= options
    assert ", ".join(f"{100 * (1 - 0.05 * 0.5**k):.4g} %" for k in (1, 2, 3)) in page
