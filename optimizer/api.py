"""`optimize` and `load`: the library's two entry points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.artifact import (
    MANIFEST,
    ManifestInfo,
    SourceRecord,
    check_output,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from optimizer.backends.capture import compile_ahead
from optimizer.backends.paged_runner import PagedRunner
from optimizer.backends.runner import BaseRunner
from optimizer.calibration import load_calibration
from optimizer.card import model_card
from optimizer.checkpoint import load_checkpoint, save_checkpoint
from optimizer.errors import ArtifactError, OptimizerError, RecipeError, UsageError
from optimizer.evals.gate import Floor
from optimizer.evals.lm_eval_results import save_lm_eval_results, seeds
from optimizer.export_command import is_export, load_export
from optimizer.export_forms import ExportedRunner
from optimizer.export_job import save_forms
from optimizer.inspection import inspect_checkpoint
from optimizer.job_diagnosis import with_diagnosis
from optimizer.passes.base import Context, Pass
from optimizer.passes.decode import Decode
from optimizer.passes.merge_linears import MergeLinears
from optimizer.pipeline import Outcome, apply_passes, choose_device
from optimizer.plan import parse_goal
from optimizer.plan_command import AUTO, MINUTES, base_recipe, plan_model
from optimizer.plan_entry import plan_entry
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.repair import run_and_repair
from optimizer.report import Report
from optimizer.report_build import build_report
from optimizer.source import load_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimizer.baseline_cache import BaselineCache


class NotReleasedError(OptimizerError):
    """The gate refused the model, so no artifact was written. The report says which floors were missed."""

    exit_code = 1


@dataclass(frozen=True)
class Result:
    """What `optimize` returns: the optimized runner, the report, and the verdict."""

    model: BaseRunner
    report: Report
    outcome: Outcome

    @property
    def verdict(self) -> str:
        """`passed` or `failed`."""
        return self.report.verdict

    @property
    def passed(self) -> bool:
        """Whether every floor held."""
        return self.outcome.verdict.passed

    def save(self, out: str | Path, *, ungated: bool = False) -> Path:
        """Write the artifact: weights, configuration, tokenizer, recipe, report, model card and manifest.

        Raises `NotReleasedError` when a floor was missed, unless `ungated`, which marks it UNGATED everywhere.
        """
        if not self.passed and not ungated:
            missed = ", ".join(floor.metric for floor in self.report.failed_floors)
            raise NotReleasedError(
                f"the gate refused this model ({missed}). Pass ungated=True to write it marked UNGATED."
            )
        report = self.report if self.passed else self.report.model_copy(update={"verdict": "ungated"})
        outcome, recipe = self.outcome, self.outcome.recipe
        source = SourceRecord(name=outcome.source.name, revision=outcome.source.revision, digest=outcome.source.digest)

        def build(folder: Path) -> None:
            if isinstance(self.model, ExportedRunner):
                save_forms(outcome.forms, self.model, folder, source)
            else:
                save_checkpoint(self.model.model, self.model.tokenizer, folder, recipe.layout)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            for name in ("report.json", "report.md", "report.html"):
                report.save(folder / name)
            card = model_card(
                name=f"{Path(outcome.source.name).name}-{recipe.name}",
                base_model=outcome.source.name,
                recipe=recipe.to_yaml(),
                results=report.to_markdown(),
                verdict=report.verdict,
                revision=outcome.source.revision,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")

        seeds = {"recipe": recipe.seed, "evaluation": recipe.evaluation.seed}
        info = ManifestInfo(source=source, verdict=report.verdict, seeds=seeds)
        write_artifact(out, build=build, manifest=info, required_bytes=outcome.weight_bytes)
        return Path(out)

    def save_lm_eval(self, folder: str | Path) -> list[Path]:
        """Write both evaluations as lm-eval does, `<folder>/<model>/results_*.json` and `samples_*.jsonl`.

        The optimized model is named after the source and the recipe. A baseline that an earlier run measured has no
        samples, and is not written.
        """
        outcome, spec = self.outcome, self.outcome.recipe.evaluation
        options = {"batch_size": spec.batch_size, "device": str(self.model.device), **seeds(spec.seed)}
        name, costs = outcome.source.name, outcome.costs
        written = []
        for variant, result, phase in zip(
            (name, f"{name}-{outcome.recipe.name}"), outcome.quality, ("baseline quality", "optimized quality"),
            strict=True,
        ):  # fmt: skip
            if result.samples:
                written += save_lm_eval_results(
                    result, Path(folder), model=variant, options=options, seconds=costs.get(phase)
                )
        return written


def optimize(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe = "default",
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    device: str | None = None,
    out: str | Path | None = None,
    inplace: bool = False,
    trust_remote_code: bool = False,
    repair: bool | None = None,
    repair_minutes: float | None = None,
    progress: Progress | None = None,
    minutes: float | None = None,
    goals: Sequence[str | Floor] = (),
    quality: float | None = None,
    baselines: BaselineCache | None = None,
) -> Result:
    """Optimize a causal language model, measure it against the original, and judge it by the recipe's floors.

    `model` is a local folder, a hub id, "reference" for the embedded model, or a loaded `PreTrainedModel`, which is
    left as it was unless `inplace`: then it becomes the optimized one, whatever the verdict. `recipe` is a built-in
    name, a YAML file or a `Recipe`. `calibration` is for passes that calibrate: text, texts, chats, token ids, a
    `datasets` object or the `Path` of a file; without it they use built-in text, and the report says so. Giving it to
    a recipe that does not calibrate is an error. With `out`, the artifact is saved there if the gate passes.
    `baselines` keeps the original's quality and the machine's ceilings for the next run.

    The recipe `auto` is made here: candidates are predicted, tried and judged for at most `minutes` (10 unless given),
    and the fastest that holds its floors is the result. `goals`, such as "decode.speedup>=3", are more floors, and say
    which phase is made faster; `quality` is the share of it to keep. With `out` what was measured is kept beside it,
    in `.<name>.plan`, so that a run that was killed goes on.

    If the gate refuses the model, up to `repair_minutes` are spent on finding the pass, pair of passes or layers that
    carry the loss and, with `repair`, on gating again without them; the recipe says both unless they are given here.
    The result is then of the repaired recipe, `result.outcome.recipe`, and the report keeps the original verdict.

    Raises a subclass of `OptimizerError` that names the thing, the rule and the remedy.
    """
    planned = recipe == AUTO
    if not planned and (minutes is not None or quality is not None or goals):
        raise UsageError(
            f"minutes, goals and quality are those of a plan, and recipe {str(recipe)!r} has none. Use recipe auto."
        )
    asked_for = [goal if isinstance(goal, Floor) else parse_goal(goal) for goal in goals]
    recipe = base_recipe(goals=asked_for, quality=quality) if planned else Recipe.load(recipe)
    asked = {"repair": repair, "repair_minutes": repair_minutes}
    recipe = recipe.updated({key: value for key, value in asked.items() if value is not None})
    progress = progress or Progress()
    target = choose_device(device)
    if out is not None:
        check_output(out)
    with progress.phase("load"):
        source = load_source(model, tokenizer=tokenizer, device=target, trust_remote_code=trust_remote_code)
    data = None
    if planned or any(getattr(step, "calibrates", False) for step in recipe.build_passes()):
        with progress.phase("calibration data"):
            data = load_calibration(calibration, source.tokenizer, source.model.config, recipe.calibration)
    elif calibration is not None:
        names = ", ".join(step.name for step in recipe.build_passes())
        raise RecipeError(
            f"calibration was given, but no pass of recipe {recipe.name!r} calibrates ({names}). Leave it out."
        )
    if out is not None:
        check_output(out, sum(p.numel() * p.element_size() for p in source.model.parameters()))
    baseline = None
    if baselines is not None:
        given = calibration if isinstance(calibration, Path) else None
        baseline = partial(baselines.baseline, source=source, recipe=recipe, progress=progress, calibration=given)
    if planned:
        found = plan_model(
            source, recipe, goals=asked_for, calibration=data, minutes=MINUTES if minutes is None else minutes,
            progress=progress, baseline=baseline,
            folder=None if out is None else Path(out).absolute().with_name(f".{Path(out).name}.plan"),
        )  # fmt: skip
        outcome = found.outcome(inplace=inplace)
        report = build_report(outcome).model_copy(update={"plan": plan_entry(found.plan)})
    else:
        outcome = run_and_repair(
            source, recipe, calibration=data, inplace=inplace, progress=progress, baseline=baseline
        )
        report = build_report(outcome)
    if recipe.diagnose:
        report = with_diagnosis(report, outcome, progress, replaced=inplace)
    if baselines is not None:
        report = report.model_copy(update={"warnings": [*report.warnings, *baselines.notes]})
    result = Result(outcome.runner, report, outcome)
    if out is not None and result.passed:
        with progress.phase("save"):
            result.save(out)
    return result


def load(folder: str | Path, *, device: str | None = None, verify: bool = True) -> BaseRunner:
    """The runner of a saved artifact, on the passes its recipe names; or of a checkpoint that another tool quantized.

    `verify` checks every file of an artifact against its sha256 first. A folder without a manifest is read as a GPTQ,
    AWQ, compressed-tensors or block-FP8 checkpoint and decoded by our own kernels. An exported folder gets the runner
    of its runtime.
    """
    folder = Path(folder)
    if is_export(folder):
        return load_export(folder, device=device or "auto", verify=verify)
    passes: list[Pass] = [MergeLinears(required=False), Decode()]
    batch = 1
    if (folder / MANIFEST).is_file() or not _is_quantized(folder):
        read_manifest(folder)
        if verify and (wrong := verify_artifact(folder)):
            problems = "; ".join(f"{m.path} {m.problem}" for m in wrong)
            raise ArtifactError(f"{folder} is not as it was written: {problems}")
        recipe = Recipe.from_yaml(folder / "recipe.yaml")
        passes, batch = [p for p in recipe.build_passes() if not p.stored], recipe.workload.batch
    model = load_checkpoint(folder, choose_device(device))
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    context = Context(tokenizer=tokenizer, batch=batch)
    apply_passes(model, passes, context, Progress())
    runner = context.make_runner(model, tokenizer)
    if isinstance(runner, PagedRunner) and runner.options.capture == "ahead":
        compile_ahead(runner)
    return runner


def _is_quantized(folder: Path) -> bool:
    """Whether the folder is a checkpoint that says itself how it is quantized."""
    if (folder / "quantize_config.json").is_file():
        return True
    return (folder / "config.json").is_file() and inspect_checkpoint(folder).quantization_config is not None
