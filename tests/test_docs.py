"""What the documents say is true: commands exist, paths exist, figures are those of the committed results."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import diagnose, gate, gemv_cpu, peers_cpu, predict, recent_kv, serving_cpu, streaming
from benchmarks.decode import markdown
from benchmarks.gpu import claims
from optimizer.cli import app
from optimizer.compare_report import Comparison
from optimizer.evals.noninferiority import score_interval
from optimizer.evals.power import items_needed
from optimizer.recipe import Recipe, builtin
from optimizer.variants import OPENERS

ROOT = Path(__file__).parents[1]
GATE = (ROOT / "docs/gate.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]


def commands_of(text):
    return [line for line in text.splitlines() if re.match(r"\s*(optimizer|make) [a-z]", line)]


@pytest.mark.parametrize("line", commands_of(README), ids=str)
def test_each_command_of_the_readme_exists_with_its_options(line):
    program, name, *rest = line.split("#")[0].split()
    if program == "make":
        assert re.search(rf"^{name}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    command = get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_the_layout_names_every_folder_and_only_those():
    tree = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = {line.split("/")[0] for line in tree.splitlines()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.split("/")[0] for path in tracked.splitlines() if "/" in path and not path.startswith(".")}
    assert named == folders


def test_the_recipe_table_lists_every_recipe():
    assert {name for name in builtin() if f"| `{name}` |" in README} == set(builtin())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_readme_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/decode-cpu.json").read_text(encoding="utf-8"))
    assert markdown(result) in README


def test_the_page_on_cpus_shows_the_committed_result():
    peers, products = (json.loads(file.read_text(encoding="utf-8")) for file in (peers_cpu.RESULT, gemv_cpu.RESULT))
    assert (ROOT / "docs/cpu.md").read_text(encoding="utf-8") == peers_cpu.page(peers, products)


def test_products_of_one_row_are_measured_and_a_missed_share_is_written_down_as_missed():
    rows = gemv_cpu.measure({"o": (64, 128)}, 1, repeats=2, cold_bytes=1, read_bytes=1 << 20)
    assert [row["kind"] for row in rows] == list(gemv_cpu.KINDS)
    assert all(row["share_of_best"] > 0 for row in rows)
    machine = {"device": "d", "cores": 1, "isa": "i", "torch": "2", "date": "today"}
    rows[0]["share_of_best"] = gemv_cpu.ASKED - 0.01
    assert "1 thread: 79%, **missed**" in gemv_cpu.markdown({"machine": machine, "rows": rows})


def test_the_page_on_the_paged_cache_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/serving_cpu.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/decode-cpu.md").read_text(encoding="utf-8") == serving_cpu.page(result)


def test_the_page_on_decoding_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/recent_kv.json").read_text(encoding="utf-8"))
    assert recent_kv.markdown(result) in (ROOT / "docs/decode.md").read_text(encoding="utf-8")


def test_the_page_on_streaming_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/streaming.json").read_text(encoding="utf-8"))
    assert streaming.markdown(result["rows"]) in (ROOT / "docs/streaming.md").read_text(encoding="utf-8")


def test_the_page_on_the_gate_shows_the_committed_simulation():
    result = json.loads((ROOT / "benchmarks/results/gate.json").read_text(encoding="utf-8"))
    assert gate.markdown(result["rows"]) in GATE
    assert f"{result['runs']:,} runs" in GATE


def test_the_page_on_the_gate_gives_the_figures_of_the_power_function():
    for line in re.findall(r"^optimizer power (.*)$", GATE, re.MULTILINE):
        options, _, said = line.partition("#")
        done = CliRunner().invoke(app, ["power", *options.split(), "--json"])
        found = json.loads(done.stdout)
        if "items" in found:
            assert f"{found['power_of_items']:.0%}".replace("%", " %") in said
            assert f"{found['margin_of_items']:.1%}".replace("%", " %") in said
        else:
            assert f"{found['items_needed']:,} items" in said
    assert f"{items_needed(0.01, flips=0.02):,} items" in GATE
    assert f"{score_interval(0, 0, 240, 0.05)[1]:.1%}".replace("%", " %") + " for 240 items" in GATE


def test_the_recipe_on_the_page_of_the_gate_is_one():
    example = re.search(r"```yaml\n(workload.*?)```", GATE, re.DOTALL)[1]
    recipe = Recipe.from_dict({"name": "example", "passes": [{"name": "decode"}], **yaml.safe_load(example)})
    assert recipe.evaluation.sequential
    assert recipe.evaluation.divergence.model_dump() == {"documents": 16, "length": 256}
    assert "`divergence: {documents: 16, length: 256}`" in GATE


def test_the_page_on_plans_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/predict-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- results -->\n(.*?)<!-- end of results -->", page, re.DOTALL)[1]
    assert shown == predict.markdown(result) + "\n"


def test_the_page_on_diagnoses_shows_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/diagnose-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/diagnose.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- results -->\n(.*?)<!-- end of results -->", page, re.DOTALL)[1]
    assert shown == diagnose.markdown(result) + "\n"


def test_an_error_of_a_predicted_gain_is_over_the_measured_one():
    row = {"phase": "decode", "name": "n", "passes": [], "predicted": 1.5,
           "measured": {"median": 2.0, "low": 1.9, "high": 2.1}}  # fmt: skip
    case = {"case": "c", "workload": {"batch": 1, "prompt": 2, "output": 3}, "rows": [row], "not_carried_out": []}
    machine = {"device": "d", "cores": 1, "isa": "i"}
    page = diagnose.markdown({"results": [case], "machine": machine, "versions": {"torch": "2"}, "date": "today"})
    assert "| decode | n | 1.50× | 2.00× [1.90, 2.10] | -25% |" in page
    assert "Median error over 1 suggestions: 25%." in page


def test_a_missed_error_of_predictions_is_written_down_as_missed():
    row = {"candidate": "c", "predicted": {"ttft": 1.0, "tpot": 2.0}, "raw": {"ttft": 1.0, "tpot": 2.0},
           "measured": {"ttft": 2.0, "tpot": 1.0}}  # fmt: skip
    result = {"workload": {"batch": 1, "prompt": 2, "output": 3}, "unquantized": {"ttft": 1, "tpot": 1}, "rows": [row],
              "left_out": {}}  # fmt: skip
    machine = {"device": "d", "cores": 1, "isa": "i"}
    page = predict.markdown({"results": [result], "machine": machine, "versions": {"torch": "2"}, "date": "today"})
    assert "Median error over 1 candidates: 75.0%" in page
    assert "**missed**" in page


def test_every_gpu_claim_names_a_result_or_says_not_measured():
    assert (ROOT / "docs/gpu.md").read_text(encoding="utf-8") == claims.page(claims.load())


def test_a_missed_gpu_target_is_written_down_as_missed():
    rows = {name: 0.0 for _, name, _, less in claims.CLAIMS if not less} | {
        "quantize gptq: seconds per billion parameters": 5
    }
    page = claims.page({"rows": rows, "device": "GPU", "versions": {"torch": "2"}, "date": "today"})
    asked = [name for _, name, bound, less in claims.CLAIMS if bound is not None and not less]
    assert page.count("**missed**") == len(asked)
    assert "| ≤ 20 | 5 | [gpu.json]" in page


def test_contributing_explains_each_in_ten_lines():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for thing in ("pass", "kernel", "format"):
        steps = re.search(rf"## Add a {thing}\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]
        assert len(re.findall(r"^\d+\. ", steps, re.MULTILINE)) == 10


COMPARE = (ROOT / "docs/compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", commands_of(COMPARE), ids=str)
def test_each_command_of_the_page_on_comparing_exists_with_its_options(line):
    _, name, *rest = line.split()
    options = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_the_page_on_comparing_names_every_kind_and_only_options_that_exist():
    rows = re.findall(r"^\| .* \| (.*) \| .* \|$", COMPARE.split("## What is measured")[0], re.MULTILINE)
    assert {kind for row in rows for kind in row.split(", ")} - {"kind"} == {opener.kind for opener in OPENERS}
    commands = get_command(app).commands
    options = {o for name in ("compare", "history") for parameter in commands[name].params for o in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", COMPARE)) <= options


def test_the_page_on_comparing_shows_the_committed_comparison():
    result = Comparison.from_json((ROOT / "benchmarks/results/compare_reference.json").read_bytes())
    summary, _, _ = result.to_markdown().partition("\n")[2].partition("\n| task and metric")
    assert summary.count("| `") == 4
    assert summary.strip() in COMPARE
    assert (ROOT / "docs/compare.png").stat().st_size < 300_000
