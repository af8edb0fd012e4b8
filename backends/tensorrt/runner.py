"""TensorRT engines as one of our runners: one profile for prompts, one for single tokens, over one cache.

What an execution returns as present is bound as the past of the next, so nothing of the cache is copied by us; inside
the engine a step appends by concatenation. It needs the GPU that the engine was built for. It is tested over a stand-in
of TensorRT's runtime that executes the same graph on a CPU, and has not run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.backends.onnx_export import past_names
from optimizer.backends.runner import BaseRunner, Ledger
from optimizer.backends.tensorrt.engine import checked_engine, read_engines
from optimizer.backends.tensorrt.provider import Provider, collecting_log, find_provider, this_gpu
from optimizer.errors import DeviceError, UsageError

_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.long}


class TensorRTRunner(BaseRunner):
    """The engines in `folder`, whose parent holds `config.json`.

    Raises:
        ArtifactError: an engine that is not as it was written, before it is deserialized.
        DeviceError: no TensorRT here, no GPU, or engines for another GPU, provider or version.
    """

    def __init__(
        self, folder: Path, tokenizer: Any = None, *, kernels: dict[str, str] | None = None,
        provider: Provider | None = None, device: str = "cuda",
    ) -> None:  # fmt: skip
        from transformers import AutoConfig

        provider = provider or find_provider()
        target = this_gpu()
        content = checked_engine(folder, target, provider)
        self.record = read_engines(folder)
        log = collecting_log(provider)
        self._runtime = provider.module.Runtime(log)  # an engine needs its runtime for as long as it lives
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            why = "; ".join(log.errors) or "no reason given"
            raise DeviceError(f"TensorRT cannot load the engine for {target}: {why}.")
        # No `super().__init__`: it measures a module, and here is none.
        self.tokenizer = tokenizer
        self.config = AutoConfig.from_pretrained(folder.parent, local_files_only=True)
        text = self.config.get_text_config()
        self.device = torch.device(device)
        self.vocab_size, self._layers = int(text.vocab_size), int(text.num_hidden_layers)
        self._profiles = {profile.name: profile for profile in self.record.profiles}
        self.max_context = self._most("decode", "total_sequence_length")
        self.max_batch = self._most("prefill", "batch_size")
        self.ledger = Ledger(kernels=dict(kernels or {}))
        self.engine = next(each for each in self.record.engines if each.target == target)
        self._weight_bytes = sum(self.engine.constant_bytes.values()) or self.engine.bytes
        self._context = 0
        self._contexts = {name: self._context_for(index) for index, name in enumerate(self._profiles)}
        self._empty = torch.zeros(16, dtype=torch.uint8, device=self.device)  # the address of a tensor without elements

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        return self._type(past_names(1)[0])

    def _type(self, name: str) -> torch.dtype:
        return _TYPES[self._engine.get_tensor_dtype(name).name]

    def _most(self, profile: str, dimension: str) -> int:
        return self._profiles[profile].dimensions[dimension][2]

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _context_for(self, index: int) -> Any:
        context = self._engine.create_execution_context()
        context.set_optimization_profile_async(index, self._stream())
        return context

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        rows, length = tokens.shape
        most = self._most("prefill", "batch_size"), self._most("prefill", "sequence_length")
        if rows > most[0] or length > most[1]:
            raise UsageError(
                f"the engine takes up to {most[0]} rows of {most[1]} tokens, and {rows} of {length} were given. Export "
                "it with a larger --batch or --prompt."
            )
        heads, width = (int(self.record.inputs[past_names(1)[0]][axis]) for axis in (1, 3))
        self._past = [
            torch.empty(rows, heads, 0, width, dtype=self.dtype, device=self.device) for _ in range(2 * self._layers)
        ]
        self._mask, self._position = mask, mask.sum(-1, keepdim=True)
        logits = self._step("prefill", tokens, (mask.cumsum(-1) - 1).clamp(min=0))
        return logits if all_logits else logits[:, -1]

    def _decode(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self.ledger.steps["tensorrt"] += 1
        logits = self._step("decode", tokens[:, None], self._position)
        self._position = self._position + 1
        return logits[:, -1]

    def _step(self, profile: str, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run `tokens [B, S]` after the cache, which grows by them; float32 logits `[B, S, V]`."""
        context = self._contexts[profile]
        given = {"input_ids": tokens, "attention_mask": self._mask, "position_ids": positions}
        given |= dict(zip(past_names(self._layers), self._past, strict=True))
        held = {name: tensor.contiguous() for name, tensor in given.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr() or self._empty.data_ptr())
        made = {}
        for name in ("logits", *past_names(self._layers, "present")):
            shape = tuple(context.get_tensor_shape(name))
            made[name] = torch.empty(shape, dtype=self._type(name), device=self.device)
            context.set_tensor_address(name, made[name].data_ptr())
        if not context.execute_async_v3(self._stream()):
            past = self._past[0].shape[2]
            raise DeviceError(f"TensorRT refused a {profile} of {list(tokens.shape)} tokens after {past}.")
        logits, *self._past = made.values()
        return logits.float()
