"""Commands that measure models, and what they left: `eval`, `bench`, `serve`, `compare`, `history`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optimizer.commands.console import (
    Device,
    Json,
    Model,
    Quiet,
    RemoteCode,
    echo_json,
    errors_to_exit,
    load_runner,
)

app = typer.Typer()


@app.command("eval")
def evaluate(
    model: Model = "reference",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "reference_perplexity,"
    "reference_next_line,reference_cloze",
    limit: Annotated[int | None, typer.Option(help="Items of each task (all unless given).", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    output_path: Annotated[Path | None, typer.Option(help="Folder for results and samples as lm-eval writes them.")] = (
        None
    ),
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure quality with lm-eval: a model folder, a hub id, or an artifact on the runner that serves it."""
    from optimizer.display import progress_for

    with errors_to_exit(as_json):
        from optimizer.evals.quality import evaluate as measure
        from optimizer.pipeline import WINDOW

        progress = progress_for(quiet)
        with progress:
            with progress.phase("load"):
                runner = load_runner(model, device, trust_remote_code)
            with progress.phase("quality"):
                found = measure(
                    runner, runner.tokenizer, tasks.split(","), limit=limit, batch_size=batch_size,
                    max_length=WINDOW, progress=progress.update,
                )  # fmt: skip
        if output_path is not None:
            from optimizer.evals.lm_eval_results import save_lm_eval_results, seeds

            save_lm_eval_results(
                found, output_path, model=model, seconds=progress.seconds["quality"],
                options={"batch_size": batch_size, "limit": limit, "device": str(runner.device), **seeds(0)},
            )  # fmt: skip
        rows = [
            {"task": m.task, "metric": m.metric, "value": m.value, "stderr": m.stderr, "documents": len(m.documents)}
            for m in found.metrics
        ]
        if as_json:
            echo_json({"model": model, "metrics": rows, "non_finite": found.non_finite})
            return
        for row in rows:
            spread = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            typer.echo(
                f"{row['task']:<24} {row['metric']:<18} {row['value']:.4f}{spread}  ({row['documents']} documents)"
            )


