"""Every shipped Triton build compiles for every GPU it is for, spills nothing, and contains what its design claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimizer.backends import kernels
from optimizer.backends.kernels import ahead

pytest.importorskip("triton")
DOC = Path(kernels.__path__[0]).parents[1] / "docs" / "kernels.md"


def compile_all(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "optimizer.backends.kernels.ahead", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    run = compile_all()
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_every_build_keeps_what_its_description_says(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["faults"]] == []
    assert {row["sm"] for row in rows} == {80, 90, 100}
    assert all(0 < row["registers"] <= 255 and row["shared"] <= 227 << 10 for row in rows)


def test_every_kernel_that_is_launched_ships_a_build(rows: list[dict[str, Any]]) -> None:
    folder = Path(kernels.__path__[0])
    launched = {file.stem for file in folder.glob("*.py") if "_kernel[" in file.read_text(encoding="utf-8")}
    assert len(launched) > 10
    assert launched <= {row["kernel"] for row in rows}


def test_the_table_in_the_documentation_is_what_compiles(rows: list[dict[str, Any]]) -> None:
    names = ahead.Compiled.__dataclass_fields__
    compiled = [ahead.Compiled(**{name: _plain(row[name]) for name in names}) for row in rows]
    assert ahead.markdown(compiled) in DOC.read_text(encoding="utf-8"), (
        "docs/kernels.md is out of date, or was made with another Triton (3.6), whose assembler gives out other "
        "registers: python -m optimizer.backends.kernels.ahead prints its table"
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_spill_and_a_missing_feature_are_faults() -> None:
    row = ahead.Compiled("op", "bf16", 90, 4, 255, 8, 16, 0, ("load128",), ("mma",))
    assert row.faults == ["24 bytes spilled", "no mma in the code"]


def test_an_interpreted_kernel_is_not_compiled() -> None:
    command = [sys.executable, "-m", "optimizer.backends.kernels.ahead", "--kernel", "rms_norm"]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert run.returncode != 0
    assert "TRITON_INTERPRET is set" in run.stderr


def test_without_triton_kernels_import_and_references_serve() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import pkgutil, importlib, torch\n"
        "from optimizer.backends import kernels\n"
        "for m in pkgutil.iter_modules(kernels.__path__): importlib.import_module(f'{kernels.__name__}.{m.name}')\n"
        "from optimizer.backends.kernels import rms_norm\n"
        "print(torch.ops.optimizer.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, 0.0).sum().item())\n"
        "try: rms_norm._rms_norm_kernel[(1,)]()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    total, error = run.stdout.splitlines()
    assert float(total) == pytest.approx(8.0, abs=1e-4)
    assert error.startswith("DeviceError _rms_norm_kernel needs Triton")
