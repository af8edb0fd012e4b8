"""Whole models of random weights: decode steps of every scheme, and the quantizers' time and memory."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.decoding import Decoding, fill, paged_runner
from benchmarks.gpu.kernels import GROUP
from optimizer.backends.paged_runner import PagedRunner
from optimizer.errors import DeviceError
from optimizer.evals.timing import time_interleaved
from optimizer.passes.base import Context, view
from optimizer.passes.calibration import Calibration
from optimizer.passes.quantize import Quantize

Name = TypeVar("Name", bound=Hashable)
PROMPT, CONTEXT = 128, 1024
"""Tokens before the first step, and the most that a row can have."""

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
    config = LlamaConfig(**sizes, max_position_embeddings=65536, tie_word_embeddings=False, head_dim=None)
    with torch.device(bench.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _compiled_baseline(model: Any, device: torch.device, tokens: int) -> Call:
    """The plain model under `torch.compile(mode="reduce-overhead")` with transformers' static cache.

    `DeviceError` where PyTorch leaves it without its graphs: that would be no baseline.
    """
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def forward(token: Tensor, position: Tensor) -> Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    with torch.no_grad():
        forward(token.expand(1, PROMPT), torch.arange(PROMPT, device=device)[None])

    def steps(count: int = tokens) -> None:
        for _ in range(count):
            token.copy_(compiled(token, position))

    skips = counters["inductor"]["cudagraph_skips"]
    with torch.no_grad():
        steps(3)  # compiled, warmed up, captured
    if counters["inductor"]["cudagraph_skips"] > skips:
        raise DeviceError("torch.compile captured no CUDA graph of this model: TORCH_LOGS=cudagraphs says why.")
    return steps


def steps(bench: Bench, size: str = "8B") -> None:
    """Decode steps of a whole model at batch 1: every scheme, uncaptured, eager, Hugging Face and `torch.compile`."""
    tokens = 64 if bench.shrink == 1 else 4
    model = _model(bench, size)
    rows, nbytes = {}, {}
    for scheme, options in SCHEMES.items():
        runner, nbytes[scheme] = paged_runner(model, options, CONTEXT)
        fill(runner.cache.storage)
        rows[scheme] = Decoding(runner, PROMPT)
        rows[scheme].turn(2)
    own = rows["bf16"].runner
    eager = PagedRunner(own.model, max_context=CONTEXT, compile=False, options=own.options)
    fill(eager.cache.storage)
    rows |= {"eager": Decoding(eager, PROMPT), "not captured": Decoding(own, PROMPT, captured=False)}
    calls: dict[str, Call] = {name: partial(row.turn, tokens) for name, row in rows.items()}
    try:
        calls["torch.compile"] = _compiled_baseline(model, bench.device, tokens)
    except Exception as error:  # not our code, and no reason to lose what is
        print(f"step {size}, torch.compile: left out, {type(error).__name__}: {error}", flush=True)
    found = _seconds(bench, calls, tokens)
    for scheme in SCHEMES:
        bench.record(f"step {size} {scheme}: ms", found[scheme] * 1e3)
        bench.record(f"step {size} {scheme}: share of read bandwidth", nbytes[scheme] / found[scheme] / bench.bandwidth)
        if rows[scheme].uncaptured:
            print(f"step {size} {scheme}: {rows[scheme].uncaptured}", flush=True)
    if not rows["bf16"].uncaptured:
        bench.record(f"step {size} bf16 graph / eager step", found["eager"] / found["bf16"])
        bench.record(f"step {size} bf16 graph / compiled step", found["not captured"] / found["bf16"])
    if "torch.compile" in found:
        bench.record(f"step {size} bf16 / torch.compile reduce-overhead", found["torch.compile"] / found["bf16"])
    if bench.device.type == "cuda":
        for scheme in ("bf16", "int4"):
            bench.record(f"step {size} {scheme}: share of time idle", rows[scheme].idle_share(16))
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=bench.device)
    generated = _hf_seconds(model, prompt, tokens)
    for scheme in ("bf16", "int4"):
        bench.record(f"step {size} {scheme} / Hugging Face eager generate", generated / found[scheme])
    for scheme in ("int8", "fp8", "int4"):
        bench.record(f"step {size} {scheme} / own bf16", found["bf16"] / found[scheme])


def contexts(bench: Bench) -> None:
    """Decode steps of an 8B model in bf16 behind a short and a long context, with keys and values in bf16 and fp8."""
    short, long = (1024, 32768) if bench.shrink == 1 else (64, 256)
    tokens = 64 if bench.shrink == 1 else 4
    model = _model(bench, "8B")
    rows: dict[tuple[str, int], Decoding] = {}
    for kind in ("bf16", "fp8"):
        runner, _ = paged_runner(
            model, None, long + 1024, cache_tokens=short + long + 1024, kv=None if kind == "bf16" else kind
        )
        fill(runner.cache.storage)
        rows |= {(kind, context): Decoding(runner, context) for context in (short, long)}
        rows[kind, short].turn(2)
    found = _seconds(bench, {key: partial(row.turn, tokens) for key, row in rows.items()}, tokens)
    for (kind, context), spent in found.items():
        name = f"context 8B {kind} KV, {context} tokens"
        nbytes = rows[kind, context].runner.bytes_per_step(1, context + tokens // 2)
        bench.record(f"{name}: tokens/s", 1 / spent)
        bench.record(f"{name}: share of read bandwidth", nbytes / spent / bench.bandwidth)
    for kind in ("bf16", "fp8"):
        ratio = found[kind, short] / found[kind, long]
        bench.record(f"context 8B {kind} KV: tokens/s at {long} / at {short} tokens", ratio)
    bench.record(f"context 8B fp8 / bf16 KV, {long} tokens", found["bf16", long] / found["fp8", long])


def _seconds(bench: Bench, calls: Mapping[Name, Call], tokens: int) -> dict[Name, float]:
    """Median seconds a token of calls that make so many each, interleaved."""
    names = {str(name): name for name in calls}
    rounds = 5 if bench.shrink == 1 else 1
    with torch.no_grad():
        times = time_interleaved(
            {text: calls[name] for text, name in names.items()}, repeats=rounds, warmup=1, device=bench.device
        )
    return {name: median(times[text]) / tokens for text, name in names.items()}


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
