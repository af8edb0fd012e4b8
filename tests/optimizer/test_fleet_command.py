"""`optimizer roofline --gpus`: the page on fleets is what the code says, and bad requests are refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.evals import arithmetic
from optimizer.evals.architecture import from_parameters
from optimizer.evals.fleet import Layout, Replica, smallest_that_fits
from optimizer.evals.hardware import GPUS, find_gpu
from optimizer.evals.roofline import ModelShape, Precision

PAGE = (Path(__file__).parents[2] / "docs/fleet.md").read_text(encoding="utf-8")
SIZES = {"d_model": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128}
ARGUMENTS = ["--params", "70e9", *(f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items())]


def replica(tensor: int = 1, pipeline: int = 1, shape: ModelShape | None = None) -> Replica:
    return Replica(shape or NAMES["model"], find_gpu("H100"), Layout(tensor, pipeline), latency=0.0)


NAMES: dict[str, Any] = {
    "model": from_parameters(70e9, **SIZES),
    "int4": from_parameters(70e9, **SIZES, weights=Precision(4), kv=Precision(8)),
    "replica": replica,
    "smallest_that_fits": smallest_that_fits,
    "arithmetic": arithmetic,
}
FIGURES = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| ([\d.]+) \|$", PAGE, re.MULTILINE)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["roofline", *arguments])


def test_the_page_holds_every_figure_of_the_worked_case() -> None:
    assert len(FIGURES) == PAGE.split("## A load")[0].count("| `") > 20


@pytest.mark.parametrize(("quantity", "expression", "value"), FIGURES, ids=lambda text: text[:40])
def test_each_figure_of_the_page_is_what_the_code_computes(quantity: str, expression: str, value: str) -> None:
    assert eval(expression, dict(NAMES)) == pytest.approx(float(value), rel=0.01), quantity


def test_the_page_shows_what_its_command_prints() -> None:
    command, shown = re.search(r"```\noptimizer (.*?)\n```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()  # type: ignore[union-attr]
    ran = CliRunner().invoke(app, shlex.split(command))
    assert ran.exit_code == 0, ran.output
    assert shown == ran.stdout


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_page_lists_the_links_of_every_gpu(gpu: Any) -> None:
    assert f"| {gpu.name} | {gpu.link_bandwidth / 1e9:g} | {gpu.network_bandwidth / 1e9:g} |" in PAGE


def test_json_holds_the_worked_figures() -> None:
    ran = invoke(*ARGUMENTS, "--gpus", "16", "--tp", "8", "--prompt", "3585", "--latency-us", "0", "--json")
    fleet = json.loads(ran.stdout)["fleet"]
    assert fleet["replicas"] == 2
    assert fleet["capacity"] == {"tokens": 4096, "requests_per_replica": 372, "requests": 744}
    assert fleet["per_gpu"]["weights_bytes"] == 17.5e9
    assert fleet["decode"]["moving"] == pytest.approx(5.22e-3, rel=1e-2)
    assert fleet["all_reduce_bytes_per_layer"] == 32768
    assert "service" not in fleet


def test_options_replace_the_assumptions() -> None:
    base = (*ARGUMENTS, "--gpus", "8", "--tp", "8", "--latency-us", "0", "--batch", "64", "--json")
    plain, fast = (json.loads(invoke(*base, *more).stdout)["fleet"] for more in ((), ("--interconnect", "900")))
    assert plain["decode"]["all_reduce"] == pytest.approx(2 * fast["decode"]["all_reduce"])
    slow = json.loads(invoke(*base, "--network", "5").stdout)["fleet"]
    assert slow["kv_transfer_seconds"] == pytest.approx(10 * plain["kv_transfer_seconds"])
    less = json.loads(invoke(*base, "--reserve", "10").stdout)["fleet"]
    assert less["per_gpu"]["free_bytes"] == plain["per_gpu"]["free_bytes"] - 10e9


def test_the_price_is_that_of_the_gpus_over_the_tokens() -> None:
    load = ("--load", "5", "--output", "100", "--prompt", "1000", "--price", "3", "--json")
    service = json.loads(invoke(*ARGUMENTS, "--gpus", "8", *load).stdout)["fleet"]["service"]
    for way in ("colocated", "disaggregated"):
        cost = service[way]["gpus"] * 3 / (5 * 100 * 3600) * 1e6
        assert service[way]["price_per_million_output_tokens"] == pytest.approx(cost)
    assert service["ttft_objective_seconds"] is None  # none given


def test_a_mixture_of_experts_from_its_configuration(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
              "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8,
              "num_experts_per_tok": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = invoke(str(tmp_path), "--gpus", "4", "--ep", "4", "--imbalance", "1.5", "--batch", "8")
    assert ran.exit_code == 0, ran.output
    assert "expert 4" in ran.stdout
    assert "all-to-all" in ran.stdout
    assert "busiest experts 1.5 × the mean" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tp", "2"), "--tp describes a fleet; add --gpus"),
        (("--gpus", "1"), "the smallest number that holds it is 2"),
        (("--gpus", "6", "--tp", "3"), "tensor 3 does not divide the 64 heads"),
        (("--gpus", "8", "--tp", "16"), "does not divide --gpus 8"),
        (("--gpus", "8", "--ep", "8"), "needs a mixture of experts"),
        (("--gpus", "8", "--gpu", "measured"), "name the GPU"),
        (("--gpus", "8", "--load", "nan"), "--load is nan"),
        (("--gpus", "8", "--price", "-1"), "--price is -1"),
        (("--gpus", "8", "--tp", "8", "--batch", "400", "--context", "4095"), "372 such requests fit"),
        (("--gpus", "8", "--load", "1", "--tpot-ms", "1"), "a later token takes at least"),
        (("--gpus", "8", "--tp", "8", "--load", "1", "--ttft-ms", "1"), "the first token of 4096 takes at least"),
        (("--gpus", "8", "--imbalance", "0.5"), "the busiest experts get at least the mean"),
        (("--gpus", "8", "--reserve", "90"), "the reserve is part of the memory"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = invoke(*ARGUMENTS, *arguments)
    assert ran.exit_code == 2, ran.output
    assert words in ran.stderr
