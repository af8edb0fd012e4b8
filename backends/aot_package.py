"""A model compiled ahead of time: an AOTInductor package (`model.pt2`) that runs without the Python code
of the model, and without our passes.

The package holds up to three entries that share their weights:

    decode   tokens [B, 1]   the next token of each row      -> logits [B, V]
    prefill  tokens [B, S]   a prompt of 2 to C tokens       -> logits [B, V], after the last
    score    tokens [B, S]   the same, for evaluation        -> logits [B, S, V]

Each takes `(tokens, start [1], padding [B], keys, values)`: the slot of the first token, how many slots of each row are
left padding, and L tensors `[B, H_kv, C, D]` for keys and for values, written in place at `start … start + S`. Logits
are float32. B and C are fixed when the package is made. A layer with a sliding window keeps all C slots, and a mask
hides what lies before the window. `aot_export` makes packages.

Compiled quantized layers call our ops, so loading needs those registered: `package.json` lists them, and
`import optimizer.backends.linear` registers them all. An unquantized model needs none. The package is machine code for
one PyTorch version and one processor; `load_package` compares both, and the sha256, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.runner import BaseRunner, Ledger
from optimizer.errors import ArtifactError, DeviceError, UsageError

PACKAGE, SIDECAR = "model.pt2", "package.json"
SCHEMA = 1


@dataclass(frozen=True)
class PackageRecord:
    """What `package.json` says of a package: shapes of its cache, entries, the ops it calls, and what it runs on."""

    batch: int
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str
    entries: tuple[str, ...]
    ops: tuple[str, ...]
    torch: str
    device: str
    isa: str
    weight_bytes: int
    sha256: str
    seconds: float

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of one layer's keys, or values."""
        return self.batch, self.kv_heads, self.context, self.head_dim


def read_package(folder: Path) -> PackageRecord:
    """The record of a package folder. Raises `ArtifactError` where there is none, or of another schema."""
    try:
        found = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        if found.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return PackageRecord(**found | {"entries": tuple(found["entries"]), "ops": tuple(found["ops"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / SIDECAR} is not the record of a package: {error}. Export again.") from None


def load_package(folder: Path, tokenizer: Any = None) -> PackageRunner:
    """A runner over the package in `folder`.

    Raises `ArtifactError` for a changed or incomplete folder, `DeviceError` for a package of another PyTorch version,
    device or processor; both before any of it is loaded.
    """
    record = read_package(folder)
    path = folder / PACKAGE
    if path.is_symlink() or not path.is_file() or sha256_of(path) != record.sha256:
        raise ArtifactError(f"{path} is missing or not as it was written: its sha256 is not {SIDECAR}'s. Export again.")
    here = (torch.__version__, isa_of(torch.device(record.device)))
    if record.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"{folder} was compiled for a GPU, and PyTorch sees none. Export it on this machine.")
    if here != (record.torch, record.isa):
        raise DeviceError(
            f"{folder} was compiled by PyTorch {record.torch} for {record.isa}, and this is PyTorch {here[0]} on "
            f"{here[1]}. Export it again here."
        )
    return PackageRunner(folder, record, tokenizer)


class PackageRunner(BaseRunner):
    """Runs a package: `batch` rows at most, prompts and steps by its compiled entries, over a cache of its own."""

    def __init__(self, folder: Path, record: PackageRecord, tokenizer: Any = None) -> None:
        from torch.export.pt2_archive._package import load_pt2
        from transformers import AutoConfig

        # No `super().__init__`: it measures a module, and here is none.
        self.record, self.tokenizer = record, tokenizer
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.device = torch.device(record.device)
        self.vocab_size, self.max_context, self.max_batch = record.vocabulary, record.context, record.batch
        self.ledger = Ledger(notes={"package": f"compiled ahead of time, {', '.join(record.ops) or 'no ops of ours'}"})
        self._weight_bytes, self._context = record.weight_bytes, 0
        self._entries = load_pt2(str(folder / PACKAGE), load_weights_from_disk=True).aoti_runners
        self._keys, self._values = (
            [torch.zeros(record.cache_shape, dtype=self.dtype, device=self.device) for _ in range(record.layers)]
            for _ in range(2)
        )
        self._padding = torch.zeros(record.batch, dtype=torch.long, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        dtype: torch.dtype = getattr(torch, self.record.dtype)
        return dtype

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        if all_logits and "score" not in self.record.entries:
            raise UsageError("the package has no `score` entry. Export it with scoring to evaluate it.")
        spare = self.record.batch - self._batch
        if spare < 0:
            raise UsageError(f"the package was compiled for {self.record.batch} rows, and {self._batch} were given.")
        if spare:
            tokens = torch.cat([tokens, tokens[-1:].expand(spare, -1)])
            mask = torch.cat([mask, mask[-1:].expand(spare, -1)])
        for tensor in (*self._keys, *self._values):
            tensor.zero_()
        self._padding = tokens.shape[1] - mask.sum(-1)
        entry = "score" if all_logits else "prefill" if tokens.shape[1] > 1 else "decode"
        alone = entry == "score" and tokens.shape[1] == 1  # the entry takes two tokens and more
        if alone:
            entry = "decode"
        logits = self._run(entry, tokens, 0)
        return (logits[:, None] if alone else logits)[: self._batch]

    def _decode(self, tokens: Tensor) -> Tensor:
        spare = self.record.batch - self._batch
        if spare:
            tokens = torch.cat([tokens, tokens[-1:].expand(spare)])
        return self._run("decode", tokens[:, None], self._context - 1)[: self._batch]

    def _run(self, entry: str, tokens: Tensor, start: int) -> Tensor:
        self.ledger.steps["compiled"] += entry == "decode"
        slot = torch.tensor([start], device=self.device)
        logits: Tensor = self._entries[entry](tokens.contiguous(), slot, self._padding, self._keys, self._values)
        return logits


def isa_of(device: torch.device) -> str:
    """The instruction set, or the architecture of the GPU, that a package for `device` is compiled for here."""
    if device.type != "cuda":
        return torch.backends.cpu.get_cpu_capability()
    return "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
