"""Commands about what is shipped, and where it runs: `export`, `verify`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimizer.commands.console import (
    Json,
    Quiet,
    RemoteCode,
    echo_json,
    errors_to_exit,
)

app = typer.Typer()


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

    with errors_to_exit(as_json):
        from optimizer.export_targets import export_to

        options = {
            "dtype": dtype, "int8_inputs": int8_inputs, "target": target, "batch": batch, "prompt": prompt,
            "context": context, "weight_streaming": weight_streaming, "version_compatible": version_compatible,
        }  # fmt: skip
        progress = progress_for(quiet)
        with progress, progress.phase("export"):
            found, text = export_to(model, out, to, options, trust_remote_code=trust_remote_code, progress=progress)
        if as_json:
            echo_json(found)
        else:
            typer.echo(text)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="An artifact.")], as_json: Json = False) -> None:
    """Check every file of an artifact against its manifest, and name those that differ."""
    with errors_to_exit(as_json):
        from optimizer.artifact import read_manifest, verify_artifact

        manifest, wrong = read_manifest(folder), verify_artifact(folder)
        if as_json:
            problems = [{"path": item.path, "problem": item.problem} for item in wrong]
            echo_json({"digest": manifest.digest, "verdict": manifest.verdict, "mismatches": problems})
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
    with errors_to_exit(as_json):
        from optimizer.display import progress_for
        from optimizer.doctor import checks

        progress = progress_for(quiet)
        with progress, progress.phase("check (compiles the CPU kernels the first time)"):
            found = checks()
        if as_json:
            echo_json([vars(check) for check in found])
            return
        for check in found:
            typer.echo(f"{'ok' if check.ok else 'no':<3} {check.name:<22} {check.detail}")
