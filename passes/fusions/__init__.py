"""The fusions in the order in which they run, one family a file: decoded weights before what reads their products, an
addition with a norm before the norm alone, epilogues for what no op of ours took, and what matches our own ops last.

Importing this defines the ops that they call.
"""

from __future__ import annotations

from optimizer.backends.fusion import Fusion
from optimizer.passes.fusions import (
    bias_gelu,
    dequantize_matmul,
    epilogue,
    gated,
    layer_norm,
    quantize,
    rms_norm,
    rope,
    rope_kv_write,
)

FUSIONS: tuple[Fusion, ...] = (
    *dequantize_matmul.FUSIONS,
    *rms_norm.FUSIONS,
    *layer_norm.FUSIONS,
    *gated.FUSIONS,
    *bias_gelu.FUSIONS,
    *rope.FUSIONS,
    *epilogue.FUSIONS,
    *quantize.FUSIONS,
    *rope_kv_write.FUSIONS,
)
"""What `fuse` and the backend run unless told otherwise."""
