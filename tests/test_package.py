"""What is installed: every package and data file of the tree, and the names that are exported."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import optimizer

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LAYERS = ("optimizer", "passes", "backends", "quant", "evals")
CODE = (".py", ".pyc", ".pyi")


def package_name(folder: Path) -> str:
    """The name under which a folder of the checkout is imported."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "optimizer" else ("optimizer", *parts))


def packages() -> dict[str, Path]:
    folders = {init.parent for layer in LAYERS for init in (ROOT / layer).rglob("__init__.py")}
    # Held-out modules of other projects are data, whatever their folders hold.
    return {package_name(folder): folder for folder in folders if "held_out" not in folder.parts}


def test_the_list_of_packages_is_the_tree() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages())


def test_every_layer_is_mapped_to_its_folder() -> None:
    expected = {package_name(ROOT / layer): layer for layer in LAYERS}
    assert SETUPTOOLS["package-dir"] == expected


def test_every_data_file_is_installed() -> None:
    patterns = SETUPTOOLS["package-data"]
    found = packages()
    missed = []
    for layer in LAYERS:
        for file in (ROOT / layer).rglob("*"):
            if not file.is_file() or file.suffix in CODE or "__pycache__" in file.parts:
                continue
            owners = [(name, folder) for name, folder in found.items() if file.is_relative_to(folder)]
            covered = any(
                fnmatch(file.relative_to(folder).as_posix(), pattern)
                or (pattern == "**/*" and file.is_relative_to(folder))
                for name, folder in owners
                for pattern in patterns.get(name, ())
            )
            if not covered:
                missed.append(str(file.relative_to(ROOT)))
    assert not missed


@pytest.mark.parametrize("suffix", [".yaml", ".jinja", ".cpp", ".jsonl"])
def test_each_kind_of_data_file_exists(suffix: str) -> None:
    assert any(path.suffix == suffix for layer in LAYERS for path in (ROOT / layer).rglob(f"*{suffix}"))


def test_every_pattern_for_data_matches_something() -> None:
    found = packages()
    for name, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert any(found[name].glob(pattern)), f"{name}: {pattern}"


def test_the_exported_names_exist_and_are_few() -> None:
    assert set(optimizer.__all__) == {"OptimizerError", "Recipe", "Result", "__version__", "load", "optimize"}
    for name in optimizer.__all__:
        assert getattr(optimizer, name) is not None


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'optimizer' has no attribute 'optimise'"):
        optimizer.optimise  # noqa: B018


def test_the_version_has_one_source() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "optimizer.__version__"}
    from optimizer.artifact import __version__ as in_manifests

    assert in_manifests == optimizer.__version__
    assert [part.isdigit() for part in optimizer.__version__.split(".")] == [True] * 3


def test_the_command_exists() -> None:
    from importlib import import_module

    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))
