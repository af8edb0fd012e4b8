"""The house stands on its floors: what each layer may import, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "quant": set(),
    "evals": set(),
    "backends": {"quant"},
    "passes": {"backends", "quant"},
    "optimizer": {"passes", "backends", "quant", "evals"},
}
EVERYWHERE = {"optimizer.errors"}
HEAVY = {"torch", "transformers", "lm_eval", "altair", "datasets", "scipy", "compressed_tensors"}
LIGHT = ("__init__", "cli", "recipe", "report", "artifact", "errors", "progress", "display")
SCRIPTS = {ROOT / "evals" / "reference" / name for name in ("train.py", "build_tasks.py", "corpus.py")}


def sources(layer: str) -> list[Path]:
    return sorted(path for path in (ROOT / layer).rglob("*.py") if "held_out" not in path.parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that an import statement names, in dotted form, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dynamic(tree: ast.AST) -> Iterator[str]:
    """Names given as a text to `import_module` or `__import__`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def violations(layer: str, code: str) -> list[str]:
    """The imports of `code` that its layer may not have."""
    found = []
    tree = ast.parse(code)
    for name in [*imported(tree), *dynamic(tree)]:
        parts = name.split(".")
        if parts[0] in ALLOWED and parts[0] != "optimizer":
            found.append(f"{name}: a bare name, shadowed by any folder of the user's")
        if parts[0] != "optimizer" or layer == "optimizer" or any(name.startswith(ok) for ok in EVERYWHERE):
            continue
        if parts[1] != layer and parts[1] not in ALLOWED[layer]:
            found.append(f"{name}: {layer} may import {', '.join(sorted(ALLOWED[layer])) or 'no sibling'}")
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    files = [path for path in sources(layer) if path not in SCRIPTS]
    assert files
    wrong = {
        str(path.relative_to(ROOT)): found for path in files if (found := violations(layer, path.read_text("utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("quant", "from optimizer.backends import linear"),
        ("quant", "import optimizer.evals.gate"),
        ("quant", "from optimizer import recipe"),
        ("evals", "def f():\n    from optimizer.quant.formats import Format"),
        ("evals", "from optimizer.pipeline import run"),
        ("backends", "from optimizer.passes.base import Pass"),
        ("backends", "import importlib\nimportlib.import_module('optimizer.evals')"),
        ("passes", "from optimizer.evals import gate"),
        ("optimizer", "import evals"),
        ("optimizer", "from passes.base import Pass"),
        ("evals", "import quant.formats"),
    ],
)
def test_the_rule_above_sees_a_violation(layer: str, code: str) -> None:
    assert violations(layer, code)


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("quant", "from optimizer.errors import UsageError"),
        ("quant", "from optimizer.quant.formats import Format"),
        ("backends", "from optimizer.quant import rtn"),
        ("passes", "from optimizer.backends.linear import QuantizedLinear"),
        ("optimizer", "from optimizer.evals.gate import judge"),
        ("evals", "import torch, lm_eval"),
    ],
)
def test_the_rule_above_lets_the_rest_pass(layer: str, code: str) -> None:
    assert not violations(layer, code)


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: not the bodies of functions, and not what is for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from on_import(child)


def heavy(code: str) -> set[str]:
    """Heavy libraries that importing a module of this code would load."""
    names = set()
    for node in on_import(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names & HEAVY


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_heavy_libraries_only_where_they_are_used(name: str) -> None:
    assert not heavy((ROOT / "optimizer" / f"{name}.py").read_text("utf-8"))


def test_the_search_for_heavy_imports_sees_them_and_only_them() -> None:
    assert heavy("import torch") == {"torch"}
    assert heavy("from transformers.utils import logging") == {"transformers"}
    assert heavy("try:\n    import scipy.stats\nexcept ImportError:\n    pass") == {"scipy"}
    assert heavy("def f():\n    import torch") == set()
    assert heavy("class A:\n    import torch\n    def f(self):\n        import scipy") == {"torch"}
    assert heavy("if TYPE_CHECKING:\n    import torch") == set()
