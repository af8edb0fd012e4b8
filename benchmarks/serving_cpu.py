"""The paged cache, its 8-bit entries, continuous batching and speculation on a CPU, against the static cache.

    python -m benchmarks.serving_cpu [--models generated,reference] [--rounds 7] [--only guesses]

One process; a round runs every variant once, so neighbours on the machine slow all alike, and ratios are paired by
round. Speculation is measured on held-out text of the reference model, where guesses have something to find. Writes
`benchmarks/results/serving_cpu.json` and `docs/decode-cpu.md`, which shows it. With `--only` a part of it is measured,
and the rest stays as it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.decode import RESULTS, commit
from benchmarks.peers_cpu import make_model
from optimizer.artifact import installed_versions
from optimizer.backends.draft_model import DraftModel, early_exit
from optimizer.backends.drafting import Draft, PromptLookup
from optimizer.backends.engine import Engine
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.paged_step import Step
from optimizer.backends.schedule import Limits
from optimizer.backends.speculation import Speculation
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
PARTS = ("decode", "batching", "speculation", "guesses")
"""What is measured of a model; the last two of the reference model alone."""
BATCHES = (1, 2, 4, 8)
TREE, CHAIN, ROWS, EXIT_LAYER = 4, 3, 4, 2
"""Nodes of a tree for one row, and guesses for each of so many rows, by so many of the model's layers."""
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


