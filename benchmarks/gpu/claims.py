"""What is claimed of a GPU, the row of the result that shows it, and the table of `docs/gpu.md`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

DOC = Path(__file__).parents[2] / "docs" / "gpu.md"
RESULT = Path(__file__).parents[1] / "results" / "gpu.json"

CLAIMS: tuple[tuple[str, str, float | None, bool], ...] = (
    ("measured read bandwidth, GB/s", "ceiling: read GB/s", None, False),
    ("measured bf16 matrix rate, TFLOP/s", "ceiling: bfloat16 TFLOP/s", None, False),
    # what is claimed, the row that shows it, what must hold, whether less is better
    ("bf16 GEMV of an 8B block, share of read bandwidth", "gemv bf16: share of read bandwidth", 0.88, False),
    ("fp8 GEMV, the same", "gemv fp8: share of read bandwidth", 0.85, False),
    ("int4 GEMV, the same", "gemv int4: share of read bandwidth", 0.70, False),
    ("8B decode step in bf16, share of read bandwidth", "step 8B bf16: share of read bandwidth", 0.80, False),
    ("8B decode step in fp8, the same", "step 8B fp8: share of read bandwidth", 0.70, False),
    ("8B decode step in int4, the same", "step 8B int4: share of read bandwidth", 0.55, False),
    ("1B decode step in bf16, the same", "step 1B bf16: share of read bandwidth", 0.55, False),
    ("8B bf16 step against torch.compile reduce-overhead", "step 8B bf16 / torch.compile reduce-overhead", 1.15, False),
    ("8B step as a CUDA graph against the eager step", "step 8B bf16 graph / eager step", 1.5, False),
    ("1B step as a CUDA graph against the eager step", "step 1B bf16 graph / eager step", 3.0, False),
    ("the same compiled step, 8B, captured against launched", "step 8B bf16 graph / compiled step", None, False),
    ("8B step as a CUDA graph, share of time idle", "step 8B bf16: share of time idle", 0.06, True),
    ("1B step as a CUDA graph, the same", "step 1B bf16: share of time idle", 0.15, True),
    ("own bf16 against Hugging Face eager generate", "step 8B bf16 / Hugging Face eager generate", 5.0, False),
    ("own int4 against Hugging Face eager generate", "step 8B int4 / Hugging Face eager generate", 10.0, False),
    ("fp8 against own bf16 decode", "step 8B fp8 / own bf16", 1.55, False),
    ("int8 against own bf16 decode", "step 8B int8 / own bf16", None, False),
    ("int4 against own bf16 decode", "step 8B int4 / own bf16", 2.2, False),
    ("int4 against `_weight_int4pack_mm`, 1 row", "gemv int4 / _weight_int4pack_mm, 1 row", 1.3, False),
    ("int4 against `_weight_int4pack_mm`, 16 rows", "gemv int4 / _weight_int4pack_mm, 16 rows", 1.8, False),
    ("W4A16 GEMM against bf16, 16 rows", "gemm int4 / cublas bf16, 16 rows", 2.5, False),
    ("W4A16 GEMM against bf16, 64 rows", "gemm int4 / cublas bf16, 64 rows", 1.3, False),
    ("W4A16 GEMM against bf16, 256 rows", "gemm int4 / cublas bf16, 256 rows", 0.95, False),
    ("fp8 prefill against bf16, quantization included, 4096 rows", "prefill fp8 / bf16, 4096 rows", 1.4, False),
    ("split-KV attention at 16k, share of read bandwidth",
     "attention bf16 KV, batch 1, 16384 tokens: share of read bandwidth", 0.75, False),
    ("attention over fp8 against bf16 KV at 16k", "attention fp8 / bf16 KV, batch 1, 16384 tokens", 1.6, False),
    ("the same in blocks of 32 tokens in no order, share of read bandwidth",
     "attention in blocks, bf16 KV, 16384 tokens: share of read bandwidth", 0.75, False),
    ("attention in blocks over fp8 against bf16 KV at 16k", "attention in blocks, fp8 / bf16 KV, 16384 tokens", 1.6,
     False),
    ("attention in blocks over int8 against bf16 KV at 16k", "attention in blocks, int8 / bf16 KV, 16384 tokens", None,
     False),
    ("8B tokens/s at 32k over 1k tokens of context, bf16 KV",
     "context 8B bf16 KV: tokens/s at 32768 / at 1024 tokens", 0.72, False),
    ("the same, fp8 KV", "context 8B fp8 KV: tokens/s at 32768 / at 1024 tokens", 0.82, False),
    ("8B step at 32k tokens in bf16, share of read bandwidth",
     "context 8B bf16 KV, 32768 tokens: share of read bandwidth", None, False),
    ("8B step at 32k tokens over fp8 against bf16 KV", "context 8B fp8 / bf16 KV, 32768 tokens", None, False),
    ("kv_write of 8 tokens against `index_put`, bf16", "kv_write bf16 / index_put, 8 tokens", None, False),
    ("kv_write of 8 tokens against rounding and `index_put`, fp8", "kv_write fp8 / index_put, 8 tokens", None, False),
    ("residual + RMS norm, share of read bandwidth", "add_rms_norm: share of read bandwidth", None, False),
    ("silu·mul, share of read bandwidth", "silu_mul: share of read bandwidth", None, False),
    ("GPTQ, seconds per billion parameters (128 × 2048 tokens)", "quantize gptq: seconds per billion parameters", 20.0,
     True),
    ("AWQ, the same", "quantize awq: seconds per billion parameters", 15.0, True),
    ("round-to-nearest, the same", "quantize rtn: seconds per billion parameters", 1.0, True),
    ("GPTQ of 8B-shaped blocks, GB above the weights", "quantize gptq: GB above the weights", 6.0, True),
)  # fmt: skip
"""What is claimed of a GPU. A claim without a measured row reads "not yet measured"."""


def page(document: dict[str, Any] | None) -> str:
    """`docs/gpu.md` for a result, or for none."""
    rows = (document or {}).get("rows", {})
    lines = [
        "# GPU claims and what backs them",
        "",
        "Every claim about a GPU names the committed result that shows it. Until there is one it reads",
        '"not yet measured". `python -m benchmarks.gpu` measures them all and writes this page.',
        "",
        "| claim | asked | figure | result |",
        "|---|---|---|---|",
        *(_line(*claim, rows) for claim in CLAIMS),
        "",
        "Tests that need a device are marked `gpu`: `python -m pytest -m gpu`. What can be known without one, such as",
        "registers, spills, shared memory and instructions of every kernel, is in [kernels.md](kernels.md).",
    ]
    if document:
        lines += ["", f"{document['device']}, torch {document['versions']['torch']}, {document['date']}."]
    return "\n".join(lines) + "\n"


def _line(claim: str, name: str, asked: float | None, less: bool, rows: dict[str, float]) -> str:
    bound = "–" if asked is None else f"{'≤' if less else '≥'} {asked:g}"
    if name not in rows:
        return f"| {claim} | {bound} | not yet measured | – |"
    held = asked is None or (rows[name] <= asked if less else rows[name] >= asked)
    figure = f"{rows[name]:.3g}{'' if held else ', **missed**'}"
    return f"| {claim} | {bound} | {figure} | [gpu.json](../benchmarks/results/gpu.json) |"


def load(file: Path = RESULT) -> dict[str, Any] | None:
    """A result, by default the committed one, if there is one."""
    with suppress(FileNotFoundError):
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    return None


def merged(*documents: dict[str, Any]) -> dict[str, Any]:
    """Results of one machine as one, later figures before earlier ones; `SystemExit` where they are of two."""
    found: dict[str, Any] = {}
    for one in documents:
        for what in ("device", "versions"):
            if found and found[what] != one[what]:
                raise SystemExit(
                    f"a result of {what} {found[what]} cannot hold figures of {one[what]}: give --out another file."
                )
        parts = {name: found.get(name, {}) | one[name] for name in ("seconds", "rows")}
        found = one | parts | {"command": f"python -m benchmarks.gpu --parts {','.join(parts['seconds'])}"}
    return found


def write(document: dict[str, Any], file: Path) -> None:
    """A result as JSON, or the page where `file` is one."""
    text = page(document) if file.suffix == ".md" else json.dumps(document, indent=2) + "\n"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(text, encoding="utf-8")
