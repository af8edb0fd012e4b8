"""A graph of `onnx_export` run by ONNX Runtime, as one of our runners: same inputs, same logits, same `generate`.

The cache stays where it is (IO binding), so nothing of it passes through Python. A graph with a shared buffer gets the
same memory as past and present, and writes a step's keys and values into it; a text that outgrows it takes one of twice
the size. A graph of standard operators returns a longer tensor, which is the past of the next step.

A folder is hostile until checked: every file against the manifest's sha256, then every path of external data, which
must be a plain name of a file that the manifest lists. Only then does the runtime open it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.onnx_cache import FIRST_ROOM, GrowingCache, SharedBuffer
from optimizer.backends.onnx_export import MODEL_FILE
from optimizer.backends.runner import BaseRunner, Ledger
from optimizer.errors import ArtifactError, DeviceError, UsageError

SETTINGS_FILE = "export.json"
PROVIDERS = {"cpu": ("CPUExecutionProvider", "onnxruntime"), "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu")}
"""By device: the execution provider, and the package that has it."""


class OnnxRunner(BaseRunner):
    """The model of an exported `folder` on `device`: "cpu", "cuda", or "auto" for the best that the runtime has.

    `files` are those that the folder may hold; its own links and paths are checked in any case. `rearrange` is that of
    `open_session`.

    Raises:
        DeviceError: ONNX Runtime, or its provider for the device, is not installed; the message says what to install.
        ArtifactError: a file is missing, or the graph names data outside of the folder.
    """

    def __init__(
        self, folder: Path, tokenizer: Any = None, *, files: Collection[str] | None = None, device: str = "auto",
        max_context: int | None = None, threads: int | None = None, rearrange: bool = True,
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
        self._place = "cpu" if device == "cpu" else "cuda"
        self._session = open_session(
            folder / MODEL_FILE,
            device=device,
            threads=threads,
            int8_inputs=bool(settings.get("int8_inputs")),
            rearrange=rearrange,
        )
        _, heads, _, width = self._session.get_inputs()[3].shape
        make = SharedBuffer if settings.get("shared_buffer") else GrowingCache
        self._make_cache = partial(make, self._runtime, self._place, int(text.num_hidden_layers), heads, width)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        return self._dtype  # type: ignore[no-any-return]

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        batch, length = tokens.shape
        self._cache = self._make_cache(batch, self.dtype, min(self.max_context, max(2 * length, FIRST_ROOM)))
        self._binding = self._session.io_binding()
        rows = torch.arange(length).expand(batch, -1)
        if self._cache.right_padded:
            rows = (rows + length - mask.sum(-1, keepdim=True)) % length  # where each row's tokens stand
            tokens, mask = tokens.gather(1, rows), mask.gather(1, rows)
        self._mask, self._position = mask, mask.sum(-1, keepdim=True)
        logits = self._step(tokens, (mask.cumsum(-1) - 1).clamp(min=0))
        back = torch.empty_like(rows).scatter_(1, rows, torch.arange(length).expand(batch, -1))
        if not all_logits:
            return logits[torch.arange(batch), back[:, -1]]
        return logits.gather(1, back[..., None].expand(logits.shape))

    def _decode(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self.ledger.steps["onnxruntime"] += 1
        logits = self._step(tokens[:, None], self._position)
        self._position = self._position + 1
        return logits[:, -1]

    def _step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run `tokens [B, S]` after the cache, which takes them in; float32 logits `[B, S, V]`."""
        binding = self._binding
        given = {"input_ids": tokens, "attention_mask": self._mask, "position_ids": positions}
        arrays = {name: tensor.contiguous().numpy() for name, tensor in given.items()}  # the binding keeps none alive
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")  # first of the outputs, whatever was bound before
        self._cache.bind(binding, self._mask.shape[1])
        self._session.run_with_iobinding(binding)
        self._cache.after(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy()).float()


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

    ONNX Runtime would join DequantizeLinear and MatMul into MatMulNBits, which for 8 bits decodes the whole weight at
    every call unless it may round the inputs. Told not to, it decodes the weight once, when the session is opened.
    """
    return {
        "session.disable_quant_qdq": "1",
        "session.qdq_matmulnbits_accuracy_level": "4" if int8_inputs else "1",
    }


def open_session(
    file: Path, *, device: str = "auto", threads: int | None = None, int8_inputs: bool = False, rearrange: bool = True
) -> Any:
    """A session of ONNX Runtime; DeviceError without it or its provider, ArtifactError for a graph that it refuses.

    Without `rearrange` it runs the graph as it is and reads weights where they lie in the file: slow, and no memory of
    its own for them.
    """
    runtime, device = _runtime(device)
    options = runtime.SessionOptions()
    for key, value in session_options(int8_inputs).items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if not rearrange:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED  # not all casts of weights first
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False  # what was used is given back
    try:
        return runtime.InferenceSession(str(file), options, providers=[PROVIDERS[device][0]])
    except Exception as error:  # the runtime's own types derive from nothing narrower
        raise ArtifactError(f"ONNX Runtime cannot load {file}: {str(error)[:300]}") from error
