"""`compare_variants` end to end on tiny models, against figures found another way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer import compare as module
from optimizer.api import optimize
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.runner import EagerRunner
from optimizer.cli import app
from optimizer.compare import Settings, compare_variants
from optimizer.compare_report import Comparison
from optimizer.documents import differing_documents
from optimizer.errors import EndpointError, UsageError
from optimizer.evals.items import Item
from optimizer.evals.timing import Workload
from optimizer.history import read_history
from optimizer.layer_errors import layer_differences, place
from optimizer.passes.base import view
from optimizer.recipe import ServingSpec
from optimizer.variants import Options
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer
from tests.optimizer.fake_endpoint import fake_server, send
from tests.optimizer.small_jobs import CEILINGS, recipe, without_measuring_the_machine
from tests.optimizer.tiny_models import byte_tokenizer, llama, tiny_llama

QUICK = Settings(
    tasks=("reference_next_line", "reference_perplexity"), limit=3, workload=Workload(1, 8, 4), repeats=3,
    price_per_hour=3.6, options=Options(device="cpu"),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_measuring_the_machine(patch)
        patch.setattr(module, "measure_ceilings", lambda *_, **__: CEILINGS)
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an artifact of it in 4 bits."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_llama(folder / "model", dtype=torch.float32)
    four = recipe(
        {"metric": "weights.ratio", "at_most": 0.9},
        passes=({"name": "quantize", "bits": 4, "group_size": 32}, {"name": "decode", "compile": False}),
    )
    optimize(folder / "model", four, device="cpu", out=folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def found(work: Path) -> Comparison:
    return compare_variants([str(work / "model"), f"four={work / 'artifact'}", f"same={work / 'model'}"], QUICK)


def test_every_local_variant_is_measured(found: Comparison, work: Path) -> None:
    assert [(v.name, v.kind) for v in found.variants] == [("model", "model"), ("four", "artifact"), ("same", "model")]
    base, four, same = found.variants
    assert base.decode_speedup is None
    assert four.decode_speedup is not None
    assert four.decode_speedup.low <= four.decode_speedup.value <= four.decode_speedup.high
    for variant in found.variants:
        assert variant.speed is not None
        assert variant.speed.tokens_per_second > 0
        assert variant.cost_per_million_tokens == pytest.approx(1000 / variant.speed.tokens_per_second)
        assert variant.memory_bytes == variant.weights_bytes + 12 * variant.kv_bytes_per_token
        assert [p.phase for p in variant.roofline] == ["prefill", "decode"]
    assert four.weights_bytes < base.weights_bytes == same.weights_bytes
    assert four.stored_bytes == (work / "artifact" / "model.safetensors").stat().st_size
    assert four.verdict == "passed"
    assert "int4" in four.format
    assert four.digest != base.digest == same.digest


def test_quality_is_paired_with_the_first(found: Comparison) -> None:
    assert [m.label for m in found.headlines()] == [
        "reference_next_line/acc_norm ↑",
        "reference_perplexity/byte_perplexity ↓",
    ]
    for metric in found.quality:
        base, four, same = metric.scores
        assert base.ratio is None
        assert metric.samples == 3
        if base.value > 0:
            assert same.ratio == 1.0 == same.ratio_low == same.ratio_high
            assert four.ratio == pytest.approx(four.value / base.value)
    assert not any(answer.differs for d in found.documents for answer in d.answers if answer.variant == "same")


def test_the_same_model_has_no_layer_error_and_four_bits_have_that_of_their_weights(
    found: Comparison, work: Path
) -> None:
    assert {layer.weight_error for layer in found.layers if layer.variant == "same"} == {0.0}
    assert {layer.output_error for layer in found.layers if layer.variant == "same"} == {0.0}
    before = AutoModelForCausalLM.from_pretrained(work / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(work / "artifact")
    after(torch.tensor([[5]]))  # transformers decompresses at the first forward
    compared = [layer for layer in found.layers if layer.variant == "four" and layer.layer is not None]
    assert len(compared) == 14
    weights = dict(after.named_modules())
    for layer in compared:
        assert place(layer.name) == (layer.layer, layer.projection)
        w, q = before[f"{layer.name}.weight"], weights[layer.name](torch.eye(weights[layer.name].in_features)).T
        assert layer.weight_error == pytest.approx(float((q - w).norm() / w.norm()), rel=1e-3)
        assert 0.3 < layer.output_error / layer.weight_error < 3
    assert found.tokens == 256


def test_the_whole_of_it_renders_and_is_recorded(found: Comparison, tmp_path: Path) -> None:
    for name in ("compare.html", "compare.json", "compare.md"):
        found.save(tmp_path / name)
    history = read_history(tmp_path)
    assert [(run.recipe, run.verdict) for run in history.runs] == [("same", "compared"), ("small", "compared")]
    assert {run.model for run in history.runs} == {"model"}
    assert history.unread == ()


def test_output_errors_are_those_of_the_layers_own_inputs() -> None:
    base, other = llama(dtype=torch.float32, tied=False), llama(dtype=torch.float32, tied=False)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= 1.25
    tokens = torch.randint(3, 200, (1, 16), generator=torch.Generator().manual_seed(0))
    differences, notes = layer_differences(EagerRunner(base, byte_tokenizer()), {"other": other}, tokens)
    errors = {item.name: (item.weight, item.output) for item in differences["other"]}
    assert errors.pop("model.layers.1.mlp.down_proj") == pytest.approx((0.25, 0.25), rel=1e-5)
    assert set(errors.values()) == {(0.0, 0.0)}
    assert notes == []


def test_folded_norms_and_missing_layers_are_told(tmp_path: Path) -> None:
    base, other = llama(dtype=torch.float32), llama(dtype=torch.float32, layers=1)
    with torch.no_grad():
        other.model.norm.weight *= 3
    tokens = torch.tensor([[5, 6, 7]])
    differences, notes = layer_differences(EagerRunner(base, byte_tokenizer()), {"o": other}, tokens)
    assert len(differences["o"]) == 8
    assert "7 of 15 layers have no counterpart" in notes[0]
    assert "a difference, and not an error" in notes[1]


def test_a_variant_of_another_shape_is_compared_in_what_it_shares() -> None:
    base, other = llama(dtype=torch.float32), llama(dtype=torch.float32, hidden=32)
    tokens = torch.tensor([[5, 6, 7]])
    differences, _ = layer_differences(EagerRunner(base, byte_tokenizer()), {"o": other}, tokens)
    assert differences == {"o": []}


def item(document: str, answer: str, right: float | None, likelihood: float | None = None) -> Item:
    scores = {} if right is None else {"acc": right}
    gold = None if right is None else "yes"
    return Item("task", "none", document, "context", answer, gold, scores, likelihood)


def test_documents_that_turned_come_before_those_that_only_changed() -> None:
    base = [item("0", "no", 0.0), item("1", "yes", 1.0), item("2", "a", 0.0), item("3", "yes", 1.0)]
    other = [item("0", "no", 0.0), item("1", "no", 0.0), item("2", "b", 0.0), item("3", "yes", 1.0)]
    documents, (count,) = differing_documents({"x": base, "y": other})
    assert [document.document for document in documents] == ["1", "2"]
    assert (count.total, count.differing, count.listed) == (4, 2, 2)
    assert [(a.right, a.differs) for a in documents[0].answers] == [(True, False), (False, True)]


def test_texts_are_ordered_by_how_far_they_moved_and_cut() -> None:
    base = [item(str(i), f"{i}", None, -100.0) for i in range(50)]
    other = [item(str(i), f"{i}+", None, -100.0 - i) for i in range(50)]
    documents, (count,) = differing_documents({"x": base, "y": other})
    assert [document.document for document in documents[:2]] == ["49", "48"]
    assert (count.differing, count.listed, len(documents)) == (50, 20, 20)


def test_serving_is_measured_where_it_can_be(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(runner: Any) -> PagedRunner:
        return PagedRunner(view(runner.model), runner.tokenizer, compile=False)

    monkeypatch.setattr(module, "paged", uncompiled)
    served = dataclasses.replace(
        QUICK, tasks=(), layers=False, serving=ServingSpec(requests=3, concurrency=2, max_batch=2)
    )
    found = compare_variants([str(work / "model"), str(work / "model")], served)
    for variant in found.variants:
        assert variant.serving is not None, variant.notes
        assert variant.serving.requests == 3
        assert variant.cost_per_million_tokens == pytest.approx(1000 / variant.serving.tokens_per_second)
    assert found.quality == found.documents == found.layers == []
    assert "Serving" in found.to_html()


def test_an_endpoint_is_compared_with_a_local_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-4711-secret")
    model = small_model()
    model.save_pretrained(tmp_path / "small")
    small_tokenizer().save_pretrained(tmp_path / "small")
    with fake_server(SmallRunner(model)) as server:
        options = Options(device="cpu", api_key_variable="SERVER_KEY")
        settings = dataclasses.replace(QUICK, tasks=("reference_next_line",), limit=4, options=options)
        found = compare_variants([str(tmp_path / "small"), server.name], settings)
        _, remote = found.variants
        assert remote.kind == "endpoint"
        assert remote.speed is not None
        assert remote.decode_speedup is None  # another clock: nothing to pair
        assert "another machine" in remote.notes[0]
        assert [s.ratio for m in found.quality for s in m.scores[1:] if m.scores[0].value > 0] == [1.0] * sum(
            m.scores[0].value > 0 for m in found.quality
        )
        assert found.layers == []
        assert server.name in found.to_html()
        assert all(headers["Authorization"] == "Bearer sk-4711-secret" for headers in server.headers)
        assert "sk-4711-secret" not in found.to_html() + found.to_json() + found.to_markdown()
        server.faults += [lambda h: send(h, 500, "broken")] * 9
        with pytest.raises(EndpointError, match="500"):
            compare_variants([str(tmp_path / "small"), server.name], settings)
        with pytest.raises(UsageError, match="scoring needs its tokenizer"):
            compare_variants([server.name, server.name], settings)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_three_files_and_says_the_result(work: Path, tmp_path: Path) -> None:
    options = ["--limit", 2, "--prompt", 8, "--output", 4, "--repeats", 3, "--tasks", "reference_next_line"]
    ran = invoke(
        "compare", work / "model", f"four={work / 'artifact'}", *options, "--out", tmp_path / "o", "--device", "cpu"
    )
    assert ran.exit_code == 0, ran.output
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["compare.html", "compare.json", "compare.md"]
    assert "four" in ran.stdout
    assert f"page: {tmp_path / 'o' / 'compare.html'}" in ran.stdout
    listed = invoke("history", tmp_path, "--json", "--out", tmp_path / "trend.html")
    assert [run["recipe"] for run in json.loads(listed.stdout)["runs"]] == ["small"]
    assert "Trends" in (tmp_path / "trend.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["reference"], "name at least two"),
        (["reference", "reference", "--price", "-1"], "must be a positive amount"),
        (["reference", "reference", "--workload", "gossip"], "gossip"),
        (["reference", "http://u:p@h/v1#m"], "no user, password"),
        (["reference", "http://h/v1#m", "--api-key-env", "NOT_SET_ANYWHERE"], "holds no usable key"),
    ],
)
def test_a_wrong_request_exits_2_at_once(arguments: list[str], problem: str, tmp_path: Path) -> None:
    ran = invoke("compare", *arguments, "--out", tmp_path / "out", "--quiet")
    assert ran.exit_code == 2
    assert problem in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = invoke("compare", "reference", "reference", "--out", tmp_path / "file" / "under", "--json")
    assert ran.exit_code == 2
    assert json.loads(ran.stderr)["error"] == "OutputError"
