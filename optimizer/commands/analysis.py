"""Commands that say what binds, and what evidence needs: `diagnose`, `roofline`, `power`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

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
    seconds: Annotated[
        float, typer.Option(min=0, help="For the repetitions of each part; long steps are repeated less.")
    ] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Write the diagnosis to this HTML file as well.")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Where prefill and decode spend their time, what binds them on this machine, and what to do next."""
    from optimizer.display import progress_for

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with errors_to_exit(as_json):
        from optimizer.diagnose_command import analyse, describe, optimized_runner, save, show

        progress = progress_for(quiet)
        with progress:
            if recipe is not None:
                runner = optimized_runner(
                    model, recipe, batch=batch, device=device, trust_remote_code=trust_remote_code, progress=progress
                )
            else:
                with progress.phase("load"):
                    runner = load_runner(model, device, trust_remote_code)
            found = analyse(
                runner, batch=batch, prompt=prompt, output=output, context=context, seconds=seconds, progress=progress
            )
        title = f"{model}, {f'recipe {recipe}' if recipe else type(runner).__name__}"
        if out is not None:
            save(describe(found, title, recipe), out, title)
        if as_json:
            echo_json({"model": model, "recipe": recipe, **found.to_dict()})
        else:
            show(describe(found, title, recipe))


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
    with errors_to_exit(as_json):
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
            echo_json(found)
        else:
            typer.echo(describe(found))


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
    with errors_to_exit(as_json):
        from optimizer.power_command import analyse, describe

        found = analyse(margin, flips=flips, deviation=deviation, items=items, alpha=alpha, power=target)
        if as_json:
            echo_json(found)
        else:
            typer.echo(describe(found))
