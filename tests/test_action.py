"""The GitHub action and the examples of docs/ci.md: pinned, proof against hostile inputs, and run as a runner would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from optimizer.ci_config import CiConfig
from optimizer.ci_outputs import outputs
from tests.optimizer.ci_examples import passed
from tests.optimizer.small_jobs import recipe
from tests.optimizer.test_ci_outputs import as_github_reads
from tests.optimizer.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "action.yml").read_text(encoding="utf-8")
ACTION = yaml.safe_load(SOURCE)
STEPS = ACTION["runs"]["steps"]
SCRIPTS = {step.get("name"): step for step in STEPS if "run" in step}
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
HOSTILE = [
    '"; touch pwned; "', "$(touch pwned)", "`touch pwned`", "a\ntouch pwned", "'; touch pwned #", "--help", "-",
    "${{ github.token }}", "x\nverdict<<EOF\npassed\nEOF", "a;touch pwned", "|touch pwned", "*", "~",
]  # fmt: skip


def examples(name: str) -> str:
    """The code block of docs/ci.md that begins with a comment of this name."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}\n")]
    return found


def workflow() -> Any:
    return yaml.load(examples(".github/workflows/optimize.yml"), yaml.BaseLoader)  # BaseLoader: `on` is no boolean


def scripts(node: Any) -> Iterator[str]:
    """Every `run` of a document."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "run":
                yield value
            else:
                yield from scripts(value)
    elif isinstance(node, list):
        for item in node:
            yield from scripts(item)


@pytest.mark.parametrize("document", [ACTION, workflow()], ids=["action", "workflow"])
def test_no_script_holds_an_expression(document: Any) -> None:
    found = list(scripts(document))
    assert found
    assert not [script for script in found if "${{" in script]


@pytest.mark.parametrize("text", [SOURCE, PAGE], ids=["action", "docs"])
def test_every_action_of_others_is_pinned_by_its_commit_with_its_version(text: str) -> None:
    used = re.findall(r"uses: *(\S+)(.*)", text)
    assert used
    for action, comment in used:
        if action.startswith("OWNER/roofline-optimizer@"):
            continue  # this action, whose commit the reader pins
        assert re.fullmatch(r"actions/[\w-]+(/[\w-]+)?@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_one_action_has_one_commit_everywhere() -> None:
    pins = {
        tuple(re.split(r"[/@]", used)[1 :: len(re.split(r"[/@]", used)) - 2]) for used in re.findall(r"actions/\S+", "")
    }
    for used in re.findall(r"uses: (actions/\S+)", SOURCE + PAGE):
        name, _, commit = used.partition("@")
        pins.add(("/".join(name.split("/")[:2]), commit))
    assert len(pins) == len({name for name, _ in pins})


def test_nothing_runs_with_the_rights_of_the_base_on_code_of_a_stranger() -> None:
    assert "pull_request_target" not in SOURCE + "".join(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    found = workflow()
    assert "pull_request_target" not in found["on"]
    assert found["permissions"] == {}
    optimize, comment = found["jobs"]["optimize"], found["jobs"]["comment"]
    assert optimize["permissions"] == {"contents": "read"}
    assert comment["permissions"] == {"pull-requests": "write"}
    assert not [step for step in comment["steps"] if "checkout" in step.get("uses", "")]  # runs no code of the change
    assert "self-hosted" in optimize["runs-on"]


def test_inputs_and_outputs_are_used_and_explained() -> None:
    for name, described in ACTION["inputs"].items():
        assert f"inputs.{name}" in SOURCE
        assert described["description"]
        assert f"| `{name}` |" in PAGE
    written = outputs(CiConfig(models=["x"]), [passed()])
    for name, described in ACTION["outputs"].items():
        assert described["value"].startswith(f"${{{{ steps.optimize.outputs.{name}")
        assert name in written
        assert f"| `{name}` |" in PAGE
    used = set(re.findall(r"steps\.optimize\.outputs\.([\w-]+)", SOURCE))
    assert used <= written.keys()


class Shell:
    """A runner's shell: nothing of ours in the environment but the fake commands and files of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.output, self.summary = folder / "output", folder / "summary"
        self.bin.mkdir()
        (folder / "temp").mkdir()

    def command(self, name: str, code: str) -> None:
        """A command on the path, written in Python."""
        file = self.bin / name
        file.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n", encoding="utf-8")
        file.chmod(0o755)

    def run(
        self, step: dict[str, Any], inputs: dict[str, str], timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a step's script as GitHub does, its `env` evaluated from the inputs."""
        given = {name: str(item.get("default", "")) for name, item in ACTION["inputs"].items()} | inputs
        environment = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], value)
            for name, value in step.get("env", {}).items()
        }
        script = self.folder / "script.sh"
        script.write_text(step["run"], encoding="utf-8")
        assert step["shell"] == "bash"
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=self.folder, capture_output=True, text=True, timeout=timeout, check=False,
            env={
                "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(self.folder),
                "GITHUB_ACTION_PATH": str(ROOT), "GITHUB_OUTPUT": str(self.output), "GITHUB_ACTIONS": "true",
                "GITHUB_STEP_SUMMARY": str(self.summary), "RUNNER_TEMP": str(self.folder / "temp"), **environment,
            },
        )  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


