"""One peer's generation on a CPU, timed on request: `benchmarks.peers_cpu` runs this in the peers' environment.

    python cpu_decode.py MODEL VARIANT THREADS

Builds the variant, answers `{"ready": ...}` on a line of its own, and then for each line that it reads, such as
`{"prompt": [1, 2], "output": 64}`, generates greedily and answers the seconds from one token to the next, the first
counted from the prompt. Imports nothing of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int], list[float]]


def eager(folder: str, dtype: str) -> Generate:
    """transformers' own `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    class Marks:
        def __init__(self) -> None:
            self.times = [time.perf_counter()]
            self.prompt = True

        def put(self, _: Any) -> None:
            if not self.prompt:
                self.times.append(time.perf_counter())
            self.prompt = False

        def end(self) -> None: ...

    def generate(prompt: list[int], output: int) -> list[float]:
        marks = Marks()
        ids = torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False,
            streamer=marks, pad_token_id=0,
        )  # fmt: skip
        return gaps(marks.times)

    return generate


def compiled(folder: str, dtype: str, *, int8: bool = False) -> Generate:
    """The model's forward under `torch.compile` over a static cache; prefill runs as it is."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    cache = StaticCache(config=model.config, max_cache_len=256)

    def forward(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(forward, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def generate(prompt: list[int], output: int) -> list[float]:
        cache.reset()
        times = [time.perf_counter()]
        token = forward(torch.tensor([prompt]), torch.arange(len(prompt))[None])
        int(token)
        times.append(time.perf_counter())
        for index in range(output - 1):
            token = step(token, torch.tensor([[len(prompt) + index]]))
            int(token)
            times.append(time.perf_counter())
        return gaps(times)

    return generate


def genai(folder: str, threads: int) -> Generate:
    """onnxruntime-genai on the int4 model its own builder makes."""
    import onnxruntime_genai as og

    out = tempfile.mkdtemp(prefix="genai-")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out, "-p", "int4"]
    done = subprocess.run([*builder, "-e", "cpu", "-c", out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the builder failed: {done.stderr[-2000:]}")
    config = Path(out) / "genai_config.json"
    described = json.loads(config.read_text(encoding="utf-8"))
    options = described["model"]["decoder"]["session_options"]
    options |= {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0"}
    config.write_text(json.dumps(described), encoding="utf-8")
    model = og.Model(out)

    def generate(prompt: list[int], output: int) -> list[float]:
        params = og.GeneratorParams(model)
        total = len(prompt) + output
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        generator = og.Generator(model, params)
        times = [time.perf_counter()]
        generator.append_tokens(prompt)
        for _ in range(output):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return gaps(times)

    return generate


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def main() -> None:
    folder, variant, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    make: dict[str, Callable[[], Generate]] = {
        "hf-eager-fp32": lambda: eager(folder, "float32"),
        "hf-eager-bf16": lambda: eager(folder, "bfloat16"),
        "torch-compile-fp32": lambda: compiled(folder, "float32"),
        "torch-compile-bf16": lambda: compiled(folder, "bfloat16"),
        "torchao-int8": lambda: compiled(folder, "bfloat16", int8=True),
        "onnxruntime-genai-int4": lambda: genai(folder, threads),
    }
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; the answers stay clean
    if variant != "onnxruntime-genai-int4":
        import torch

        torch.set_num_threads(threads)
    generate = make[variant]()
    generate([1] * 16, 4)
    packages = ("torch", "transformers", "torchao", "onnxruntime", "onnxruntime-genai")
    print(json.dumps({"ready": {name: version(name) for name in packages}}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(generate(asked["prompt"], asked["output"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
