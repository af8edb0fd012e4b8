"""A report such as a run on a small CPU produces, for tests. The numbers are made up but hang together."""

from __future__ import annotations

import math
from typing import Any

from optimizer.report import (
    BandwidthPoint,
    BreakEven,
    Ceilings,
    Cost,
    Divergence,
    FloorEntry,
    GenerationStats,
    LayerEntry,
    Ledger,
    Machine,
    Memory,
    ModelEntry,
    PassEntry,
    Percentiles,
    QualityEntry,
    Ratio,
    Report,
    RooflinePoint,
    Skipped,
    SpeedCell,
)

BANDWIDTH, PEAK = 41.3e9, 430e9
SHAPES = {"qkv_proj": (1536, 1024), "o_proj": (1024, 1024), "gate_up_proj": (5632, 1024), "down_proj": (1024, 2816)}


def stats(ttft: float, tpot: float, tokens: float, mbu: float | None, mfu: float | None) -> GenerationStats:
    return GenerationStats(
        ttft_seconds=Percentiles(p50=ttft, p95=ttft * 1.12),
        tpot_seconds=Percentiles(p50=tpot, p95=tpot * 1.18, p99=tpot * 1.41),
        tokens_per_second=tokens,
        mbu=mbu,
        mfu=mfu,
    )


def speed_cell(batch: int, prompt: int, ttft: tuple[float, float], tpot: tuple[float, float]) -> SpeedCell:
    """Times `(baseline, optimized)` in seconds; the rest follows from them."""
    output = 64
    total = [a + (output - 1) * b for a, b in zip(ttft, tpot, strict=True)]
    tokens = [batch * output / seconds for seconds in total]
    mbu = [332e6 / (tpot[0] * BANDWIDTH), 92e6 / (tpot[1] * BANDWIDTH)]
    mfu = [2 * 166e6 * prompt * batch / (seconds * PEAK) for seconds in ttft]

    def ratio(value: float) -> Ratio:
        return Ratio(value=value, low=value * 0.97, high=value * 1.03)

    return SpeedCell(
        batch=batch,
        prompt=prompt,
        output=output,
        baseline=stats(ttft[0], tpot[0], tokens[0], mbu[0], mfu[0]),
        optimized=stats(ttft[1], tpot[1], tokens[1], mbu[1], mfu[1]),
        decode_speedup=ratio(tpot[0] / tpot[1]),
        ttft_speedup=ratio(ttft[0] / ttft[1]),
        throughput_speedup=ratio(tokens[1] / tokens[0]),
    )


def layers(blocks: int = 12) -> list[LayerEntry]:
    found = []
    for block in range(blocks):
        for place, (name, (rows, columns)) in enumerate(SHAPES.items()):
            error = 0.061 + 0.004 * math.sin(3 * block + 2 * place) + (0.03 if (block, place) == (1, 3) else 0)
            found.append(
                LayerEntry(
                    name=f"model.layers.{block}.{'self_attn' if place < 2 else 'mlp'}.{name}",
                    kind=name,
                    shape=[rows, columns],
                    format="int4-g64-asym",
                    kernel="cpu_vnni_w4a8",
                    bytes_before=rows * columns * 2,
                    bytes_after=rows * columns * 17 // 32,
                    weight_error=error,
                    output_error=error * (0.55 + 0.1 * math.cos(block)) if block else None,
                )
            )
    return found


def roofline() -> list[RooflinePoint]:
    rows: list[tuple[str, Any, Any, float, float]] = [
        ("B1", "decode", "baseline", 1.0, 12.3e9),
        ("B1", "decode", "optimized", 3.6, 84e9),
        ("B8", "decode", "baseline", 7.6, 74e9),
        ("B8", "decode", "optimized", 27.0, 231e9),
        ("S128", "prefill", "baseline", 118.0, 272e9),
        ("S128", "prefill", "optimized", 240.0, 341e9),
    ]
    return [
        RooflinePoint(
            label=label,
            phase=phase,
            variant=variant,
            intensity=intensity,
            achieved_flops=achieved,
            attainable_flops=min(PEAK, BANDWIDTH * intensity),
        )
        for label, phase, variant, intensity, achieved in rows
    ]


