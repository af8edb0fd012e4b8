"""Opening a user's model safely: every bad input is refused with a typed error before any long work.

Weights are read from safetensors only, never from pickle. A safetensors file is

    8 bytes little-endian: N | N bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | data

and is valid when the tensors tile the data exactly: sorted by offset each begins where the one before ends, the last
ends at the end of the file, and `end - begin` is what dtype and shape say
(https://github.com/huggingface/safetensors#format). Headers are enough to know a checkpoint, so inspection costs
kilobytes whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REFERENCE = "reference"  # the name of the model shipped inside this package

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 64  # of a torch tensor
_CHUNK = 1 << 24  # elements looked at in one go
_NAMED = 20  # tensors an error lists before it only counts
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # copies of the same weights in other layouts
_CONVERT = (
    "convert it to safetensors first, on a machine where its author is trusted: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)
# name in a safetensors header -> (bits an element, name in torch)
_DTYPES = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E2M3": (6, "float6_e2m3fn"), "F6_E3M2": (6, "float6_e3m2fn"), "F4": (4, "float4_e2m1fn"),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"),
    "C64": (64, "complex64"), "BOOL": (8, "bool"),
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One stored tensor: its shape, torch's name of its dtype, and the file of the checkpoint that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def bytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


_BITS = {name: bits for bits, name in _DTYPES.values()}


@dataclass(frozen=True)
class CheckpointInfo:
    """What the headers and `config.json` of a checkpoint say; no weight was read.

    `dtype` is the one that most of the stored bytes have; `tied` says that the config shares the embedding with the
    output layer; `files` are the weight files in use. `digest` reads them all, on first use only.
    """

    path: Path
    architecture: str
    model_type: str
    dtype: str
    tensors: Mapping[str, TensorInfo]
    total_bytes: int
    tied: bool
    has_tokenizer: bool
    quantization_config: Mapping[str, Any] | None
    files: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over name and sha256 of `config.json` and of each weight file, streamed."""
        total = hashlib.sha256()
        for name in sorted((*self.files, "config.json")):
            with (self.path / name).open("rb") as file:
                total.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
        return total.hexdigest()


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
    folder, name, revision = _resolve(model, trust_remote_code=trust_remote_code)
    info = inspect_checkpoint(folder, trust_remote_code=trust_remote_code)
    _refuse_nonfinite(str(folder), _stored_tensors(folder, info.tensors))
    if tokenizer is None and info.has_tokenizer:
        tokenizer = folder
    with _quiet():
        if isinstance(tokenizer, str | Path):
            tokenizer = _load_tokenizer(Path(tokenizer), trust_remote_code=trust_remote_code)
        if tokenizer is not None:
            check_tokenizer(tokenizer, _load_config(folder, trust_remote_code=trust_remote_code))
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
        with _quiet():
            tokenizer = _load_tokenizer(Path(tokenizer), trust_remote_code=False)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    return Source(model, tokenizer, name, None, None, model_digest(model))


def _resolve(model: str | Path, *, trust_remote_code: bool) -> tuple[Path, str, str | None]:
    """(folder, name, hub commit or None)."""
    if model == REFERENCE:
        import optimizer.evals.reference as reference

        folder = Path(str(reference.__file__)).parent / "model"
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
            f"No local folder {hub_id!r}, and the Hugging Face hub gave none: {_first_line(error)}. Check the name, "
            "the network and (for a gated model) HF_TOKEN, or download it elsewhere and pass the folder"
        ) from error
    return Path(folder), hub_id, Path(folder).name


