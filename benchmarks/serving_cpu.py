"""The paged cache, its 8-bit entries, continuous batching and speculation on a CPU, against the static cache.

    python -m benchmarks.serving_cpu [--models generated,reference] [--rounds 7]

One process; a round runs every variant once, so neighbours on the machine slow all alike, and ratios are paired by
round. Speculation is measured on held-out text of the reference model, where guesses have something to find. Writes
`benchmarks/results/serving_cpu.json` and `docs/decode-cpu.md`, which shows it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.decode import RESULTS, commit
from benchmarks.peers_cpu import make_model
from optimizer.artifact import installed_versions
from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.schedule import Limits
from optimizer.evals.ceilings import describe
from optimizer.evals.timing import Summary, ratio
from optimizer.passes.base import Context, view
from optimizer.passes.registry import build_pass
from optimizer.pipeline import apply_passes
from optimizer.progress import Progress
from optimizer.source import load_source, reference_folder

INT4 = ("quantize", {"bits": 4, "group_size": 128, "ignore": []})
MERGE = ("merge_linears", {})
PAGED = {"cache": "paged", "int8_inputs": True}
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "static": [INT4, MERGE, ("decode", {"int8_inputs": True})],
    "paged": [INT4, MERGE, ("decode", PAGED)],
    "paged, int8 KV": [INT4, MERGE, ("decode", PAGED | {"kv": "int8"})],
    "paged, fp8 KV": [INT4, MERGE, ("decode", PAGED | {"kv": "fp8"})],
}
"""All with int4 weights, where a step is short and the cache's part of it large."""
SPECULATING = [INT4, MERGE, ("decode", PAGED), ("speculate", {"drafts": 4})]
BATCHES = (1, 2, 4, 8)
REQUESTS = 8


def build(source: Any, passes: list[tuple[str, dict[str, Any]]]) -> Any:
    """The runner of these passes over the source's model."""
    model, ctx = view(source.model), Context(tokenizer=source.tokenizer)
    apply_passes(model, [build_pass(name, options) for name, options in passes], ctx, Progress())
    return ctx.make_runner(model, source.tokenizer)


def gaps(runner: Any, tokens: torch.Tensor, output: int) -> list[float]:
    """Seconds from one token to the next, the first counted from the prompt."""
    times = [time.perf_counter()]
    runner.generate(tokens, max_new_tokens=output, on_token=lambda _: times.append(time.perf_counter()))
    return [later - earlier for earlier, later in pairwise(times)]


