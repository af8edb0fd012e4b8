"""The model's own forward over a paged cache: prompts in chunks, steps compiled whole, sampling inside the step.

Prompts run uncompiled, in chunks that bound the memory they take. What a bucket of rows compiles and how a step runs is
in `paged_step`; what joins and leaves between steps, in `engine`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.compiled import bucket
from optimizer.backends.kernels.sampling import sample_tokens
from optimizer.backends.paged_cache import View
from optimizer.backends.paged_options import PagedOptions, layout_of
from optimizer.backends.paged_step import Step, uniform
from optimizer.backends.runner import OnToken, StepRunner
from optimizer.backends.sampling import Sampling
from optimizer.backends.sequences import Sequence, SequenceCache
from optimizer.backends.speculation import Speculation
from optimizer.errors import UsageError

__all__ = ["PagedOptions", "PagedRunner", "layout_of"]

SMALLEST_CONTEXT = 256
"""Tokens of the smallest bucket of contexts."""
_UNKNOWN = -1
"""Stands for a generated token in lockstep, whose value would have to be waited for; no prompt ever contains it."""


class PagedRunner(StepRunner):
    """Satisfies the `Runner` protocol for batches in lockstep; `Engine` runs requests that come and go on top of it.

    Raises `ModelError`, with the reason, for a model whose attention cannot read blocks. `model` is switched to the
    paged attention: give it a view.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_context: int | None = None,
        compile: bool = True,
        options: PagedOptions | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_context=max_context, compile=compile)
        self.options = options or PagedOptions()
        self.speculation: Speculation | None = None
        self.layout = layout_of(self.model, self.options)
        tokens = max(self.options.cache_tokens or self._default_tokens(), self.options.block_size)
        self.cache = SequenceCache(
            self.layout, tokens, min(tokens, self.max_context), self.device,
            chunk=self.options.chunk, share_prefixes=self.options.share_prefixes, rings=self.options.max_batch,
        )  # fmt: skip
        self.context_buckets = self.device.type == "cuda"
        """Whether steps are made for contexts of 256, 512, ... tokens: a GPU's kernels divide what a table may hold."""
        self.writes_by_op = not self.layout.recent
        self.graphs = self.device.type == "cuda" and compile
        """Whether steps are captured as CUDA graphs."""
        self._steps: dict[tuple[int, int, int, bool], Step] = {}
        self._rows: list[Sequence] = []
        self._step: Step | None = None

    # What batches in lockstep use: the `Runner` protocol.

    def _prefill(self, tokens: Tensor, mask: Tensor, all_logits: bool) -> Tensor:
        self.close()
        if self.layout.recent and len(tokens) > self.options.max_batch:
            raise UsageError(
                f"{len(tokens)} rows exceed max_batch {self.options.max_batch}, the rows whose recent tokens are kept. "
                "Raise it, or run (evaluate) fewer rows at once."
            )
        lengths = mask.sum(1).tolist()
        prompts = [row[len(row) - n :] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        self._rows = [self.cache.open(prompt, share=not all_logits) for prompt in prompts]
        self._step = None
        return self.extend(self._rows, prompts, all_logits=all_logits)

    def _decode(self, tokens: Tensor) -> Tensor:
        needed = self._longest + 1
        if self._step is None or needed > self._step.context:
            self._step = self.step(self._batch, context=needed)
            self._step.bind(self._rows, [[0]] * self._batch)
        self._step.reserve([1] * self._batch)
        self._step.tokens[: self._batch, 0].copy_(tokens)
        logits, _ = self._step()
        for row in self._rows:
            self.cache.commit(row, [_UNKNOWN])
        return logits[: self._batch, 0]

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
        """`BaseRunner`'s; one row goes to an engine that speculates, if `speculation` is set."""
        if self.speculation is None or tokens.shape[0] > 1 or not bool(mask.all()):
            return super()._sampled(tokens, mask, max_new, sampling, ends, seed, on_token)
        (new,) = self.generate_batch(
            tokens.tolist(), max_new_tokens=max_new, sampling=sampling, eos_token_id=ends.tolist(), seed=seed,
            on_token=None if on_token is None else lambda token: on_token(torch.tensor([token])),
        )  # fmt: skip
        return torch.cat([tokens, torch.tensor([new], device=self.device)], 1)

    def _tokens(
        self, tokens: Tensor, mask: Tensor, sampling: Sampling, seed: int | None
    ) -> Generator[Tensor, None, None]:
        """The tokens that the step itself chooses. The rows are given back at the end."""
        logits = self.prefill(tokens, mask)
        first = torch.Generator().seed() >> 1 if seed is None else seed
        seeds = [first + i for i in range(self._batch)]
        chosen = [
            self.choose(row[None], sampling, own, sequence.length - 1)
            for row, own, sequence in zip(logits, seeds, self._rows, strict=True)
        ]
        new = torch.cat(chosen)
        step: Step | None = None
        try:
            while True:
                yield new
                if step is None or self._longest + 1 > step.context:
                    step = self.step(self._batch, context=self._longest + 1, sampled=sampling.temperature > 0)
                    step.bind(self._rows, new[:, None].tolist(), [sampling] * self._batch, seeds)
                step.reserve([1] * self._batch)
                new = step()[1][: self._batch, 0].clone()
                for row in self._rows:
                    self.cache.commit(row, [_UNKNOWN])
        finally:
            self.close()

    def generate_batch(self, prompts: Rows[Rows[int]], **options: Any) -> list[list[int]]:
        """New tokens for prompts of any lengths, by continuous batching; takes the options of `Engine.submit`."""
        from optimizer.backends.engine import Engine

        self.close()
        engine = Engine(self)  # no more rows at once than its limits say
        requests = [engine.submit(prompt, **options) for prompt in prompts]
        while engine.busy:
            engine.step()
        return [request.tokens for request in requests]

    def reset(self, batch: int) -> None:
        """Empty the cache; the next call must be `prefill` with `batch` rows."""
        super().reset(batch)
        self.close()

    def close(self) -> None:
        """Give the blocks of the lockstep rows back."""
        for row in self._rows:
            self.cache.close(row)
        self._rows, self._step, self._context = [], None, 0

    @property
    def _longest(self) -> int:
        """Tokens of the longest row in lockstep."""
        return max(row.length for row in self._rows)

    def warm_up(self, batch: int = 1, context: int = 1) -> None:
        """Compile and run the step of a bucket, so that the first request does not pay for it."""
        del context  # one bucket serves every length
        self.prefill(torch.zeros(batch, 1, dtype=torch.long, device=self.device))
        self.decode(torch.zeros(batch, dtype=torch.long, device=self.device))
        self.reset(batch)

    def _default_tokens(self) -> int:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(16 * self.max_context, free // 4 // self.layout.bytes_per_token())

    # What the engine uses.

    def extend(self, rows: Rows[Sequence], tokens: Rows[Rows[int]], *, all_logits: bool = False) -> Tensor:
        """Run what is not written yet of each row's `tokens` (all of them from its start); logits after the last.

        In chunks of `options.chunk` tokens a row. Returns `[B, V]` float32, or `[B, S, V]` for every token,
        rows right-aligned. Raises `OutOfBlocks` where the cache has no room; what was written stays.
        """
        starts = [row.length for row in rows]
        width = max(len(t) - start for t, start in zip(tokens, starts, strict=True))
        if width < 1 or any(len(t) <= start for t, start in zip(tokens, starts, strict=True)):
            raise UsageError("every row must have at least one token that is not in the cache yet.")
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        places = torch.full((len(rows), width), -1)
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            new = len(row) - start
            ids[i, width - new :] = torch.tensor(row[start:])
            places[i, width - new :] = torch.arange(start, len(row))
        columns = self.options.chunk
        found = []
        for first in range(0, width, columns):
            part = slice(first, min(first + columns, width))
            last = part.stop == width
            logits = self._chunk(rows, ids[:, part], places[:, part], keep=0 if all_logits else 1)
            for sequence, written, at in zip(rows, ids[:, part].tolist(), places[:, part].tolist(), strict=True):
                self.cache.commit(sequence, [token for token, place in zip(written, at, strict=True) if place >= 0])
            if all_logits or last:
                found.append(logits)
        return torch.cat(found, 1) if all_logits else found[-1][:, -1]

    def _chunk(self, rows: Rows[Sequence], ids: Tensor, places: Tensor, keep: int) -> Tensor:
        ends = places.amax(1) + 1
        for row, end in zip(rows, ends.tolist(), strict=True):
            if end:
                self.cache.reserve(row, end)
        fresh = bool((places[:, 0] == 0).all())
        view = View.of(
            self.cache.storage, places.to(self.device), self.tables(rows), context=int(ends.max()), fresh=fresh,
            rings=self.rings(rows),
        )  # fmt: skip
        return self.forward(ids.to(self.device), view, keep)

    def forward(self, ids: Tensor, view: View, keep: int) -> Tensor:
        """The model's own forward, not compiled; float32 logits of the last `keep` tokens, of all for 0."""
        self.ledger.steps["prefill chunk"] += 1
        with torch.inference_mode(False), torch.no_grad():
            out = self.model(
                input_ids=ids,
                position_ids=view.positions.clamp(min=0),
                past_key_values=view,
                use_cache=True,
                kv_cache=view,
                logits_to_keep=keep,
            )
        return out.logits.float()  # type: ignore[no-any-return]

    def tables(self, rows: Rows[Sequence]) -> list[Tensor]:
        """The rows' block tables `[B, M]` of each group."""
        tables = []
        for group in range(len(self.layout.windows)):
            lists = [row.table(group) for row in rows]
            width = max(1, *map(len, lists))
            padded = [table + [-1] * (width - len(table)) for table in lists]
            tables.append(torch.tensor(padded, dtype=torch.int32, device=self.device))
        return tables

    def rings(self, rows: Rows[Sequence]) -> tuple[Tensor, Tensor] | None:
        """The rows' rings of recent tokens and where they begin, `[B]` int32."""
        if not self.layout.recent:
            return None
        rings, kept = ([row.ring for row in rows], [row.kept for row in rows])
        return tuple(torch.tensor(values, dtype=torch.int32, device=self.device) for values in (rings, kept))  # type: ignore[return-value]

    def step(self, rows: int, tokens: int = 1, *, context: int | None = None, sampled: bool = False) -> Step:
        """The step for at least that many rows, of `tokens` new tokens each; compiled when it first runs.

        `context` is the most tokens that a row will hold then: the longest that the runner takes unless given.
        """
        most = self.max_context
        if self.context_buckets and context is not None:
            most = min(max(SMALLEST_CONTEXT, bucket(context)), most)
        key = (bucket(rows), tokens, most, sampled)
        if key not in self._steps:
            self._steps[key] = Step(self, *key)
        return self._steps[key]

    def choose(self, logits: Tensor, sampling: Sampling, seed: int, position: int | Tensor) -> Tensor:
        """The token after `position` (or `[B]` of them) for `logits [B, V]`, as a step would draw it; `[B]`."""
        if sampling.temperature == 0:
            return logits.argmax(-1)
        rows = logits.shape[0]
        parameters = (
            torch.full((rows,), sampling.temperature, device=self.device),
            torch.full((rows,), sampling.top_k or 0, dtype=torch.int32, device=self.device),
            torch.full((rows,), 1.0 if sampling.top_p is None else sampling.top_p, device=self.device),
        )
        place = torch.as_tensor(position, device=self.device).expand(rows)
        return sample_tokens(logits, *parameters, uniform(torch.full_like(place, seed), place))  # type: ignore[no-any-return]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys, values and scales a token keeps, over all layers, and a ring's share of a full context."""
        return self.layout.bytes_per_token() + -(-self.layout.ring_bytes // self.max_context)

    def bytes_per_step(self, batch: int, context: int) -> int:
        """`BaseRunner`'s; recent tokens are read in the model's type."""
        return self._weight_bytes + batch * self.layout.bytes_read(context)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that all blocks and rings occupy, used or not."""
        return self.cache.storage.bytes
