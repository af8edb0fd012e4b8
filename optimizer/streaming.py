"""Quantize a checkpoint of any size block by block: memory holds one block and the calibration activations.

The model is built without data (meta device). Each block's tensors are read from safetensors, quantized, written and
dropped again. What is finished lies in a work folder beside the result, so a run that was killed goes on where it was:

    .<out>.work/state.json                what the work is of: model, recipe, data, versions, device
                part-00000.safetensors    the finished tensors of a block, by their names in the checkpoint
                part-00000.json           what was done to them, written last: the block is done
                hidden-00001.safetensors  the inputs of the next block

The same model, recipe and data give the same bytes on one machine, whether the run was interrupted or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimizer import __version__
from optimizer.artifact import ManifestInfo, SourceRecord, check_output, write_artifact
from optimizer.calibration import load_calibration
from optimizer.card import model_card
from optimizer.checkpoint import check_layout, find_layout
from optimizer.errors import RecipeError
from optimizer.inspection import CheckpointInfo, inspect_checkpoint, load_config, quiet
from optimizer.lazy_weights import LazyWeights, empty_model, return_freed_memory
from optimizer.parts import Parts
from optimizer.passes.base import Context, PassReport, Skip, stopwatch
from optimizer.passes.blocks import BlockInputs, block_names, calibration_dtype
from optimizer.passes.quantize import Part, Quantize, quantize_rest, start
from optimizer.passes.quantize_block import quantize_block, quantize_layers
from optimizer.pipeline import choose_device
from optimizer.preflight import Preflight, Sizes, predict, rehearse, require_room, resident_bytes
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.source import check_tokenizer, load_tokenizer, resolve
from optimizer.work_folder import WorkFolder, device_memory, system_memory

NOT_EVALUATED = "Not evaluated: quantized block by block without a gate. Measure it with `optimizer eval`."


@dataclass(frozen=True)
class Streamed:
    """What a finished run made: the artifact's folder, what was done to its layers, and what it was predicted to take.

    `resumed_at` is how many parts an earlier run had finished.
    """

    artifact: Path
    report: PassReport
    resumed_at: int
    seconds: float
    predicted: Preflight


def quantize_checkpoint(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    calibration: Any = None,
    device: str | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Streamed:
    """Quantize a checkpoint on disk into an artifact at `out`, block by block, and go on where a killed run stopped.

    Nothing is evaluated, so the artifact is marked UNGATED. The recipe's `quantize` pass is what is carried out;
    other passes that a checkpoint holds are refused. `calibration` is what `load_calibration` takes. `restart`
    throws away the work of an earlier run.

    Raises:
        ModelError, DataError, RecipeError: as `optimize`.
        OutputError: the disk or the memory is too small, or the work folder holds another job.
    """
    recipe = Recipe.load(recipe)
    progress = progress or Progress()
    out = Path(out)
    check_output(out)
    job = _Job.prepare(model, recipe, out, calibration, choose_device(device), progress)
    with job.work.opened(job.state(), restart=restart), stopwatch() as seconds:
        resumed_at = job.parts.finished()
        with progress.phase("preflight"):
            predicted = job.preflight(resumed_at)
        with progress.phase("quantize"), torch.no_grad():
            job.quantize(resumed_at)
        with progress.phase("assemble"):
            report = job.assemble(out)
        job.work.remove()
        return Streamed(out, replace(report, seconds=seconds()), resumed_at, seconds(), predicted)


@dataclass
class _Job:
    """One streamed quantization."""

    info: CheckpointInfo
    source: SourceRecord
    tokenizer: Any
    recipe: Recipe
    step: Quantize
    ctx: Context
    weights: LazyWeights
    chosen: Mapping[str, nn.Linear]
    skipped: list[Skip]
    blocks: list[str]
    device: torch.device
    work: WorkFolder
    progress: Progress
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.weights.model
        self.prefixes = tuple(f"{path}." for path in self.blocks)
        self.parts = Parts(self.work, len(self.blocks) + 1)

    @classmethod
    def prepare(
        cls, model: str | Path, recipe: Recipe, out: Path, data: Any, device: torch.device, progress: Progress
    ) -> _Job:
        step = _only_quantize(recipe)
        if data is not None and not step.calibrates:
            raise RecipeError(f"calibration was given, but recipe {recipe.name!r} does not calibrate. Leave it out.")
        with progress.phase("inspect"), quiet():
            folder, name, revision = resolve(model)
            info = inspect_checkpoint(folder)
            config = load_config(folder, trust_remote_code=False)
            config.dtype = config.dtype or getattr(torch, info.dtype)
            tokenizer = load_tokenizer(folder) if info.has_tokenizer else None
            if tokenizer is not None:
                check_tokenizer(tokenizer, config)
            weights = LazyWeights(info, *empty_model(folder, config, device))
            _read_generation_config(weights.model, folder)
        ctx = Context(tokenizer=tokenizer, progress=progress.update, scale_dtype=find_layout(recipe.layout).scale_dtype)
        if step.calibrates:
            with progress.phase("calibration data"):
                ctx.calibration = load_calibration(data, tokenizer, config, recipe.calibration)
        step.check(weights.model, ctx)
        chosen, skipped = step.layers(weights.model)
        work = WorkFolder(out.absolute().with_name(f".{out.name}.work"))
        with progress.phase("digest"):
            source = SourceRecord(name=name, revision=revision, digest=info.digest)
        return cls(
            info, source, tokenizer, recipe, step, ctx, weights, chosen, skipped, block_names(weights.model), device,
            work, progress,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What this work is of: anything that could change a byte of the result."""
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
        return {
            "model": self.info.digest,
            "recipe": self.recipe.model_dump(mode="json", include={"passes", "layout", "seed", "calibration"}),
            "calibration": None if self.ctx.calibration is None else self.ctx.calibration.digest,
            "versions": {"roofline-optimizer": __version__, **versions},
            "device": str(self.device),
            "threads": torch.get_num_threads(),  # sums in another order round differently
        }

    def preflight(self, resumed_at: int) -> Preflight:
        """Refuse a job for which memory or disk are too small, and rehearse the last step with the smallest layer."""
        shapes = {n: (self.step.scheme, m.out_features, m.in_features) for n, m in self.chosen.items()}
        check_layout(self.recipe.layout, shapes)
        needed = predict(self.step, self.chosen, self.blocks, self._sizes(), device=self.device)
        self.progress.update(f"needs about {needed}", 0, 1)
        accelerator = device_memory(self.device) if self.device.type == "cuda" else 0
        free = system_memory()
        require_room(needed, self.work.path, free and free + resident_bytes(), accelerator)
        if resumed_at == 0 and self.chosen:
            name = min(self.chosen, key=lambda n: self.chosen[n].weight.numel())
            tensors = self.weights.under(f"{name}.") or [self.weights.tied[f"{name}.weight"]]
            self.weights.load(tensors, torch.device("cpu"))
            linear = self.model.get_submodule(name)
            with self.work.writing():
                rehearse(self.recipe.layout, name, linear, self.step, self.ctx.scale_dtype, self.work.path)
            self.weights.release(tensors)
        return needed

    def _sizes(self) -> Sizes:
        inside = [self.weights.bytes(self.weights.under(prefix)) for prefix in self.prefixes]
        outside = self.weights.under("", self.prefixes)
        calibration, width = self.ctx.calibration, self.model.get_input_embeddings().embedding_dim
        arithmetic = calibration_dtype(self.model, self.device)
        return Sizes(
            block=max(inside),
            outside=self.weights.bytes(outside),
            tensor=max(self.weights.bytes([name]) for name in self.weights.stored),
            hidden=0 if calibration is None else calibration.tokens * width * arithmetic.itemsize,
            item=self.model.dtype.itemsize,
            arithmetic=arithmetic.itemsize,
        )

    def quantize(self, resumed_at: int) -> None:
        """Carry out every part that is not finished: each block, then what lies outside the blocks."""
        if resumed_at == self.parts.count:
            return
        inputs = probe = None
        if self.step.calibrates:
            head = self._head()
            outside = self.weights.under("", (*self.prefixes, *((f"{head}.",) if head else ())))
            self.weights.load(outside, self.device)
            inputs, probe = start(self.model, self.ctx)
            self.weights.release(outside)
            if resumed_at:
                inputs.hidden = self._kept_hidden(resumed_at)
        for index in range(resumed_at, len(self.blocks)):
            self._block(index, inputs, probe)
            self.progress.update("blocks", index + 1, len(self.blocks))
        self._outside(inputs)

    def _head(self) -> str | None:
        """The output layer, where it has weights of its own."""
        head = self.model.get_output_embeddings()
        return next((n for n, m in self.model.named_modules() if m is head and self.weights.under(f"{n}.")), None)

    def _block(self, index: int, inputs: BlockInputs | None, probe: BlockInputs | None) -> None:
        path, prefix = self.blocks[index], self.prefixes[index]
        names = [name for name in self.chosen if name.startswith(prefix)]
        self.weights.load(self.weights.under(prefix), self.device)
        block = self.model.get_submodule(path)
        if inputs is None or probe is None:
            part = quantize_layers(self.step, self.model, names, {}, self.ctx)
        else:
            part = quantize_block(self.step, self.model, path, index, names, inputs, probe, self.ctx)
            inputs.advance(block, index)
            hidden = {f"{position:05}": tensor.cpu() for position, tensor in enumerate(inputs.hidden)}
            self.work.write_tensors(_hidden(index + 1), hidden)
            inputs.hidden = self._kept_hidden(index + 1)
        self.parts.keep(index, part, self.weights, self.recipe.layout, prefix, ())
        (self.work.path / _hidden(index)).unlink(missing_ok=True)
        block.to("meta")
        return_freed_memory()

    def _kept_hidden(self, index: int) -> list[torch.Tensor]:
        """The inputs of a block from their file: the system may drop from memory what is not in use."""
        return [tensor.to(self.device) for tensor in self.work.map_tensors(_hidden(index)).values()]

    def _outside(self, inputs: BlockInputs | None) -> None:
        self.weights.load(self.weights.under("", self.prefixes), self.device)
        rest = {name: linear for name, linear in self.chosen.items() if not name.startswith(self.prefixes)}
        part = Part()
        if rest and inputs is not None:
            part = quantize_rest(self.step, self.model, rest, inputs, self.ctx)
        elif rest:
            part = quantize_layers(self.step, self.model, rest, {}, self.ctx)
        self.parts.keep(len(self.blocks), part, self.weights, self.recipe.layout, "", self.prefixes)

    def assemble(self, out: Path) -> PassReport:
        """Make the artifact of the finished parts: they become its shards."""
        notes = [f"calibrated on {self.ctx.calibration}"] if self.ctx.calibration else []
        if unused := self.weights.unused:
            notes.append(
                f"{len(unused)} tensors of the files are not the model's and are left out: {unused[0]}"
                + ", …" * (len(unused) > 1)
            )
        report = self.parts.report(self.step.name, self.chosen, self.skipped, notes)

        def build(folder: Path) -> None:
            self.parts.write_checkpoint(self.model, self.recipe.layout, report, folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
            card = model_card(
                name=f"{Path(self.source.name).name}-{self.recipe.name}", base_model=self.source.name,
                recipe=self.recipe.to_yaml(), results=NOT_EVALUATED, verdict="ungated", revision=self.source.revision,
            )  # fmt: skip
            (folder / "README.md").write_text(card, encoding="utf-8")

        info = ManifestInfo(source=self.source, verdict="ungated", seeds={"recipe": self.recipe.seed})
        write_artifact(out, build=build, manifest=info)
        return report


def _hidden(index: int) -> str:
    return f"hidden-{index:05}.safetensors"


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _only_quantize(recipe: Recipe) -> Quantize:
    """The one pass that a checkpoint holds; `RecipeError` for a recipe with another."""
    stored = [step for step in recipe.build_passes() if step.stored]
    if len(stored) != 1 or not isinstance(stored[0], Quantize):
        names = ", ".join(step.name for step in stored) or "none"
        raise RecipeError(
            f"recipe {recipe.name!r}: block by block, one quantize pass is carried out; its stored passes are {names}. "
            "Use optimizer run, which holds the whole model."
        )
    return stored[0]
