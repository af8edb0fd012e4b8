"""Runs inside GPTQModel's own environment: load checkpoints, and write the weights and logits that it makes of them.

    python load_gptqmodel.py OUT TOKENS FOLDER…

Imports nothing of ours. `OUT` is a safetensors file with `FOLDER/layer` for each weight and `FOLDER/logits`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def dequantized(module: Any) -> Any:
    """The weight `[N, K]` of a quantized layer by the library's own code, or None for any other module."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().float().T.contiguous()
    if hasattr(module, "qweight"):
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        parts = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
        return dequantize_gemm(*parts).float().T.contiguous()
    return None


def main(out: str, tokens: str, *folders: str) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file, save_file

    ids = load_file(tokens)["tokens"]
    found = {}
    for folder in folders:
        kind = BACKEND.TORCH if "gptq" in Path(folder).name else getattr(BACKEND, "TORCH_AWQ", BACKEND.AUTO)
        loaded = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=kind)
        name = Path(folder).name
        for layer, module in loaded.model.named_modules():
            if (weight := dequantized(module)) is not None:
                found[f"{name}/{layer}"] = weight
        with torch.no_grad():
            found[f"{name}/logits"] = loaded.model(ids).logits.float()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
