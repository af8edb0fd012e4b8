"""The finished parts of a streamed quantization: what each holds, and the artifact that they make together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.checkpoint import layer_tensors, save_configuration
from optimizer.lazy_weights import LazyWeights
from optimizer.passes.base import LayerChange, PassReport, Skip
from optimizer.passes.quantize import Part, quantization_report
from optimizer.quant.formats import ActivationFormat, Format, Scheme
from optimizer.work_folder import WorkFolder


@dataclass(frozen=True)
class Parts:
    """The parts of one job in its work folder: a block each, and last what lies outside the blocks."""

    work: WorkFolder
    count: int

    def finished(self) -> int:
        """How many parts are done, from the first on."""
        done = (self._record(index).is_file() for index in range(self.count))
        return next((index for index, is_done in enumerate(done) if not is_done), self.count)

    def keep(
        self, index: int, part: Part, weights: LazyWeights, layout: str, prefix: str, without: tuple[str, ...]
    ) -> None:
        """Write what lies under `prefix`, but not under `without`, and then its record: the part is done."""
        tensors, schemes, plain = _stored(weights, layout, prefix, without)
        self.work.write_tensors(self.tensors(index).name, tensors)
        record = {
            "changes": [asdict(change) for change in part.changes],
            "skipped": [asdict(skip) for skip in part.skipped],
            "notes": part.notes,
            "schemes": {layer: asdict(scheme) for layer, scheme in schemes.items()},
            "plain": plain,
            "tensors": {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()},
        }
        self.work.write_record(self._record(index).name, record)

    def tensors(self, index: int) -> Path:
        """The file of a part's tensors."""
        return self.work.path / f"part-{index:05}.safetensors"

    def _record(self, index: int) -> Path:
        return self.work.path / f"part-{index:05}.json"

    def records(self) -> list[dict[str, Any]]:
        """What was done to each part, as it was kept."""
        return [self.work.read_record(self._record(index).name) for index in range(self.count)]

    def report(self, name: str, chosen: Mapping[str, Any], skipped: list[Skip], notes: list[str]) -> PassReport:
        """What was done to the layers `chosen`; `skipped` and `notes` are of the whole model."""
        records = self.records()
        entries = [change for record in records for change in record["changes"]]
        changes = [LayerChange(**(entry | {"shape": tuple(entry["shape"])})) for entry in entries]
        left = [*skipped, *(Skip(**skip) for record in records for skip in record["skipped"])]
        every = [*notes, *(note for record in records for note in record["notes"])]
        return quantization_report(name, chosen, left, changes, every, seconds=0.0)

    def write_checkpoint(self, model: Any, layout: str, report: PassReport, folder: Path) -> None:
        """The parts become the shards of a checkpoint in `folder`, beside its configuration and the report."""
        records = self.records()
        shards = [f"model-{index + 1:05}-of-{self.count:05}.safetensors" for index in range(self.count)]
        for index, shard in enumerate(shards):
            _link(self.tensors(index), folder / shard)
        weight_map = {key: shard for record, shard in zip(records, shards, strict=True) for key in record["tensors"]}
        total = sum(size for record in records for size in record["tensors"].values())
        index_document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index_document)
        schemes = {name: _scheme(entry) for record in records for name, entry in record["schemes"].items()}
        save_configuration(model, layout, schemes, [name for record in records for name in record["plain"]], folder)
        _write_json(folder / "quantization.json", asdict(report))


def _stored(
    weights: LazyWeights, layout: str, prefix: str, without: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Scheme], list[str]]:
    """Tensors by their names on disk, the schemes of quantized layers, and the linear layers left plain."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Scheme] = {}
    plain: list[str] = []
    inside: set[str] = set()
    for name, module in weights.model.named_modules():
        if not name.startswith(prefix) or (without and name.startswith(without)):
            continue
        on_disk = weights.names.modules.get(name, name)
        if isinstance(module, QuantizedLinear):
            tensors |= layer_tensors(on_disk, module, weights.model.dtype, layout)
            schemes[on_disk] = module.scheme
            inside.add(name)
        elif isinstance(module, nn.Linear):
            plain.append(on_disk)
    others = (name for name in weights.under(prefix, without) if name.rpartition(".")[0] not in inside)
    tensors |= dict(weights.plain(others))
    return {key: tensor.cpu() for key, tensor in tensors.items()}, schemes, plain


def _scheme(entry: dict[str, Any]) -> Scheme:
    activation = entry["activation"]
    return Scheme(Format(**entry["weight"]), ActivationFormat(**activation) if activation else None)


def _link(file: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