def inspect_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> CheckpointInfo:
    """Read `config.json` and the safetensors headers of the folder `path`; no weight is loaded.

    Raises ModelError for a missing, pickle-only, truncated, corrupt or hostile checkpoint, for one that is no causal
    language model, and for one that brings its own code unless `trust_remote_code`.
    """
    folder = _require_folder(path)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    tensors = _read_tensors(folder)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(f"{folder}/config.json: quantization_config must be an object, is {quantization!r:.80}")
    with _quiet():
        parsed = _load_config(folder, trust_remote_code=trust_remote_code)
    stored: Counter[str] = Counter()
    for tensor in tensors.values():
        stored[tensor.dtype] += tensor.bytes
    return CheckpointInfo(
        path=folder,
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        dtype=stored.most_common(1)[0][0],
        tensors=tensors,
        total_bytes=stored.total(),
        tied=bool(getattr(parsed.get_text_config(decoder=True), "tie_word_embeddings", False)),
        has_tokenizer=any((folder / name).is_file() for name in _TOKENIZER_FILES),
        quantization_config=quantization,
        files=tuple(sorted({tensor.file for tensor in tensors.values()})),
    )


def _require_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise ModelError(f"Model folder {str(folder)!r} {problem}: pass a folder with config.json and *.safetensors")
    return folder


