"""Formats are checked when made, count their own bits, and survive the trip through a checkpoint's config."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs

from optimizer.errors import UsageError
from optimizer.quant.formats import (
    ACTIVATIONS,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    GROUP_SIZES,
    MXFP4,
    NVFP4,
    ActivationFormat,
    Format,
    Scheme,
)

INTEGERS = [Format(bits, symmetric, group) for bits, symmetric, group in product((4, 8), (True, False), GROUP_SIZES)]
OTHERS = [
    Format(8, granularity="tensor"), Format(8, granularity="block"), FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK,
    Format(8, True, 128, kind="float"), NVFP4, MXFP4,
]  # fmt: skip
ALL = INTEGERS + OTHERS


@pytest.mark.parametrize("bits", [0, -4, 2, 3, 5, 16, "4", None])
def test_bits_other_than_4_and_8_are_refused_by_value(bits: Any) -> None:
    with pytest.raises(UsageError, match=rf"Invalid bits {bits}.*4 or 8"):
        Format(bits=bits)


@pytest.mark.parametrize("group", [0, 1, 16, 48, 256, -2, 64.5, None])
def test_group_sizes_that_no_kernel_takes_are_refused(group: Any) -> None:
    with pytest.raises(UsageError, match=rf"Invalid group size {group}.*32, 64, 128, -1"):
        Format(group_size=group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "float", "symmetric": False}, "are symmetric"),
        ({"granularity": "block", "symmetric": False}, "are symmetric"),
        ({"bits": 4, "kind": "float"}, r"NVFP4 .* or MXFP4"),
        ({"bits": 4, "kind": "float", "scale": "e4m3"}, "Use one of 16"),
        ({"bits": 4, "kind": "float", "scale": "e4m3", "group_size": 32}, "group size 32. Use one of 16"),
        ({"bits": 4, "kind": "float", "scale": "e8m0", "group_size": 16}, "group size 16. Use one of 32"),
        ({"granularity": "group"}, "Groups need a group size"),
        ({"granularity": "tensor", "group_size": 32}, "granularity 'tensor'"),
        ({"granularity": "block", "group_size": 128}, "granularity 'block'"),
    ],
    ids=str,
)
def test_combinations_that_are_no_format_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Format(**options)


def test_the_largest_and_smallest_of_each_kind() -> None:
    assert [(f.q_min, f.q_max) for f in (FP8_CHANNEL, NVFP4, MXFP4)] == [(-448, 448), (-6, 6), (-6, 6)]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (FP8_TENSOR, (1, 1)),
        (FP8_CHANNEL, (300, 1)),
        (FP8_BLOCK, (3, 3)),  # 300 and 320 in blocks of 128
        (NVFP4, (300, 20)),
        (MXFP4, (300, 10)),
        (Format(4, True, 64), (300, 5)),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else None,
)
def test_the_shape_of_the_scales(format: Format, expected: tuple[int, int]) -> None:
    assert format.scale_shape(300, 320) == expected


def test_the_grid_is_the_signed_twos_complement_range() -> None:
    assert [(f.q_min, f.q_max) for f in (Format(4), Format(8))] == [(-8, 7), (-128, 127)]


@pytest.mark.parametrize(
    ("format", "k", "scale_bits", "expected"),
    [
        (Format(4, True, 64), 4096, 16, 4.25),  # 4 + 16 / 64
        (Format(4, True, 128), 4096, 16, 4.125),
        (Format(4, True, 32), 4096, 32, 5.0),  # 4 + 32 / 32
        (Format(4, False, 128), 4096, 16, 4.15625),  # 4 + (16 + 4) / 128
        (Format(8, True, -1), 4096, 16, 8 + 16 / 4096),
        (Format(8, False, 32), 64, 16, 8.75),  # 8 + (16 + 8) / 32
        (Format(4, True, -1), 1, 16, 20.0),  # a row of one weight pays for its whole scale
        (NVFP4, 4096, 16, 4.5),  # 4 + 8 / 16, whatever the type of other scales
        (MXFP4, 4096, 32, 4.25),  # 4 + 8 / 32
        (FP8_BLOCK, 4096, 32, 8 + 32 / 128**2),
        (FP8_CHANNEL, 4096, 16, 8 + 16 / 4096),
    ],
)
def test_effective_bits_count_scales_and_zero_points(format: Format, k: int, scale_bits: int, expected: float) -> None:
    assert format.effective_bits(k, scale_bits) == expected


def test_a_row_that_groups_do_not_fill_is_refused_with_sizes_that_do() -> None:
    assert Format(4, True, 128).groups(384) == 3
    assert Format(4, True, -1).groups(100) == 1
    with pytest.raises(UsageError, match=r"group size 128 does not divide 192 .* of 32, 64, -1\."):
        Format(4, True, 128).groups(192)
    with pytest.raises(UsageError, match=r"group size 32 does not divide 100 .* of -1\."):
        Format(4, True, 32).groups(100)


def test_names_are_short_and_distinct() -> None:
    assert Format(4, True, 128).name == "int4-g128"
    assert Format(8, False, -1).name == "int8-channel-asym"
    assert [f.name for f in (FP8_BLOCK, FP8_CHANNEL, NVFP4, MXFP4)] == ["fp8-block", "fp8-channel", "nvfp4", "mxfp4"]
    assert len({format.name for format in ALL}) == len(ALL)


def test_activations_and_schemes_are_named_by_what_they_are() -> None:
    assert {key: format.name for key, format in ACTIVATIONS.items()} == {
        "int8": "int8-token",
        "llm-int8": "int8-token-outliers6",
        "fp8": "fp8-token",
        "fp8-static": "fp8-tensor-static",
        "int8-static": "int8-tensor-static",
        "fp8-group": "fp8-g128",
        "nvfp4": "fp4-g16-static",
    }
    assert Scheme(Format(4, True, 128)).name == "int4-g128"
    assert Scheme(FP8_CHANNEL, ActivationFormat(kind="float")).name == "fp8-channel × fp8-token"


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_what_compressed_tensors_reads_is_what_was_written(format: Format) -> None:
    written = format.as_compressed_tensors()
    args = QuantizationArgs(**written)  # the consumer's own validation
    assert (args.num_bits, args.symmetric) == (format.bits, format.symmetric)
    assert args.group_size == (None if format.group_size == -1 else format.group_size)
    assert Format.from_compressed_tensors(written) == format
    assert Format.from_compressed_tensors(args.model_dump(mode="json")) == format


@pytest.mark.parametrize(
    "change",
    [
        {"type": "float"},  # 4-bit floats in groups of 128
        {"type": None},
        {"strategy": "tensor"},
        {"strategy": "tensor", "group_size": None, "block_structure": [64, 64]},
        {"strategy": "block"},
        {"strategy": ["group"]},
        {"strategy": "group", "group_size": None},
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": "128"},
        {"strategy": "group", "group_size": 77},
        {"strategy": "channel", "group_size": 128},
        {"num_bits": 3},
        {"num_bits": "4"},
        {"num_bits": None},
        {"symmetric": "false"},
    ],
    ids=str,
)
def test_a_checkpoint_entry_that_cannot_run_is_refused_and_never_guessed(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Format.from_compressed_tensors(Format(4, True, 128).as_compressed_tensors() | change)


def test_an_empty_checkpoint_entry_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        Format.from_compressed_tensors({})
