"""Packed words against plain integers: shifts and masks on Python numbers, no tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.quant.packing import (
    pack_awq,
    pack_nibbles,
    pack_words,
    unpack_awq,
    unpack_nibbles,
    unpack_words,
)


def codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def fields(word: int, bits: int) -> list[int]:
    return [(word % 2**32) >> shift & (2**bits - 1) for shift in range(0, 32, bits)]


def test_the_worked_examples() -> None:
    row = torch.arange(1, 9, dtype=torch.uint8)[None]
    assert pack_words(row, 4).tolist() == [[0x87654321 - 2**32]]
    assert pack_awq(row).tolist() == [[0x86427531 - 2**32]]
    assert pack_nibbles(row).tolist() == [[0x21, 0x43, 0x65, 0x87]]
    assert pack_words(torch.tensor([[1, 2, 3, 255]], dtype=torch.uint8), 8).tolist() == [[0xFF030201 - 2**32]]


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_words_hold_their_codes_low_bits_first_and_come_back(bits: int, rows: int, words: int, seed: int) -> None:
    q = codes(bits, rows, words * 32 // bits, seed)
    packed = pack_words(q, bits)
    assert packed.dtype == torch.int32
    assert [[c for word in row for c in fields(word, bits)] for row in packed.tolist()] == q.tolist()
    assert torch.equal(unpack_words(packed, bits), q)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_awq_words_hold_even_columns_then_odd_ones_and_come_back(rows: int, words: int, seed: int) -> None:
    q = codes(4, rows, words * 8, seed)
    packed = pack_awq(q)
    for row, stored in zip(q.tolist(), packed.tolist(), strict=True):
        for index, word in enumerate(stored):
            eight = row[8 * index : 8 * index + 8]
            assert fields(word, 4) == eight[0::2] + eight[1::2]
    assert torch.equal(unpack_awq(packed), q)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_nibbles_hold_the_first_code_low_and_come_back(rows: int, pairs: int, seed: int) -> None:
    q = codes(4, rows, 2 * pairs, seed)
    packed = pack_nibbles(q)
    assert [[c for byte in row for c in (byte % 16, byte // 16)] for row in packed.tolist()] == q.tolist()
    assert torch.equal(unpack_nibbles(packed), q)


def test_transposed_views_pack_like_their_copies() -> None:
    q = codes(4, 16, 24)
    assert torch.equal(pack_words(q.t(), 4), pack_words(q.t().contiguous(), 4))
    assert torch.equal(pack_awq(q.t()), pack_awq(q.t().contiguous()))
    words = pack_words(q, 4)
    assert torch.equal(unpack_words(words.t().contiguous().t(), 4), q)


def test_strides_of_a_dimension_of_one_do_not_matter() -> None:
    one_word = pack_words(codes(4, 5, 8), 4)  # [5, 1]
    odd = one_word.t().clone(memory_format=torch.contiguous_format).t()
    assert odd.is_contiguous()
    assert odd.stride() != (1, 1)
    assert torch.equal(unpack_words(odd, 4), codes(4, 5, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_words(codes(4, 2, 9), 4), "8 to a word"),
        (lambda: pack_words(codes(8, 2, 6), 8), "4 to a word"),
        (lambda: pack_words(codes(4, 2, 8).to(torch.int8), 4), "int8"),
        (lambda: pack_words(torch.full((1, 8), 16, dtype=torch.uint8), 4), "16 does not fit 4 bits"),
        (lambda: pack_words(codes(4, 2, 8), 3), "3 bits cannot be packed"),
        (lambda: unpack_words(torch.zeros(1, 1, dtype=torch.int64), 4), "must be int32"),
        (lambda: unpack_words(torch.zeros(1, 1, dtype=torch.int32), 2), "2 bits cannot be packed"),
        (lambda: pack_awq(codes(4, 2, 12)), "multiple of 8"),
        (lambda: pack_awq(codes(4, 1, 8)[0]), "multiple of 8"),
        (lambda: pack_nibbles(codes(4, 2, 3)), "two to a byte"),
        (lambda: pack_nibbles(torch.tensor([[3, 16]], dtype=torch.uint8)), "16 does not fit 4 bits"),
        (lambda: unpack_nibbles(torch.zeros(1, 1, dtype=torch.int8)), "must be uint8"),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        call()
