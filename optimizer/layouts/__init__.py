"""Checkpoint formats, one a file, and the table of them."""

from optimizer.layouts.awq import AWQ
from optimizer.layouts.base import Layout, StoredLayer
from optimizer.layouts.compressed_tensors import CompressedTensors
from optimizer.layouts.fp8 import FP8
from optimizer.layouts.gptq import GPTQ

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (CompressedTensors(), FP8(), GPTQ(), AWQ())}
"""Every layout by its name, which is also the `quant_method` of its checkpoints."""

__all__ = ["LAYOUTS", "Layout", "StoredLayer"]
