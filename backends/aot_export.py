"""Compiles a model ahead of time into the package that `aot_package` describes and runs."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.aot_package import PACKAGE, SCHEMA, SIDECAR, PackageRecord, isa_of, sha256_of
from optimizer.backends.kernels.library import introduce_ops
from optimizer.backends.linear import weight_bytes
from optimizer.errors import ModelError, UsageError

_INDUCTOR = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # one copy of the weights, whatever the number of entries
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


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
    """The model over caller-owned storage; see `aot_package` for its inputs."""

    def __init__(self, model: Any, *, all_logits: bool) -> None:
        super().__init__()
        self.model, self.all_logits = model, all_logits
        config = model.config.get_text_config()
        self.kinds, self.window = _attention_kinds(config), getattr(config, "sliding_window", None)

    def forward(
        self, tokens: Tensor, start: Tensor, padding: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        slots = start + torch.arange(tokens.shape[1], device=tokens.device)
        out = self.model(
            input_ids=tokens,
            attention_mask=self._masks(slots, padding, keys[0].shape[2]),
            position_ids=(slots[None, :] - padding[:, None]).clamp(min=0),
            past_key_values=_Cache(keys, values, slots),
            use_cache=True,
            logits_to_keep=0 if self.all_logits else 1,
        )
        logits = out.logits.float()
        return logits if self.all_logits else logits[:, -1]  # type: ignore[no-any-return]

    def _masks(self, slots: Tensor, padding: Tensor, context: int) -> Tensor | dict[str, Tensor]:
        """Which slots each token sees `[B, 1, S, C]`, by the kind of the layer where the model has both kinds.

        Every layer keeps the whole context; a window is a mask.
        """
        columns = torch.arange(context, device=slots.device)[None, None, :]
        rows = slots[None, :, None]
        # A padded row would see nothing, and a softmax over nothing is NaN: it sees itself.
        full = ((columns <= rows) & (columns >= padding[:, None, None]) | (columns == rows))[:, None]
        if self.kinds == {FULL}:
            return full
        assert self.window is not None
        sliding = full & (columns > rows - self.window)[:, None]
        return sliding if self.kinds == {SLIDING} else {FULL: full, SLIDING: sliding}


FULL, SLIDING = "full_attention", "sliding_attention"


def _attention_kinds(config: Any) -> set[str]:
    """Whether layers attend to all tokens, to a window, or some to each."""
    if kinds := set(getattr(config, "layer_types", None) or ()):
        return kinds
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return {SLIDING if windowed else FULL}


def _check(model: Any) -> None:
    """Refuse, before anything is compiled, what a package does not hold."""
    config = model.config.get_text_config()
    if other := _attention_kinds(config) - {FULL, SLIDING}:
        raise ModelError(
            f"{type(model).__name__} has layers of {', '.join(sorted(other))}, and a package holds attention to all "
            "tokens or to a window. Serve it with `decode`."
        )
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ModelError(
            f"{type(model).__name__} routes tokens to experts, which a package does not hold yet. Serve it with "
            "`decode`."
        )


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

    Raises `ModelError` where `torch.export` cannot follow the model, or it has experts or keeps anything but plain keys
    and values, `UsageError` for a context that the model does not have.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or context
    if not 2 <= context <= limit or batch < 1:
        raise UsageError(f"batch {batch} and context {context}: give at least 1 row and 2 to {limit} tokens.")
    _check(model)
    if out.exists() and not (out / SIDECAR).is_file():
        raise UsageError(f"{out} exists and is no package. Name a new folder.")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    shape = (batch, heads, context, head_dim)
    entries = ("decode", "prefill", "score")[: 3 if scoring else 2]
    began = time.perf_counter()
    introduce_ops()
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
            torch.__version__, device.type, isa_of(device), weight_bytes(model), sha256_of(staging / PACKAGE),
            time.perf_counter() - began,
        )  # fmt: skip
        model.config.to_json_file(staging / "config.json")
        (staging / SIDECAR).write_text(json.dumps({"schema": SCHEMA} | asdict(record), indent=1), encoding="utf-8")
        if out.exists():
            out.rename(Path(name) / "old")
        staging.rename(out)
    return record


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
