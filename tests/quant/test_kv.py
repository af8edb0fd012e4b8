"""8-bit keys and values against integer arithmetic and a table of e4m3, and what makes rounding at every step right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import UsageError
from optimizer.quant.kv import KvKind, dequantize_kv, kv_bits, quantize_kv, round_kv

KINDS: tuple[KvKind, ...] = ("int8", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("kind", KINDS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Keys with channels of very different size, as trained ones have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-2, 1, shape[-1])).to(dtype)


def test_int8_by_hand() -> None:
    x = torch.tensor([1.27, -0.5, 0.014, 0.0]).view(1, 1, 1, 4)
    q, scale = quantize_kv(x, "int8")
    assert q.flatten().tolist() == [127, -50, 1, 0]
    assert float(scale) == pytest.approx(0.01)


def test_fp8_by_hand() -> None:
    x = torch.tensor([448.0, 17.0, -0.3, 1.0]).view(1, 1, 1, 4)  # e4m3 near 17 is 16 or 18, near 0.3 0.28125 or 0.3125
    q, scale = quantize_kv(x, "fp8")
    assert float(scale) == 1.0
    assert q.float().flatten().tolist() == [448.0, 16.0, -0.3125, 1.0]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_types_and_error(kind: KvKind, dtype: torch.dtype) -> None:
    x = random(2, 3, 5, 24, dtype=dtype)
    q, scale = quantize_kv(x, kind)
    assert q.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    assert (q.shape, scale.shape, scale.dtype) == (x.shape, (2, 3, 5, 1), torch.float32)
    got = dequantize_kv(q, scale)
    assert torch.equal(got, q.float() * scale)
    # int8: half a step. e4m3: half of 2^-3 of the value, or half of its smallest number 2^-9.
    bound = scale / 2 if kind == "int8" else torch.maximum(x.float().abs() / 16, scale * 2.0**-10)
    assert bool(((got - x.float()).abs() <= bound * (1 + 2.0**-20)).all())
    assert torch.equal(round_kv(x, kind), got.to(dtype))


@both
def test_effective_bits_are_those_of_the_tensors(kind: KvKind) -> None:
    for size in (64, 80, 128):
        stored = sum(t.numel() * t.element_size() for t in quantize_kv(random(1, 2, 3, size), kind))
        assert kv_bits(size) == 8 * stored / (2 * 3 * size)
    assert kv_bits(128) == 8.25


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_rounded_entry_by_entry_is_the_cache_rounded_whole(kind: KvKind, dtype: torch.dtype) -> None:
    x = random(2, 3, 9, 16, dtype=dtype)
    entries = torch.cat([round_kv(x[:, :, s : s + 1], kind) for s in range(9)], dim=2)
    heads = torch.cat([round_kv(x[:, h : h + 1], kind) for h in range(3)], dim=1)
    assert torch.equal(round_kv(x, kind), entries)
    assert torch.equal(round_kv(x, kind), heads)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-65504, 65504, width=16), min_size=4, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_rounding_twice_is_rounding_once_in_16_bits(values: list[float], kind: KvKind, dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype).view(1, 1, 1, 4)
    once = round_kv(x, kind)
    assert torch.equal(round_kv(once, kind), once)
    assert torch.equal(once.abs().amax(), x.abs().amax())


@both
def test_rounding_twice_in_float32_moves_last_bits_at_most(kind: KvKind) -> None:
    once = round_kv(random(1, 8, 500, 16), kind)
    # The largest magnitude and the quotient are each off by an ulp or two; no element changes.
    torch.testing.assert_close(round_kv(once, kind), once, rtol=2.0**-21, atol=0)


@both
def test_a_zero_vector_stays_one(kind: KvKind) -> None:
    x = random(1, 2, 3, 8)
    x[0, 1] = 0
    got = round_kv(x, kind)
    assert not got[0, 1].any()
    assert got[0, 0].any()
    assert bool((quantize_kv(x, kind)[1] > 0).all())
    assert not round_kv(torch.full((1, 1, 1, 4), 1e-45), kind).isnan().any()


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_nan_in_its_own_vector_only(kind: KvKind, bad: float) -> None:
    x = random(2, 2, 3, 8)
    x[1, 0, 2, 5] = bad
    got = round_kv(x, kind)
    assert got[1, 0, 2].isnan().all()
    assert int(got.isnan().sum()) == 8


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_largest_numbers_survive(kind: KvKind, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, 1.0, 0.0], dtype=dtype).view(1, 1, 1, 4)
    assert round_kv(x, kind)[..., :2].flatten().tolist() == [largest, -largest]


@both
def test_an_empty_cache_is_no_error(kind: KvKind) -> None:
    assert round_kv(torch.zeros(1, 2, 0, 8), kind).shape == (1, 2, 0, 8)


@both
def test_the_input_is_unchanged_and_may_be_strided(kind: KvKind) -> None:
    x = random(2, 5, 3, 8).transpose(1, 2)
    before = x.clone()
    assert torch.equal(round_kv(x, kind), round_kv(x.contiguous(), kind))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["int4", "", "INT8", None])
def test_another_kind_is_refused_with_those_there_are(kind: Any) -> None:
    with pytest.raises(UsageError, match=r"Invalid KV cache kind .*int8, fp8"):
        round_kv(torch.zeros(1, 1, 1, 4), kind)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1, 0), (1, 1, 1, 1, 4)], ids=str)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\[B, H, S, D\]"):
        quantize_kv(torch.zeros(shape), "int8")
