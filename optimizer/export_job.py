"""A job whose recipe exports: the graph, not PyTorch's runner, is measured, judged and saved."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.backends.onnx_export import DATA_FILE, MODEL_FILE
from optimizer.backends.onnx_runner import OnnxRunner
from optimizer.errors import UsageError
from optimizer.export_command import write_onnx
from optimizer.passes.base import Pass
from optimizer.recipe import Recipe


class ExportedRunner(OnnxRunner):
    """The graph of a job, in a folder that lives as long as the runner; `model` is what it was exported from."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any) -> None:
        super().__init__(folder, tokenizer)
        self.folder, self.model = folder, model
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph and its data."""
        return sum((self.folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values a token keeps, in the graph's own type."""
        return super().original_kv_bytes_per_token

    @property
    def original_kv_bytes_per_token(self) -> int:
        """The same in the type of the model it was exported from."""
        stored = next(self.model.parameters()).dtype
        return super().original_kv_bytes_per_token * stored.itemsize // self.dtype.itemsize

    def copy_to(self, folder: Path) -> None:
        """Every file of the export."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def check_export(recipe: Recipe, passes: Sequence[Pass]) -> None:
    """`UsageError` for passes that shape the PyTorch runner, where the graph is what runs."""
    if recipe.export is None:
        return
    if idle := [step.name for step in passes if not step.stored]:
        raise UsageError(
            f"export: the exported graph is what runs, and {', '.join(idle)} would shape PyTorch's runner. Leave "
            "them out."
        )
    if recipe.serving is not None:
        raise UsageError("export: requests that come and go need PyTorch's paged runner. Leave `serving` out.")


def exported_runner(model: Any, tokenizer: Any, recipe: Recipe) -> ExportedRunner:
    """Export the optimized model as the recipe says, checked beside PyTorch, and open it.

    Raises what `write_onnx` does.
    """
    spec = recipe.export
    assert spec is not None
    folder = Path(tempfile.mkdtemp(prefix="optimizer-export-"))
    try:
        write_onnx(model, tokenizer, folder, dtype=spec.dtype, int8_inputs=spec.int8_inputs)
        return ExportedRunner(folder, model, tokenizer)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
