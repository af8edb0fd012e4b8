"""The `optimizer` command. Results go to stdout, everything else to stderr; `--json` prints one JSON document.

Exit codes: 0 passed, 1 a floor was missed, 2 usage or configuration, 3 a failure while running. Heavy libraries are
imported by the command that needs them, so `--help` stays fast.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="optimizer",
    help="Make a Hugging Face language model smaller and faster, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or `reference` for the embedded model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Text (.txt) or rows (.jsonl, .json, .parquet) to calibrate on; else built-in text.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
RemoteCode = Annotated[bool, typer.Option(help="Run Python code that the model's repository ships.")]


@app.command()
def run(
    model: Model = "reference",
    recipe: Annotated[
        str, typer.Option(help="A built-in recipe, a YAML file, or `auto` to search for the best.")
    ] = "default",
    out: Annotated[Path | None, typer.Option(help="Folder for the artifact; its report lies beside it.")] = None,
    minutes: Annotated[float | None, typer.Option(help="With --recipe auto: the time it has (10).")] = None,
    calibration: Calibration = None,
    device: Device = "auto",
    ungated: Annotated[
        bool,
        typer.Option(help="Write the artifact even if floors are missed, marked UNGATED; the exit code is still 1."),
    ] = False,
    repair: Annotated[
        bool | None,
        typer.Option("--repair/--no-repair", help="Gate again without what carries a loss; as the recipe says."),
    ] = None,
    repair_minutes: Annotated[
        float | None, typer.Option(min=0, help="Spent at most on a missed floor; 0: none. As the recipe says.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Optimize a model, measure it against the original, and release it if every floor holds."""
    from optimizer.display import print_table, progress_for

    with _errors_to_exit(as_json):
        from optimizer.api import optimize
        from optimizer.artifact import check_output

        if out is not None:
            check_output(out / "artifact")
        progress = progress_for(quiet)
        with progress:
            result = optimize(
                model, recipe, calibration=calibration, device=device, progress=progress,
                trust_remote_code=trust_remote_code, out=None if out is None else out / "artifact", minutes=minutes,
                repair=repair, repair_minutes=repair_minutes,
            )  # fmt: skip
            if out is not None and ungated and not result.passed:
                result.save(out / "artifact", ungated=True)
        report = result.report
        if ungated and not result.passed:
            report = report.model_copy(update={"verdict": "ungated"})
        written = []
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            written = [str(report.save(out / f"report.{kind}")) for kind in ("html", "md", "json")]
            result.save_lm_eval(out / "lm_eval")
            if report.plan is not None:
                (out / "plan.yaml").write_text(result.outcome.recipe.to_yaml(), encoding="utf-8")
        if as_json:
            typer.echo(report.to_json())
        else:
            print_table(report)
            for floor in report.failed_floors:
                typer.echo(f"missed: {floor.metric}: {floor.reason}")
            _echo_attribution(report)
            typer.echo(report.summary)
            if out is not None:
                typer.echo(f"artifact: {_fate(out / 'artifact', result.passed, ungated)}")
                typer.echo(f"report:   {written[0]}")
                typer.echo(f"lm-eval:  {out / 'lm_eval'}")
    raise typer.Exit(0 if result.passed else 1)


def _echo_attribution(report: Any) -> None:
    """What was found about a refusal: causes, candidates gated again, and what was not sure."""
    found = report.attribution
    if found is None:
        return
    for floor in found.refused if found.reverted else ():
        typer.echo(f"refused as given: {floor.reason}")
    for cause in found.causes:
        typer.echo(f"because: {cause}")
    for attempt in found.attempts:
        verdict = "passed" if attempt.passed else "; ".join(attempt.missed)
        typer.echo(f"gated again with {'; '.join(attempt.reverted)}: {verdict}")
    for note in found.notes:
        if note not in found.causes:
            typer.echo(f"note: {note}")


