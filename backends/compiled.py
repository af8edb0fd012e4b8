"""The model's own forward, compiled whole over a static cache: the runner that the `decode` pass serves through."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.kernels.library import introduce_ops
from optimizer.backends.kv_cache import StaticKeyValueCache, prompt_cache
from optimizer.backends.runner import Ledger, StepRunner


class CompiledRunner(StepRunner):
    """The model's own forward, compiled whole over a static cache: one graph for every step of a bucket.

    A bucket is a batch size (the next power of two; spare rows repeat the last one) and a capacity in tokens (256
    doubled until the request fits). Its step is compiled when first used, with `fullgraph=True`, so that a graph
    break is an error; `warm_up` does it ahead of time. A sequence that outgrows its capacity moves to the next one.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, max_context: int | None = None, compile: bool = True
    ) -> None:
        super().__init__(model, tokenizer, max_context=max_context, compile=compile)
        self.writes_by_op = self.device.type == "cuda"
        self._steps: dict[tuple[int, int], _CompiledStep] = {}
        self._step: _CompiledStep | None = None
        self._prompt: tuple[Any, Tensor] | None = None
        self._wanted = 0

    def warm_up(self, batch: int = 1, context: int = 1) -> None:
        """Compile and run the step of a bucket, so that the first request does not pay for it."""
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._wanted = context
        self.prefill(tokens)
        self.decode(tokens[:, 0])

    def generate(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """`BaseRunner.generate`, in the bucket that holds the whole request."""
        self._wanted = tokens.shape[-1] + options.get("max_new_tokens", 128)
        return super().generate(tokens, mask, **options)

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        spare = bucket(self._batch) - self._batch
        if spare and not all_logits:
            tokens = torch.cat([tokens, tokens[-1:].expand(spare, -1)])
            mask = torch.cat([mask, mask[-1:].expand(spare, -1)])
        cache = prompt_cache(self.config)
        logits = self._run_prompt(tokens, mask, all_logits, cache)
        self._prompt, self._step = (cache, mask), None
        return logits[: self._batch]

    def _decode(self, tokens: Tensor) -> Tensor:
        if self._step is None:
            self._step = self._bucket_for(max(self._wanted, self._context))
            assert self._prompt is not None
            self._step.state.load(*self._prompt)
            self._prompt, self._wanted = None, 0
        elif self._context > self._step.state.capacity:
            larger = self._bucket_for(self._context)
            larger.state.take_over(self._step.state)
            self._step = larger
        spare = self._step.state.batch - self._batch
        if spare:
            tokens = torch.cat([tokens, tokens[-1:].expand(spare)])
        return self._step(tokens)[: self._batch]

    def _bucket_for(self, context: int) -> _CompiledStep:
        rows, capacity = bucket(self._batch), min(max(256, bucket(context)), self.max_context)
        if (rows, capacity) not in self._steps:
            state = StaticKeyValueCache(self.config, rows, capacity, self.device)
            self._steps[rows, capacity] = _CompiledStep(self.model, state, self.ledger, self.compile, self.backend)
        return self._steps[rows, capacity]

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the static caches of all buckets in use occupy."""
        return sum(step.state.bytes for step in self._steps.values())


class _CompiledStep:
    """One decode step of one bucket, compiled at its first call.

    It is compiled without Dynamo's guards (0.4 ms a step on a six-layer model): everything they would watch belongs
    to the runner, which checks its inputs, and the step has a code object of its own, so there is one graph to
    choose. It therefore cannot recompile.
    """

    def __init__(
        self,
        model: nn.Module,
        state: StaticKeyValueCache,
        ledger: Ledger,
        compile: bool,
        backend: str | Callable[..., Any],
    ) -> None:
        self.model, self.state, self.ledger = model, state, ledger
        self.kind = "compiled" if compile else "eager"
        self.ready = not compile
        forward = FunctionType(_step_forward.__code__.replace(), _step_forward.__globals__, "decode_step")
        self.run: Callable[..., Tensor] = forward
        if compile:
            options = compile_options(state.mask.device)
            self.run = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False, options=options)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.ledger.steps[self.kind] += 1
        if self.ready:
            return self.run(self.model, self.state, tokens)
        began = time.perf_counter()
        introduce_ops()
        logits = self.run(self.model, self.state, tokens)
        self.ledger.compile_seconds += time.perf_counter() - began
        self.ready = True
        return logits


def _step_forward(model: Any, state: StaticKeyValueCache, tokens: Tensor) -> Tensor:
    """Append `tokens [B]` to the static cache; float32 logits `[B, V]`."""
    out = model(
        input_ids=tokens[:, None],
        attention_mask=state.mask,
        position_ids=state.position,
        past_key_values=state.cache,
        use_cache=True,
    )
    state.advance()
    return out.logits[:, -1].float()  # type: ignore[no-any-return]


def compile_options(device: torch.device) -> dict[str, Any]:
    """Inductor options of the decode step: no guards, and on a CPU its C++ wrapper, a step being many short kernels."""
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return options | ({"cpp_wrapper": True} if device.type == "cpu" else {})


def bucket(size: int) -> int:
    """The size that is compiled for `size` rows or tokens: the next power of two."""
    return 1 << (size - 1).bit_length()
