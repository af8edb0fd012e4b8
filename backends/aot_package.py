"""A model compiled ahead of time: an AOTInductor package (`model.pt2`) that runs without the Python code
of the model, and without our passes.

The package holds up to three entries that share their weights:

    decode   tokens [B, 1]   the next token of each row      -> logits [B, V]
    prefill  tokens [B, S]   a prompt of 2 to C tokens       -> logits [B, V], after the last
    score    tokens [B, S]   the same, for evaluation        -> logits [B, S, V]

Each takes `(tokens, start [1], padding [B], keys, values)`: the slot of the first token, how many slots of each row are
left padding, and L tensors `[B, H_kv, C, D]` for keys and for values, written in place at `start … start + S`. Logits
are float32. B and C are fixed when the package is made.

Compiled quantized layers call our ops, so loading needs those registered: `package.json` lists them, and
`import optimizer.backends.linear` registers them all. An unquantized model needs none. The package is machine code for
one PyTorch version and one processor; `load_package` compares both, and the sha256, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import weight_bytes
from optimizer.backends.runner import BaseRunner, Ledger
from optimizer.errors import ArtifactError, DeviceError, ModelError, UsageError

PACKAGE, SIDECAR = "model.pt2", "package.json"
SCHEMA = 1
_INDUCTOR = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # one copy of the weights, whatever the number of entries
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


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


class _Cache:
    """Caller-owned keys and values as transformers' models use a cache: `update` writes in place and returns all."""

    is_compileable = True

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, key)
        values.index_copy_(2, self.slots, value)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions and mask are given; nothing is left to derive from a length


class _Step(nn.Module):
    """The model over caller-owned storage; see the module for its inputs."""

    def __init__(self, model: nn.Module, *, all_logits: bool) -> None:
        super().__init__()
        self.model, self.all_logits = model, all_logits

    def forward(
        self, tokens: Tensor, start: Tensor, padding: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        slots = start + torch.arange(tokens.shape[1], device=tokens.device)
        columns = torch.arange(keys[0].shape[2], device=tokens.device)
        causal = columns[None, None, :] <= slots[None, :, None]
        visible = causal & (columns[None, None, :] >= padding[:, None, None])
        # A padded row would see nothing, and a softmax over nothing is NaN: it sees itself.
        visible = visible | (columns[None, None, :] == slots[None, :, None])
        out = self.model(
            input_ids=tokens,
            attention_mask=visible[:, None],
            position_ids=(slots[None, :] - padding[:, None]).clamp(min=0),
            past_key_values=_Cache(keys, values, slots),
            use_cache=True,
            logits_to_keep=0 if self.all_logits else 1,
        )
        logits = out.logits.float()
        return logits if self.all_logits else logits[:, -1]  # type: ignore[no-any-return]


def export_package(
    model: Any,
    out: Path,
    *,
    batch: int = 1,
    context: int = 1024,
    scoring: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> PackageRecord:
    """Compile `model` for `batch` rows and up to `context` tokens into the folder `out`, and say what it holds.

    Without `scoring` there is no `score` entry, and such a package can be served but not evaluated. An existing package
    stays until the new one is complete.

    Raises `ModelError` where `torch.export` cannot follow the model or its attention keeps anything but plain keys and
    values, `UsageError` for a context that the model does not have.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or context
    if not 2 <= context <= limit or batch < 1:
        raise UsageError(f"batch {batch} and context {context}: give at least 1 row and 2 to {limit} tokens.")
    windowed = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windowed or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise ModelError(
            f"{type(model).__name__} has layers of {', '.join(sorted(windowed)) or 'sliding windows'}, and a package "
            "attends to the whole context in every layer. Serve it with `decode`."
        )
    if out.exists() and not (out / SIDECAR).is_file():
        raise UsageError(f"{out} exists and is no package. Name a new folder.")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    shape = (batch, heads, context, head_dim)
    entries = ("decode", "prefill", "score")[: 3 if scoring else 2]
    began = time.perf_counter()
    files: dict[str, Any] = {}
    ops: set[str] = set()
    for done, name in enumerate(entries):
        if progress is not None:
            progress(name, done, len(entries))
        with warnings.catch_warnings():  # torch.export warns of its own use of what torch deprecates
            warnings.simplefilter("ignore")
            program = _exported(model.eval(), name, shape, config.num_hidden_layers, device, dtype)
            compiled = torch._inductor.aot_compile(program.module(), *program.example_inputs, options=dict(_INDUCTOR))
        ops |= {str(node.target) for node in program.graph.nodes if str(node.target).startswith("optimizer.")}
        files[name] = compiled
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        staging = Path(name) / "package"
        staging.mkdir()
        from torch._inductor.package.package import package_aoti

        package_aoti(str(staging / PACKAGE), files)
        for paths in files.values():
            shutil.rmtree(Path(paths[0]).parent, ignore_errors=True)
        record = PackageRecord(
            batch, context, config.num_hidden_layers, heads, head_dim, config.vocab_size,
            str(dtype).removeprefix("torch."), entries, tuple(sorted(op.removesuffix(".default") for op in ops)),
            torch.__version__, device.type, _isa(device), weight_bytes(model), _sha256(staging / PACKAGE),
            time.perf_counter() - began,
        )  # fmt: skip
        model.config.to_json_file(staging / "config.json")
        (staging / SIDECAR).write_text(json.dumps({"schema": SCHEMA} | asdict(record), indent=1), encoding="utf-8")
        if out.exists():
            out.rename(Path(name) / "old")
        staging.rename(out)
    return record


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
    if path.is_symlink() or not path.is_file() or _sha256(path) != record.sha256:
        raise ArtifactError(f"{path} is missing or not as it was written: its sha256 is not {SIDECAR}'s. Export again.")
    here = (torch.__version__, _isa(torch.device(record.device)))
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


def _exported(
    model: nn.Module, entry: str, shape: tuple[int, ...], layers: int, device: torch.device, dtype: torch.dtype
) -> Any:
    batch, _, context, _ = shape
    length = 1 if entry == "decode" else min(8, context)
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2))
    start = torch.zeros(1, dtype=torch.long, device=device)
    padding = torch.zeros(batch, dtype=torch.long, device=device)
    free = None if entry == "decode" else {1: torch.export.Dim("length", min=2, max=context)}
    dims = (free, None, None, [None] * layers, [None] * layers)
    try:
        with torch.no_grad():
            return torch.export.export(
                _Step(model, all_logits=entry == "score"), (tokens, start, padding, keys, values), dynamic_shapes=dims
            )
    except Exception as error:
        raise ModelError(
            f"torch.export cannot follow {type(model).__name__} ({entry}): {str(error).strip().splitlines()[0][:400]}"
        ) from error


def _isa(device: torch.device) -> str:
    if device.type != "cuda":
        return torch.backends.cpu.get_cpu_capability()
    return "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