def held_out(source: Any) -> list[list[int]]:
    """The first 256 tokens of four modules."""
    lines = (reference_folder().parent / "held_out" / "perplexity.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:: max(1, len(lines) // 4)]][:4]
    return [source.tokenizer(text)["input_ids"][:256] for text in texts]


class OneByOne:
    """A draft model that guesses for its own row only, as if it knew of no others."""

    def __init__(self, model: DraftModel) -> None:
        self.model = model

    def propose(self, history: Sequence[int], limit: int) -> Draft:
        return self.model.propose(history, limit)


def guesses(source: Any, rounds: int, output: int) -> dict[str, Any]:
    """Tokens a second of steps that verify trees, compiled and not, and with a draft for all rows and for one by one.

    Every step guesses, whatever it brings; `output` steps, in which no request ends.
    """
    runner, texts = build(source, VARIANTS["paged"]), held_out(source)
    draft = PagedRunner(early_exit(view(runner.model), EXIT_LAYER), compile=runner.compile, options=runner.options)
    runner.compile = False
    uncompiled = {}
    for tokens in range(2, TREE + 2):
        runner.step(1, tokens)
        uncompiled |= runner._steps
        runner._steps = {}
    runner.compile = True
    alone: list[DraftModel] = []

    def single() -> OneByOne:
        alone.append(DraftModel(draft))
        return OneByOne(alone[-1])

    def rate(prompts: list[list[int]], speculation: Speculation | None, steps: dict[Any, Step] | None = None) -> float:
        own = runner._steps
        runner._steps = own if steps is None else own | steps
        engine = Engine(runner, Limits(ROWS, 4096), speculation=speculation)
        requests = [engine.submit(prompt, max_new_tokens=(TREE + 1) * output + TREE + 2) for prompt in prompts]
        engine.step()  # the prompts
        began, before = time.perf_counter(), sum(len(request.tokens) for request in requests)
        for _ in range(output):
            engine.step()
        seconds = time.perf_counter() - began
        made = sum(len(request.tokens) for request in requests) - before
        engine.close()
        runner._steps = own
        while alone:
            alone.pop().close()
        return seconds / made

    tree = Speculation(partial(PromptLookup, 3, 1, 3), TREE)
    together, separate = Speculation(partial(DraftModel, draft), CHAIN), Speculation(single, CHAIN)
    calls = {
        "no tree": lambda: mean(rate([text], None) for text in texts),
        "tree, uncompiled": lambda: mean(rate([text], tree, uncompiled) for text in texts),
        "tree": lambda: mean(rate([text], tree) for text in texts),
        "no draft": lambda: rate(texts, None),
        "draft, one by one": lambda: rate(texts, separate),
        "draft": lambda: rate(texts, together),
    }
    found = interleaved(calls, rounds)
    base = {name: "no tree" if "tree" in name else "no draft" for name in found}
    rows = {
        name: {
            "tokens_per_second": 1 / Summary.of(seconds).median,
            "speedup": asdict(ratio(found[base[name]], seconds)),
        }
        for name, seconds in found.items()
    }
    gains = {
        name: asdict(ratio(found[before], found[name]))
        for name, before in (("tree", "tree, uncompiled"), ("draft", "draft, one by one"))
    }
    when = {"rounds": rounds, "steps": output, "date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    return {"rows": rows, "gains": gains, **when}


def speculation(source: Any, rounds: int, output: int) -> dict[str, Any]:
    """A request with and without guesses, on held-out source code."""
    plain, guessing = build(source, VARIANTS["paged"]), build(source, SPECULATING)
    assert isinstance(guessing, PagedRunner)
    assert guessing.speculation is not None
    prompts = [torch.tensor([tokens]) for tokens in held_out(source)]
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
        if "guesses" in found:
            lines += ["", *_guesses(found["guesses"])]
        lines.append("")
    return "\n".join(lines)


def _guesses(found: dict[str, Any]) -> list[str]:
    gains = found["gains"]
    lines = [
        f"Guesses in every step of held-out text, whether they pay or not: trees of {TREE} nodes by lookup for one "
        f"request, and chains of {CHAIN} by", f"the first {EXIT_LAYER} layers for {ROWS} at once"
        f" ({found['rounds']} rounds of {found['steps']} steps, {found['date']}).", "",
        "| guesses | tok/s | against none |", "|---|--:|--:|",
    ]  # fmt: skip
    names = {
        "no tree": "none, one request", "tree, uncompiled": "trees, verified by the uncompiled forward",
        "tree": "trees, verified by the compiled step", "no draft": f"none, {ROWS} requests",
        "draft, one by one": "chains, one row after the other", "draft": "chains, all rows in the same steps",
    }  # fmt: skip
    for name, label in names.items():
        row = found["rows"][name]
        lines.append(f"| {label} | {row['tokens_per_second']:.0f} | {_interval(row['speedup'])} |")
    return [
        *lines, "", f"Compiling brings {_interval(gains['tree'])} for trees; guessing for all rows at once "
        f"{_interval(gains['draft'])}.",
    ]  # fmt: skip


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
    parser.add_argument("--only", choices=PARTS, help="measure this of what the reference model has, keep the rest")
    for name, default in (("rounds", 7), ("output", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.only:
        measure_only(args.only, args.rounds, args.output)
        return
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
            parts = PARTS if name == "reference" else PARTS[:2]
            found: dict[str, Any] = {"parameters": source.model.num_parameters()}
            found |= {part: measured(part, source, args.rounds, args.output) for part in parts}
            document["models"][name] = found
            print(markdown(document), flush=True)
    write(document)


def measured(part: str, source: Any, rounds: int, output: int) -> dict[str, Any]:
    """One of `PARTS`."""
    contexts = tuple(c for c in (64, 448, 960) if c <= source.model.config.max_position_embeddings - output)
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "decode": lambda: decoding(source, rounds, contexts, output),
        "batching": lambda: batching(source, rounds, output),
        "speculation": lambda: speculation(source, rounds, output * 2),
        "guesses": lambda: guesses(source, rounds, output),
    }
    return calls[part]()


def measure_only(part: str, rounds: int, output: int) -> None:
    """Measure one part of the reference model, and put it in the place of what was measured before."""
    document = json.loads((RESULTS / "serving_cpu.json").read_text(encoding="utf-8"))
    source = load_source(str(reference_folder()))
    document["models"]["reference"][part] = measured(part, source, rounds, output)
    write(document)


def write(document: dict[str, Any]) -> None:
    """The result, and the page that shows it."""
    out = RESULTS / "serving_cpu.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (RESULTS.parents[1] / "docs" / "decode-cpu.md").write_text(page(document), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
