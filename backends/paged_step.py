"""One decode step of a bucket of rows over a paged cache: compiled whole, with sampling inside, or captured as a graph.

A step appends up to `S` tokens to each of `B` rows and returns the logits after each and the token drawn from them. It
is compiled once for a bucket (rows, a power of two; tokens a row; the context that its tables have room for; whether
tokens are drawn) over buffers of its own that never move, which is also what a CUDA graph needs: tokens, positions,
block tables and sampling parameters are copied in when they change. A step of one token advances them itself, so that
the next step needs nothing from the host. Rows that are not in use have position -1: they write and see nothing.

Drafts that a step of several tokens verifies form a tree below the first of them; a chain is the tree whose nodes each
have one child. They are written one behind the other, and see the cache and their own branch.

Random numbers are a hash of (seed, position), so a row's draws do not depend on the rows beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizer.backends.compiled import compile_options
from optimizer.backends.cuda_graph import GraphedStep
from optimizer.backends.drafting import Draft
from optimizer.backends.kernels.library import introduce_ops
from optimizer.backends.kernels.sampling import sample_tokens
from optimizer.backends.kv_layout import FEW_TOKENS
from optimizer.backends.paged_cache import Storage, View
from optimizer.backends.sampling import Sampling, most_likely
from optimizer.backends.sequences import Sequence
from optimizer.errors import UsageError

if TYPE_CHECKING:
    from optimizer.backends.paged_runner import PagedRunner


class Step:
    """One bucket: its buffers, and the compiled (or captured) function over them."""

    def __init__(self, runner: PagedRunner, rows: int, tokens: int, context: int, sampled: bool) -> None:
        if tokens > FEW_TOKENS:
            raise UsageError(f"Invalid step of {tokens} tokens a row. At most {FEW_TOKENS} are attended in place.")
        device = runner.device
        self.runner, self.ledger, self.sampled = runner, runner.ledger, sampled
        self.context = context
        """The most tokens of a row, new ones included, that its tables have room for."""
        self.tokens = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.positions = torch.full((rows, tokens), -1, dtype=torch.long, device=device)
        self.tree: tuple[Tensor, Tensor] | None = None
        """Which of the new tokens each sees, as bits `[B, S]`, and where it stands in its branch `[B, S]`."""
        if tokens > 1:
            self.tree = (torch.zeros(rows, tokens, dtype=torch.int32, device=device), self.positions.clone())
        shape = (rows, -(-context // runner.layout.block_size))
        self.tables = [torch.full(shape, -1, dtype=torch.int32, device=device) for _ in runner.layout.windows]
        self.rings: tuple[Tensor, Tensor] | None = None
        if runner.layout.recent:
            ring = torch.full((rows,), -1, dtype=torch.int32, device=device)
            self.rings = (ring, torch.zeros_like(ring))
        self.temperature = torch.zeros(rows, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.top_p = torch.ones(rows, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.long, device=device)
        for static in self.buffers:
            torch._dynamo.mark_static_address(static)
        self.rows: list[Sequence] = []
        self._versions: list[int] = []
        self.uncaptured, self._kind = _executable(runner, self)
        """The compiled step itself, without a graph."""
        self._graph = GraphedStep(self.uncaptured, self.buffers) if runner.graphs else None
        self._ready = False

    @property
    def buffers(self) -> list[Tensor]:
        """Everything that a step reads and the host writes."""
        sampling = (self.temperature, self.top_k, self.top_p, self.seeds)
        return [self.tokens, self.positions, *(self.tree or ()), *self.tables, *(self.rings or ()), *sampling]

    def bind(
        self, rows: Rows[Sequence], tokens: Rows[Rows[int]], samplings: Rows[Sampling] = (), seeds: Rows[int] = (),
        drafts: Rows[Draft] = (),
    ) -> None:  # fmt: skip
        """Put sequences into the first rows, each to go on with its `tokens`, one or more; the other rows rest.

        Those behind the first are the nodes of its draft; a chain unless `drafts` are given.
        """
        count, width = len(rows), self.tokens.shape[1]
        self.rows = list(rows)
        self._versions = [-1] * count
        self.positions.fill_(-1)
        if count:
            self.tokens[:count] = _padded(tokens, width, 0)
            places = [range(row.length, row.length + len(new)) for row, new in zip(rows, tokens, strict=True)]
            self.positions[:count] = _padded(places, width, -1)
        if count and self.tree is not None:
            trees = drafts or [Draft.chain(new[1:]) for new in tokens]
            sees, stand = self.tree
            sees[:count] = _padded([draft.sees for draft in trees], width, 0)
            stands = [[row.length + depth for depth in draft.depths] for row, draft in zip(rows, trees, strict=True)]
            stand[:count] = _padded(stands, width, -1)
        if self.tree is not None:
            self.tree[0][count:], self.tree[1][count:] = 0, -1
        for i, sampling in enumerate(samplings):
            self.temperature[i] = sampling.temperature
            self.top_k[i] = sampling.top_k or 0
            self.top_p[i] = 1.0 if sampling.top_p is None else sampling.top_p
        if seeds:
            self.seeds[: len(seeds)] = torch.tensor(seeds)

    def reserve(self, tokens: Rows[int]) -> None:
        """Make room for so many further tokens in each row, and copy the tables that changed. Raises `OutOfBlocks`."""
        for i, row in enumerate(self.rows):
            self.runner.cache.reserve(row, row.length + tokens[i])
            if row.version == self._versions[i]:
                continue
            for group, buffer in enumerate(self.tables):
                table = row.table(group)
                buffer[i, : len(table)] = torch.tensor(table, dtype=torch.int32)
            if self.rings is not None:
                self.rings[0][i], self.rings[1][i] = row.ring, row.kept
            self._versions[i] = row.version

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Run it: float32 logits `[B, S, V]`, and the token chosen after each `[B, S]`."""
        logits, chosen = self._run()
        replayed = self._graph is not None and not self._graph.reason
        self.ledger.steps["replayed" if replayed else self._kind] += 1
        if self._graph is not None and self._graph.reason:
            self.ledger.notes["graph"] = f"steps ran uncaptured: {self._graph.reason}"
        return logits, chosen

    def prepare(self) -> None:
        """Compile and capture it, if it never ran, with all rows at rest; no step is counted."""
        if not self._ready:
            self.bind([], [])
            self._run()

    def _run(self) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        if not self._ready and self.runner.compile:
            introduce_ops()
        with torch.inference_mode(False), torch.no_grad():
            outputs = self.uncaptured() if self._graph is None else self._graph()
        if not self._ready:
            self.ledger.compile_seconds += time.perf_counter() - began
            self._ready = True
        return outputs


