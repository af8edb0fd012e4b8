"""Run decode from a static or paged key-value cache with one compiled graph a batch size.

Generation then launches one precompiled step a token instead of hundreds of small operators. Unquantized bfloat16
layers on a processor without bfloat16 matrix instructions move to our own kernel at the same time. With `int8_inputs`
weight-only integer layers multiply integers: their inputs are rounded to int8 as they come, which changes a little what
the model computes, and nothing that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from optimizer.backends.compiled import CompiledRunner
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.decode_attention import register
from optimizer.backends.kv_layout import KeyValueLayout
from optimizer.backends.linear import DenseLinear, MergedSlice, QuantizedLinear, linear_layers
from optimizer.backends.paged_runner import PagedOptions, PagedRunner, layout_of
from optimizer.backends.runner import BaseRunner
from optimizer.errors import ModelError, RecipeError, UsageError
from optimizer.passes.base import Context, PassReport, Skip, stopwatch
from optimizer.quant.kv import check_kv_kind

INT8_GROUP = 32
"""Values of a token that share a scale where `int8_inputs` rounds them: a block of the kernels, and the finest."""


@dataclass(frozen=True)
class Decode:
    """Serve through a `CompiledRunner` of `max_context` tokens (all the model's positions unless given).

    With `cache: paged` through a `PagedRunner`: keys and values in blocks of `block_size` tokens, room for
    `cache_tokens` over all rows, prompts in chunks of `chunk` tokens, shared prefixes, and requests that join and leave
    between steps. `kv: int8` or `fp8` rounds them, and with `recent` the last so many tokens of each row, of
    `max_batch` at once, are attended in the model's type; with a `window` every token sees that many before it and the
    first `sinks`. With `capture: ahead` all steps of up to `max_batch` rows are compiled before the first is needed. A
    model whose attention cannot read blocks stays on the static cache, and the report says why.

    `int8_inputs` rounds the inputs of weight-only integer layers to int8 in groups of 32 values of a token on a CPU.
    """

    name: ClassVar[str] = "decode"
    stored: ClassVar[bool] = False
    max_context: int | None = None
    compile: bool = True
    int8_inputs: bool = False
    cache: str = "static"
    kv: str | None = None
    block_size: int = 32
    cache_tokens: int | None = None
    chunk: int = 512
    window: int = 0
    sinks: int = 0
    recent: int = 0
    max_batch: int = 16
    capture: str = "lazy"
    required: bool = True

    @property
    def paged(self) -> PagedOptions:
        """How the paged cache is kept."""
        kv: Any = self.kv
        return PagedOptions(
            kv, self.block_size, self.cache_tokens, self.chunk, self.window, self.sinks, recent=self.recent,
            max_batch=self.max_batch, capture=self.capture,
        )  # fmt: skip

    def check(self, model: nn.Module, ctx: Context) -> None:
        """The context must be one that the model has positions for, and the options must go together."""
        del ctx
        if self.cache not in ("static", "paged"):
            raise RecipeError(f"decode.cache is {self.cache!r}. Use static or paged.")
        try:
            paged = self.paged
            if self.kv is not None:
                check_kv_kind(self.kv)
        except UsageError as error:
            raise RecipeError(f"decode: {error}") from error
        if self.cache == "static" and paged != PagedOptions():
            raise RecipeError(
                "decode: kv, block_size, cache_tokens, chunk, window, sinks, recent, max_batch and capture are options "
                "of the paged cache. "
                "Add `cache: paged`."
            )
        limit = getattr(model.config, "max_position_embeddings", None)
        if self.max_context is not None and not 1 < self.max_context <= (limit or self.max_context):
            raise RecipeError(f"decode.max_context is {self.max_context}; the model has positions for 2 to {limit}.")

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Choose kernels for the remaining dense layers, and set the runner that the pipeline will build."""
        with stopwatch() as seconds:
            dense = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and DenseLinear.suits(m)]
            for name, linear in dense:
                model.set_submodule(name, DenseLinear(linear))
            integer, skipped = _use_int8_inputs(model) if self.int8_inputs else ([], [])
            ctx.make_runner = partial(_runner, max_context=self.max_context, compile=self.compile)
            attention = ""
            if self.cache == "paged":
                try:
                    attention = f"attention reads blocks: {_described(layout_of(model, self.paged))}"
                    ctx.make_runner = partial(
                        _paged_runner, max_context=self.max_context, compile=self.compile, options=self.paged
                    )
                except ModelError as error:
                    if self.kv or self.window:
                        raise
                    skipped.append(Skip("cache", f"stays static: {error}"))
            attention = attention or _use_decode_attention(model)
        notes = [f"{len(dense)} dense layers run on bf16_linear"] if dense else []
        notes += [*integer, attention]
        return PassReport(self.name, 1, 1, tuple(skipped), notes=tuple(notes), seconds=seconds())


def _runner(model: nn.Module, tokenizer: Any, *, max_context: int | None, compile: bool) -> BaseRunner:
    return CompiledRunner(model, tokenizer, max_context=max_context, compile=compile)


def _paged_runner(
    model: nn.Module, tokenizer: Any, *, max_context: int | None, compile: bool, options: PagedOptions
) -> BaseRunner:
    return PagedRunner(model, tokenizer, max_context=max_context, compile=compile, options=options)


def _described(layout: KeyValueLayout) -> str:
    windows = ", ".join(f"a window of {window}" if window else "all tokens" for window in layout.windows)
    elements = str(layout.elements).removeprefix("torch.")
    recent = f", the last {layout.recent} in {str(layout.dtype).removeprefix('torch.')}" if layout.recent else ""
    return f"{elements}, {layout.bytes_per_token()} bytes a token, {windows} seen{recent}"


def _use_int8_inputs(model: nn.Module) -> tuple[list[str], list[Skip]]:
    """Have every weight-only integer layer multiply integers; a note of what was done, and the layers that cannot."""
    layers = {name: m.group.linear if isinstance(m, MergedSlice) else m for name, m in linear_layers(model).items()}
    chosen = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLinear) and layer.format.kind == "int" and layer.activation is None
    }
    skipped = [Skip(name, reason) for name, layer in chosen.items() if (reason := layer.serve_int8(INT8_GROUP))]
    done = len(chosen) - len(skipped)
    if done:
        rule = f"round their inputs to int8 in groups of {INT8_GROUP} values of a token"
        return [f"{done} weight-only integer layers {rule}; what is stored stays"], skipped
    reason = skipped[0].reason if skipped else "no layer has integer weights and inputs in 16 bits"
    return [f"int8_inputs did nothing: {reason}"], skipped


def _use_decode_attention(model: Any) -> str:
    """Switch a model that attends through SDPA to our kernel for single tokens, and say what was done."""
    config = model.config
    if config._attn_implementation != "sdpa":
        return f"attention stays {config._attn_implementation}"
    if next(model.parameters()).device.type != "cpu" or not cpu_kernels().loaded:
        return "attention stays sdpa: decode_attention is compiled for CPUs only"
    config._attn_implementation = register()
    return "single-token attention runs on decode_attention"