def _read_config(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    file = folder / "config.json"
    config = _read_json(file, "save the model with save_pretrained, or copy the file from where the weights came from")
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if not (isinstance(architectures, list) and architectures and all(isinstance(a, str) for a in architectures)):
        raise ModelError(f"{file}: architectures must name the model's class, is {architectures!r:.80}")
    if not isinstance(model_type, str):
        raise ModelError(f"{file}: model_type must be a string such as 'llama', is {model_type!r:.80}")
    if trust_remote_code:
        return config
    if "auto_map" in config:
        raise ModelError(
            f"{folder} runs its own code (auto_map in config.json), which can do anything on this machine: read the "
            "code, then pass trust_remote_code=True, or use a model that transformers knows"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if known is None:
        raise ModelError(
            f"{file}: model_type {model_type!r:.80} is no causal language model that the installed transformers knows: "
            "use a causal language model, or upgrade transformers"
        )
    if architectures[0] not in ([known] if isinstance(known, str) else known):
        raise ModelError(
            f"{file}: architecture {architectures[0]!r:.80} is no causal language model; {model_type!r} has {known}: "
            "use a checkpoint of that class"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every stored tensor by name. Like transformers, a single file is preferred to an index."""
    if (folder / SINGLE).is_file():
        tensors = read_header(folder / SINGLE)
    elif (folder / INDEX).is_file():
        tensors = _read_shards(folder)
    else:
        raise ModelError(_no_weights(folder))
    if not tensors:
        raise ModelError(f"{folder}: the checkpoint holds no tensor: download or save it again")
    return tensors


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return f"{folder} has its weights as pickle ({pickles[0]}), which runs code when opened: {_CONVERT}"
    if "adapter_config.json" in names:
        return f"{folder} is an adapter, not a model: merge it into its base (peft: merge_and_unload), and save that"
    return f"{folder} has neither {SINGLE} nor {INDEX}: save the model there with save_pretrained"


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    file = folder / INDEX
    weight_map = _read_json(file, "download or save the checkpoint again").get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise ModelError(f"{file}: weight_map must map tensor names to files: download or save the checkpoint again")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not is_inside(shard) or not shard.endswith(".safetensors"):
            raise ModelError(f"{file} names {shard!r:.120}: a shard must be a *.safetensors file inside the folder")
        if not (folder / shard).is_file():
            raise ModelError(f"{file} names {shard!r:.120}, which is missing: download the checkpoint again")
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise ModelError(f"{folder}: tensor {name!r:.120} is in both {tensors[name].file} and {shard}")
            tensors[name] = tensor._replace(file=shard)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise ModelError(f"{file} places tensor {name!r:.120} in {shard}, which lacks it: download it again")
    return tensors


def is_inside(path: str) -> bool:
    """Whether a relative path, read as POSIX or as Windows, stays inside the folder that it is joined to."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    rooted = posix.is_absolute() or bool(windows.anchor)
    return not rooted and bool(posix.parts) and ".." not in windows.parts and "\0" not in path


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header alone; every rule of the format is checked."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                limits = f"the file has {size} and the format allows {_MAX_HEADER_BYTES}"
                raise _corrupt(file, f"its header claims {length} bytes, {limits}")
            raw = stream.read(length)
    except OSError as error:
        raise ModelError(f"Cannot read {file} ({error.strerror}): make it readable") from error
    header = _parse_json(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(file, "__metadata__ does not map strings to strings")
    spans: list[tuple[int, int, str]] = []
    tensors = {name: _parse_entry(file, name, entry, spans) for name, entry in header.items()}
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            problem = f"tensor {name!r:.120} begins at byte {begin}, where {position} is next"
            raise _corrupt(file, f"{problem}: tensors may neither overlap nor leave gaps")
        position = end
    if position != size - 8 - length:
        raise _corrupt(file, f"its tensors take {position} bytes, the file has {size - 8 - length} for them")
    return tensors


def _parse_entry(file: Path, name: str, entry: Any, spans: list[tuple[int, int, str]]) -> TensorInfo:
    """One header entry; its place in the data is appended to `spans`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(file, f"the entry of {name!r:.120} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _corrupt(file, f"tensor {name!r:.120} has the unknown dtype {dtype!r:.40}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _corrupt(file, f"tensor {name!r:.120} has the impossible shape {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _corrupt(file, f"tensor {name!r:.120} has the impossible offsets {offsets!r:.80}")
    bits, torch_name = _DTYPES[dtype]
    if math.prod(shape) * bits != (offsets[1] - offsets[0]) * 8:
        raise _corrupt(file, f"tensor {name!r:.120} {dtype} {shape!r:.80} does not fit its offsets {offsets!r:.80}")
    spans.append((offsets[0], offsets[1], name))
    return TensorInfo(tuple(shape), torch_name, file.name)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _corrupt(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file} is not a valid safetensors file: {problem}. Download or save it again")


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ModelError(f"Cannot read {file} ({error.strerror}): {remedy}") from error
    return _parse_json(raw, file)


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice!r:.120} occurs twice")
        return result

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: no valid JSON where it must have it ({error}). Download or save it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: the JSON must be an object, is {value!r:.80}. Download or save it again")
    return value


def check_finite(source: str | Path | PreTrainedModel) -> None:
    """Refuse a model with NaN or infinity: ModelError names each tensor and how many of its values are not finite.

    A folder is streamed tensor by tensor, so memory holds one of them; a model is only read.
    """
    if isinstance(source, str | Path):
        folder = _require_folder(source)
        _refuse_nonfinite(str(folder), _stored_tensors(folder, _read_tensors(folder)))
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
            raise _corrupt(folder / file, _first_line(error)) from error


# Formats of 6 bits and fewer have no NaN and no infinity.
_TORCH_FLOATS = {name for name in _BITS if name.startswith(("float", "bfloat", "complex")) and _BITS[name] >= 8}


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


def _load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's config class runs its own arithmetic on the values of the file
        raise ModelError(
            f"{folder}/config.json does not describe a model ({type(error).__name__}: {_first_line(error)}): "
            "copy the file from where the weights came from"
        ) from error


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"Tokenizer folder {str(folder)!r} does not exist: pass a folder with tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises a bare Exception for a file it cannot read
        raise ModelError(
            f"The tokenizer in {folder} cannot be loaded ({_first_line(error)}): save it again with save_pretrained, "
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
            f"transformers cannot load {folder} ({_first_line(error)}): config.json and the weights must belong "
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
    if not any(isinstance(m, nn.Linear | Conv1D) and m is not head for m in model.modules()):
        raise ModelError(
            f"{name} ({type(model).__name__}) has no linear layer besides its output layer, so there is nothing to "
            "optimize: use a model with nn.Linear or Conv1D layers"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Only transformers' errors, no progress bars; what the caller had set comes back."""
    import warnings

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    no_hub_bars = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hub warns where its own environment variable overrules this
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            (disable_progress_bars if no_hub_bars else enable_progress_bars)()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
