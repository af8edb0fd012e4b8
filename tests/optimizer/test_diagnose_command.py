"""`optimizer diagnose`: what people and programs are told, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers.utils import logging
from typer.testing import CliRunner

from optimizer import diagnose_command
from optimizer.cli import app
from optimizer.evals import ceilings, verdicts
from optimizer.evals.diagnose import Diagnosis
from optimizer.evals.interventions import Intervention
from optimizer.evals.memory_probe import SATURATED
from optimizer.evals.trace import HOST_GAP_SECONDS, TERM_NAMES
from optimizer.evals.verdicts import Verdict
from tests.optimizer.small_jobs import CEILINGS, recipe
from tests.optimizer.tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor, when it is first imported

SMALL = ("--prompt", "8", "--output", "6", "--quiet")


@pytest.fixture(autouse=True, scope="module")
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "measure_ceilings", lambda *_, **__: CEILINGS)
        patch.setenv("KINETO_LOG_LEVEL", "6")
        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("m") / "model", dtype=torch.float32)


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


@pytest.fixture(scope="module")
def document(model: Path) -> dict[str, Any]:
    ran = invoke(model, *SMALL, "--batch", "2", "--context", "40", "--json")
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_json_holds_all_of_it(document: dict[str, Any]) -> None:
    prefill, decode = document["phases"]
    assert (prefill["batch"], prefill["tokens_or_context"]) == (2, 8)
    assert (decode["batch"], decode["tokens_or_context"]) == (2, 40)
    for phase in document["phases"]:
        assert sum(phase["terms"].values()) == pytest.approx(phase["seconds"])
        assert phase["floor_seconds"] < phase["seconds"]
        assert {"name", "term", "seconds", "flops", "bytes", "attainable"} <= phase["kernels"][0].keys()
        assert any(layer["name"] == "lm_head" for layer in phase["layers"])
    assert document["ceilings"]["device"] == CEILINGS.device
    for intervention in document["interventions"]:
        seconds = {phase["phase"]: phase["seconds"] for phase in document["phases"]}[intervention["phase"]]
        assert intervention["predicted_gain"] == pytest.approx(seconds / intervention["predicted_seconds"])


def test_people_read_the_same(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "d.html"
    ran = invoke(model, *SMALL, "--out", page)
    assert ran.exit_code == 0, ran.output
    for part in ("prefill, batch 1, prompt 8", "decode, batch 1, context 11", "launch and gaps", "aten::",
                 "Where the bottleneck moves:", "Next, by what a whole request saves", "attainable"):  # fmt: skip
        assert part in ran.stdout, part
    step = float(re.search(r"decode, batch 1, context 11: ([\d.]+) ms", ran.stdout)[1])  # type: ignore[index]
    terms = ran.stdout.split("decode, batch 1")[1]
    parts = [
        float(line) for line in re.findall(r"([\d.]+) +\d+%", re.split(r"term +ms +share", terms)[1].split("kernel")[0])
    ]
    assert sum(parts) == pytest.approx(step, abs=0.004)
    assert "decode, batch 1, context 11" in page.read_text(encoding="utf-8")


def test_the_runner_of_a_recipe(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe().to_yaml(), encoding="utf-8")
    ran = invoke(model, *SMALL, "--recipe", path, "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["recipe"] == str(path)
    kernels = {kernel["name"] for phase in found["phases"] for kernel in phase["kernels"]}
    assert any(name.startswith("optimizer::") for name in kernels)
    assert all(phase["unclassified"] == [] for phase in found["phases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "5000"), "do not fit the model's 256 positions"),
        (("--prompt", "300"), "do not fit the model's 256 positions"),
        (("--recipe", "defalt"), "default"),
        (("--output", "2"), "output"),
        (("--batch", "0"), "batch"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_what_cannot_be_diagnosed_is_usage(model: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = invoke(model, "--quiet", *arguments)
    assert ran.exit_code == 2
    assert message in ran.output


def test_a_damaged_model_is_a_typed_error(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    ran = invoke(folder, *SMALL)
    assert ran.exit_code in (2, 3)
    assert "Traceback" not in ran.output
    assert invoke(tmp_path / "absent", *SMALL).exit_code == 2


def test_passes_that_a_recipe_has_are_no_news() -> None:
    merge = Intervention("x", "decode", "", ({"name": "merge_linears"}, {"name": "fuse"}), 1.0, 2.0)
    kv = Intervention("x", "decode", "", ({"name": "decode", "cache": "paged", "kv": "int8"},), 1.0, 2.0)
    there = diagnose_command._passes_of("default")
    assert diagnose_command._passes(merge, there) == "in the recipe already"
    assert diagnose_command._passes(kv, there) == "decode(cache=paged, kv=int8)"
    assert diagnose_command._passes(merge, []) == "merge_linears + fuse"


DOCUMENT = (Path(__file__).parents[2] / "docs/diagnose.md").read_text(encoding="utf-8")


def test_the_document_explains_every_term_and_verdict() -> None:
    for word in (*TERM_NAMES, *get_args(Verdict)):
        assert f"| `{word}` |" in DOCUMENT, word
    assert set(re.findall(r"^\| `(.*?)` \|", DOCUMENT, re.MULTILINE)) == {*TERM_NAMES, *get_args(Verdict)}


def test_the_document_states_the_rules_that_the_code_follows() -> None:
    assert f"more than {verdicts.HOST:.0%}".replace("%", " %") in DOCUMENT
    assert f"more than {verdicts.MUCH:.0%}".replace("%", " %") in DOCUMENT
    assert f"at least {verdicts.NEAR:.0%}".replace("%", " %") in DOCUMENT
    assert f"{HOST_GAP_SECONDS * 1e3:g} ms" in DOCUMENT
    assert verdicts.SHORT_CALLS == 10
    assert SATURATED == 0.5


def test_every_term_of_the_documents_example_adds_up() -> None:
    example = DOCUMENT.split("## Example")[1]
    for phase in ("prefill", "decode"):
        step = re.search(rf"^{phase}, batch .*?: ([\d.]+) ms", example, re.MULTILINE)
        assert step
        table = re.split(r"term +ms +share", example[step.end() :])[1].split("kernel")[0]
        parts = [float(value) for value in re.findall(r"([\d.]+) +\d+%", table)]
        assert sum(parts) == pytest.approx(float(step[1]), abs=0.0006 * len(parts))
    for phase, then, gain in re.findall(r"(prefill|decode) {2,}\S.*? {2,}([\d.]+) +([\d.]+)×", example):
        before = float(re.search(rf"^{phase}, batch .*?: ([\d.]+) ms", example, re.MULTILINE)[1])  # type: ignore[index]
        assert before / float(then) == pytest.approx(float(gain), rel=0.02)


def test_nothing_to_do_is_said(document: dict[str, Any]) -> None:
    from optimizer.evals.roofline import Roofline
    from optimizer.evals.timing import Workload

    empty = Diagnosis((), (), (), CEILINGS, Roofline(1e11, 1e10), Workload(1, 8, 6))
    assert "nothing in the table would gain" in diagnose_command.describe(empty, "m")[-1]