@app.command()
def bench(
    model: Model = "reference",
    against: Annotated[str | None, typer.Option(help="A second model or artifact, timed in the same rounds.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=3)] = 5,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time generation: TTFT, TPOT and throughput, interleaved when two models are given."""
    from dataclasses import asdict

    from optimizer.display import progress_for

    with errors_to_exit(as_json):
        from optimizer.evals.timing import Workload, measure_generation, ratio

        progress = progress_for(quiet)
        names = [model] + ([against] if against else [])
        if against == model:
            names[1] = f"{model} (again)"
        with progress:
            with progress.phase("load"):
                loaded = [load_runner(path, device, trust_remote_code) for path in (model, against) if path]
                runners = dict(zip(names, loaded, strict=True))
            with progress.phase("speed"):
                timings = measure_generation(
                    runners, Workload(batch, prompt, output), repeats=repeats,
                    progress=lambda done, total: progress.update("rounds", done, total),
                )  # fmt: skip
        speedup = None
        if against:
            first, second = (timings[name] for name in names)
            speedup = ratio(first.tpot_rounds, second.tpot_rounds)
        if as_json:
            document: dict[str, Any] = {
                "workload": {"batch": batch, "prompt": prompt, "output": output},
                "runners": {
                    name: {"ttft_seconds": asdict(t.ttft), "tpot_seconds": asdict(t.tpot),
                           "tokens_per_second": t.tokens_per_second} for name, t in timings.items()
                },
                "decode_speedup": None if speedup is None else asdict(speedup),
            }  # fmt: skip
            echo_json(document)
            return
        for name, t in timings.items():
            typer.echo(
                f"{name}: TTFT {t.ttft.p50 * 1e3:.1f} ms, TPOT p50 {t.tpot.p50 * 1e3:.2f} p95 {t.tpot.p95 * 1e3:.2f} "
                f"p99 {t.tpot.p99 * 1e3:.2f} ms, {t.tokens_per_second:.1f} tok/s"
            )
        if speedup is not None:
            typer.echo(
                f"decode: {names[1]} is {speedup.median:.2f}× {names[0]} [{speedup.low:.2f}, {speedup.high:.2f}]"
            )


@app.command()
def serve(
    model: Model = "reference",
    workload: Annotated[str, typer.Option(help="chat, generation, summarization or reasoning.")] = "chat",
    requests: Annotated[int, typer.Option(min=1)] = 40,
    rate: Annotated[float | None, typer.Option(help="Requests a second; without it, --clients take turns.")] = None,
    burst: Annotated[int, typer.Option(min=1, help="Requests that come together, at --rate.")] = 1,
    clients: Annotated[int, typer.Option(min=1)] = 4,
    max_batch: Annotated[int, typer.Option(min=1)] = 8,
    ttft_ms: Annotated[float, typer.Option(help="The objective for the first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="The objective for each later one, on average.")] = 50.0,
    kv: Annotated[str | None, typer.Option(help="Round keys and values: int8 or fp8.")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay requests that come and go on this machine: latencies, throughput, and goodput under an objective.

    It opens no port: to serve over a network, load the artifact in vLLM, SGLang or TensorRT-LLM.
    """
    from optimizer.display import progress_for

    with errors_to_exit(as_json):
        from dataclasses import asdict

        from optimizer.recipe import serving_spec
        from optimizer.serving import describe, paged, serve

        spec = serving_spec(
            preset=workload, requests=requests, rate=rate, burst=burst, concurrency=clients, max_batch=max_batch,
            ttft_ms=ttft_ms, tpot_ms=tpot_ms,
        )  # fmt: skip
        progress = progress_for(quiet)
        with progress:
            with progress.phase("load"):
                runner = paged(load_runner(model, device, trust_remote_code), kv)
            with progress.phase("serving"):
                report, shape = serve(runner, spec, progress=progress.update)
        if as_json:
            echo_json({"workload": str(shape), "ledger": dict(runner.ledger.steps), **asdict(report)})
            return
        for line in describe(report, shape):
            typer.echo(line)


@app.command()
def compare(
    variants: Annotated[
        list[str],
        typer.Argument(help="Two or more, the baseline first: folders, hub ids, artifacts, http(s)://host/v1#model."),
    ],
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, separated by commas; empty for none.")
    ] = "reference_perplexity,reference_next_line,reference_cloze",
    limit: Annotated[int | None, typer.Option(help="Documents of each task (all unless given).", min=1)] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=3)] = 5,
    workload: Annotated[
        str | None, typer.Option(help="Also serve requests: chat, generation, summarization or reasoning.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="With --workload.")] = 40,
    rate: Annotated[float | None, typer.Option(help="With --workload: requests a second.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="With --workload, without --rate.")] = 4,
    ttft_ms: Annotated[float, typer.Option(help="With --workload: the objective for the first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="With --workload: the objective for each later one.")] = 50.0,
    price: Annotated[float | None, typer.Option(help="Price of the device per hour, for a cost of tokens.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of endpoints; else that of the first variant that runs here.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoints' key.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer of an endpoint.")] = 60.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are scored at a time.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for compare.html, .json and .md.")] = Path("out/compare"),
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure variants side by side: quality, speed, size, serving, layer by layer; one page that filters and sorts."""
    from optimizer.display import progress_for

    with errors_to_exit(as_json):
        from optimizer.compare import Settings, compare_variants
        from optimizer.compare_command import check_folder, describe, write
        from optimizer.evals.timing import Workload
        from optimizer.recipe import serving_spec
        from optimizer.variants import Options

        served = None
        if workload is not None:
            served = serving_spec(
                preset=workload, requests=requests, rate=rate, concurrency=clients, ttft_ms=ttft_ms, tpot_ms=tpot_ms
            )
        settings = Settings(
            tasks=tuple(task for task in tasks.split(",") if task), limit=limit,
            workload=Workload(batch, prompt, output), repeats=repeats, batch_size=batch_size, serving=served,
            price_per_hour=price, tokenizer=tokenizer,
            options=Options(device, trust_remote_code, api_key_env, timeout),
        )  # fmt: skip
        check_folder(out)
        progress = progress_for(quiet)
        with progress:
            found = compare_variants(variants, settings, progress)
        written = write(found, out)
        if as_json:
            typer.echo(found.to_json())
            return
        for line in describe(found):
            typer.echo(line)
        typer.echo(f"page: {written[0]}")


@app.command()
def history(
    folder: Annotated[Path, typer.Argument(help="A folder of runs: report.json and compare.json at any depth.")],
    out: Annotated[Path | None, typer.Option(help="Write the trend page to this .html file.")] = None,
    as_json: Json = False,
) -> None:
    """List the runs that reports under a folder tell of, oldest first, and draw how they developed."""
    with errors_to_exit(as_json):
        from optimizer.history import describe, read_history, save_page

        found = read_history(folder)
        if out is not None:
            save_page(found, out)
        if as_json:
            echo_json(found.to_dict())
            return
        for line in describe(found):
            typer.echo(line)
        if out is not None:
            typer.echo(f"page: {out}")
