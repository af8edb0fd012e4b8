"""The last tokens of each sequence in the model's own type, beside a paged cache of 8 bits (KIVI's residual, Liu et
al., arXiv:2402.02750).

In every layer a sequence has a ring of C slots, and position p lies in slot `p % C` of it. All tokens are written to
the blocks as well, so prefixes are shared as before. A token at position t reads from the ring

    p ≥ starts = max(t + 1 - R, kept)       the last R tokens, itself included

and what came before from the blocks. `kept` is 0, but for a sequence that began with a prefix found in the cache (its
keys exist in 8 bits only: `kept` is where its own tokens begin) or that was cut back to tokens that have left the ring.
So what a token sees does not depend on the size of a chunk, or on the tokens beside it.

C is R and what a step may write beyond the first token that reads (`FEW_TOKENS`), in whole sixteens. Of a longer chunk
only the last C tokens are written; the ring is read before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = 2**31 - 1
"""Where padding begins to read the ring."""


@dataclass
class Recent:
    """What one forward does with rings of `capacity` slots.

    Of each new token: `starts [B, S]` int32, its first position that lies in the ring, and `slots [B, S]` int64, where
    it is written, -1 for nowhere. Of each row: `rings [B]` int32 and `first [B]` int64, its first new position.
    """

    capacity: int
    rings: Tensor
    starts: Tensor
    slots: Tensor
    first: Tensor

    @classmethod
    def of(cls, recent: int, capacity: int, places: Tensor, at: Tensor, rings: Tensor, kept: Tensor) -> Recent:
        """For tokens written at `places [B, S]` (-1 is padding) that stand at positions `at [B, S]`.

        They differ for drafts in a tree. `rings`, `kept` `[B]` int32 are those of each row.
        """
        real = places >= 0
        starts = torch.where(real, (at + 1 - recent).maximum(kept[:, None]), _NEVER)
        written = real & (places > places.amax(1, keepdim=True) - capacity)
        slots = torch.where(written, rings[:, None].long() * capacity + places % capacity, -1)
        first = torch.where(real, places, _NEVER).amin(1)
        return cls(capacity, rings, starts.clamp(min=0).to(torch.int32), slots, first)

    def visible(self, blocks: Tensor, places: Tensor, window: int, sinks: int) -> Tensor:
        """What new tokens see of L positions in blocks, of their row's ring and of themselves `[B, 1, S, L + C + S]`.

        `blocks [B, 1, S, L]` is what they would see without rings.
        """
        starts, at = self.starts[:, :, None], places[:, :, None]  # [B, S, 1]
        old = blocks & (torch.arange(blocks.shape[-1], device=at.device) < starts)[:, None]
        slot = torch.arange(self.capacity, device=at.device)
        last = self.first[:, None] - 1
        held = last - (last - slot) % self.capacity  # [B, C]: the position that each slot of the ring holds
        keys = torch.cat([held, places], 1)[:, None]  # [B, 1, C + S]
        near = (keys >= starts) & (keys <= at)
        if window:
            near = near & ((keys > at - window) | (keys < sinks))
        return torch.cat([old, near[:, None]], 3)
