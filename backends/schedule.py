"""Which requests run in the next step: the whole policy of continuous batching (Orca, Yu et al., OSDI 2022).

Running requests decode in every step. A waiting one is admitted, in order of arrival, when a row is free and the cache
has room for its prompt and a block to grow into; its prompt is then run in chunks that share a step's token budget with
the decoding rows (Sarathi-Serve, arXiv:2403.02310), so that a long prompt does not stall the others for long. When the
cache has no room left for the rows that run, the one that was admitted last is put back to the head of the queue: it
loses its blocks, not its tokens, and recomputes them when it is admitted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """At most `max_batch` rows at once, and about `token_budget` tokens a step (one prompt chunk always fits)."""

    max_batch: int = 8
    token_budget: int = 512

    def __post_init__(self) -> None:
        for name in ("max_batch", "token_budget"):
            if getattr(self, name) < 1:
                raise UsageError(f"Invalid {name} {getattr(self, name)}. Use at least 1.")


@dataclass(frozen=True)
class Waiting:
    """A request that is not admitted yet, or was put back: the tokens that must be in the cache before it decodes."""

    tokens: int


@dataclass(frozen=True)
class Running:
    """An admitted request: tokens of its prompt that are still to be run; 0 when it decodes."""

    prompt_left: int = 0


@dataclass(frozen=True)
class Plan:
    """What a step does: how many of the waiting are admitted, and the prompt tokens to run for each running request.

    `chunks` has an entry for every running request, those admitted now at its end; 0 for those that decode or wait.
    """

    admit: int
    chunks: tuple[int, ...]


def plan(waiting: Sequence[Waiting], running: Sequence[Running], room: int, limits: Limits, block_size: int) -> Plan:
    """The next step. `room` is the tokens that could be reserved now, for which cached prefixes count as free."""
    admit, rows = 0, list(running)
    # What admitted prompts still need comes off the room before another one is let in.
    room -= sum(row.prompt_left for row in rows)
    for request in waiting:
        room -= request.tokens + block_size
        if len(rows) >= limits.max_batch or (room < 0 and rows):
            break
        rows.append(Running(request.tokens))
        admit += 1
    budget = limits.token_budget - sum(row.prompt_left == 0 for row in rows)
    chunks: list[int] = []
    for row in rows:
        chunk = min(row.prompt_left, max(budget, 0 if any(chunks) else 1))
        budget -= chunk
        chunks.append(chunk)
    return Plan(admit, tuple(chunks))