def interleaved(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each call's results, one a round after a round to warm up; the order rotates."""
    names, found = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = calls[name]()
            if turn:
                found[name].append(value)
    return found


def decoding(source: Any, rounds: int, contexts: tuple[int, ...], output: int) -> dict[str, Any]:
    """Milliseconds a token of every variant after prompts of each length, and ratios to the static cache."""
    runners = {name: build(source, passes) for name, passes in VARIANTS.items()}
    vocabulary, rows = source.model.config.vocab_size, {}
    for context in contexts:
        tokens = torch.randint(2, vocabulary, (1, context), generator=torch.Generator().manual_seed(context))
        calls = {name: (lambda r=r, t=tokens: mean(gaps(r, t, output)[1:])) for name, r in runners.items()}
        found = interleaved(calls, rounds)
        rows[str(context)] = {
            name: {"tpot": asdict(Summary.of(seconds)), "speedup": asdict(ratio(found["static"], seconds))}
            for name, seconds in found.items()
        }
    sizes = {name: runner.kv_bytes_per_token for name, runner in runners.items()}
    return {"rows": rows, "kv_bytes_per_token": sizes}


def batching(source: Any, rounds: int, output: int) -> dict[str, Any]:
    """Tokens a second of the engine by how many requests run at once; new prompts every time, so none is cached."""
    runner = build(source, VARIANTS["paged"])
    generator = torch.Generator().manual_seed(0)

    def served(batch: int) -> float:
        prompts = torch.randint(2, source.model.config.vocab_size, (REQUESTS, 64), generator=generator).tolist()
        engine = Engine(runner, Limits(batch))
        began = time.perf_counter()
        for prompt in prompts:
            engine.submit(prompt, max_new_tokens=output)
        while engine.busy:
            engine.step()
        return time.perf_counter() - began

    found = interleaved({str(batch): (lambda b=batch: served(b)) for batch in BATCHES}, rounds)
    made = REQUESTS * output
    return {
        batch: {"tokens_per_second": made / Summary.of(seconds).median, "speedup": asdict(ratio(found["1"], seconds))}
        for batch, seconds in found.items()
    }


def speculation(source: Any, rounds: int, output: int) -> dict[str, Any]:
    """A request with and without guesses, on held-out source code."""
    plain, guessing = build(source, VARIANTS["paged"]), build(source, SPECULATING)
    assert isinstance(guessing, PagedRunner)
    assert guessing.speculation is not None
    lines = (reference_folder().parent / "held_out" / "perplexity.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:: max(1, len(lines) // 4)]][:4]
    prompts = [torch.tensor([source.tokenizer(text)["input_ids"][:256]]) for text in texts]
    for prompt in prompts:  # the guard of the comparison: speculation is exact up to ties of rounded logits
        plain.generate(prompt, max_new_tokens=4)

    def all_of(runner: Any) -> float:
        began = time.perf_counter()
        for prompt in prompts:
            runner.generate(prompt, max_new_tokens=output)
        return time.perf_counter() - began

    found = interleaved({"plain": lambda: all_of(plain), "lookup": lambda: all_of(guessing)}, rounds)
    policy = guessing.speculation.policy
    assert policy is not None
    return {
        "speedup": asdict(ratio(found["plain"], found["lookup"])), "summary": guessing.speculation.summary,
        "acceptance": policy.stats.acceptance, "tokens_per_step": policy.stats.tokens_per_step,
        "verify_seconds": {str(n): s for n, s in policy.costs.verify_seconds.items()},
    }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """The result as tables."""
    lines = []
    for name, found in document["models"].items():
        decode = found["decode"]
        lines += [f"**{name}**, {found['parameters'] / 1e6:.0f} M parameters, batch 1", ""]
        heads = "".join(f" ms a token at {context} | against static |" for context in decode["rows"])
        lines += [f"| cache | KV bytes a token |{heads}", "|---|--:|" + "--:|--:|" * len(decode["rows"])]
        for variant, size in decode["kv_bytes_per_token"].items():
            cells = "".join(
                f" {row[variant]['tpot']['median'] * 1e3:.2f} | {_interval(row[variant]['speedup'])} |"
                for row in decode["rows"].values()
            )
            lines.append(f"| {variant} | {size:,} |{cells}")
        lines += ["", "| requests at once | tok/s | against one |", "|--:|--:|--:|"]
        for batch, row in found["batching"].items():
            lines.append(f"| {batch} | {row['tokens_per_second']:.0f} | {_interval(row['speedup'])} |")
        if "speculation" in found:
            row = found["speculation"]
            lines += ["", f"Prompt lookup, up to 4 guesses: {_interval(row['speedup'])}; {row['summary']}."]
        lines.append("")
    return "\n".join(lines)


def _interval(row: dict[str, float]) -> str:
    return f"{row['median']:.2f}× [{row['low']:.2f}, {row['high']:.2f}]"


def page(document: dict[str, Any]) -> str:
    """`docs/decode-cpu.md`."""
    machine = f"{document['machine']}, {document['cores']} cores ({document['isa']}), {document['threads']} threads"
    return f"""# The paged cache on a CPU

Int4 weights with inputs rounded to int8, {document["rounds"]} interleaved rounds; medians, with 95 % intervals of the
ratios paired by round (`python -m benchmarks.serving_cpu`). *generated* is the Llama of random weights of
[cpu.md](cpu.md). Requests: 8 of 64 tokens in, {document["output"]} out, served at most so many at once.

{markdown(document)}
{machine}, {document["date"]}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="generated,reference")
    for name, default in (("rounds", 7), ("output", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    machine, cores, isa = describe("cpu")
    document: dict[str, Any] = {
        "command": "python -m benchmarks.serving_cpu", "machine": machine, "cores": cores, "isa": isa,
        "threads": torch.get_num_threads(), "versions": installed_versions(), "output": args.output,
        "rounds": args.rounds, "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "models": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        for name in args.models.split(","):
            folder = Path(made) / name if name == "generated" else reference_folder()
            if name == "generated":
                make_model(folder)
            source = load_source(str(folder))
            longest = source.model.config.max_position_embeddings - args.output
            contexts = tuple(c for c in (64, 448, 960) if c <= longest)
            found: dict[str, Any] = {"parameters": source.model.num_parameters()}
            found["decode"] = decoding(source, args.rounds, contexts, args.output)
            found["batching"] = batching(source, args.rounds, args.output)
            if name == "reference":
                found["speculation"] = speculation(source, args.rounds, args.output * 2)
            document["models"][name] = found
            print(markdown(document), flush=True)
    out = RESULTS / "serving_cpu.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (RESULTS.parents[1] / "docs" / "decode-cpu.md").write_text(page(document), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
