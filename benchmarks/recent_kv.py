"""What an 8-bit cache costs in quality on the reference model, and what keeping recent tokens in their type gives back.

    python -m benchmarks.recent_kv [--windows 16]

Windows of 512 tokens of held-out text run through the paged cache; each token sees the keys and values that a decode
step would show it, whatever the chunk. The second half is judged, where all of `RECENT` leave older tokens to be read
rounded. The model computes in float32, so all that differs is the cache. Deterministic: quality, not speed.
Writes `benchmarks/results/recent_kv.json` and its table in `docs/decode.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import RESULTS, commit
from optimizer.artifact import installed_versions
from optimizer.backends.paged_runner import PagedOptions, PagedRunner
from optimizer.passes.base import view
from optimizer.passes.blocks import in_float32
from optimizer.source import load_source, reference_folder

LENGTH = 512
RECENT = (0, 64, 128, 256)
ROWS = 8


def windows(tokenizer: Any, count: int) -> Tensor:
    """The first tokens of each of the longest held-out texts `[count, LENGTH]`."""
    modules = sorted((reference_folder().parent / "held_out" / "modules").iterdir())
    rows = [tokenizer(file.read_text(encoding="utf-8"))["input_ids"] for file in modules]
    rows = sorted((row for row in rows if len(row) >= LENGTH), key=len, reverse=True)[:count]
    return torch.tensor([row[:LENGTH] for row in rows])


def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of every token `[B, S, V]` over a paged cache."""
    runner = PagedRunner(view(model), max_context=LENGTH, compile=False, options=PagedOptions(**options))
    return torch.cat([runner.prefill(part, all_logits=True) for part in tokens.split(ROWS)])


def compared(found: Tensor, exact: Tensor, tokens: Tensor) -> dict[str, float]:
    """Perplexity, and the distance of logits and distributions from those over an exact cache, of the second half."""
    found, exact, tokens = (t[:, LENGTH // 2 :] for t in (found, exact, tokens))
    loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    before, after = exact.log_softmax(-1), found.log_softmax(-1)
    return {
        "perplexity": math.exp(float(loss)),
        "logit_error": float((found - exact).norm() / exact.norm()),
        "kl_nats": float((before.exp() * (before - after)).sum(-1).mean()),
        "same_choice": float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def measure(count: int) -> dict[str, Any]:
    """All kinds of cache over the same tokens."""
    source = load_source("reference")
    model = in_float32(source.model)
    tokens = windows(source.tokenizer, count)
    exact = logits_of(model, tokens)
    rows = [{"kv": "float32", "recent": 0, **compared(exact, exact, tokens)}]
    for kind in ("int8", "fp8"):
        for recent in RECENT:
            found = logits_of(model, tokens, kv=kind, recent=recent)
            rows.append({"kv": kind, "recent": recent, **compared(found, exact, tokens)})
    return {
        "commit": commit(),
        "versions": installed_versions(),
        "windows": len(tokens),
        "length": LENGTH,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of `docs/decode.md`."""
    lines = [
        "| `kv` | `recent` | perplexity | error of logits | KL, nats a token | same first choice |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        recent = row["recent"] or "–"
        lines.append(
            f"| {row['kv']} | {recent} | {row['perplexity']:.4f} | {row['logit_error']:.3%} | {row['kl_nats']:.2e} | "
            f"{row['same_choice']:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16)
    result = measure(parser.parse_args().windows)
    (RESULTS / "recent_kv.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
