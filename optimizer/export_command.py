"""`optimizer export`: a model or an artifact as a folder for another runtime, written whole or not at all.

The folder holds the graph with its data, configuration, tokenizer, `genai_config.json` for onnxruntime-genai,
`export.json` for our own runner, and the manifest that every artifact has. Before it appears, the graph is run beside
the PyTorch model on the same tokens; one that does not agree is never released.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.artifact import (
    MANIFEST,
    ManifestInfo,
    SourceRecord,
    check_output,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from optimizer.backends.aot_package import load_package
from optimizer.backends.onnx_export import MODEL_FILE, Exported, export, float_copy
from optimizer.backends.onnx_runner import SETTINGS_FILE, OnnxRunner, session_options
from optimizer.backends.onnx_weights import computing_copy
from optimizer.backends.runner import BaseRunner, EagerRunner
from optimizer.errors import ArtifactError, PassError, UsageError

DTYPES = ("float32", "float16")
ENGINES, PACKAGE = "engines", "package"
BOUND = {"float32": 1e-4, "float16": 2e-2}
"""The largest difference of a logit from PyTorch's in float32, over the largest logit, that is released.

float32: sums of thousands of terms in another order differ by less than 1e-6 of the largest, and a deep model adds some
of that. float16: its numbers are 5e-4 apart, and every layer rounds.
"""
ROUNDED_BOUND = 0.05
"""The same where inputs are rounded: one that falls to the other side of a tie is a whole step away."""
INT8_BOUND = 0.15
"""The same where the runtime rounds the inputs of quantized layers to int8, which PyTorch's side does not.

No export is released beyond it.
"""
LARGE = 1 << 30
"""Bytes of a graph from which on its check spares memory rather than time."""


@dataclass(frozen=True)
class ExportResult:
    """What was written where, and how far its logits are from PyTorch's: largest difference over largest logit."""

    folder: Path
    exported: Exported
    bytes: int
    difference: float
    bound: float


