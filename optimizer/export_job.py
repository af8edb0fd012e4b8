"""A job whose recipe exports: what the first export computes is measured, judged and saved, not PyTorch's runner.

The exports after the first are written as well, measured where they can run on this machine, and saved UNGATED. The
original and PyTorch's runner of the same weights stand beside them, timed in the same rounds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimizer.artifact import ManifestInfo, SourceRecord, write_artifact
from optimizer.backends.linear import weight_bytes
from optimizer.backends.runner import BaseRunner
from optimizer.backends.tensorrt.provider import this_gpu
from optimizer.errors import DeviceError, OptimizerError, UsageError
from optimizer.export_engines import check_engines
from optimizer.export_forms import WRITERS, ExportedRunner, ExportFolder, Form, Shape, engine_options
from optimizer.passes.base import Context, Pass, view
from optimizer.passes.decode import Decode
from optimizer.passes.merge_linears import MergeLinears
from optimizer.progress import Progress
from optimizer.recipe import ExportSpec, Recipe

UNGATED = "ungated"
"""The folder of an artifact that holds what was exported beside what the gate judged."""
SCORED = 512
"""Tokens of context that an evaluation window holds at most, which an export must take at once."""


def check_export(recipe: Recipe, passes: Sequence[Pass], model: Any) -> None:
    """Refuse, before any work, an export that could not be made, or could not be judged on this machine.

    Raises:
        UsageError: passes that shape PyTorch's runner, which is not what runs; a context that is too short; engines
            that stand first where no GPU can run them.
        DeviceError: no TensorRT, or no GPU to build for is named or here.
    """
    if recipe.export is None:
        return
    if idle := [step.name for step in passes if not step.stored]:
        raise UsageError(
            f"export: the exported graph is what runs, and {', '.join(idle)} would shape PyTorch's runner. Leave "
            "them out."
        )
    if recipe.serving is not None:
        raise UsageError("export: requests that come and go need PyTorch's paged runner. Leave `serving` out.")
    for index, spec in enumerate(recipe.export):
        shape = _shape(spec, recipe, model)
        if spec.to != "tensorrt":
            continue
        check_engines(model.config, engine_options(spec, shape))
        if index == 0:
            _require_gpu(spec)


def _require_gpu(spec: ExportSpec) -> None:
    rule = "export: the first export is what is measured, judged and released, and "
    try:
        here = this_gpu()
    except DeviceError as error:
        raise UsageError(
            f"{rule}no engine can run here. Name one that can before it, as `[{{to: onnx}}, {{to: tensorrt, targets: "
            "[sm89]}]`, or build engines alone with `optimizer export --to tensorrt`."
        ) from error
    if others := set(spec.targets or ()) - {here}:
        raise UsageError(
            f"{rule}an engine for {', '.join(sorted(others))} cannot be judged on {here}. Leave `targets` out, or "
            "build the others with `optimizer export --to tensorrt`."
        )


def _shape(spec: ExportSpec, recipe: Recipe, model: Any) -> Shape:
    work = recipe.workload
    served = [(work.batch, work.prompt, work.output), *((c.batch, c.context, c.output) for c in work.cells)]
    least = max(prompt + output for _, prompt, output in served)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(1024, least)
    context = spec.context or min(limit, max(1024, least))
    if not least <= context <= limit:
        raise UsageError(
            f"export: {spec.to} has a context of {context}; the workload needs {least}, and the model was made for "
            f"{limit}. Name one between."
        )
    prompt = max(min(SCORED, context), *(prompt for _, prompt, _ in served))
    return Shape(max(batch for batch, _, _ in served), prompt, context)


def exported_forms(model: Any, tokenizer: Any, recipe: Recipe, progress: Progress) -> list[Form]:
    """Export the optimized model as the recipe says, each form checked beside PyTorch, and open what can run here.

    The first is opened by an `ExportedRunner`. Raises what the exports do; nothing is left behind then.
    """
    forms: list[Form] = []
    for spec in recipe.export or ():
        kept = ExportFolder()
        try:
            with progress.phase(f"export {spec.to}"):
                forms += WRITERS[spec.to](model, tokenizer, kept, spec, _shape(spec, recipe, model), progress)
        except BaseException:
            for folder in (kept, *(form.folder for form in forms)):
                if folder is not None:
                    folder.remove()
            raise
    if forms[0].runner is None:
        raise DeviceError(f"export: {forms[0].name} cannot be judged here: {forms[0].reason}")
    return forms


FAILURES = (OptimizerError, RuntimeError, MemoryError)
"""What building PyTorch's runner may raise: its own refusals, and the device's or the compiler's."""


def pytorch_form(model: Any, tokenizer: Any, recipe: Recipe, progress: Progress) -> Form:
    """The same weights as this package would serve them in PyTorch: merged, with a static cache and compiled steps.

    Where an export may round the inputs of quantized layers to int8, so does it.
    """
    own = view(model)
    int8_inputs = any(spec.int8_inputs for spec in recipe.export or ())
    context = Context(tokenizer=tokenizer, batch=recipe.workload.batch)
    work, began = recipe.workload, time.perf_counter()
    runner: BaseRunner | None = None
    reason = ""
    with progress.phase("PyTorch's runner"):
        try:
            for step in (MergeLinears(required=False), Decode(int8_inputs=int8_inputs)):
                step.check(own, context)
                step.run(own, context)
            built: Any = context.make_runner(own, tokenizer)
            built.warm_up(work.batch, work.prompt + work.output)
            runner = built
        except FAILURES as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    dtype = str(next(own.parameters()).dtype).removeprefix("torch.")
    rounded = ", inputs of quantized layers rounded to int8" if int8_inputs else ""
    return Form(
        "pytorch", f"PyTorch, {dtype}, merged and compiled{rounded}", weight_bytes(own), time.perf_counter() - began,
        runner, reason,
    )  # fmt: skip


def save_forms(forms: Sequence[Form], released: ExportedRunner, folder: Path, source: SourceRecord) -> None:
    """Every file of the released export into `folder`, and the others below `ungated/`, each as an artifact.

    Those are marked UNGATED in manifests of their own: they were built and perhaps measured, and no floor judged them.
    """
    shutil.copytree(released.folder, folder, dirs_exist_ok=True)
    others = {form.to: form.folder.path for form in forms if form.folder and form.folder.path != released.folder}
    for name, path in others.items():
        info = ManifestInfo(source=source, verdict="ungated")
        write_artifact(folder / UNGATED / name, build=partial(_copy, path), manifest=info)


def _copy(path: Path, folder: Path) -> None:
    shutil.copytree(path, folder, dirs_exist_ok=True)
