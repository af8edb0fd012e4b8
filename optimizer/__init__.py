"""Makes a Hugging Face language model smaller and faster, with proof.

    from optimizer import optimize
    result = optimize("path/or/hub-id")
    result.save("artifact/")
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizer.api import Result, load, optimize
    from optimizer.errors import OptimizerError
    from optimizer.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["OptimizerError", "Recipe", "Result", "__version__", "load", "optimize"]

_EXPORTS = {
    "OptimizerError": "optimizer.errors",
    "Recipe": "optimizer.recipe",
    "Result": "optimizer.api",
    "load": "optimizer.api",
    "optimize": "optimizer.api",
}

# The layers stand beside this folder in a checkout and inside it when installed.
_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'optimizer' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
