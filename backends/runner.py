"""Runners: what every one does (input checks, generation, text), and the Hugging Face model as its users run it.

A runner gives float32 logits and satisfies the `Runner` protocol of the measuring side, so all are timed by one clock
and judged on one set of items. Tokens are int64 and left-padded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import layer_kernel, linear_layers, weight_bytes
from optimizer.backends.sampling import Sampling, sample
from optimizer.errors import UsageError

OnToken = Callable[[Tensor], None]


@dataclass
class Ledger:
    """What really ran: steps by how they were executed, and the kernel of every linear layer."""

    steps: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)
    """What a reader of the counts should know, by subject: why steps were not replayed, what speculation did."""

    def kernel_counts(self) -> dict[str, int]:
        """Layers by kernel."""
        return dict(Counter(self.kernels.values()).most_common())


@contextmanager
def _recording_nothing() -> Iterator[None]:
    """No autograd graph, whatever the caller's mode; nor inference tensors, which a later step could not write to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class BaseRunner(ABC):
    """Input checks, generation and text handling; subclasses say how a prompt and a step are run."""

    max_batch: int | None = None
    """Rows that it takes at once; None is any number."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, max_context: int | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        config: Any = model.config
        self.config: Any = config
        self.device = next(model.parameters()).device
        self.vocab_size = int(self.config.get_text_config().vocab_size)
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if max_context is not None and max_context < 1:
            raise UsageError(f"Invalid max_context {max_context}. A context has at least one token.")
        self.max_context = min(max_context or limit, limit)
        self.ledger = Ledger(kernels={name: layer_kernel(module) for name, module in linear_layers(model).items()})
        self._weight_bytes = weight_bytes(model) - _looked_up_bytes(model)
        self._context = 0

    def reset(self, batch: int) -> None:
        """Empty the cache; the next call must be `prefill` with `batch` rows."""
        if batch < 1:
            raise UsageError(f"Invalid batch {batch}. A batch has at least one row.")
        self._batch, self._context = batch, 0

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, all_logits: bool = False) -> Tensor:
        """Run the prompt `[B, S]`; logits `[B, V]`, or `[B, S, V]` with `all_logits`, in float32."""
        tokens, mask = self._checked(tokens, mask)
        self.reset(tokens.shape[0])
        self.ledger.steps["prefill"] += 1
        with _recording_nothing():
            logits = self._prefill(tokens, mask, all_logits)
        self._context = tokens.shape[1]
        return logits

    def decode(self, tokens: Tensor) -> Tensor:
        """Append `tokens [B]` to the rows; logits `[B, V]` in float32."""
        if self._context == 0:
            raise UsageError("decode was called before prefill. Run the prompt first.")
        if tokens.shape != (self._batch,):
            raise UsageError(f"decode takes one token a row: [{self._batch}], got {list(tokens.shape)}.")
        if self._context >= self.max_context:
            raise UsageError(f"the context is full at {self.max_context} tokens. Give the runner a larger max_context.")
        self._context += 1
        with _recording_nothing():
            return self._decode(tokens.to(self.device, torch.long).contiguous())

    def generate(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Continue the prompts `[B, S]` by at most `max_new_tokens`; returns `[B, S + new]`.

        Greedy unless `temperature` is positive; draws come from a generator of their own, seeded by `seed`. A row
        that has produced an end token is filled up with it, and generation ends when all rows have. `on_token`
        receives each new `[B]` as it is made.
        """
        tokens, mask = self._checked(tokens, mask)
        sampling = Sampling(temperature, top_k, top_p)
        self._check_room(tokens.shape[1], max_new_tokens)
        ends = torch.tensor(_as_list(eos_token_id), dtype=torch.long, device=self.device)
        if temperature == 0 and not ends.numel():
            return self._greedy(tokens, mask, max_new_tokens, on_token)
        return self._sampled(tokens, mask, max_new_tokens, sampling, ends, seed, on_token)

    def _greedy(self, tokens: Tensor, mask: Tensor, new: int, on_token: OnToken | None) -> Tensor:
        """Exactly `new` most likely tokens a row."""
        return self._sampled(tokens, mask, new, Sampling(), tokens.new_empty(0), None, on_token)

    def _sampled(
        self,
        tokens: Tensor,
        mask: Tensor,
        max_new: int,
        sampling: Sampling,
        ends: Tensor,
        seed: int | None,
        on_token: OnToken | None,
    ) -> Tensor:
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=self.device)
        produced: list[Tensor] = []
        with closing(self._tokens(tokens, mask, sampling, seed)) as chosen:
            for new in chosen:
                if ends.numel():
                    new = torch.where(done, ends[0], new)
                    done |= torch.isin(new, ends)
                produced.append(new)
                if on_token is not None:
                    on_token(new)
                if len(produced) == max_new or (ends.numel() and bool(done.all())):
                    break
        return torch.cat([tokens, torch.stack(produced, 1)], 1)

    def _tokens(
        self, tokens: Tensor, mask: Tensor, sampling: Sampling, seed: int | None
    ) -> Generator[Tensor, None, None]:
        """The next token of each row `[B]`, without end."""
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(self.device)
            generator.manual_seed(seed) if seed is not None else generator.seed()
        logits = self.prefill(tokens, mask)
        while True:
            new = sample(logits, sampling, generator)
            yield new
            logits = self.decode(new)

    def generate_text(self, prompts: str | Sequence[str], **options: Any) -> list[str]:
        """Continue texts, and return the continuations alone. Takes the options of `generate`."""
        if self.tokenizer is None:
            raise UsageError("this runner has no tokenizer. Pass one to `optimize`, or call `generate` with token ids.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        tokens, mask = left_pad(rows, self.tokenizer.pad_token_id or 0)
        options.setdefault("eos_token_id", self.tokenizer.eos_token_id)
        out = self.generate(tokens, mask, **options)[:, tokens.shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in out.tolist()]

    def bytes_per_step(self, batch: int, context: int) -> int:
        """The fewest bytes one decode step must move: every weight once, and every row's keys and values.

        Of an embedding that is not the head as well, a step looks up single rows; they are not counted.
        """
        return self._weight_bytes + batch * context * self.kv_bytes_per_token

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values a token keeps, over all layers."""
        return self.original_kv_bytes_per_token

    @property
    def original_kv_bytes_per_token(self) -> int:
        """The same in the type of activations, as the model itself would keep them."""
        config = self.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * head_dim * self.dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        return next(self.model.parameters()).dtype

    def _checked(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise UsageError(f"tokens must be [batch, length] with at least one of each, got {list(tokens.shape)}.")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise UsageError(f"tokens must be integers, got {tokens.dtype}.")
        tokens = tokens.long()
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise UsageError(f"token {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}.")
        if tokens.shape[1] > self.max_context:
            raise UsageError(f"a prompt of {tokens.shape[1]} tokens exceeds the context of {self.max_context}.")
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        if mask.shape != tokens.shape or not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
            raise UsageError("the mask must have the shape of the tokens and be left-padded: 0…0 1…1 in each row.")
        return tokens.to(self.device), mask.to(self.device)

    def _check_room(self, prompt: int, new: int) -> None:
        if new < 1:
            raise UsageError(f"Invalid max_new_tokens {new}. Ask for at least 1.")
        if prompt + new > self.max_context:
            raise UsageError(
                f"{prompt} prompt tokens and {new} new ones exceed the context of {self.max_context}. "
                "Shorten them, or give the runner a larger max_context (the recipe's `decode` pass has the option)."
            )

    def _run_prompt(self, tokens: Tensor, mask: Tensor, all_logits: bool, cache: Any) -> Tensor:
        """The model's own forward over the whole prompt, which fills `cache`."""
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        logits = out.logits.float()
        return logits if all_logits else logits[:, -1]  # type: ignore[no-any-return]

    @abstractmethod
    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        """Run a checked prompt in an empty cache."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """Run a checked step."""


class StepRunner(BaseRunner):
    """A runner whose steps are compiled unless `compile` is False; set `torch.compile`'s `backend` before the first."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_context: int | None, compile: bool) -> None:
        super().__init__(model, tokenizer, max_context=max_context)
        self.compile = compile
        self.backend: str | Callable[..., Any] = "inductor"
        self.writes_by_op = False
        """Whether one `kv_write` a layer is all that puts a step's keys and values into the cache."""

    @abstractmethod
    def warm_up(self, batch: int = 1, context: int = 1) -> None:
        """Compile and run the step of a bucket, so that the first request does not pay for it."""


class EagerRunner(BaseRunner):
    """The Hugging Face model as its users run it: eager forward, dynamic cache, and greedy `generate` its own.

    This is the baseline of every speed ratio.
    """

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        from transformers import DynamicCache

        self._mask, self._cache = mask, DynamicCache(config=self.config)
        return self._run_prompt(tokens, mask, all_logits, self._cache)

    def _decode(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(self._batch, 1)], 1)
        self.ledger.steps["eager"] += 1
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._mask.sum(-1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def _greedy(self, tokens: Tensor, mask: Tensor, new: int, on_token: OnToken | None) -> Tensor:
        """Greedy requests without an end token go to `model.generate`, what a user would call.

        The model's generation defaults are set aside meanwhile: an end token would stop it early, and a repetition
        penalty would make its tokens another task than the one the compiled runner is measured on.
        """
        from transformers import GenerationConfig

        model: Any = self.model
        defaults, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
        try:
            with torch.no_grad():
                out = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=new,
                    do_sample=False,
                    use_cache=True,
                    streamer=None if on_token is None else _Streamer(on_token),
                )
        finally:
            model.generation_config = defaults
        self.ledger.steps["prefill"] += 1
        self.ledger.steps["eager"] += new - 1
        return out  # type: ignore[no-any-return]


class _Streamer:
    """transformers' streamer interface: the prompt comes first, then each new `[B]`."""

    def __init__(self, on_token: OnToken) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.on_token(value)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _looked_up_bytes(model: Any) -> int:
    """Bytes of an input embedding that no linear layer multiplies by."""
    table = model.get_input_embeddings().weight
    multiplied = {getattr(module, "weight", table.new_empty(0)).data_ptr() for module in linear_layers(model).values()}
    return 0 if table.data_ptr() in multiplied else table.numel() * table.element_size()


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows of any lengths as `tokens [B, S]` and `mask [B, S]`, padded on the left."""
    if not rows or any(len(row) == 0 for row in rows):
        raise UsageError("every prompt must have at least one token.")
    length = max(map(len, rows))
    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return tokens, mask


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