TELL = "json.dump(sys.argv[1:], open('told.json', 'w'))"


@pytest.mark.parametrize("extras", [*HOSTILE, "mlflow,", ",", "A", "mlflow wandb", "mlflow]", "mlflow[x"])
def test_hostile_extras_install_nothing(extras: str, shell: Shell) -> None:
    shell.command("python", TELL)
    ran = shell.run(SCRIPTS["Install"], {"extras": extras})
    assert ran.returncode == 2
    assert "extras is" in ran.stderr
    assert not (shell.folder / "told.json").exists()
    assert not (shell.folder / "pwned").exists()


@pytest.mark.parametrize(("extras", "package"), [("", str(ROOT)), ("mlflow,wandb", f"{ROOT}[mlflow,wandb]")])
def test_install_takes_the_action_s_own_code(extras: str, package: str, shell: Shell) -> None:
    shell.command("python", TELL)
    assert shell.run(SCRIPTS["Install"], {"extras": extras}).returncode == 0
    assert json.loads((shell.folder / "told.json").read_text()) == ["-m", "pip", "install", package]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_config_is_one_argument(value: str, shell: Shell) -> None:
    shell.command("optimizer", TELL)
    assert shell.run(SCRIPTS["Optimize"], {"config": value}).returncode == 0
    told = json.loads((shell.folder / "told.json").read_text())
    assert told == ["ci", f"--config={value}", f"--cache={shell.folder}/temp/optimizer-baselines"]
    assert not (shell.folder / "pwned").exists()


@pytest.mark.parametrize("value", [v for v in HOSTILE if v != "-"])
def test_a_hostile_folder_is_no_command(value: str, shell: Shell) -> None:
    shell.command("optimizer", TELL)
    assert shell.run(SCRIPTS["Optimize"], {"working-directory": value}).returncode != 0
    assert not list(shell.folder.rglob("told.json"))
    assert not (shell.folder / "pwned").exists()


OPTIMIZER = f"""
import os
os.environ["HOME"] = {str(Path.home())!r}  # where the compiled CPU kernels are kept
sys.path.insert(0, {str(ROOT)!r})
from optimizer.evals import ceilings
from optimizer import pipeline
from tests.optimizer.small_jobs import CEILINGS
pipeline.measure_ceilings = lambda *_, **__: CEILINGS
from optimizer.cli import main
main()
"""


def test_the_step_runs_for_real_and_leaves_its_outputs(shell: Shell) -> None:
    tiny_llama(shell.folder / "model", dtype=torch.float32)
    given = {"models": "model", "recipes": recipe().model_dump(mode="json"), "title": "`$(touch pwned)`"}
    (shell.folder / "my config.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    shell.command("optimizer", OPTIMIZER)
    ran = shell.run(SCRIPTS["Optimize"], {"config": "my config.yaml"}, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = as_github_reads(shell.output.read_text(encoding="utf-8"))
    assert found.keys() >= set(ACTION["outputs"])
    assert (found["verdict"], found["exit-code"], found["jobs"]) == ("passed", "0", "model-small")
    assert (Path(found["artifact"]) / "manifest.json").is_file()
    assert len(found["baselines"]) == 64
    for name in ("report", "junit", "summary", "comment", "results"):
        assert Path(found[name]).is_file()
    assert "PASSED" in shell.summary.read_text(encoding="utf-8")
    assert not (shell.folder / "pwned").exists()
    assert len(list((shell.folder / "temp/optimizer-baselines").glob("*.json"))) == 1


def test_the_gitlab_example_reports_what_is_written() -> None:
    found = yaml.safe_load(examples(".gitlab-ci.yml"))
    artifacts = found["optimize"]["artifacts"]
    out = Path(CiConfig(models=["x"]).out)
    assert artifacts["when"] == "always"
    assert artifacts["reports"] == {"junit": str(out / "junit.xml"), "dotenv": str(out / "optimizer.env")}
    assert str(Path(CiConfig(models=["x"]).cache or "")) in found["optimize"]["cache"]["paths"]
    assert any(line.startswith("optimizer ci") for line in found["optimize"]["script"])


def test_the_configuration_of_the_page_is_accepted_and_shows_every_key(tmp_path: Path) -> None:
    text = examples("optimizer.yaml")
    (tmp_path / "optimizer.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "my-recipe.yaml").write_text(recipe().to_yaml(), encoding="utf-8")
    config = CiConfig.from_yaml(tmp_path / "optimizer.yaml")
    assert len(config.jobs()) == len(config.models) * len(config.recipes)
    assert set(yaml.safe_load(text)) == set(CiConfig.model_fields)