def export_model(
    model: str,
    out: str | Path,
    *,
    dtype: str = "float32",
    int8_inputs: bool = False,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Export a folder, hub id, "reference" or artifact into the new folder `out`. An old one stays until it is done.

    Raises:
        UsageError: an unknown type; a format without an operator; a missing package.
        ModelError: an architecture that cannot be exported.
        ArtifactError: an artifact that is not as it was written.
        OutputError: `out` cannot be written.
        PassError: the graph does not compute what the model does.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    check_output(out)
    loaded, tokenizer, source = load_for_export(model, trust_remote_code)
    item = getattr(torch, dtype).itemsize
    needed = sum(p.numel() * max(p.element_size(), item) for p in loaded.parameters())
    found: list[Any] = []

    def build(folder: Path) -> None:
        nonlocal loaded
        expected = reference(loaded, dtype)
        exported = write_graph(loaded, tokenizer, folder, dtype=dtype, int8_inputs=int8_inputs)
        loaded = None  # its memory is for the runtime now
        found.extend((exported, *check_graph(folder, exported, expected, int8_inputs=int8_inputs)))

    manifest = write_artifact(
        out, build=build, manifest=ManifestInfo(source=source, verdict="ungated"), required_bytes=needed
    )
    exported, difference, bound = found
    return ExportResult(Path(out), exported, sum(f.bytes for f in manifest.files.values()), difference, bound)


def write_onnx(
    model: Any, tokenizer: Any, folder: Path, *, dtype: str, int8_inputs: bool = False, dialect: str = "onnxruntime"
) -> tuple[Exported, float, float]:
    """Write graph, settings and configuration into `folder` and run them beside PyTorch.

    Returns what was written, the largest difference of a logit over the largest logit, and the bound that it kept.
    Raises `PassError` where it does not, and what `onnx_export.export` does.
    """
    expected = reference(model, dtype)
    exported = write_graph(model, tokenizer, folder, dtype=dtype, int8_inputs=int8_inputs, dialect=dialect)
    return exported, *check_graph(folder, exported, expected, int8_inputs=int8_inputs)


def write_graph(
    model: Any, tokenizer: Any, folder: Path, *, dtype: str, int8_inputs: bool = False, dialect: str = "onnxruntime"
) -> Exported:
    """Write graph, settings and configuration into `folder`. Raises what `onnx_export.export` does."""
    exported = export(model, folder, dtype=getattr(torch, dtype), dialect=dialect, int8_inputs=int8_inputs)
    write_document(folder / SETTINGS_FILE, {
        "opset": exported.opset, "dtype": exported.dtype, "dialect": dialect, "int8_inputs": int8_inputs,
        "kernels": exported.kernels, "step_weight_bytes": exported.step_weight_bytes,
        "attention": exported.attention, "attention_note": exported.attention_note,
        "shared_buffer": exported.shared_buffer,
    })  # fmt: skip
    write_configuration(model, tokenizer, folder)
    generation = getattr(model, "generation_config", None)
    write_document(folder / "genai_config.json", genai_config(
        model.config, generation, int8_inputs=int8_inputs, shared_buffer=exported.shared_buffer
    ))  # fmt: skip
    return exported


def check_graph(
    folder: Path, exported: Exported, expected: Reference, *, int8_inputs: bool = False
) -> tuple[float, float]:
    """Run the graph on the tokens of `expected`: how far its logits are, and how far they may be.

    A large graph is run as it lies in its file: what the runtime arranges anew when it loads weights would be held
    twice. Raises `PassError` where logits are too far.
    """
    bound = allowed(exported, expected, int8_inputs)
    size = sum(file.stat().st_size for file in folder.iterdir())
    difference = rehearse(expected, OnnxRunner(folder, rearrange=size < LARGE))
    if not difference <= bound:
        raise PassError(
            f"the exported graph does not compute what the model does: logits differ by {difference:.3g} of the "
            f"largest, and {bound:.3g} is allowed. Nothing was written; try another type."
        )
    return difference, bound


def allowed(exported: Exported, expected: Reference, int8_inputs: bool = False) -> float:
    """The largest difference of a logit over the largest logit with which the graph is released."""
    if int8_inputs:
        return INT8_BOUND
    if any(" × " in kernel for kernel in exported.kernels.values()):
        return max(BOUND[exported.dtype], ROUNDED_BOUND, min(2 * expected.own, INT8_BOUND))
    return BOUND[exported.dtype]


def load_export(folder: Path, *, device: str = "auto", verify: bool = True) -> BaseRunner:
    """The runner of an exported folder, after every file was checked against the manifest.

    Raises:
        ArtifactError: a file that is missing, changed, or outside of the folder.
        DeviceError: ONNX Runtime or its provider is not installed, or the folder was made for another machine.
    """
    files = read_manifest(folder).files
    if verify and (wrong := verify_artifact(folder)):
        problems = "; ".join(f"{m.path} {m.problem}" for m in wrong)
        raise ArtifactError(f"{folder} is not as it was written: {problems}")
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / PACKAGE).is_dir():
        return load_package(folder / PACKAGE, tokenizer)
    if (folder / ENGINES).is_dir():
        from optimizer.backends.tensorrt.runner import TensorRTRunner

        return TensorRTRunner(folder / ENGINES, tokenizer)
    return OnnxRunner(folder, tokenizer, files=files, device=device)


def is_export(folder: Path) -> bool:
    """Whether the folder holds what one of the export targets wrote."""
    return (folder / MANIFEST).is_file() and any((folder / name).exists() for name in (MODEL_FILE, ENGINES, PACKAGE))


@dataclass(frozen=True)
class Reference:
    """What a model makes in float32 of up to two prompts `tokens [B, S]`, one padded (`mask`), and four steps.

    `own` is how far PyTorch itself is from that in float16, for a model with rounded inputs that is exported in it:
    float16's own rounding becomes whole steps wherever a tie falls to the other side, so how far that moves logits
    depends on the model, and two programs that round alike are each so far off.
    """

    tokens: Tensor
    mask: Tensor
    logits: tuple[Tensor, ...]
    own: float = 0.0


def reference(model: Any, dtype: str, *, rows: int = 2, context: int | None = None) -> Reference:
    """The reference for an export in `dtype` of `rows` prompts at most, which ends after `context` tokens at most."""
    original = EagerRunner(computing_copy(model, torch.float32))
    generator = torch.Generator().manual_seed(0)
    length = min(32, min(original.max_context, context or original.max_context) - 4)
    tokens = torch.randint(original.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, : length // 3] = 0
    tokens, mask = tokens[:rows], mask[:rows]
    found = Reference(tokens, mask, _logits(original, tokens, mask))
    if dtype == "float16" and any(getattr(module, "activation", None) is not None for module in model.modules()):
        return replace(found, own=rehearse(found, EagerRunner(float_copy(model, torch.float16))))
    return found


def rehearse(expected: Reference, runner: BaseRunner) -> float:
    """The largest difference of a logit over the largest logit."""
    found = _logits(runner, expected.tokens, expected.mask)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected.logits, found, strict=True))


