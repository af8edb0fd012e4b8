"""Opening a user's model safely: every bad input is refused with a typed error before any long work.

Weights are read from safetensors only, never from pickle; `optimizer.inspection` knows the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.checkpoint import load_checkpoint
from optimizer.errors import ModelError
from optimizer.inspection import (
    BITS,
    CheckpointInfo,
    TensorInfo,
    corrupt,
    first_line,
    inspect_checkpoint,
    load_config,
    quiet,
    read_tensors,
    require_folder,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

REFERENCE = "reference"  # the name of the model shipped inside this package

_CHUNK = 1 << 24  # elements looked at in one go
_NAMED = 20  # tensors an error lists before it only counts
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # copies of the same weights in other layouts


@dataclass(frozen=True)
class Source:
    """A model ready to be optimized, and where it came from.

    `info` and `revision` (the hub's commit) are None for a model that was handed over in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    info: CheckpointInfo | None
    revision: str | None
    digest: str


def load_source(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Source:
    """Open a folder, a hub id ("org/name"), the embedded "reference", or take a model that is already loaded.

    A folder is inspected, checked for NaN and infinity and for a tokenizer that fits, and only then loaded, in its
    own dtype and in eval mode. A model object is used as it is. Raises ModelError for whatever cannot be used.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _from_object(model, tokenizer)
    if not isinstance(model, str | Path):
        raise ModelError(
            f"Cannot optimize a {type(model).__name__}: pass a folder, a hub id, or a transformers PreTrainedModel"
        )
    folder, name, revision = resolve(model, trust_remote_code=trust_remote_code)
    info = inspect_checkpoint(folder, trust_remote_code=trust_remote_code)
    _refuse_nonfinite(str(folder), _stored_tensors(folder, info.tensors))
    if tokenizer is None and info.has_tokenizer:
        tokenizer = folder
    with quiet():
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(Path(tokenizer), trust_remote_code=trust_remote_code)
        if tokenizer is not None:
            check_tokenizer(tokenizer, load_config(folder, trust_remote_code=trust_remote_code))
        if info.quantization_config is not None:  # decoded by our own kernels, whoever quantized it
            loaded = load_checkpoint(folder, torch.device(device))
        else:
            loaded = _load_model(folder, trust_remote_code=trust_remote_code)
    _require_linear(loaded, name)
    return Source(loaded.to(device), tokenizer, name, info, revision, info.digest)


def _from_object(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | Path | None) -> Source:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is no causal language model: pass one with its output layer (…ForCausalLM)"
        )
    check_finite(model)
    _require_linear(model, name)
    if isinstance(tokenizer, str | Path):
        with quiet():
            tokenizer = load_tokenizer(Path(tokenizer), trust_remote_code=False)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    return Source(model, tokenizer, name, None, None, model_digest(model))


def reference_folder() -> Path:
    """Where the embedded model lies."""
    import optimizer.evals.reference as reference

    return Path(str(reference.__file__)).parent / "model"


def resolve(model: str | Path, *, trust_remote_code: bool = False) -> tuple[Path, str, str | None]:
    """The folder of a model given by path, hub id or as "reference"; its name, and its hub commit or None."""
    if model == REFERENCE:
        folder = reference_folder()
        if not folder.is_dir():
            raise ModelError(f"The embedded model is missing from {folder}: reinstall roofline-optimizer")
        return folder, REFERENCE, None
    folder = Path(model).expanduser()
    try:
        local = folder.exists()
    except OSError:  # a name too long for the file system is no folder
        local = False
    if str(model).strip() and (local or isinstance(model, Path)):
        return folder, folder.resolve().name, None
    if not _HUB_ID.fullmatch(str(model)):
        raise ModelError(
            f"No folder {str(model)!r}, and it is no hub id, which has the form org/name: pass the path of a folder "
            f"with config.json and *.safetensors, a hub id, or {REFERENCE!r} for the embedded model"
        )
    return _download(str(model), trust_remote_code=trust_remote_code)


def _download(hub_id: str, *, trust_remote_code: bool) -> tuple[Path, str, str | None]:
    import huggingface_hub

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED)
    except Exception as error:  # the hub's library, its HTTP client and its cache each have their own family of errors
        raise ModelError(
            f"No local folder {hub_id!r}, and the Hugging Face hub gave none: {first_line(error)}. Check the name, "
            "the network and (for a gated model) HF_TOKEN, or download it elsewhere and pass the folder"
        ) from error
    return Path(folder), hub_id, Path(folder).name


def check_finite(source: str | Path | PreTrainedModel) -> None:
    """Refuse a model with NaN or infinity: ModelError names each tensor and how many of its values are not finite.

    A folder is streamed tensor by tensor, so memory holds one of them; a model is only read.
    """
    if isinstance(source, str | Path):
        folder = require_folder(source)
        _refuse_nonfinite(str(folder), _stored_tensors(folder, read_tensors(folder)))
    else:
        _refuse_nonfinite(type(source).__name__, _state(source))


def _stored_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    if tensors[name].dtype in _TORCH_FLOATS:
                        yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise corrupt(folder / file, first_line(error)) from error


# Formats of 6 bits and fewer have no NaN and no infinity.
_TORCH_FLOATS = {name for name in BITS if name.startswith(("float", "bfloat", "complex")) and BITS[name] >= 8}


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and persistent buffer once, by name; a tied one under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        if tensor.is_meta:
            raise ModelError(f"{type(model).__name__}: tensor {name} has no data (meta device): load the weights first")
        seen.add(id(tensor))
        yield name, tensor.detach()


def _refuse_nonfinite(name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    found = {key: count for key, tensor in tensors if (count := _count_nonfinite(tensor))}
    if found:
        listed = ", ".join(f"{key} ({count})" for key, count in list(found.items())[:_NAMED])
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ModelError(
            f"{name} has values that are NaN or infinite in {len(found)} tensors: {listed}{more}. "
            "Quantizing them would spread them: use a checkpoint without them"
        )


def _count_nonfinite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return sum(chunk.numel() - int(_finite(chunk).sum()) for chunk in tensor.reshape(-1).split(_CHUNK))


def _finite(chunk: Tensor) -> Tensor:
    if chunk.dtype == torch.float8_e8m0fnu:  # exponents only: 255 is its NaN, and float32 cannot tell it from 2^128
        return chunk.view(torch.uint8) != 255
    return torch.isfinite(chunk.float() if chunk.dtype.itemsize == 1 else chunk)


def model_digest(model: PreTrainedModel) -> str:
    """sha256 (hex) over the config and over name, dtype, shape and bytes of each tensor of the model, streamed."""
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_state(model)):
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for chunk in tensor.reshape(-1).split(_CHUNK):
            total.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PretrainedConfig) -> None:
    """Refuse a tokenizer that can produce an id without a row in the embedding, and special ids outside it.

    An embedding with more rows than the tokenizer has tokens is padding, and fine.
    """
    from transformers import PretrainedConfig

    config = model if isinstance(model, PretrainedConfig) else model.config
    rows = config.get_text_config(decoder=True).vocab_size if model is config else _embedding_rows(model)
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ModelError("The tokenizer has no tokens: pass the one that the model was trained with")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= rows:
        raise ModelError(
            f"The tokenizer's token {token!r:.80} has id {highest}, the model's embedding has {rows} rows: pass "
            f"this model's tokenizer, or grow the embedding (model.resize_token_embeddings({highest + 1})) and train it"
        )
    holders = {"tokenizer": tokenizer, "config": config, "generation config": getattr(model, "generation_config", None)}
    for holder, key in ((h, f"{k}_token_id") for h in holders for k in ("bos", "eos", "pad", "unk")):
        value = getattr(holders[holder], key, None)
        for index in value if isinstance(value, list | tuple) else [value]:
            if index is None or (index == -1 and key == "pad_token_id"):  # -1: "no padding" in older configs
                continue
            if type(index) is not int or not 0 <= index < rows:
                raise ModelError(
                    f"{key} of the {holder} is {index!r:.40}, outside the {rows} rows of the embedding: correct it in "
                    "the model's config.json, generation_config.json or tokenizer_config.json"
                )


def _embedding_rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; `ModelError` when it cannot be loaded."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"Tokenizer folder {str(folder)!r} does not exist: pass a folder with tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises a bare Exception for a file it cannot read
        raise ModelError(
            f"The tokenizer in {folder} cannot be loaded ({first_line(error)}): save it again with save_pretrained, "
            "or pass another as tokenizer="
        ) from error


def _load_model(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"transformers cannot load {folder} ({first_line(error)}): config.json and the weights must belong "
            "together; download or save both again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors of the model that config.json describes, first {missing[0]}; they "
            "would be random: config.json and the weights must belong together; download or save both again"
        )
    return model.eval()


def _require_linear(model: PreTrainedModel, name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    if not any(isinstance(m, nn.Linear | Conv1D | QuantizedLinear) and m is not head for m in model.modules()):
        raise ModelError(
            f"{name} ({type(model).__name__}) has no linear layer besides its output layer, so there is nothing to "
            "optimize: use a model with nn.Linear or Conv1D layers"
        )
