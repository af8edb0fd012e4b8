"""Kernels are compiled once per source, compiler and processor; whatever prevents it is a reason, never a crash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optimizer.backends.kernels import build

Compiler = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes stand-ins for g++ that log each compilation in `runs` and write a file that is no library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(version: str, body: str = "sleep 0.2; echo not a library > $out") -> Path:
        script = tmp_path / f"c++-{version}"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && {{ echo {version}; exit; }}\n'
            f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\necho run >> {tmp_path}/runs\n{body}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return make


def compilations(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_a_library_is_built_once_and_then_reused(compiler: Compiler, tmp_path: Path) -> None:
    script = str(compiler("1"))
    first = build._built(script)
    assert first.parent == tmp_path / "cache" / "roofline-optimizer"
    assert build._built(script) == first
    assert compilations(tmp_path) == 1
    assert [p.name for p in first.parent.iterdir() if p.suffix != ".lock"] == [first.name]


def test_the_key_changes_with_source_flags_compiler_torch_and_processor(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(compiler("1"))
    libraries = {build._built(script)}
    source = Path(shutil.copytree(build.SOURCE.parent, tmp_path / "changed")) / build.SOURCE.name
    header = source.with_name("linear.h")
    header.write_text(header.read_text() + "\n// one more line\n")
    for change in (
        lambda m: m.setattr(build, "SOURCE", source),
        lambda m: m.setattr(build, "FLAGS", (*build.FLAGS, "-g")),
        lambda m: m.setattr(build, "_processor", lambda: "another processor"),
        lambda m: m.setattr(build.torch, "__version__", "99.0"),
    ):
        with monkeypatch.context() as changed:
            change(changed)
            libraries.add(build._built(script))
    libraries.add(build._built(str(compiler("2"))))
    assert len(libraries) == 6


def test_builders_at_the_same_time_compile_once_and_agree(compiler: Compiler, tmp_path: Path) -> None:
    script = str(compiler("1"))
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(build._built, [script] * 4))
    assert len(libraries) == 1
    assert compilations(tmp_path) == 1


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    got = build.cpu_kernels.__wrapped__()
    assert not got.loaded
    assert "install g++" in got.reason


def test_a_compiler_that_is_not_there_is_a_reason(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    got = build.cpu_kernels.__wrapped__()
    assert not got.loaded
    assert "/no/such/compiler" in got.reason


def test_a_failing_compiler_is_quoted_and_leaves_nothing_behind(compiler: Compiler, tmp_path: Path) -> None:
    compiler("1", "echo 'cpu.cpp:1: error: no such intrinsic' >&2; exit 1")
    got = build.cpu_kernels.__wrapped__()
    assert not got.loaded
    assert "no such intrinsic" in got.reason
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_cannot_be_loaded_is_a_reason(compiler: Compiler) -> None:
    compiler("1")
    got = build.cpu_kernels.__wrapped__()
    assert not got.loaded
    assert "cannot be kept or loaded" in got.reason


def test_a_cache_that_cannot_be_written_is_a_reason(compiler: Compiler, tmp_path: Path) -> None:
    compiler("1")
    (tmp_path / "cache").write_text("a file where a folder should be")
    got = build.cpu_kernels.__wrapped__()
    assert not got.loaded
    assert "cannot be kept or loaded" in got.reason


def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path: Path) -> None:
    script = """
import torch
from optimizer.backends.linear import QuantizedLinear
from optimizer.quant.formats import Format
from optimizer.quant.rtn import quantize_rtn
weight = quantize_rtn(torch.randn(8, 64), Format(4, True, 32))
layer, x = QuantizedLinear(weight), torch.randn(3, 64)
assert layer.kernel == "w4a16_linear[reference]", layer.kernel
torch.testing.assert_close(layer(x), x @ weight.dequantize().t())
"""
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    root = Path(build.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_this_machine_says_what_it_runs() -> None:
    got = build.cpu_kernels()
    assert got.isa
    assert got.loaded == (got.reason == "")