def _logits(runner: BaseRunner, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    prompt = runner.prefill(tokens, mask)
    return prompt, *(runner.decode(tokens[:, step]) for step in range(4))


def load_for_export(model: str, trust_remote_code: bool) -> tuple[Any, Any, SourceRecord]:
    """The model, its tokenizer and its record; an artifact is verified and keeps its packed weights."""
    from optimizer.source import load_source

    folder = Path(model)
    if not (folder / MANIFEST).is_file():
        source = load_source(model, trust_remote_code=trust_remote_code)
        return source.model, source.tokenizer, SourceRecord(
            name=source.name, revision=source.revision, digest=source.digest
        )  # fmt: skip
    if is_export(folder):
        raise UsageError(f"{folder} is an export already. Name the model or the artifact that it came from.")
    from transformers import AutoTokenizer

    from optimizer.checkpoint import load_checkpoint

    manifest = read_manifest(folder)
    if wrong := verify_artifact(folder):
        problems = "; ".join(f"{m.path} {m.problem}" for m in wrong)
        raise ArtifactError(f"{folder} is not as it was written: {problems}")
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    record = SourceRecord(name=manifest.source.name, revision=manifest.source.revision, digest=manifest.digest)
    return load_checkpoint(folder, torch.device("cpu")), tokenizer, record


def write_configuration(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model's configuration without what quantization added, and its tokenizer."""
    document = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("quantization_config", "_name_or_path", "roofline_optimizer"):
        document.pop(name, None)
    write_document(folder / "config.json", document)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def genai_config(
    config: Any, generation: Any = None, *, int8_inputs: bool = False, shared_buffer: bool = True
) -> dict[str, Any]:
    """What onnxruntime-genai needs to know of the graph: names, sizes, and where a text ends."""
    text = config.get_text_config()

    def token(name: str) -> Any:
        found = getattr(generation, name, None)
        return getattr(text, name, None) if found is None else found

    context = int(getattr(text, "max_position_embeddings", None) or 4096)
    end = token("eos_token_id")
    first_end = end[0] if isinstance(end, list) else end
    padding = token("pad_token_id")
    heads = int(text.num_attention_heads)
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": token("bos_token_id") or 0,
            "eos_token_id": 0 if end is None else end,
            "pad_token_id": padding if padding is not None else first_end or 0,
            "context_length": context,
            "vocab_size": int(text.vocab_size),
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    **session_options(int8_inputs),
                },
                "filename": MODEL_FILE,
                "head_size": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
                "hidden_size": int(text.hidden_size),
                "num_attention_heads": heads,
                "num_hidden_layers": int(text.num_hidden_layers),
                "num_key_value_heads": int(getattr(text, "num_key_value_heads", None) or heads),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": shared_buffer},
    }


def write_document(file: Path, document: Any) -> None:
    """JSON with sorted keys, so that equal documents are equal bytes."""
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def data(result: ExportResult) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "folder": str(result.folder), "opset": result.exported.opset, "dtype": result.exported.dtype,
        "bytes": result.bytes, "kernels": result.exported.kernels, "attention": result.exported.attention,
        "logit_difference": result.difference, "logit_bound": result.bound,
    }  # fmt: skip


def describe(result: ExportResult) -> str:
    """The result as text."""
    from collections import Counter

    counts = Counter(result.exported.kernels.values())
    layers = ", ".join(f"{count} × {kernel}" for kernel, count in counts.most_common())
    note = f" ({result.exported.attention_note})" if result.exported.attention_note else ""
    return (
        f"{result.folder}: ONNX opset {result.exported.opset}, {result.exported.dtype}, {result.bytes / 1e6:.1f} MB\n"
        f"linear layers: {layers}\n"
        f"attention: {result.exported.attention}{note}\n"
        f"logits differ from PyTorch's by at most {result.difference:.2g} of the largest ({result.bound:.2g} allowed)\n"
        "UNGATED: measure it with `optimizer eval` and `optimizer bench`"
    )
