"""What a checkpoint folder holds, read from its headers; a damaged or hostile one is refused with a typed error.

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
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

from optimizer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 64  # of a torch tensor
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")
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
BITS = {name: bits for bits, name in _DTYPES.values()}


class TensorInfo(NamedTuple):
    """One stored tensor: its shape, torch's name of its dtype, and the file of the checkpoint that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def bytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


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


def inspect_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> CheckpointInfo:
    """Read `config.json` and the safetensors headers of the folder `path`; no weight is loaded.

    Raises ModelError for a missing, pickle-only, truncated, corrupt or hostile checkpoint, for one that is no causal
    language model, and for one that brings its own code unless `trust_remote_code`.
    """
    folder = require_folder(path)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    tensors = read_tensors(folder)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(f"{folder}/config.json: quantization_config must be an object, is {quantization!r:.80}")
    with quiet():
        parsed = load_config(folder, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    layers = getattr(parsed, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(tensors):  # building them could take hours, only to find out
        raise ModelError(
            f"{folder}/config.json: num_hidden_layers is {layers}, the files hold {len(tensors)} tensors, and each "
            "layer has at least one: copy the file from where the weights came from"
        )
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
        tied=bool(getattr(parsed, "tie_word_embeddings", False)),
        has_tokenizer=any((folder / name).is_file() for name in _TOKENIZER_FILES),
        quantization_config=quantization,
        files=tuple(sorted({tensor.file for tensor in tensors.values()})),
    )


def require_folder(path: str | Path) -> Path:
    """The folder as a path; `ModelError` when it is none."""
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


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
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
                raise corrupt(file, f"its header claims {length} bytes, {limits}")
            raw = stream.read(length)
    except OSError as error:
        raise ModelError(f"Cannot read {file} ({error.strerror}): make it readable") from error
    header = _parse_json(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(file, "__metadata__ does not map strings to strings")
    spans: list[tuple[int, int, str]] = []
    tensors = {name: _parse_entry(file, name, entry, spans) for name, entry in header.items()}
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            problem = f"tensor {name!r:.120} begins at byte {begin}, where {position} is next"
            raise corrupt(file, f"{problem}: tensors may neither overlap nor leave gaps")
        position = end
    if position != size - 8 - length:
        raise corrupt(file, f"its tensors take {position} bytes, the file has {size - 8 - length} for them")
    return tensors


def _parse_entry(file: Path, name: str, entry: Any, spans: list[tuple[int, int, str]]) -> TensorInfo:
    """One header entry; its place in the data is appended to `spans`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(file, f"the entry of {name!r:.120} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise corrupt(file, f"tensor {name!r:.120} has the unknown dtype {dtype!r:.40}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise corrupt(file, f"tensor {name!r:.120} has the impossible shape {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise corrupt(file, f"tensor {name!r:.120} has the impossible offsets {offsets!r:.80}")
    bits, torch_name = _DTYPES[dtype]
    if math.prod(shape) * bits != (offsets[1] - offsets[0]) * 8:
        raise corrupt(file, f"tensor {name!r:.120} {dtype} {shape!r:.80} does not fit its offsets {offsets!r:.80}")
    spans.append((offsets[0], offsets[1], name))
    return TensorInfo(tuple(shape), torch_name, file.name)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def corrupt(file: Path, problem: str) -> ModelError:
    """The error for a damaged file."""
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


def load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration as transformers reads it; `ModelError` when it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's config class runs its own arithmetic on the values of the file
        raise no_model(folder, error) from error


def no_model(folder: Path, error: Exception) -> ModelError:
    """What is raised where transformers makes no configuration, or no model, of the values in `config.json`."""
    return ModelError(
        f"{folder}/config.json does not describe a model ({type(error).__name__}: {first_line(error)}): "
        "copy the file from where the weights came from"
    )


@contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: BaseException) -> str:
    """What an error says, short enough to quote."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
