"""Peak memory and time of block-by-block quantization, on checkpoints of random weights that are made for it.

    python -m benchmarks.streaming [--gigabytes 8] [--layers 4 8 16] [--folder FOLDER] [--out FILE]

Rounds a Llama-shaped bf16 checkpoint of at least so many gigabytes to INT4, and runs GPTQ on smaller ones by depth.
Each runs as `optimizer quantize` in a process of its own, whose peak resident memory the system reports; pages of
mapped files count. Everything made is removed again but the result, `benchmarks/results/streaming.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.decode import RESULTS, commit
from optimizer.artifact import installed_versions
from optimizer.evals.ceilings import describe
from optimizer.recipe import Recipe
from optimizer.source import load_tokenizer, reference_folder

LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCABULARY = {"large": 32000, "small": 8192}
SAMPLES = 8
"""Calibration rows of GPTQ: what they take in memory is the same at any depth, and this is about depth."""


def shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The tensors of a block and those outside, by name."""
    h, m = config.hidden_size, config.intermediate_size
    kv = h * config.num_key_value_heads // config.num_attention_heads
    block = {
        "self_attn.q_proj.weight": (h, h), "self_attn.k_proj.weight": (kv, h), "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, h), "mlp.gate_proj.weight": (m, h), "mlp.up_proj.weight": (m, h),
        "mlp.down_proj.weight": (h, m), "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
    }  # fmt: skip
    vocabulary = (config.vocab_size, h)
    outside = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (h,), "lm_head.weight": vocabulary}
    return block, outside


def make_checkpoint(folder: Path, size: dict[str, int], vocabulary: int, layers: int) -> int:
    """Write a checkpoint of random weights, a file a block, and return its parameters; memory holds one file."""
    config = LlamaConfig(
        **size, vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=2048, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    load_tokenizer(reference_folder()).save_pretrained(folder)
    block, outside = shapes(config)
    generator, weight_map, parameters = torch.Generator().manual_seed(0), {}, 0
    for file, tensors in _files(block, outside, layers):
        data = {name: _random(shape, generator) for name, shape in tensors.items()}
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(data, file)
        parameters += sum(tensor.numel() for tensor in data.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return parameters


def _files(block: dict[str, Any], outside: dict[str, Any], layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in range(layers):
        named = {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
        yield f"model-{index + 1:05}-of-{layers + 1:05}.safetensors", named
    yield f"model-{layers + 1:05}-of-{layers + 1:05}.safetensors", outside


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms of ones; matrices of unit gain."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5, generator=generator)


def quantize(model: Path, recipe: str, out: Path) -> tuple[dict[str, Any], int, float]:
    """`optimizer quantize` in a process of its own: its JSON, peak resident bytes and seconds from start to end."""
    command = [sys.executable, "-c", "from optimizer.cli import main; main()", "quantize", str(model), "--recipe"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [*command, recipe, "--out", str(out), "--device", "cpu", "--json", "--quiet"], stdout=answer
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        answer.seek(0)
        text = answer.read().decode()
    if process.returncode:
        raise SystemExit(f"optimizer quantize {model} failed: {text}")
    return json.loads(text), usage.ru_maxrss * 1024, seconds


def measure(folder: Path, size: dict[str, int], vocabulary: int, layers: int, recipe: str) -> dict[str, Any]:
    """One row of the result; the checkpoint and the artifact are removed again."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="streaming-") as made:
        model, out = Path(made) / "model", Path(made) / "out"
        with get_context("spawn").Pool(1) as maker:  # a child's peak begins with its parent's, so this one stays small
            parameters = maker.apply(make_checkpoint, (model, size, vocabulary, layers))
        answer, peak, seconds = quantize(model, recipe, out)
        disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    row = {
        "recipe": Path(recipe).stem, "layers": layers, "parameters": parameters, "checkpoint_gb": 2 * parameters / 1e9,
        "peak_rss_gb": peak / 1e9, "predicted_ram_gb": answer["predicted"]["ram"] / 1e9, "artifact_gb": disk / 1e9,
        "predicted_disk_gb": answer["predicted"]["disk"] / 1e9, "seconds": seconds,
        "seconds_quantizing": answer["report"]["seconds"],
        "seconds_per_billion_parameters": answer["report"]["seconds"] / (parameters / 1e9),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The result as a table."""
    lines = [
        "| recipe | layers | checkpoint GB | peak RSS GB | predicted GB | seconds | s / 10⁹ parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines) + "".join(
        f"\n| {row['recipe']} | {row['layers']} | {row['checkpoint_gb']:.2f} | {row['peak_rss_gb']:.2f} | "
        f"{row['predicted_ram_gb']:.2f} | {row['seconds']:.0f} | {row['seconds_per_billion_parameters']:.1f} |"
        for row in rows
    )


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints are made"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming.json")
    args = parser.parse_args()
    block, outside = shapes(LlamaConfig(**LARGE, vocab_size=VOCABULARY["large"]))
    size, rest = (2 * sum(torch.Size(shape).numel() for shape in part.values()) for part in (block, outside))
    rows = []
    if args.gigabytes:
        layers = -int(-(args.gigabytes * 1e9 - rest) // size)
        rows.append(measure(args.folder, LARGE, VOCABULARY["large"], layers, "int4-rtn"))
    gptq = Recipe.load("w4a16-gptq")
    spec = gptq.calibration.model_copy(update={"samples": SAMPLES})
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "w4a16-gptq.yaml"
        recipe.write_text(gptq.model_copy(update={"calibration": spec}).to_yaml(), encoding="utf-8")
        rows += [measure(args.folder, SMALL, VOCABULARY["small"], layers, str(recipe)) for layers in args.layers]
    machine, cores, isa = describe("cpu")
    document = {
        "command": " ".join(["python -m benchmarks.streaming", *sys.argv[1:]]), "machine": machine, "cores": cores,
        "isa": isa, "threads": torch.get_num_threads(), "versions": installed_versions(),
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "calibration_samples": SAMPLES,
        "calibration_length": spec.length, "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True, parents=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{markdown(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