def quality() -> list[QualityEntry]:
    return [
        QualityEntry(
            task="stdlib_next_line",
            metric="acc",
            filter="none",
            higher_is_better=True,
            baseline=0.712,
            optimized=0.706,
            ratio=0.9916,
            ratio_low=0.9741,
            ratio_high=1.0088,
            p_value=0.41,
            samples=640,
            flips_to_wrong=17,
            flips_to_right=13,
        ),
        QualityEntry(
            task="stdlib_perplexity",
            metric="word_perplexity",
            higher_is_better=False,
            baseline=9.412,
            optimized=9.561,
            ratio=1.0158,
            ratio_low=1.0121,
            ratio_high=1.0197,
            p_value=3.1e-9,
            samples=212,
        ),
    ]


def floors() -> list[FloorEntry]:
    return [
        FloorEntry(
            metric="quality.stdlib_next_line.acc.recovery",
            rule="≥ 0.97 (lower end of 95 % interval)",
            threshold=0.97,
            value=0.9916,
            low=0.9741,
            high=1.0088,
            samples=640,
            samples_needed=1234,
            passed=True,
            reason="0.9741 ≥ 0.97",
        ),
        FloorEntry(
            metric="quality.stdlib_perplexity.word_perplexity.ratio",
            rule="≤ 1.03 (upper end of 95 % interval)",
            threshold=1.03,
            value=1.0158,
            low=1.0121,
            high=1.0197,
            samples=212,
            passed=True,
            reason="1.0197 ≤ 1.03",
        ),
        FloorEntry(
            metric="decode.speedup",
            rule="≥ 3 (lower end of 95 % interval)",
            threshold=3,
            unit="×",
            value=6.6,
            low=6.4,
            high=6.8,
            samples=40,
            passed=True,
            reason="6.4 ≥ 3",
        ),
        FloorEntry(metric="eager_steps", rule="= 0", threshold=0, value=0, samples=2560, passed=True, reason="0 = 0"),
    ]


MISSED = FloorEntry(
    metric="ttft.speedup",
    rule="≥ 1.3 (lower end of 95 % interval)",
    threshold=1.3,
    unit="×",
    value=1.289,
    low=1.251,
    high=1.328,
    samples=40,
    passed=False,
    reason="ttft.speedup >= 1.3 is missed: the value is 1.289",
)