@app.command()
def ci(
    config: Annotated[Path, typer.Option(help="What to run: models, recipes, where results go (docs/ci.md).")] = Path(
        "optimizer.yaml"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder for the results, instead of the one in the file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of kept baselines, likewise.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every job of an optimizer.yaml and write what CI systems read: JUnit, summary, comment, outputs."""
    from optimizer.display import progress_for

    with _errors_to_exit(as_json):
        from optimizer.ci import describe, run_file
        from optimizer.ci_outputs import document
        from optimizer.ci_result import exit_code

        progress = progress_for(quiet)
        with progress:
            results = run_file(
                config, out=out, cache=cache, progress=progress, warn=lambda text: typer.echo(text, err=True)
            )
        if as_json:
            _echo_json(document(results))
        else:
            for line in describe(results):
                typer.echo(line)
    raise typer.Exit(exit_code(results))


def _fate(artifact: Path, passed: bool, ungated: bool) -> str:
    """Where the artifact is, or why there is none."""
    if passed:
        return str(artifact)
    if ungated:
        return f"{artifact}, marked UNGATED"
    earlier = f"; {artifact} is an earlier run's, untouched" if artifact.exists() else ""
    return f"none, the gate refused it{earlier}"


@app.command()
def plan(
    model: Model = "reference",
    recipe: Annotated[
        str,
        typer.Option(help="What to hold to: workload, evaluation and floors of a recipe, whose passes are replaced."),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for plan.yaml, and for what was measured.")] = Path("out/plan"),
    goal: Annotated[list[str] | None, typer.Option(help="For example decode.speedup>=3; may be repeated.")] = None,
    quality: Annotated[
        float | None, typer.Option(help="Share of quality to keep: 0.99 allows 1 % more perplexity.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="No try is begun that would end later.")] = 10.0,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    prompt: Annotated[int | None, typer.Option(min=1)] = None,
    output: Annotated[int | None, typer.Option(min=2)] = None,
    calibration: Calibration = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the fastest recipe that keeps the quality; run again to go on where a killed search stopped."""
    from optimizer.display import progress_for

    with _errors_to_exit(as_json):
        from optimizer.plan import parse_goal
        from optimizer.plan_command import base_recipe, describe, document, make_plan

        goals = [parse_goal(text) for text in goal or ()]
        size = {"batch": batch, "prompt": prompt, "output": output}
        base = base_recipe(recipe, goals=goals, quality=quality, workload=size)
        progress = progress_for(quiet)
        with progress:
            planned = make_plan(
                model, base, out, goals=goals, minutes=minutes, calibration=calibration, device=device,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
        if as_json:
            _echo_json(document(planned))
        else:
            typer.echo(describe(planned))
            if planned.plan.chosen is not None:
                typer.echo(f"recipe: {out / 'plan.yaml'}")
    raise typer.Exit(0 if planned.plan.passed else 1)


@app.command()
def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option(help="A built-in recipe or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    calibration: Calibration = None,
    device: Device = "auto",
    restart: Annotated[bool, typer.Option(help="Throw away the work of an earlier run instead of going on.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint of any size block by block, without evaluating it; goes on where a killed run stopped."""
    from optimizer.display import progress_for

    with _errors_to_exit(as_json):
        from dataclasses import asdict

        from optimizer.streaming import quantize_checkpoint

        progress = progress_for(quiet)
        with progress:
            done = quantize_checkpoint(
                model, recipe, out, calibration=calibration, device=device, restart=restart, progress=progress
            )
        report = done.report
        if as_json:
            _echo_json(
                {
                    "artifact": str(done.artifact),
                    "resumed_at": done.resumed_at,
                    "predicted": asdict(done.predicted),
                    "report": asdict(report),
                }
            )
            return
        typer.echo(
            f"quantized {report.matched} of {report.expected} layers, {report.bytes_before / 1e9:.2f} to "
            f"{report.bytes_after / 1e9:.2f} GB, in {done.seconds:.0f} s"
            + (f" (went on at part {done.resumed_at})" if done.resumed_at else "")
        )
        for skip in report.skipped:
            typer.echo(f"left as it was: {skip.name} ({skip.reason})")
        for note in report.notes:
            typer.echo(note)
        typer.echo(f"artifact: {done.artifact}, UNGATED: nothing was evaluated")


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the built-in recipes."""
    with _errors_to_exit(as_json):
        from optimizer.recipe import Recipe, builtin

        found = {name: Recipe.from_yaml(path) for name, path in builtin().items()}
        if as_json:
            _echo_json({name: recipe.model_dump(mode="json") for name, recipe in found.items()})
            return
        for name, recipe in found.items():
            typer.echo(f"{name:<12} {recipe.description}")


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

    with _errors_to_exit(as_json):
        from optimizer.evals.quality import evaluate as measure
        from optimizer.pipeline import WINDOW

        progress = progress_for(quiet)
        with progress:
            with progress.phase("load"):
                runner = _runner(model, device, trust_remote_code)
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
            _echo_json({"model": model, "metrics": rows, "non_finite": found.non_finite})
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

    with _errors_to_exit(as_json):
        from optimizer.evals.timing import Workload, measure_generation, ratio

        progress = progress_for(quiet)
        names = [model] + ([against] if against else [])
        if against == model:
            names[1] = f"{model} (again)"
        with progress:
            with progress.phase("load"):
                loaded = [_runner(path, device, trust_remote_code) for path in (model, against) if path]
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
            _echo_json(document)
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

    with _errors_to_exit(as_json):
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
                runner = paged(_runner(model, device, trust_remote_code), kv)
            with progress.phase("serving"):
                report, shape = serve(runner, spec, progress=progress.update)
        if as_json:
            _echo_json({"workload": str(shape), "ledger": dict(runner.ledger.steps), **asdict(report)})
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

    with _errors_to_exit(as_json):
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
    with _errors_to_exit(as_json):
        from optimizer.history import describe, read_history, save_page

        found = read_history(folder)
        if out is not None:
            save_page(found, out)
        if as_json:
            _echo_json(found.to_dict())
            return
        for line in describe(found):
            typer.echo(line)
        if out is not None:
            typer.echo(f"page: {out}")


@app.command()
def roofline(
    model: Annotated[str | None, typer.Argument(help="A model folder or config.json.")] = None,
    params: Annotated[
        float | None, typer.Option(help="Instead of a model: its number of parameters, e.g. 70e9.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="With --params.")] = 0,
    d_model: Annotated[int, typer.Option(min=0, help="With --params.")] = 0,
    heads: Annotated[int, typer.Option(min=0, help="With --params.")] = 0,
    kv_heads: Annotated[int, typer.Option(min=0, help="With --params.")] = 0,
    head_dim: Annotated[int, typer.Option(min=0, help="With --params.")] = 0,
    gpu: Annotated[str, typer.Option(help="V100, A100, H100, H200, B200, or `measured` for this machine.")] = "H100",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4, 8 or 16.")] = 16,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a 16-bit scale.")] = None,
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached key or value.")] = 16,
    prompt: Annotated[int, typer.Option(min=1)] = 4096,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    context: Annotated[int, typer.Option(min=0, help="Tokens cached before a decode step.")] = 0,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a fleet; the options below need it.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallel; the best division if none is given.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Groups that share the experts.")] = None,
    microbatches: Annotated[int | None, typer.Option(min=1, help="In a pipeline; its depth unless given.")] = None,
    interconnect: Annotated[float | None, typer.Option(help="GB/s that a GPU sends in its machine.")] = None,
    network: Annotated[float | None, typer.Option(help="GB/s that a GPU sends to other machines.")] = None,
    latency_us: Annotated[float | None, typer.Option(help="Of a collective; 5 unless given.")] = None,
    imbalance: Annotated[float | None, typer.Option(help="Tokens of the busiest experts over the mean; 1.")] = None,
    reserve: Annotated[float | None, typer.Option(help="GB of each GPU to keep free.")] = None,
    output: Annotated[int | None, typer.Option(min=2, help="Tokens that a request asks for; 512.")] = None,
    load: Annotated[float | None, typer.Option(help="Requests a second to serve.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="The objective for the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="The objective for each later one.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU hour, in any currency.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The floor under prefill and decode times: FLOPs, bytes, intensity, and what bounds them; of a fleet, too."""
    with _errors_to_exit(as_json):
        from optimizer.display import progress_for
        from optimizer.fleet_command import FleetOptions
        from optimizer.roofline_command import analyse, describe

        fleet = FleetOptions(
            gpus, tp, pp, ep, microbatches, interconnect, network, latency_us, imbalance, reserve, output, load,
            ttft_ms, tpot_ms, price,
        )  # fmt: skip
        progress = progress_for(quiet or gpu != "measured")
        with progress, progress.phase("measure this machine"):
            found = analyse(
                model, params, {"layers": layers, "d_model": d_model, "heads": heads, "kv_heads": kv_heads,
                                "head_dim": head_dim},
                gpu=gpu, bits=bits, group_size=group_size, kv_bits=kv_bits, prompt=prompt, batch=batch,
                context=context, fleet=fleet,
            )  # fmt: skip
        if as_json:
            _echo_json(found)
        else:
            typer.echo(describe(found))


@app.command()
def diagnose(
    model: Model = "reference",
    recipe: Annotated[str | None, typer.Option(help="Diagnose the runner that this recipe makes of the model.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[int, typer.Option(min=4, help="Tokens of a request; what is next is ranked by it.")] = 64,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the decode step sees; else the prompt and half the output.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the diagnosis to this HTML file as well.")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Where prefill and decode spend their time, what binds them on this machine, and what to do next."""
    from optimizer.display import progress_for

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with _errors_to_exit(as_json):
        from optimizer.diagnose_command import analyse, describe, optimized_runner, save, show

        progress = progress_for(quiet)
        with progress:
            if recipe is not None:
                runner = optimized_runner(
                    model, recipe, batch=batch, device=device, trust_remote_code=trust_remote_code, progress=progress
                )
            else:
                with progress.phase("load"):
                    runner = _runner(model, device, trust_remote_code)
            found = analyse(runner, batch=batch, prompt=prompt, output=output, context=context, progress=progress)
        title = f"{model}, {f'recipe {recipe}' if recipe else type(runner).__name__}"
        if out is not None:
            save(describe(found, title, recipe), out, title)
        if as_json:
            _echo_json({"model": model, "recipe": recipe, **found.to_dict()})
        else:
            show(describe(found, title, recipe))


@app.command()
def power(
    margin: Annotated[float, typer.Option(help="The loss to exclude: 0.01 is one point of accuracy.")],
    flips: Annotated[float | None, typer.Option(help="Share of 0/1 answers that change, both ways together.")] = None,
    deviation: Annotated[float | None, typer.Option(help="Instead: deviation of one item's paired difference.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Say what so many items can show, too.")] = None,
    alpha: Annotated[float, typer.Option(help="One-sided error rate: how often a loss of the margin passes.")] = 0.05,
    target: Annotated[float, typer.Option("--power", help="How often a model without loss must pass.")] = 0.8,
    as_json: Json = False,
) -> None:
    """How many items a margin needs before a gate can tell, and what a given number of items can show."""
    with _errors_to_exit(as_json):
        from optimizer.power_command import analyse, describe

        found = analyse(margin, flips=flips, deviation=deviation, items=items, alpha=alpha, power=target)
        if as_json:
            _echo_json(found)
        else:
            typer.echo(describe(found))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, an artifact, or `reference`.")],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    to: Annotated[
        str, typer.Option(help="onnx (ONNX Runtime, onnxruntime-genai), tensorrt (engines) or aot (PyTorch package).")
    ] = "onnx",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations and cache: float32 (onnx) or float16 (tensorrt) unless given.")
    ] = None,
    int8_inputs: Annotated[
        bool, typer.Option(help="onnx: let the runtime round the inputs of quantized layers to int8.")
    ] = False,
    target: Annotated[list[str] | None, typer.Option(help="tensorrt: a GPU to build for, as sm89; repeatable.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="tensorrt, aot: rows at most.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="tensorrt: tokens of a prompt at most.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="tensorrt, aot: tokens of a row at most.")] = None,
    weight_streaming: Annotated[bool, typer.Option(help="tensorrt: weights may stay in host memory.")] = False,
    version_compatible: Annotated[bool, typer.Option(help="tensorrt: later versions may run the engine.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model or an artifact for another runtime, checked against PyTorch's logits."""
    from optimizer.display import progress_for

    with _errors_to_exit(as_json):
        from optimizer.export_targets import export_to

        options = {
            "dtype": dtype, "int8_inputs": int8_inputs, "target": target, "batch": batch, "prompt": prompt,
            "context": context, "weight_streaming": weight_streaming, "version_compatible": version_compatible,
        }  # fmt: skip
        progress = progress_for(quiet)
        with progress, progress.phase("export"):
            found, text = export_to(model, out, to, options, trust_remote_code=trust_remote_code, progress=progress)
        if as_json:
            _echo_json(found)
        else:
            typer.echo(text)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="An artifact.")], as_json: Json = False) -> None:
    """Check every file of an artifact against its manifest, and name those that differ."""
    with _errors_to_exit(as_json):
        from optimizer.artifact import read_manifest, verify_artifact

        manifest, wrong = read_manifest(folder), verify_artifact(folder)
        if as_json:
            problems = [{"path": item.path, "problem": item.problem} for item in wrong]
            _echo_json({"digest": manifest.digest, "verdict": manifest.verdict, "mismatches": problems})
        else:
            for item in wrong:
                typer.echo(f"{item.path}: {item.problem}")
            state = (
                f"{len(wrong)} of {len(manifest.files)} files differ" if wrong else f"{len(manifest.files)} files match"
            )
            typer.echo(f"{state}; verdict {manifest.verdict.upper()}, digest {manifest.digest}")
    raise typer.Exit(3 if wrong else 0)


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """What this machine can run, and why not the rest."""
    with _errors_to_exit(as_json):
        from optimizer.display import progress_for
        from optimizer.doctor import checks

        progress = progress_for(quiet)
        with progress, progress.phase("check (compiles the CPU kernels the first time)"):
            found = checks()
        if as_json:
            _echo_json([vars(check) for check in found])
            return
        for check in found:
            typer.echo(f"{'ok' if check.ok else 'no':<3} {check.name:<22} {check.detail}")


def _echo_json(document: Any) -> None:
    """One JSON document on stdout; a value that is not finite, which JSON cannot say, becomes null."""
    typer.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _runner(model: str, device: str, trust_remote_code: bool) -> Any:
    """An artifact on the runner it is served by; any other model as Hugging Face runs it."""
    from optimizer.artifact import MANIFEST
    from optimizer.backends.runner import EagerRunner
    from optimizer.pipeline import choose_device
    from optimizer.source import load_source

    if (Path(model) / MANIFEST).is_file():
        from optimizer.api import load

        return load(model, device=device)
    source = load_source(model, device=choose_device(device), trust_remote_code=trust_remote_code)
    return EagerRunner(source.model, source.tokenizer)


class _errors_to_exit:  # noqa: N801 (reads as a statement)
    """Print a typed error as one line (or a JSON object) on stderr and leave with its exit code.

    Anything else is a defect: it keeps its traceback, and leaves with 3 like every failure while running.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        from optimizer.errors import OptimizerError

        if isinstance(error, OptimizerError):
            self._leave(type(error).__name__, str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            self._leave("Interrupted", "interrupted", 130)
        if isinstance(error, BrokenPipeError):  # the reader of our output went away: what a shell calls SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141)
        if isinstance(error, Exception) and not isinstance(error, typer.Exit | typer.Abort):
            import traceback

            traceback.print_exception(error)
            self._leave(type(error).__name__, str(error) or "no message", 3)

    def _leave(self, kind: str, message: str, code: int) -> NoReturn:
        text = json.dumps({"error": kind, "message": message}) if self.as_json else f"error: {message}"
        typer.echo(text, err=True)
        raise typer.Exit(code)


def main() -> None:
    """Entry point of the `optimizer` command."""
    app()


if __name__ == "__main__":
    main()
