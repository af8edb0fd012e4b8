"""Whole models of random weights: decode steps of every scheme, and the quantizers' time and memory."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.kernels import GROUP
from optimizer.backends.linear import weight_bytes
from optimizer.passes.base import Context, view
from optimizer.passes.calibration import Calibration
from optimizer.passes.decode import Decode
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.quantize import Quantize

MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Llama 3.1 8B and Llama 3.2 1B, with random weights: enough for speed."""
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip

SCHEMES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"ignore": []},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "int4": {"bits": 4, "group_size": GROUP},
}


def _model(bench: Bench, name: str) -> Any:
    sizes = MODELS[name] if bench.shrink == 1 else TINY
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False, head_dim=None)
    with torch.device(bench.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _runner(model: Any, options: dict[str, Any] | None) -> tuple[Any, int]:
    """The runner of a scheme on a view of the model, and the bytes of weights a step reads."""
    copy, context = view(model), Context()
    if options is not None:
        Quantize(**options).run(copy, context)
    MergeLinears().run(copy, context)
    Decode(max_context=1024).run(copy, context)
    runner = context.make_runner(copy, None)
    embedding = copy.get_input_embeddings().weight
    return runner, weight_bytes(copy) - embedding.numel() * embedding.element_size()


@torch.no_grad()
def _step_seconds(bench: Bench, step: Call, tokens: int) -> float:
    """Median seconds of a step over a few rounds of `tokens` steps, after a warm-up."""
    times = []
    for turn in range(4):
        bench.synchronise()
        began = time.perf_counter()
        for _ in range(tokens):
            step()
        bench.synchronise()
        if turn:
            times.append((time.perf_counter() - began) / tokens)
    return median(times)


def _compiled_baseline(model: Any, device: torch.device) -> Call:
    """The plain model under `torch.compile(mode="reduce-overhead")` with transformers' static cache."""
    cache = StaticCache(config=model.config, max_cache_len=1024)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def forward(token: Tensor, position: Tensor) -> Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    forward(token.expand(1, 128), torch.arange(128, device=device)[None])

    def step() -> None:
        token.copy_(compiled(token, position))

    return step


def steps(bench: Bench) -> None:
    """Decode steps of whole models at batch 1: every scheme, Hugging Face eager and `torch.compile`."""
    tokens = 32 if bench.shrink == 1 else 4
    for size in ("8B", "1B") if bench.shrink == 1 else ("1B",):
        model = _model(bench, size)
        prompt = torch.randint(0, model.config.vocab_size, (1, 128), device=bench.device)
        measured: dict[str, float] = {}
        for scheme, options in SCHEMES.items():
            runner, nbytes = _runner(model, options)
            runner.prefill(prompt)
            token = runner.decode(prompt[:, 0]).argmax(-1)
            measured[scheme] = _step_seconds(bench, lambda r=runner, t=token: r.decode(t), tokens)  # type: ignore[misc]
            bench.record(f"step {size} {scheme}: ms", measured[scheme] * 1e3)
            bench.record(f"step {size} {scheme}: share of read bandwidth", nbytes / measured[scheme] / bench.bandwidth)
            del runner
            bench.free()
        if bench.device.type == "cuda":
            compiled = _step_seconds(bench, _compiled_baseline(model, bench.device), tokens)
            bench.record(f"step {size} bf16 / torch.compile reduce-overhead", compiled / measured["bf16"])
        generated = _hf_seconds(model, prompt, tokens)
        for scheme in ("bf16", "int4"):
            bench.record(f"step {size} {scheme} / Hugging Face eager generate", generated / measured[scheme])
        for scheme in ("int8", "fp8", "int4"):
            bench.record(f"step {size} {scheme} / own bf16", measured["bf16"] / measured[scheme])
        del model
        bench.free()


@torch.no_grad()
def _hf_seconds(model: Any, prompt: Tensor, tokens: int) -> float:
    """Seconds a token of Hugging Face `generate` beyond the first."""
    spent = []
    for output in (1, 1 + tokens, 1, 1 + tokens):
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0).cpu()
        spent.append(time.perf_counter() - began)
    return (spent[3] - spent[2]) / tokens


def quantizers(bench: Bench) -> None:
    """Seconds per billion parameters of each method, on two 8B-shaped blocks with 128 rows of 2048 tokens."""
    sizes = (MODELS["8B"] if bench.shrink == 1 else TINY) | {"num_hidden_layers": 2, "vocab_size": 512}
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, head_dim=None), dtype=torch.bfloat16).eval()
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    rows, length = (128, 2048) if bench.shrink == 1 else (8, 128)
    calibration = Calibration(tuple(torch.randint(0, 512, (length,)) for _ in range(rows)))
    for method in ("rtn", "awq", "gptq"):
        for _ in range(2 if method == "rtn" else 1):  # the first run of all pays for what libraries load
            copy, context = view(model), Context(calibration=calibration)
            bench.synchronise()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            Quantize(bits=4, group_size=GROUP, method=method).run(copy, context)
            bench.synchronise()
            spent = time.perf_counter() - began
        bench.record(f"quantize {method}: seconds per billion parameters", spent / parameters * 1e9)
        if bench.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - 2 * sum(p.numel() for p in model.parameters())
            bench.record(f"quantize {method}: GB above the weights", peak / 1e9)
