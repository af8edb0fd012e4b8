"""Formats are checked when made, count their own bits, and survive the trip through a checkpoint's config."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs

from optimizer.errors import UsageError
from optimizer.quant.formats import GROUP_SIZES, Format

ALL = [Format(bits, symmetric, group) for bits, symmetric, group in product((4, 8), (True, False), GROUP_SIZES)]


@pytest.mark.parametrize("bits", [0, -4, 2, 3, 5, 16, "4", None])
def test_bits_other_than_4_and_8_are_refused_by_value(bits: Any) -> None:
    with pytest.raises(UsageError, match=rf"Invalid bits {bits}.*4 or 8"):
        Format(bits=bits)


@pytest.mark.parametrize("group", [0, 1, 16, 48, 256, -2, 64.5, None])
def test_group_sizes_that_no_kernel_takes_are_refused(group: Any) -> None:
    with pytest.raises(UsageError, match=rf"Invalid group size {group}.*32, 64, 128, -1"):
        Format(group_size=group)


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
    assert len({format.name for format in ALL}) == len(ALL)


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
        {"type": "float"},
        {"type": None},
        {"strategy": "tensor"},
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
