"""Several small codes in one machine word, as checkpoint formats store them. Pure bits: no scales, no models.

    words    int32, codes of 4 or 8 bits, lowest bits first: GPTQ packs its weight `[K, N]` down the columns, so a word
             holds 32 / b neighbours in K; zero points lie along N
    AWQ      int32 along N, eight codes of 4 bits in the order 0 2 4 6 1 3 5 7, which lets a kernel spread the even and
             the odd half of a word with one mask (https://github.com/mit-han-lab/llm-awq)
    fp4      uint8, two e2m1 codes, the lower nibble first

Worked example: the codes 1 2 3 4 5 6 7 8 are the word 0x87654321; in AWQ's order they are 1 3 5 7 2 4 6 8, 0x86427531.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.errors import UsageError

WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that nibble i of an AWQ word holds."""


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., C]` below `2^bits` as int32 `[..., C bits / 32]`, low bits first.

    `UsageError` when the codes do not fill whole words, are too large, or `bits` is neither 4 nor 8.
    """
    per_word = _per_word(bits)
    if codes.dtype != torch.uint8 or codes.shape[-1] % per_word:
        raise UsageError(
            f"codes {codes.dtype} {list(codes.shape)} do not fill 32-bit words: give uint8, {per_word} to a word."
        )
    if bits == 4:
        codes = pack_nibbles(codes)
    return _fresh(codes).view(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., 32 C / bits]` of words int32 `[..., C]`."""
    _per_word(bits)
    if words.dtype != torch.int32:
        raise UsageError(f"packed codes must be int32, are {words.dtype}.")
    codes = _fresh(words).view(torch.uint8)
    return unpack_nibbles(codes) if bits == 4 else codes


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes uint8 `[R, C]` as int32 `[R, C / 8]` in AWQ's order."""
    if codes.ndim != 2 or codes.shape[1] % len(AWQ_ORDER):
        raise UsageError(f"codes {list(codes.shape)} do not fill AWQ words: give rows of a multiple of 8.")
    return pack_words(codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """Codes uint8 `[R, 8 C]` of AWQ words int32 `[R, C]`."""
    place = [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]
    codes: Tensor = unpack_words(words, 4).unflatten(1, (-1, 8))[..., place]
    return codes.flatten(1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes uint8 `[..., C]` as bytes uint8 `[..., C / 2]`, the lower nibble first."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise UsageError(f"codes {codes.dtype} {list(codes.shape)} do not fill bytes: give uint8, two to a byte.")
    if codes.numel() and int(codes.max()) > 15:
        raise UsageError(f"a code of {int(codes.max())} does not fit 4 bits.")
    packed: Tensor = codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes uint8 `[..., 2 C]` of bytes uint8 `[..., C]`."""
    if packed.dtype != torch.uint8:
        raise UsageError(f"packed codes must be uint8, are {packed.dtype}.")
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _per_word(bits: int) -> int:
    if bits not in (4, 8):
        raise UsageError(f"{bits} bits cannot be packed. Use 4 or 8.")
    return WORD_BITS // bits


def _fresh(tensor: Tensor) -> Tensor:
    """A copy with the strides of its shape: `contiguous()` leaves those of a dimension of 1 as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)
