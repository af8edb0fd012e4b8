"""A key-value cache in blocks, as the runner keeps it: attention that reads it and the op that writes it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.kernels import FP8, Cache, attend, random_cache
from optimizer.backends.kernels.kv_write import kv_write
from optimizer.quant.kv import quantize_kv

BLOCK = 32
"""Tokens of a block, as the runner has it."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of an 8B model."""
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": FP8}


def attention(bench: Bench) -> None:
    """One row of an 8B model over blocks that lie in no order: bandwidth by context, and 8-bit caches against bf16."""
    for context in (1024, 16384, 32768) if bench.shrink == 1 else (256,):
        blocks = context // BLOCK
        q = bench.random(1, HEADS, HEAD_DIM)
        lengths = torch.tensor([context], device=bench.device, dtype=torch.int32)
        nbytes, calls = {}, {}
        for name, dtype in KINDS.items():
            size = 2 * context * KV_HEADS * HEAD_DIM * dtype.itemsize
            sets = [random_cache(bench, (blocks, KV_HEADS, BLOCK, HEAD_DIM), dtype) for _ in range(bench.copies(size))]
            tables = [torch.randperm(blocks, device=bench.device).to(torch.int32)[None] for _ in sets]
            calls[name] = [
                attend(q, one, table, lengths, HEAD_DIM**-0.5) for one, table in zip(sets, tables, strict=True)
            ]
            nbytes[name] = sum(t.nbytes for t in sets[0] if t is not None)
        seconds = bench.seconds(calls)
        for name, spent in seconds.items():
            share = nbytes[name] / spent / bench.bandwidth
            bench.record(f"attention in blocks, {name} KV, {context} tokens: share of read bandwidth", share)
        for name in ("int8", "fp8"):
            bench.record(f"attention in blocks, {name} / bf16 KV, {context} tokens", seconds["bf16"] / seconds[name])


def write(bench: Bench) -> None:
    """Keys and values of new tokens into their slots, against `index_put` of what eager PyTorch rounds first."""
    blocks = 4096 if bench.shrink == 1 else 64
    for batch, tokens in ((8, 1), (1, 512)) if bench.shrink == 1 else ((2, 3),):
        count = batch * tokens
        for name, dtype in KINDS.items():
            store = random_cache(bench, (blocks, KV_HEADS, BLOCK, HEAD_DIM), dtype)
            calls: dict[str, list[Call]] = {"ours": [], "index_put": []}
            for _ in range(bench.copies(4 * count * KV_HEADS * HEAD_DIM)):
                k, v = (bench.random(batch, KV_HEADS, tokens, HEAD_DIM) for _ in range(2))
                slots = torch.randperm(blocks * BLOCK, device=bench.device)[:count].view(batch, tokens)
                calls["ours"].append(partial(kv_write, k, v, *store, slots))
                calls["index_put"].append(partial(_put, k, v, store, slots.flatten()))
            seconds = bench.seconds(calls)
            bench.record(f"kv_write {name} / index_put, {count} tokens", seconds["index_put"] / seconds["ours"])


def _put(k: Tensor, v: Tensor, store: Cache, slots: Tensor) -> None:
    """The same in PyTorch's own operators."""
    block, offset = slots // BLOCK, slots % BLOCK
    for new, target, scales in zip((k, v), store[:2], store[2:], strict=True):
        rows = new.transpose(1, 2).flatten(0, 1)  # [n, H_kv, D]
        if scales is None:
            target[block, :, offset] = rows
            continue
        q, scale = quantize_kv(rows.unsqueeze(0), "int8" if target.dtype == torch.int8 else "fp8")
        target.view(torch.uint8)[block, :, offset] = q[0].view(torch.uint8)
        scales[block, :, offset] = scale[0, ..., 0]
