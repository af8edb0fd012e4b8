"""The packing of 4-bit weights, read back by an independent decoder that knows only the documented layout."""

from __future__ import annotations

import pytest
import torch

from optimizer.backends.kernels.w4a16_linear import pack_int4, unpack_int4


def decode(data: bytes, k: int) -> list[int]:
    """One row, in plain integer arithmetic: blocks of 32 weights in 16 bytes, low nibbles first, stored as q + 8."""
    row = []
    for block in range(k // 32):
        chunk = data[16 * block : 16 * block + 16]
        row += [(byte & 0x0F) - 8 for byte in chunk]
        row += [(byte >> 4) - 8 for byte in chunk]
    return row


@pytest.mark.parametrize(("rows", "k"), [(1, 32), (3, 64), (5, 416), (0, 32)])
def test_packing_by_an_independent_decoder(rows: int, k: int) -> None:
    q = torch.randint(-8, 8, (rows, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
    data = pack_int4(q)
    assert data.dtype == torch.uint8
    assert data.shape == (rows, k // 2)
    assert [decode(bytes(row.tolist()), k) for row in data] == q.tolist()
    assert torch.equal(unpack_int4(data), q)


def test_every_pair_of_nibbles() -> None:
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    q = torch.cat([low.reshape(16, 1, 16), high.reshape(16, 1, 16)], 1).reshape(1, -1).to(torch.int8)
    data = pack_int4(q)
    assert sorted(data.flatten().tolist()) == list(range(256))
    assert decode(bytes(data[0].tolist()), q.shape[1]) == q[0].tolist()


def test_every_byte_unpacks_and_packs_to_itself() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(1, 256)
    assert decode(bytes(range(256)), 512) == unpack_int4(data)[0].tolist()
    assert torch.equal(pack_int4(unpack_int4(data)), data)


def test_a_strided_weight_packs_like_its_copy() -> None:
    q = torch.randint(-8, 8, (64, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(pack_int4(q), pack_int4(q.contiguous()))
