"""Decode on a CPU beside the peers: Hugging Face eager, torch.compile, torchao, onnxruntime-genai, and ours.

    python -m benchmarks.peers_cpu --peer-python ENV/bin/python [--models generated,reference] [--rounds 7]

The peers run in an environment of their own, made with
`pip install torch transformers torchao onnx onnx-ir onnxruntime onnxruntime-genai`. Every variant is a process that
waits its turn, and one round asks each once, so that neighbours on the machine slow all alike: ratios are paired by
round. Writes `benchmarks/results/peers_cpu.json`, and `docs/cpu.md`, which shows it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import gemv_cpu
from benchmarks.decode import RESULTS, commit
from optimizer.artifact import installed_versions
from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.linear import weight_bytes
from optimizer.backends.runner import BaseRunner
from optimizer.evals.ceilings import describe, measure_ceilings
from optimizer.evals.timing import Summary, ratio
from optimizer.passes.base import Context, view
from optimizer.pipeline import apply_passes
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import load_source, load_tokenizer, reference_folder

RESULT = RESULTS / "peers_cpu.json"
PEERS = (
    "hf-eager-fp32", "hf-eager-bf16", "torch-compile-fp32", "torch-compile-bf16", "torchao-int8",
    "onnxruntime-genai-int4",
)  # fmt: skip
MERGE: dict[str, Any] = {"name": "merge_linears"}
INT4: dict[str, Any] = {"name": "quantize", "bits": 4, "group_size": 128, "ignore": []}
OURS: dict[str, list[dict[str, Any]]] = {
    "ours-bf16": [MERGE, {"name": "decode"}],
    "ours-int8": [{"name": "quantize", "ignore": []}, MERGE, {"name": "decode"}],
    "ours-int8-int8-inputs": [{"name": "quantize", "ignore": []}, MERGE, {"name": "decode", "int8_inputs": True}],
    "ours-int4": [INT4, MERGE, {"name": "decode"}],
    "ours-int4-int8-inputs": [INT4, MERGE, {"name": "decode", "int8_inputs": True}],
}
"""Rounding alone: how the integers are found does not change the speed. The head is quantized too, as the peers do."""

GENERATED = {
    "hidden_size": 1024, "intermediate_size": 3456, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""167 million parameters."""

COMPARISONS = {  # what TARGETS asks of this table: ours, theirs, at least
    "int4 decode / Hugging Face eager bf16": ("ours-int4-int8-inputs", "hf-eager-bf16", 5.0),
    "int4 decode / torchao int8 compiled": ("ours-int4-int8-inputs", "torchao-int8", 2.0),
    "int4 decode / onnxruntime-genai int4": ("ours-int4-int8-inputs", "onnxruntime-genai-int4", 1.2),
    "int4 decode / own bf16 compiled": ("ours-int4-int8-inputs", "ours-bf16", 2.8),
    "int8 decode / own bf16 compiled": ("ours-int8-int8-inputs", "ours-bf16", 1.7),
}


class Peer:
    """A peer's process, which generates when asked."""

    def __init__(self, python: str, folder: Path, variant: str, log: Any) -> None:
        script = Path(__file__).parent / "peers" / "cpu_decode.py"
        command = [python, str(script), str(folder), variant, str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.versions = json.loads(self._line())["ready"]

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}; see the log")
        return line

    def generate(self, prompt: list[int], output: int) -> list[float]:
        assert self.process.stdin is not None
        print(json.dumps({"prompt": prompt, "output": output}), file=self.process.stdin, flush=True)
        return json.loads(self._line())  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Own:
    """One of our runners, in this process."""

    def __init__(self, source: Any, passes: list[dict[str, Any]], context: int) -> None:
        model, ctx = view(source.model), Context(tokenizer=source.tokenizer)
        recipe = Recipe.load("default").model_copy(update={"passes": passes})
        apply_passes(model, recipe.build_passes(), ctx, Progress())
        self.runner: BaseRunner = ctx.make_runner(model, source.tokenizer)
        self.bytes = weight_bytes(model)
        if isinstance(self.runner, CompiledRunner):
            self.runner.warm_up(1, context)

    def generate(self, prompt: list[int], output: int) -> list[float]:
        times = [time.perf_counter()]
        self.runner.generate(
            torch.tensor([prompt]), max_new_tokens=output, temperature=0.0, eos_token_id=None,
            on_token=lambda _: times.append(time.perf_counter()),
        )  # fmt: skip
        return [later - earlier for earlier, later in pairwise(times)]

    def close(self) -> None: ...


