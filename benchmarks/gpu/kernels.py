"""Kernels beside what they replace: linears of a Llama-3.1-8B block, decode attention, norms and gates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench, Call
from optimizer.backends.kernels.bf16_linear import bf16_linear
from optimizer.backends.kernels.fp8_linear import fp8_linear
from optimizer.backends.kernels.gated import silu_mul
from optimizer.backends.kernels.paged_attention import paged_attention
from optimizer.backends.kernels.quantize_rows import quantize_rows
from optimizer.backends.kernels.rms_norm import add_rms_norm
from optimizer.backends.kernels.w4a16_linear import pack_int4, w4a16_linear
from optimizer.backends.kernels.w8a16_linear import w8a16_linear

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""`[N, K]` of the linears of a Llama-3.1-8B block, siblings merged."""
GROUP = 128
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Weights:
    """One random layer in every stored form."""

    dense: Tensor
    fp8: Tensor
    fp8_scale: Tensor
    int8: Tensor
    int8_scale: Tensor
    int4: Tensor
    int4_scale: Tensor

    @classmethod
    def random(cls, bench: Bench, n: int, k: int) -> Weights:
        """Elements over the whole grid; scales of a layer with unit gain."""
        q8 = torch.randint(-127, 128, (n, k), device=bench.device, dtype=torch.int8)
        q4 = torch.randint(-8, 8, (n, k), device=bench.device, dtype=torch.int8)
        ones = torch.rand(n, 1, device=bench.device) + 0.5
        groups = torch.rand(n, k // GROUP, device=bench.device) + 0.5
        return cls(
            bench.random(n, k), bench.random(n, k).to(FP8), ones, q8, ones / 64 / k**0.5, pack_int4(q4),
            groups / 4 / k**0.5,
        )  # fmt: skip


def linears(bench: Bench, w: Weights, x: Tensor) -> dict[str, tuple[Call, int]]:
    """Each way to multiply, and the bytes of weights that it must read."""
    found: dict[str, tuple[Call, int]] = {
        "cublas": (lambda: F.linear(x, w.dense), w.dense.nbytes),
        "bf16": (lambda: bf16_linear(x, w.dense, None), w.dense.nbytes),
        "fp8": (
            lambda: fp8_linear(*quantize_rows(x, -1, FP8), w.fp8, w.fp8_scale, None, x.dtype),
            w.fp8.nbytes + w.fp8_scale.nbytes,
        ),
        "int8": (lambda: w8a16_linear(x, w.int8, w.int8_scale, None, None), w.int8.nbytes + w.int8_scale.nbytes),
        "int4": (lambda: w4a16_linear(x, w.int4, w.int4_scale, None, None), w.int4.nbytes + w.int4_scale.nbytes),
    }
    if bench.device.type != "cpu":
        n, k = w.dense.shape
        q = torch.randint(0, 256, (n, k // 2), device=bench.device, dtype=torch.int32).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        scales = torch.rand(k // GROUP, n, 2, device=bench.device).to(torch.bfloat16)
        found["aten-int4"] = (
            lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales), q.nbytes + scales.nbytes
        )  # fmt: skip
    return found


def _layers(bench: Bench, rows: int) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of a whole block's linears at so many rows of input, for each way to multiply."""
    total: dict[str, tuple[float, int]] = {}
    for n, k in (bench.shape(*shape) for shape in LAYERS.values()):
        x = bench.random(rows, k)
        sets = [linears(bench, Weights.random(bench, n, k), x) for _ in range(bench.copies(n * k // 2))]
        seconds = bench.seconds({name: [s[name][0] for s in sets] for name in sets[0]})
        for name, spent in seconds.items():
            before = total.get(name, (0.0, 0))
            total[name] = before[0] + spent, before[1] + sets[0][name][1]
    return total


def ceilings(bench: Bench) -> None:
    """Read bandwidth: what every share below is a share of."""
    from optimizer.evals.ceilings import measure_ceilings

    if bench.shrink > 1:
        bench.bandwidth = 1e10
        return
    found = measure_ceilings(bench.device)
    bench.bandwidth = found.memory_bandwidth
    bench.record("ceiling: read GB/s", found.memory_bandwidth / 1e9)
    bench.record("ceiling: copy GB/s", found.copy_bandwidth / 1e9)
    bench.record("ceiling: launch µs", found.launch_seconds * 1e6)
    for dtype, rate in found.matmul_flops.items():
        bench.record(f"ceiling: {dtype} TFLOP/s", rate / 1e12)


def gemv(bench: Bench) -> None:
    """One row through a block's linears: the share of the read bandwidth, and int4 against ATen's."""
    found = _layers(bench, 1)
    for name, (seconds, nbytes) in found.items():
        bench.record(f"gemv {name}: share of read bandwidth", nbytes / seconds / bench.bandwidth)
    if "aten-int4" in found:
        bench.record("gemv int4 / _weight_int4pack_mm, 1 row", found["aten-int4"][0] / found["int4"][0])


def gemm(bench: Bench) -> None:
    """A few rows to a few hundred: weight-only int4 and fp8 against cuBLAS in bf16."""
    for rows in (16, 64, 256) if bench.shrink == 1 else (16,):
        found = _layers(bench, rows)
        for name in ("int4", "int8", "fp8"):
            bench.record(f"gemm {name} / cublas bf16, {rows} rows", found["cublas"][0] / found[name][0])
        if rows == 16 and "aten-int4" in found:
            bench.record("gemv int4 / _weight_int4pack_mm, 16 rows", found["aten-int4"][0] / found["int4"][0])


def prefill(bench: Bench) -> None:
    """Thousands of rows: fp8 with the quantization of its input, against cuBLAS in bf16."""
    for rows in (4096, 8192) if bench.shrink == 1 else (64,):
        times = {"cublas": 0.0, "fp8": 0.0}
        for n, k in (bench.shape(*shape) for shape in LAYERS.values()):
            x, w = bench.random(rows, k), Weights.random(bench, n, k)
            calls = linears(bench, w, x)
            for name, seconds in bench.seconds({name: [calls[name][0]] for name in times}).items():
                times[name] += seconds
        bench.record(f"prefill fp8 / bf16, {rows} rows", times["cublas"] / times["fp8"])


def attention(bench: Bench) -> None:
    """Split-KV decode attention of an 8B model: bandwidth by context, and quantized caches against bf16."""
    heads, kv_heads, d = 32, 8, 128
    contexts = (1024, 16384, 32768) if bench.shrink == 1 else (256,)
    for batch, context in [(1, c) for c in contexts] + ([(16, 4096)] if bench.shrink == 1 else []):
        shape = (batch, kv_heads, context, d)
        q = bench.random(batch, heads, d)
        table = torch.arange(batch, device=bench.device, dtype=torch.int32)[:, None]
        lengths = torch.full((batch,), context, device=bench.device, dtype=torch.int32)
        nbytes, calls = {}, {}
        for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8), ("fp8", FP8)):
            size = 2 * math.prod(shape) * dtype.itemsize
            sets = [random_cache(bench, shape, dtype) for _ in range(bench.copies(size))]
            calls[name] = [attend(q, cache, table, lengths, d**-0.5) for cache in sets]
            nbytes[name] = size + sum(t.nbytes for t in sets[0][2:] if t is not None)
        seconds = bench.seconds(calls)
        for name, spent in seconds.items():
            share = nbytes[name] / spent / bench.bandwidth
            bench.record(f"attention {name} KV, batch {batch}, {context} tokens: share of read bandwidth", share)
        for name in ("int8", "fp8"):
            bench.record(
                f"attention {name} / bf16 KV, batch {batch}, {context} tokens", seconds["bf16"] / seconds[name]
            )


Cache = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def random_cache(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
    """Keys and values of one shape, and with 8 bits their scales."""
    k, v = bench.random(*shape), bench.random(*shape)
    if dtype == torch.bfloat16:
        return k, v, None, None
    top = 127.0 if dtype == torch.int8 else 448.0
    scales = [t.float().abs().amax(-1) / top for t in (k, v)]
    k, v = ((t.float() / s[..., None]).to(dtype) for t, s in zip((k, v), scales, strict=True))
    return k, v, scales[0], scales[1]


def attend(q: Tensor, cache: Cache, table: Tensor, lengths: Tensor, scale: float) -> Call:
    """A call of the attention over such a cache."""
    k, v, k_scale, v_scale = cache
    return lambda: paged_attention(q, k, v, k_scale, v_scale, table, lengths, scale, 0.0, 0, 0, *[None] * 6)


def elementwise(bench: Bench) -> None:
    """Norm and gate of an 8B prefill against the chain of operators that eager PyTorch runs."""
    rows, h = (4096, 4096) if bench.shrink == 1 else (64, 256)
    weight = bench.random(h)

    def eager_norm(x: Tensor, r: Tensor) -> Tensor:
        total = x + r
        wide = total.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    pairs = [(bench.random(rows, h), bench.random(rows, h)) for _ in range(bench.copies(4 * rows * h))]
    seconds = bench.seconds({
        "ours": [lambda x=x, r=r: add_rms_norm(x, r, weight, 1e-6, 0.0) for x, r in pairs],  # type: ignore[misc]
        "eager": [lambda x=x, r=r: eager_norm(x, r) for x, r in pairs],  # type: ignore[misc]
    })  # fmt: skip
    bench.record("add_rms_norm: share of read bandwidth", 4 * 2 * rows * h / seconds["ours"] / bench.bandwidth)
    bench.record("add_rms_norm / eager", seconds["eager"] / seconds["ours"])
    seconds = bench.seconds({
        "ours": [lambda g=g, u=u: silu_mul(g, u) for g, u in pairs],  # type: ignore[misc]
        "eager": [lambda g=g, u=u: F.silu(g) * u for g, u in pairs],  # type: ignore[misc]
    })  # fmt: skip
    bench.record("silu_mul: share of read bandwidth", 3 * 2 * rows * h / seconds["ours"] / bench.bandwidth)
    bench.record("silu_mul / eager", seconds["eager"] / seconds["ours"])
