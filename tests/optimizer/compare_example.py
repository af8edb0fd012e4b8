"""A comparison as data, with every section filled, and one whose every name and text is hostile."""

from __future__ import annotations

from typing import Any

from optimizer.compare_report import (
    Answer,
    Comparison,
    Document,
    LayerError,
    MetricEntry,
    Score,
    TaskDocuments,
    VariantEntry,
    Workload,
)
from optimizer.report import GenerationStats, Latency, Percentiles, Ratio, RooflinePoint, Serving
from tests.optimizer.report_example import HOSTILE, example_report

NAMES = ("base", "int8", "int4")
# per variant: decode tok/s, bytes, accuracy ratio, perplexity ratio
FIGURES = {"base": (100.0, 20e6, 1.0, 1.0), "int8": (250.0, 10e6, 0.99, 1.002), "int4": (200.0, 6e6, 0.95, 1.05)}


def stats(rate: float) -> GenerationStats:
    return GenerationStats(
        ttft_seconds=Percentiles(p50=2 / rate, p95=3 / rate),
        tpot_seconds=Percentiles(p50=1 / rate, p95=1.2 / rate, p99=1.5 / rate),
        tokens_per_second=0.8 * rate, mbu=0.3, mfu=0.2,
    )  # fmt: skip


def point(phase: Any, variant: Any, intensity: float, achieved: float) -> RooflinePoint:
    return RooflinePoint(
        label="B1", phase=phase, variant=variant, intensity=intensity, achieved_flops=achieved, attainable_flops=4e11
    )


def serving(rate: float) -> Serving:
    return Serving(
        workload="chat", requests=40, ttft_slo_seconds=1.0, tpot_slo_seconds=0.05, met_share=0.9, met_share_low=0.77,
        met_share_high=0.96, tokens_per_second=2 * rate, goodput_tokens_per_second=1.8 * rate,
        latencies=[
            Latency(name="TTFT", p50=0.1, p95=0.4, p99=None), Latency(name="TPOT", p50=1 / rate, p95=None, p99=None),
        ],
    )  # fmt: skip


def variant(name: str) -> VariantEntry:
    rate, size, _, _ = FIGURES[name]
    first = name == NAMES[0]
    gain = None if first else Ratio(value=rate / 100, low=rate / 110, high=rate / 90)
    which = "baseline" if first else "optimized"
    return VariantEntry(
        name=name, given=f"runs/{name}", kind="model" if first else "artifact", architecture="LlamaForCausalLM",
        format="bfloat16" if first else name, kernels={"aten::linear": 4}, digest="ab" * 32, stored_bytes=int(size),
        weights_bytes=int(size), kv_bytes_per_token=3072, memory_bytes=int(size) + 600_000, speed=stats(rate),
        decode_tokens_per_second=rate, decode_speedup=gain, ttft_speedup=gain, throughput_speedup=gain,
        cost_per_million_tokens=1e3 / rate, serving=serving(rate),
        roofline=[point("prefill", which, 100, 2e11), point("decode", which, 1 if first else 4, rate * 1e8)],
    )  # fmt: skip


def metric(task: str, name: str, column: int, up: bool) -> MetricEntry:
    base = 0.5 if up else 3.0
    scores = [Score(variant=NAMES[0], value=base, stderr=0.02)]
    for other in NAMES[1:]:
        ratio = FIGURES[other][column]
        flips = {"p_value": 0.4, "flips_to_wrong": 3, "flips_to_right": 1} if up else {}
        scores.append(
            Score(
                variant=other, value=base * ratio, stderr=0.02, ratio=ratio, ratio_low=ratio - 0.01,
                ratio_high=ratio + 0.01, **flips,
            )
        )  # fmt: skip
    return MetricEntry(
        task=task, metric=name, filter="none", higher_is_better=up, samples=40, headline=True, scores=scores
    )


def documents() -> list[Document]:
    """Two that int4 got wrong, one that int8 got right, one where only the words differ."""

    def answers(*rows: tuple[str, bool]) -> list[Answer]:
        return [
            Answer(variant=name, text=text, right=right, differs=(text, right) != rows[0])
            for name, (text, right) in zip(NAMES, rows, strict=True)
        ]

    yes, no = ("yes", True), ("no", False)
    return [
        Document(task="choice", document="0:aa", context="Is\nit?", gold="yes", answers=answers(yes, yes, no)),
        Document(task="choice", document="1:bb", context="Was it?", gold="yes", answers=answers(yes, yes, no)),
        Document(task="choice", document="2:cc", context="Will it?", gold="yes", answers=answers(no, yes, no)),
        Document(task="cloze", document="0:dd", context="x = ", gold="1", answers=answers(no, ("nope", False), no)),
    ]


def layers() -> list[LayerError]:
    return [
        LayerError(
            variant=name, name=f"model.layers.{i}.{part}", layer=i, projection=part,
            weight_error=size * (1 + i), output_error=None if part == "b" and i == 1 else size * (2 + i),
        )
        for name, size in (("int8", 0.005), ("int4", 0.08))
        for i in range(2)
        for part in ("a", "b")
    ] + [LayerError(variant="int8", name="lm_head", projection="lm_head", weight_error=0.0)]  # fmt: skip


def example(**changes: Any) -> Comparison:
    """The example; keyword arguments replace fields."""
    full = example_report()
    fields: dict[str, Any] = {
        "product_version": "0.1.0", "created": "2026-01-31T12:00:00+00:00", "machine": full.machine,
        "ceilings": full.ceilings, "versions": full.versions, "seeds": {"evaluation": 1234},
        "workload": Workload(batch=1, prompt=128, output=64, repeats=5), "price_per_hour": 2.5,
        "variants": [variant(name) for name in NAMES],
        "quality": [metric("choice", "acc", 2, True), metric("text", "byte_perplexity", 3, False)],
        "tasks": [
            TaskDocuments(task="choice", total=40, differing=3, listed=3),
            TaskDocuments(task="cloze", total=20, differing=1, listed=1),
        ],
        "documents": documents(), "layers": layers(), "tokens": 256, "warnings": ["int4: a warning"],
    }  # fmt: skip
    return Comparison(**(fields | changes))


def hostile() -> Comparison:
    """The example with markup in every name and text that comes from outside."""
    names = {name: f"{HOSTILE}{i}" for i, name in enumerate(NAMES)}

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rename(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    plain = rename(example().model_dump(mode="json"))
    for entry in plain["variants"]:
        entry |= {"given": HOSTILE, "format": HOSTILE, "architecture": HOSTILE, "digest": HOSTILE, "recipe": HOSTILE}
        entry |= {"verdict": HOSTILE, "notes": [HOSTILE], "kernels": {HOSTILE: 1}}
        entry["serving"] |= {"workload": HOSTILE}
    for entry in (*plain["quality"], *plain["tasks"], *plain["documents"]):
        entry["task"] = HOSTILE + entry["task"]
    for entry in plain["documents"]:
        entry |= {"context": HOSTILE, "gold": HOSTILE, "document": HOSTILE}
        for answer in entry["answers"]:
            answer["text"] += HOSTILE
    for entry in plain["layers"]:
        entry |= {"name": HOSTILE + entry["name"], "projection": HOSTILE + entry["projection"]}
    plain |= {
        "versions": {HOSTILE: HOSTILE},
        "warnings": [HOSTILE],
        "layer_notes": [HOSTILE],
        "product_version": HOSTILE,
    }
    return Comparison.model_validate(plain)
