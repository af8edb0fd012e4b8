"""What a block-by-block quantization will need, and a rehearsal of its last step, before the hours in between.

The prediction adds what is alive at once at the worst moment: the process as it is, one block in the arithmetic of the
calibration, its Gram matrices, what quantizing its largest layer takes, and the calibration's hidden states.
"""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimizer.errors import ModelError, OutputError
from optimizer.layouts import LAYOUTS, StoredLayer
from optimizer.passes.merge_linears import SIBLINGS
from optimizer.passes.quantize import Quantize
from optimizer.quant.rtn import quantize_rtn
from optimizer.report_units import BYTES

WORKING_COPIES = {"rtn": 1, "awq": 7, "gptq": 7}
"""Float32 copies of a layer's weight that are alive while it is quantized; rounding works on few rows at a time."""

GRAM_COPIES = {"rtn": 0, "awq": 2, "gptq": 6}
"""Float32 copies of one Gram matrix that its use makes: ordered, damped, factored."""

ACTIVATION_COPIES = 6
"""Activations of the widest layer's size that are alive while a batch runs through a block."""

BATCH_TOKENS = 4096
"""Calibration tokens that run through a block at once."""

LIBRARIES = 300_000_000
"""What libraries take for themselves once they compute: modules, thread pools, buffers of matrix products."""

SLACK = 1.4
"""What the process holds for each byte in use: its allocator does not give all that is freed back to the system."""


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk of the largest block, of all outside the blocks, and of the largest tensor.

    `hidden` is what the hidden states of all calibration tokens take, `item` and `arithmetic` a number of the model and
    of the calibration.
    """

    block: int
    outside: int
    tensor: int
    hidden: int
    item: int
    arithmetic: int


@dataclass(frozen=True)
class Preflight:
    """Predicted peaks in bytes. `ram` is the process's; `vram` what it takes on an accelerator, if it uses one."""

    ram: int
    vram: int
    disk: int

    def __str__(self) -> str:
        """Such as `2.10 GB RAM, 4.40 GB disk`."""
        parts = [f"{BYTES.format(self.ram)} RAM"] + ([f"{BYTES.format(self.vram)} VRAM"] if self.vram else [])
        return ", ".join([*parts, f"{BYTES.format(self.disk)} disk"])


def resident_bytes() -> int:
    """The memory that this process holds; the largest that it has held where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def predict(
    step: Quantize, chosen: Mapping[str, nn.Linear], blocks: Sequence[str], sizes: Sizes, *, device: torch.device
) -> Preflight:
    """The peaks of quantizing layers `chosen` (without data) of a model with decoder `blocks`."""
    inside = {block: {n: m for n, m in chosen.items() if n.startswith(f"{block}.")} for block in blocks}
    quantized = max(_stored_bytes(step, layers) for layers in inside.values())
    layer = max((m.in_features * m.out_features for m in chosen.values()), default=0)
    rounding = (4 * WORKING_COPIES[step.method] + 4) * layer  # the elements, unpacked, packed and joined: a byte each
    block = sizes.block + max(sizes.tensor, quantized + rounding)
    outside = sizes.outside + max(sizes.tensor, rounding)
    if step.calibrates:
        wide = sizes.block * sizes.arithmetic // sizes.item if sizes.arithmetic != sizes.item else 0
        folded = sizes.block * 4 // sizes.item if step.smooth or step.method == "awq" else 0
        widest = max((max(m.in_features, m.out_features) for m in chosen.values()), default=0)
        running = ACTIVATION_COPIES * BATCH_TOKENS * widest * sizes.arithmetic
        grams = max(_gram_bytes(layers) for layers in inside.values())
        copies = GRAM_COPIES[step.method] * 4 * max((m.in_features for m in chosen.values()), default=0) ** 2
        observed = sizes.block + wide + grams + running
        block = sizes.hidden + max(observed, block + folded + grams + copies, quantized + wide + running + sizes.hidden)
        outside += sizes.hidden
    peak, now = int(SLACK * max(block, outside)) + LIBRARIES, resident_bytes()
    disk = _stored_bytes(step, chosen) + sizes.outside + sizes.block + 2 * sizes.hidden  # a block's worth of slack
    if device.type != "cuda":
        return Preflight(now + peak, 0, disk)
    host = int(SLACK * (max(quantized, sizes.outside) + 2 * sizes.hidden + sizes.tensor)) + LIBRARIES
    return Preflight(now + host, peak, disk)


def _stored_bytes(step: Quantize, layers: Mapping[str, nn.Linear]) -> int:
    """What layers take in a checkpoint."""
    bits = step.format.effective_bits
    return sum(int(m.in_features * m.out_features * bits(m.in_features) / 8) for m in layers.values())


def _gram_bytes(layers: Mapping[str, nn.Linear]) -> int:
    """Float32 Gram matrices of one block; siblings that read one input share theirs."""
    followers = {name for group in SIBLINGS for name in group[1:]}
    return sum(4 * m.in_features**2 for name, m in layers.items() if name.rpartition(".")[2] not in followers)


def require_room(needed: Preflight, work: Path, ram: int, vram: int) -> None:
    """`OutputError` when memory or disk are too small for the prediction; of memory, 0 means that it is not known.

    What an earlier run has left in the folder `work` is disk that need not be found again.
    """
    folder = next(parent for parent in work.absolute().parents if parent.exists())
    there = sum(file.stat().st_size for file in work.iterdir()) if work.is_dir() else 0
    free = {"RAM": ram, "VRAM": vram, "disk": shutil.disk_usage(folder).free + there}
    for what, need in {"RAM": needed.ram, "VRAM": needed.vram, "disk": needed.disk}.items():
        if need > free[what] and (free[what] or what == "disk"):
            remedy = "choose another disk" if what == "disk" else "use fewer calibration samples, or a larger machine"
            raise OutputError(
                f"This job needs about {BYTES.format(need)} of {what}, of which {BYTES.format(free[what])} are free: "
                f"{remedy}"
            )


def rehearse(
    layout: str, name: str, linear: Any, step: Quantize, scale_dtype: torch.dtype | None, folder: Path
) -> None:
    """Round one layer, write it in the layout, read it back, and require the very same weight.

    Raises `ModelError` where what comes back differs.
    """
    from safetensors.torch import load_file, save_file

    format = LAYOUTS[layout]
    weight_only = step.format.kind == "int" and step.scheme.activation is None
    dtype = scale_dtype or (linear.weight.dtype if weight_only else torch.float32)
    weight = quantize_rtn(linear.weight, step.format, dtype)
    activation = step.scheme.activation
    input_scale = None if activation is None or activation.dynamic else torch.ones(1, device=weight.q.device)
    layer = StoredLayer(weight, activation, input_scale)
    file = folder / "rehearsal.safetensors"
    tensors = format.layer_tensors(name, layer, linear.weight.dtype)
    try:
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
        config = format.quantization_config({name: step.scheme}, [])
        back = format.reader(config)(name, load_file(file))
    finally:
        file.unlink(missing_ok=True)
    if not torch.equal(back.weight.dequantize(), weight.dequantize().cpu()):
        raise ModelError(f"{name} does not come back from a {layout} checkpoint as it was written")