def _executable(runner: PagedRunner, step: Step) -> tuple[Callable[[], tuple[Tensor, Tensor]], str]:
    """What runs a step, and what the ledger calls it."""
    # A code object of its own: every bucket is one graph, none has guards, and none can be compiled again.
    forward = FunctionType(_step_forward.__code__.replace(), _step_forward.__globals__, "paged_step")
    run: Callable[..., tuple[Tensor, Tensor]] = forward
    if runner.compile:
        options = compile_options(runner.device)
        run = torch.compile(forward, backend=runner.backend, fullgraph=True, dynamic=False, options=options)

    def call() -> tuple[Tensor, Tensor]:
        return run(runner.model, runner.cache.storage, step)

    return call, "compiled" if runner.compile else "eager"


def _step_forward(model: Any, storage: Storage, step: Step) -> tuple[Tensor, Tensor]:
    """Append the step's tokens; float32 logits `[B, S, V]`, next tokens `[B, S]`, which a step of one takes on."""
    positions = step.positions
    view = View.of(storage, positions, step.tables, tree=step.tree, rings=step.rings)
    stand = positions if step.tree is None else step.tree[1]
    out = model(
        input_ids=step.tokens,
        position_ids=stand.clamp(min=0),
        past_key_values=view,
        use_cache=True,
        kv_cache=view,
    )
    logits = out.logits.float()
    if step.sampled:
        batch, tokens, vocabulary = logits.shape
        rows = [t.repeat_interleave(tokens) for t in (step.temperature, step.top_k, step.top_p)]
        chosen = sample_tokens(logits.view(-1, vocabulary), *rows, uniform(step.seeds[:, None], stand).view(-1))
        chosen = chosen.view(batch, tokens)
    else:
        chosen = most_likely(logits)
    if positions.shape[1] == 1:
        step.tokens.copy_(torch.where(positions >= 0, chosen, step.tokens))
        positions.add_((positions >= 0).long())
    return logits, chosen


def _padded(rows: Rows[Rows[int]], width: int, fill: int) -> Tensor:
    """`[B, width]`."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) float32, one for each (seed, position): splitmix64 of their mix (Steele et al., 2014)."""
    x = seeds * -7046029254386353131 + (positions + 1) * -7723592293110705685
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
