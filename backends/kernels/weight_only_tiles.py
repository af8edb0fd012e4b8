"""Which kernel multiplies by a weight on a GPU, and in what pieces: data and arithmetic for `weight_only.py`.

`gpu_kernel` answers for the report, `tile_for` and `blocks_per_split` for the launch, so that both say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MAX_ROWS = 64
"""Rows up to which the fused kernels run; above it decode+matmul. Not yet measured."""

PROGRAMS_PER_SM = 4
"""How many programs a launch aims at for each multiprocessor before it stops splitting K. Not yet measured."""

MIN_BLOCKS = 4
"""K blocks that one program takes at least where K is split, so that its pipeline fills. Not yet measured."""

DEFAULT_SMS = 132
"""Multiprocessors to plan for where there is no device to ask: an H200 has 132."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: `block_n` weight rows by `block_m` rows of x, `block_k` weights of a row at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


TILES: dict[int, tuple[Tile, ...]] = {
    4: (Tile(8, 64, 128, 2, 4), Tile(16, 64, 128, 2, 4), Tile(32, 128, 128, 8, 3), Tile(64, 128, 128, 8, 3)),
    8: (Tile(8, 64, 128, 4, 4), Tile(16, 64, 128, 2, 4), Tile(32, 64, 128, 4, 3), Tile(64, 64, 128, 4, 3)),
    16: (Tile(8, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 8, 4)),
}
"""By bits of a weight, in order of rows; the first that holds all rows runs. Chosen from generated code, not yet timed.

Two warps a program keep int4 on `mma.sync` at 16 rows, where each warp decodes what it multiplies.
"""


@dataclass(frozen=True)
class Nibbles:
    """How 4 bits become a floating-point pair: `(word & mask) | magic` is `base + (q + 8)` twice, `offset` is base + 8.

    The nibble must stand `left` bits up in its half word. `ones` is 1.0 twice, `minus` the offset negated twice.
    """

    mask: int
    magic: int
    left: int
    offset: int
    ones: int
    minus: int
    fma: str

    def asm(self, exact: bool) -> str:
        """PTX for one word: the compiler makes two instructions of an `and` and an `or` with two constants."""
        lop3 = f"lop3.b32 {{}}, $1, {self.mask:#010x}, {self.magic:#010x}, 0xea;"  # 0xea is (a & b) | c
        if not exact:
            return lop3.format("$0")
        constants = f"mov.b32 one, {self.ones:#010x}; mov.b32 minus, {self.minus:#010x};"
        return f"{{ .reg .b32 v, one, minus; {constants} {lop3.format('v')} {self.fma} $0, v, one, minus; }}"


NIBBLES = {
    torch.bfloat16: Nibbles(0x000F000F, 0x43004300, 0, 136, 0x3F803F80, 0xC308C308, "fma.rn.bf16x2"),
    torch.float16: Nibbles(0x00F000F0, 0x54005400, 4, 72, 0x3C003C00, 0xD480D480, "fma.rn.f16x2"),
}


def gpu_kernel(rows: int, n: int, k: int, groups: int, dtype: torch.dtype, bits: int = 4) -> str:
    """Which implementation multiplies `x [rows, k]` of `dtype` by a weight `[n, k]` of `bits`, `groups` scales a row.

    One of `gemv` (the kernel at its narrowest), `split-k`, `decode+matmul`, or `none` where nothing is to be computed.
    """
    if not (rows and n):
        return "none"
    fits = k > 0 and groups > 0 and k % (32 * groups) == 0
    typed = dtype == torch.bfloat16 or (dtype == torch.float16 and bits < 16)
    if rows > MAX_ROWS or not fits or not typed:
        return "decode+matmul"
    return "gemv" if rows <= TILES[bits][0].block_m else "split-k"


def tile_for(rows: int, group: int, bits: int) -> Tile:
    """The tile for `rows` at most `MAX_ROWS`, its `block_k` cut to what divides the `group`, a multiple of 32."""
    tile = next(t for t in TILES[bits] if rows <= t.block_m)
    block_k = tile.block_k
    while group % block_k:
        block_k //= 2
    return replace(tile, block_k=block_k)


def blocks_per_split(rows: int, n: int, k: int, tile: Tile, bits: int, sms: int = DEFAULT_SMS) -> int:
    """K blocks that one program takes: fewer fill the device, but partial sums never outweigh the weight itself."""
    blocks = k // tile.block_k
    wanted = -(-PROGRAMS_PER_SM * sms // -(-n // tile.block_n))
    splits = max(1, min(wanted, blocks // MIN_BLOCKS, k * bits // (32 * rows)))
    return -(-blocks // splits)