def example_report(**changes: Any) -> Report:
    """The example, passed; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "product_version": "0.1.0",
        "created": "2026-01-31T12:00:00+00:00",
        "verdict": "passed",
        "summary": "Decodes 6.6× faster in 27 % of the bytes; every floor holds.",
        "model": ModelEntry(
            name="example/stdlib-166m",
            architecture="LlamaForCausalLM",
            parameters=166_000_000,
            dtype="bfloat16",
            source_digest="sha256:" + "9f" * 32,
        ),
        "recipe": {"name": "w4a8-cpu", "passes": [{"merge_linears": {}}, {"quantize": {"bits": 4, "group_size": 64}}]},
        "machine": Machine(
            device="AMD EPYC 9R14",
            kind="cpu",
            cores=2,
            memory_bytes=16 * 10**9,
            isa="AVX-512 VNNI BF16",
            os="Linux 6.1",
            python="3.11.9",
        ),
        "ceilings": Ceilings(
            read_bandwidth=[
                BandwidthPoint(working_set_bytes=1 << 20, bytes_per_second=152e9),
                BandwidthPoint(working_set_bytes=1 << 24, bytes_per_second=88e9),
                BandwidthPoint(working_set_bytes=1 << 29, bytes_per_second=BANDWIDTH),
            ],
            copy_bytes_per_second=29.8e9,
            matmul_flops_per_second={"float32": 118e9, "bfloat16": PEAK, "int8": 660e9},
            launch_seconds=3.1e-6,
        ),
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"},
        "passes": [
            PassEntry(
                name="merge_linears",
                required=False,
                matched=24,
                expected=24,
                seconds=0.21,
                bytes_before=332_000_000,
                bytes_after=332_000_000,
                notes="q, k, v into one; gate, up into one",
            ),
            PassEntry(
                name="quantize",
                required=True,
                matched=48,
                expected=48,
                skipped=[Skipped(name="lm_head", reason="excluded by the recipe: kept in bfloat16")],
                seconds=18.4,
                bytes_before=332_000_000,
                bytes_after=92_100_000,
            ),
        ],
        "layers": layers(),
        "quality": quality(),
        "speed": [
            speed_cell(1, 128, (0.156, 0.121), (0.0269, 0.00407)),
            speed_cell(1, 1024, (1.31, 1.02), (0.0288, 0.0052)),
            speed_cell(8, 128, (1.19, 0.93), (0.0361, 0.0115)),
        ],
        "memory": Memory(
            weights_bytes_before=332_000_000,
            weights_bytes_after=92_100_000,
            kv_bytes_per_token_before=12_288,
            kv_bytes_per_token_after=6_528,
            peak_rss_bytes=1_310_000_000,
        ),
        "roofline": roofline(),
        "ledger": Ledger(compiled=2560, kernels={"cpu_vnni_w4a8": 48, "aten_linear_bf16": 1}),
        "floors": floors(),
        "costs": [
            Cost(phase="load", seconds=1.2),
            Cost(phase="baseline", seconds=64.0),
            Cost(phase="passes", seconds=18.6),
            Cost(phase="evaluate", seconds=58.3),
            Cost(phase="gate", seconds=0.4),
        ],
        "divergence": [
            Divergence(name="KL, mean, nats a token", value=0.0123, low=0.011, high=0.0136, tokens=4096, documents=16),
            Divergence(name="Same most likely token", value=0.971, low=0.966, high=0.976, tokens=4096, documents=16),
        ],
        "break_even": BreakEven(
            optimization_seconds=18.6,
            run_seconds=142.5,
            seconds_per_token_before=0.0293,
            seconds_per_token_after=0.00596,
            tokens=797,
            tokens_at_worst=812,
            tokens_of_run=6106,
            cost=0.0396,
            cost_per_million_tokens_before=8.139,
            cost_per_million_tokens_after=1.656,
        ),
        "warnings": ["2 of 40 timing blocks were repeated: another process was busy"],
    }
    return Report(**(fields | changes))


def failed_report() -> Report:
    """The example with one floor missed."""
    return example_report(
        verdict="failed", summary="Prefill is not as fast as the recipe asks.", floors=[*floors(), MISSED]
    )


def ungated_report() -> Report:
    """The example without its gate."""
    return example_report(verdict="ungated", summary="The gate was off: nothing was judged.", floors=[])


def bare_report(**changes: Any) -> Report:
    """The least that a report can hold: nothing measured but sizes."""
    full = example_report()
    fields: dict[str, Any] = {
        "product_version": "0.1.0",
        "created": "2026-01-31T12:00:00Z",
        "verdict": "ungated",
        "summary": "Nothing was measured.",
        "model": full.model,
        "recipe": {"name": "none"},
        "machine": full.machine,
        "memory": Memory(
            weights_bytes_before=0, weights_bytes_after=0, kv_bytes_per_token_before=0, kv_bytes_per_token_after=0
        ),
    }
    return Report(**(fields | changes))


HOSTILE = (
    "</script><script>alert(1)</script><img src=http://x.test/a onerror=alert(2)>|`*_[a](javascript:0)\n\x00\u202e'\""
)


def hostile_report() -> Report:
    """The example with markup in every name that comes from a model, a recipe or a task."""
    full = example_report()
    return example_report(
        verdict="failed",
        summary=HOSTILE.replace("\n", ""),
        model=full.model.model_copy(update={"name": HOSTILE, "architecture": HOSTILE, "dtype": HOSTILE}),
        recipe={"name": HOSTILE, HOSTILE: [HOSTILE]},
        machine=full.machine.model_copy(update={"device": HOSTILE}),
        versions={HOSTILE: HOSTILE},
        passes=[
            full.passes[0].model_copy(
                update={"name": HOSTILE, "notes": HOSTILE, "skipped": [Skipped(name=HOSTILE, reason=HOSTILE)]}
            )
        ],
        layers=[layer.model_copy(update={"name": HOSTILE + "x" * 300}) for layer in full.layers[:3]],
        quality=[entry.model_copy(update={"task": HOSTILE, "filter": HOSTILE}) for entry in full.quality],
        roofline=[point.model_copy(update={"label": HOSTILE}) for point in full.roofline],
        ceilings=full.ceilings.model_copy(update={"matmul_flops_per_second": {HOSTILE: PEAK}}),
        ledger=Ledger(compiled=1, kernels={HOSTILE: 1}),
        floors=[MISSED.model_copy(update={"metric": HOSTILE, "rule": HOSTILE, "reason": HOSTILE, "unit": HOSTILE})],
        costs=[Cost(phase=HOSTILE, seconds=1.0)],
        divergence=[row.model_copy(update={"name": HOSTILE}) for row in full.divergence],
        warnings=[HOSTILE],
    )