def make_model(folder: Path) -> None:
    """A bf16 Llama of random weights with the reference model's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GENERATED), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(reference_folder()).save_pretrained(folder)


def measure(folder: Path, python: str, rounds: int, prompt: int, output: int, log: Any) -> dict[str, Any]:
    """Every variant on one model, a round at a time; one round to warm up."""
    source = load_source(str(folder))
    vocabulary = source.model.config.vocab_size
    with ExitStack() as stack:
        runs: dict[str, Peer | Own] = {name: Peer(python, folder, name, log) for name in PEERS}
        versions = runs[PEERS[0]].versions  # type: ignore[union-attr]
        runs |= {name: Own(source, passes, prompt + output) for name, passes in OURS.items()}
        for run in runs.values():
            stack.callback(run.close)
        samples: dict[str, list[list[float]]] = {name: [] for name in runs}
        generator = torch.Generator().manual_seed(0)
        names = list(runs)
        for turn in range(rounds + 1):
            ids = torch.randint(2, vocabulary, (prompt,), generator=generator).tolist()
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                gaps = runs[name].generate(ids, output)
                if len(gaps) != output:
                    raise SystemExit(f"{name} made {len(gaps)} tokens of {output}")
                if turn:
                    samples[name].append(gaps)
            print(f"round {turn} of {rounds}", flush=True)
        sizes = {name: run.bytes for name, run in runs.items() if isinstance(run, Own)}
    tpot = {name: [mean(gaps[1:]) for gaps in found] for name, found in samples.items()}
    ttft = {name: [gaps[0] for gaps in found] for name, found in samples.items()}
    ceilings = measure_ceilings("cpu")
    rows = {
        name: {
            "tpot": asdict(Summary.of(tpot[name])), "ttft": asdict(Summary.of(ttft[name])),
            "weight_bytes": sizes.get(name),
            "bandwidth_share": sizes[name] / Summary.of(tpot[name]).median / ceilings.bandwidth(sizes[name])
            if name in sizes else None,
        }
        for name in samples
    }  # fmt: skip
    compared = {
        what: asdict(ratio(tpot[theirs], tpot[ours])) | {"asked": asked}
        for what, (ours, theirs, asked) in COMPARISONS.items()
    }
    compared["int8 prefill / own bf16"] = asdict(ratio(ttft["ours-bf16"], ttft["ours-int8-int8-inputs"])) | {
        "asked": 1.4
    }
    return {"parameters": source.model.num_parameters(), "peer_versions": versions, "rows": rows, "compared": compared}


def markdown(document: dict[str, Any]) -> str:
    """The result as tables."""
    lines = []
    for name, found in document["models"].items():
        lines += [f"**{name}**, {found['parameters'] / 1e6:.0f} M parameters", ""]
        lines += ["| | TPOT ms | TTFT ms | weights MB | share of read bandwidth |", "|---|--:|--:|--:|--:|"]
        for variant, row in found["rows"].items():
            size = f"{row['weight_bytes'] / 1e6:.0f}" if row["weight_bytes"] else "–"
            share = f"{row['bandwidth_share']:.0%}" if row["bandwidth_share"] else "–"
            tpot, ttft = row["tpot"]["median"] * 1e3, row["ttft"]["median"] * 1e3
            lines.append(f"| {variant} | {tpot:.2f} | {ttft:.1f} | {size} | {share} |")
        lines += ["", "| | measured | asked | |", "|---|---|--:|---|"]
        for what, row in found["compared"].items():
            held = "holds" if row["median"] >= row["asked"] else "**missed**"
            interval = f"{row['median']:.2f}× [{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(f"| {what} | {interval} | {row['asked']}× | {held} |")
        lines.append("")
    return "\n".join(lines)


def page(document: dict[str, Any], products: dict[str, Any]) -> str:
    """`docs/cpu.md`: this benchmark's result, and that of `gemv_cpu`."""
    peers = next(iter(document["models"].values()))["peer_versions"]
    versions = ", ".join(f"{name} {version}" for name, version in peers.items())
    asked = (
        f"Batch 1, {document['prompt']} tokens in, {document['output']} out, {document['rounds']} interleaved rounds;"
    )
    machine = f"{document['machine']}, {document['cores']} cores ({document['isa']}), {document['threads']} threads"
    return f"""# Decode on a CPU, beside the peers

{asked} medians, with 95 % intervals of the
ratios paired by round (`python -m benchmarks.peers_cpu`). *generated* is a Llama of random weights: hidden size 1024,
12 layers, 16 heads over 4. Weights are rounded to nearest and the head is quantized too; `int8-inputs` are served with
inputs rounded to int8 in groups of 32. Weights MB include the embedding, of which a step reads one row. The share of
the read bandwidth is that of the whole step. What is asked was set for a processor with AVX-512 VNNI.

{markdown(document)}
{machine}, {document["date"]}; theirs:
{versions}.

## One row by a layer's weights

The share of the read bandwidth that a product with one row reaches, by layer and kind of weight, weights cold
(`python -m benchmarks.gemv_cpu`): the median against the best plain read of 256 MB in the same run and, in parentheses,
against the best read of the same round. Inputs rounded to int8 have a scale for 32 values.

{gemv_cpu.markdown(products)}
"""


def write_page() -> None:
    """`docs/cpu.md` from the results that are kept."""
    peers, products = (json.loads(file.read_text(encoding="utf-8")) for file in (RESULT, gemv_cpu.RESULT))
    (RESULTS.parents[1] / "docs" / "cpu.md").write_text(page(peers, products), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="the Python of the peers' environment")
    parser.add_argument("--models", default="generated,reference")
    for name, default in (("rounds", 7), ("prompt", 128), ("output", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    machine, cores, isa = describe("cpu")
    document: dict[str, Any] = {
        "command": "python -m benchmarks.peers_cpu", "machine": machine, "cores": cores, "isa": isa,
        "threads": torch.get_num_threads(), "versions": installed_versions(), "prompt": args.prompt,
        "output": args.output, "rounds": args.rounds, "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(), "models": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryFile("w+") as log:
        for name in args.models.split(","):
            folder = Path(made) / name if name == "generated" else reference_folder()
            if name == "generated":
                make_model(folder)
            try:
                found = measure(folder, args.peer_python, args.rounds, args.prompt, args.output, log)
            except SystemExit:
                log.seek(0)
                print(log.read()[-4000:])
                raise
            document["models"][name] = found
    RESULT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    write_page()
    print(f"{markdown(document)}\nwritten to {RESULT}")


if __name__ == "__main__":
    main()
