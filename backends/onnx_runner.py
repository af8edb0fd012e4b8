"""A graph of `onnx_export` run by ONNX Runtime, as one of our runners: same inputs, same logits, same `generate`.

The cache stays where the runtime made it: what a step returns as present is bound as the past of the next (IO binding),
so nothing of it passes through Python. Inside the graph a step appends by Concat, which makes a longer tensor.

A folder is hostile until checked: every file against the manifest's sha256, then every path of external data, which
must be a plain name of a file that the manifest lists. Only then does the runtime open it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.onnx_export import MODEL_FILE, past_names
from optimizer.backends.runner import BaseRunner, Ledger
from optimizer.errors import ArtifactError, DeviceError, UsageError

SETTINGS_FILE = "export.json"
PROVIDERS = {"cpu": ("CPUExecutionProvider", "onnxruntime"), "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu")}
"""By device: the execution provider, and the package that has it."""


class OnnxRunner(BaseRunner):
    """The model of an exported `folder` on `device`: "cpu", "cuda", or "auto" for the best that the runtime has.

    `files` are those that the folder may hold; its own links and paths are checked in any case.

    Raises:
        DeviceError: ONNX Runtime, or its provider for the device, is not installed; the message says what to install.
        ArtifactError: a file is missing, or the graph names data outside of the folder.
    """

    def __init__(
        self, folder: Path, tokenizer: Any = None, *, files: Collection[str] | None = None, device: str = "auto",
        max_context: int | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        from transformers import AutoConfig

        self._runtime, device = _runtime(device)
        settings = _settings(folder)
        check_external_data(folder, files)
        self.tokenizer = tokenizer
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = self.config.get_text_config()
        self.device = torch.device("cpu")  # where tokens and logits are
        self.vocab_size = int(text.vocab_size)
        limit = getattr(text, "max_position_embeddings", None) or 2**31
        if max_context is not None and max_context < 1:
            raise UsageError(f"Invalid max_context {max_context}. A context has at least one token.")
        self.max_context = min(max_context or limit, limit)
        self._dtype = getattr(torch, settings["dtype"])
        self._weight_bytes = int(settings["step_weight_bytes"])
        self.ledger = Ledger(kernels=dict(settings["kernels"]))
        self._context = 0
        self._layers = int(text.num_hidden_layers)
        self._place = "cpu" if device == "cpu" else "cuda"
        self._session = open_session(
            folder / MODEL_FILE, device=device, threads=threads, int8_inputs=bool(settings.get("int8_inputs"))
        )
        self._shape = [int(n) if isinstance(n, int) else 0 for n in self._session.get_inputs()[3].shape]

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        return self._dtype  # type: ignore[no-any-return]

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        _, heads, _, width = self._shape
        empty = torch.zeros(len(tokens), heads, 0, width, dtype=self.dtype)
        self._past = [self._runtime.OrtValue.ortvalue_from_numpy(empty.numpy(), self._place, 0)] * (2 * self._layers)
        self._mask, self._position = mask, mask.sum(-1, keepdim=True)
        logits = self._step(tokens, (mask.cumsum(-1) - 1).clamp(min=0))
        return logits if all_logits else logits[:, -1]

    def _decode(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self.ledger.steps["onnxruntime"] += 1
        logits = self._step(tokens[:, None], self._position)
        self._position = self._position + 1
        return logits[:, -1]

    def _step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run `tokens [B, S]` after the cache, which grows by them; float32 logits `[B, S, V]`."""
        binding = self._session.io_binding()
        given = {"input_ids": tokens, "attention_mask": self._mask, "position_ids": positions}
        arrays = {name: tensor.contiguous().numpy() for name, tensor in given.items()}  # the binding keeps none alive
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in zip(past_names(self._layers), self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in past_names(self._layers, "present"):
            binding.bind_output(name, self._place)
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        return torch.from_numpy(logits.numpy()).float()


def _runtime(device: str) -> tuple[Any, str]:
    """The onnxruntime module, and the device, for which it has a provider."""
    if device not in (*PROVIDERS, "auto"):
        raise DeviceError(f"ONNX graphs run on {' or '.join(PROVIDERS)} here, not on {device!r}.")
    package = PROVIDERS["cpu" if device == "auto" else device][1]
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(f"running ONNX graphs needs ONNX Runtime: pip install {package}") from error
    present = onnxruntime.get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"][0] in present else "cpu"
    if PROVIDERS[device][0] not in present:
        raise DeviceError(
            f"this ONNX Runtime has no {PROVIDERS[device][0]}: pip uninstall onnxruntime; pip install {package}"
        )
    return onnxruntime, device


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_bytes())
        if not {"dtype", "step_weight_bytes", "kernels"} <= settings.keys() or settings["dtype"] not in (
            "float32",
            "float16",
        ):
            raise ValueError("it lacks dtype, step_weight_bytes or kernels")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{folder / SETTINGS_FILE} cannot be read ({error}): export the model again") from error
    return settings  # type: ignore[no-any-return]


def check_external_data(folder: Path, files: Collection[str] | None = None) -> None:
    """Refuse a graph whose tensors lie anywhere but in plain files of its folder, listed in `files` where given.

    Raises:
        ArtifactError: naming the tensor, its path and the rule.
    """
    try:
        import onnx
        from onnx.external_data_helper import _get_all_tensors, uses_external_data
    except ImportError as error:
        raise DeviceError("checking an ONNX graph before it is run needs onnx: pip install onnx") from error
    from google.protobuf.message import DecodeError

    file = folder / MODEL_FILE
    if file.is_symlink() or not file.is_file():
        raise ArtifactError(f"{file} is missing or a link: export the model again")
    try:
        graph = onnx.load(str(file), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"{file} is no ONNX graph ({error}): export the model again") from error
    for tensor in _get_all_tensors(graph):
        if not uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        data = folder / location
        wrong = (
            "is no plain file name" if not location or location != Path(location).name or location in (".", "..")
            else "is a symbolic link" if data.is_symlink()
            else "is missing" if not data.is_file()
            else "is not in the manifest" if files is not None and location not in files
            else ""
        )  # fmt: skip
        if wrong:
            raise ArtifactError(f"{file}: the data of {tensor.name!r:.80} is in {location!r:.200}, which {wrong}")


def session_options(int8_inputs: bool) -> dict[str, str]:
    """Settings under which the runtime computes what the graph says.

    ONNX Runtime joins DequantizeLinear and MatMul into one kernel, which rounds the inputs to int8 unless told not to.
    """
    return {"session.qdq_matmulnbits_accuracy_level": "4" if int8_inputs else "1"}


def open_session(file: Path, *, device: str = "auto", threads: int | None = None, int8_inputs: bool = False) -> Any:
    """A session of ONNX Runtime; DeviceError without it or its provider, ArtifactError for a graph that it refuses."""
    runtime, device = _runtime(device)
    options = runtime.SessionOptions()
    for key, value in session_options(int8_inputs).items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(file), options, providers=[PROVIDERS[device][0]])
    except Exception as error:  # the runtime's own types derive from nothing narrower
        raise ArtifactError(f"ONNX Runtime cannot load {file}: {str(error)[:300]}") from error
