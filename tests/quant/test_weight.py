"""Elements against tables written from the definition of each number format; decoding, rows and stacking, exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format
from optimizer.quant.rtn import quantize_rtn
from optimizer.quant.weight import E2M1, QuantizedWeight, concatenate, from_elements, spread, stackable, to_elements

FORMATS = [
    Format(4), Format(4, False, 32), Format(8), Format(8, False, -1), Format(8, granularity="tensor"),
    Format(8, granularity="block"), FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, NVFP4, MXFP4,
]  # fmt: skip
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a code of sign, exponent and mantissa, from the definition; no infinities."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    return sign * (math.ldexp(fraction, 1 - bias) if exponent == 0 else math.ldexp(1 + fraction, exponent - bias))


E2M1_VALUES = [small_float(code, 2, 1) for code in range(16)]
E4M3_VALUES = [small_float(code, 4, 3) for code in range(256) if code & 127 != 127]  # 127 and 255 are NaN
TABLES = [(NVFP4, E2M1_VALUES), (FP8_CHANNEL, E4M3_VALUES), (Format(8), [float(q) for q in range(-128, 128)])]
every_table = pytest.mark.parametrize(("format", "values"), TABLES, ids=["e2m1", "e4m3", "int8"])


def weight(n: int = 5, k: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 0, n).unsqueeze(1)


def as_bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.itemsize == 1 else t


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert a.format == b.format
    for name in ("q", "scale", "zero", "global_scale"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(as_bits(one), as_bits(other)), name


def test_the_table_of_e2m1_is_its_definition() -> None:
    assert E2M1_VALUES[:8] == list(E2M1)
    assert from_elements(torch.arange(16, dtype=torch.uint8), NVFP4).tolist() == E2M1_VALUES
    assert math.copysign(1, E2M1_VALUES[8]) == -1


@pytest.mark.parametrize(("format", "codes"), [(NVFP4, 16), (FP8_CHANNEL, 256)], ids=["e2m1", "e4m3"])
def test_every_code_decodes_by_definition_and_encodes_to_itself(format: Format, codes: int) -> None:
    """Both zeros included: the sign survives."""
    all_codes = torch.arange(codes, dtype=torch.uint8)
    numbers = all_codes if codes == 16 else all_codes[(all_codes & 127) != 127]
    elements = numbers if codes == 16 else numbers.view(torch.float8_e4m3fn)
    decoded = from_elements(elements, format)
    assert decoded.tolist() == (E2M1_VALUES if codes == 16 else E4M3_VALUES)
    assert torch.equal(to_elements(decoded, format).view(torch.uint8), numbers)


@every_table
def test_ties_go_to_the_even_code(format: Format, values: list[float]) -> None:
    magnitudes = sorted({v for v in values if v >= 0})
    for index, (low, high) in enumerate(pairwise(magnitudes)):
        middle = (low + high) / 2
        even = high if index % 2 else low
        got = from_elements(to_elements(torch.tensor([middle, -middle]), format), format)
        assert got.tolist() == [even, -even]


@every_table
def test_beyond_the_ends_are_the_ends(format: Format, values: list[float]) -> None:
    far = torch.tensor([1.0001, 2.0, 1e30, math.inf])
    assert from_elements(to_elements(far * format.q_max, format), format).unique().tolist() == [max(values)]
    assert from_elements(to_elements(far * format.q_min, format), format).unique().tolist() == [min(values)]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TABLES), st.floats(-1000, 1000, width=32))
def test_no_other_element_is_nearer(table: tuple[Format, list[float]], value: float) -> None:
    format, values = table
    (got,) = from_elements(to_elements(torch.tensor([value]), format), format).tolist()
    assert abs(got - value) == min(abs(v - value) for v in values)


def by_hand(stored: QuantizedWeight) -> Tensor:
    """The dequantized weight in float64, element by element from the tables."""
    n, k = stored.q.shape
    rows, groups = stored.scale.shape
    out = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            if stored.format.granularity == "block":
                at = (i // BLOCK, j // BLOCK)
            else:
                at = (i if rows == n else 0, j * groups // k)
            code = stored.q.view(torch.uint8)[i, j]
            if stored.format.kind == "int":
                value = float(stored.q[i, j]) - (0 if stored.zero is None else float(stored.zero[at]))
            else:
                value = small_float(int(code), 2, 1) if stored.format.bits == 4 else small_float(int(code), 4, 3)
            step = float(stored.scale[at].float())
            out[i, j] = value * (step if stored.global_scale is None else step / float(stored.global_scale))
    return out


@every_format
def test_dequantizing_by_hand(format: Format) -> None:
    n, k = (130, 160) if format.granularity == "block" else (3, 64)  # ragged blocks
    stored = quantize_rtn(weight(n, k), format)
    # Exact but for NVFP4, whose step is a quotient rounded to float32 before the product is.
    torch.testing.assert_close(stored.dequantize().double(), by_hand(stored), rtol=2.0**-23, atol=0)
    assert torch.equal(stored.dequantize(torch.bfloat16), stored.dequantize().bfloat16())


@every_format
def test_encoding_what_was_decoded_changes_nothing(format: Format) -> None:
    stored = quantize_rtn(weight(), format)
    assert torch.equal(stored.grid.decode(stored.grid.encode(stored.dequantize())), stored.dequantize())


@every_format
def test_columns_give_the_step_and_zero_of_every_weight(format: Format) -> None:
    n, k = 130, 256
    stored = quantize_rtn(weight(n, k), format)
    steps, zeros = stored.grid.columns(n, k)
    assert steps.shape == zeros.shape == (n, k)
    assert torch.equal((from_elements(stored.q, format) - zeros) * steps, stored.dequantize())


def test_blocks_are_spread_over_ragged_edges() -> None:
    got = spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 130, 200)
    assert got.shape == (130, 200)
    assert got[[0, 127, 128, 129], 0].tolist() == [1, 1, 3, 3]
    assert got[129, [127, 128, 199]].tolist() == [3, 4, 4]


@every_format
def test_rows_of_a_stack_are_its_parts(format: Format) -> None:
    sizes = (128, 128, 40)
    whole = quantize_rtn(weight(sum(sizes)), format)
    parts = [whole.rows(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(3)]
    assert stackable(parts) == ""
    assert_same(concatenate(parts), whole)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


def test_a_cut_through_a_block_is_refused() -> None:
    stored = quantize_rtn(weight(300), FP8_BLOCK)
    with pytest.raises(UsageError, match="rows 100:256 cut a block of 128"):
        stored.rows(100, 256)
    with pytest.raises(UsageError, match="rows 128:200 cut"):
        stored.rows(128, 200)
    assert len(stored.rows(128, 300).q) == 172


@pytest.mark.parametrize("format", [NVFP4, FP8_TENSOR], ids=lambda f: f.name)
def test_weights_under_different_tensor_scales_cannot_be_stacked(format: Format) -> None:
    parts = [quantize_rtn(weight(seed=1), format), quantize_rtn(2 * weight(seed=2), format)]
    assert stackable(parts) == "tensor scales differ"
    with pytest.raises(UsageError, match="tensor scales differ"):
        concatenate(parts)
    largest = float(max(part.dequantize().abs().max() for part in parts)) * 1.01
    shared = [quantize_rtn(weight(seed=i), format, tensor_max=largest) for i in (1, 2)]
    assert stackable(shared) == ""
    assert torch.equal(concatenate(shared).dequantize(), torch.cat([part.dequantize() for part in shared]))


def test_weights_that_do_not_fill_blocks_cannot_be_stacked() -> None:
    ragged, full = quantize_rtn(weight(130), FP8_BLOCK), quantize_rtn(weight(128), FP8_BLOCK)
    assert stackable([ragged, full]) == "rows [130, 128] do not fill blocks of 128"
    assert stackable([full, ragged]) == ""
