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

# In a checkout the layers stand beside this folder, and a file added since an editable install is found here too.
_here = Path(__file__).resolve().parent
if (_here.parent / "pyproject.toml").is_file():
    __path__[:] = [str(_here), str(_here.parent)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'optimizer' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
