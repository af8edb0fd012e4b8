"""How a paged cache is kept, and what that makes of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimizer.backends.falcon_attention import PagedFalconAttention, replace_attention
from optimizer.backends.kv_layout import FEW_TOKENS, KeyValueLayout, check_interface, probe, windowed
from optimizer.backends.paged_cache import register
from optimizer.errors import UsageError
from optimizer.quant.kv import KvKind


@dataclass(frozen=True)
class PagedOptions:
    """How the cache of a `PagedRunner` is kept.

    `kv` rounds keys and values to 8 bits. `cache_tokens` is the room for all rows together: unless given, 16 contexts,
    or what a quarter of the free memory holds. `chunk` bounds the tokens of a prompt that run at once. With a `window`,
    every token sees that many before it and the first `sinks`. `share_prefixes` keeps full blocks for later prompts
    that begin with them. With 8 bits, the `recent` last tokens of each row are also kept in the model's type and
    attended in it, for up to `max_batch` rows at once. Steps are compiled when first used (`capture` "lazy"), or all up
    to `max_batch` rows before (`ahead`; `backends.capture`).
    """

    kv: KvKind | None = None
    block_size: int = 32
    cache_tokens: int | None = None
    chunk: int = 512
    window: int = 0
    sinks: int = 0
    share_prefixes: bool = True
    recent: int = 0
    max_batch: int = 16
    capture: str = "lazy"

    def __post_init__(self) -> None:
        for name in ("block_size", "chunk", "max_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"Invalid {name} {getattr(self, name)}. Use at least 1.")
        if self.capture not in ("lazy", "ahead"):
            raise UsageError(f"Invalid capture {self.capture!r}. Use lazy or ahead.")
        if self.window < 0 or self.sinks < 0 or (self.sinks and not self.window):
            raise UsageError(f"Invalid window {self.window} with {self.sinks} sinks. Sinks stand beside a window.")
        if self.recent and (self.kv is None or self.recent < FEW_TOKENS):
            raise UsageError(
                f"Invalid recent {self.recent} with kv {self.kv}. Keep {FEW_TOKENS} or more, beside kv int8 or fp8."
            )


def layout_of(model: Any, options: PagedOptions) -> KeyValueLayout:
    """Switch a model to the paged attention and read off what its cache must hold.

    Raises `ModelError`, with the reason, for a model that cannot be, which stays as it was.
    """
    config = model.config
    before, replaced = config._attn_implementation, replace_attention(model)
    if not any(isinstance(module, PagedFalconAttention) for module in model.modules()):
        check_interface(model)
    config._attn_implementation = register()
    try:
        layout = probe(model, kind=options.kv, block_size=options.block_size, recent=options.recent)
    except BaseException:
        config._attn_implementation = before
        for name, module in replaced.items():
            model.set_submodule(name, module)
        raise
    return windowed(layout, options.window, options.sinks) if options.window else layout
