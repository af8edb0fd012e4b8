"""Commands that make a model: `run`, `plan`, `quantize`, `ci`, and the recipes that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optimizer.commands.console import (
    Calibration,
    Device,
    Json,
    Model,
    Quiet,
    RemoteCode,
    echo_json,
    errors_to_exit,
)

app = typer.Typer()


@app.command()
def run(
    model: Model = "reference",
    recipe: Annotated[
        str, typer.Option(help="A built-in recipe, a YAML file, or `auto` to search for the best.")
    ] = "default",
    out: Annotated[Path | None, typer.Option(help="Folder for the artifact; its report lies beside it.")] = None,
    minutes: Annotated[float | None, typer.Option(help="With --recipe auto: the time it has (10).")] = None,
    goal: Annotated[
        list[str] | None, typer.Option(help="With --recipe auto: decode.speedup>=3, say; may be repeated.")
    ] = None,
    quality: Annotated[float | None, typer.Option(help="With --recipe auto: share of quality to keep.")] = None,
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

    with errors_to_exit(as_json):
        from optimizer.api import optimize
        from optimizer.artifact import check_output

        if out is not None:
            check_output(out / "artifact")
        progress = progress_for(quiet)
        with progress:
            result = optimize(
                model, recipe, calibration=calibration, device=device, progress=progress,
                trust_remote_code=trust_remote_code, out=None if out is None else out / "artifact", minutes=minutes,
                goals=goal or (), quality=quality, repair=repair, repair_minutes=repair_minutes,
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

    with errors_to_exit(as_json):
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
            echo_json(document(planned))
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

    with errors_to_exit(as_json):
        from dataclasses import asdict

        from optimizer.report_units import BYTES
        from optimizer.streaming import quantize_checkpoint

        progress = progress_for(quiet)
        with progress:
            done = quantize_checkpoint(
                model, recipe, out, calibration=calibration, device=device, restart=restart, progress=progress
            )
        report = done.report
        if as_json:
            echo_json(
                {
                    "artifact": str(done.artifact),
                    "resumed_at": done.resumed_at,
                    "predicted": asdict(done.predicted),
                    "report": asdict(report),
                }
            )
            return
        typer.echo(
            f"quantized {report.matched} of {report.expected} layers, "
            f"{' to '.join(BYTES.pair(report.bytes_before, report.bytes_after))}, in {done.seconds:.0f} s"
            + (f" (went on at part {done.resumed_at})" if done.resumed_at else "")
        )
        for skip in report.skipped:
            typer.echo(f"left as it was: {skip.name} ({skip.reason})")
        for note in report.notes:
            typer.echo(note)
        typer.echo(f"artifact: {done.artifact}, UNGATED: nothing was evaluated")


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

    with errors_to_exit(as_json):
        from optimizer.ci import describe, run_file
        from optimizer.ci_outputs import document
        from optimizer.ci_result import exit_code

        progress = progress_for(quiet)
        with progress:
            results = run_file(
                config, out=out, cache=cache, progress=progress, warn=lambda text: typer.echo(text, err=True)
            )
        if as_json:
            echo_json(document(results))
        else:
            for line in describe(results):
                typer.echo(line)
    raise typer.Exit(exit_code(results))


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the built-in recipes."""
    with errors_to_exit(as_json):
        from optimizer.recipe import Recipe, builtin

        found = {name: Recipe.from_yaml(path) for name, path in builtin().items()}
        if as_json:
            echo_json({name: recipe.model_dump(mode="json") for name, recipe in found.items()})
            return
        for name, recipe in found.items():
            typer.echo(f"{name:<12} {recipe.description}")
