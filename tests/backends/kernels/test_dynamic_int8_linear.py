"""The product of int8 inputs and integer weights, against integers and float64 that share no code with it."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.dynamic_int8_linear import dynamic_int8_linear, dynamic_int8_linear_ref, input_format
from optimizer.backends.kernels.w4a16_linear import pack_int4
from optimizer.errors import UsageError
from optimizer.quant.activations import quantize_activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEMM_ROWS = 8
"""From here a processor with VNNI runs another kernel, `cpu/int8_gemm.h`: tiles of 4 or 8 rows by 32 columns (half of
each with 8 lanes)."""


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    """Weights as integers, `group` values of a row under one scale, and a bias."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    bits: int

    def args(self, x: Tensor, group: int) -> tuple[Any, ...]:
        data = pack_int4(self.q) if self.bits == 4 else self.q
        return x, data, self.scale, self.zero, self.bias, group


def layer(bits: int, group: int = -1, *, n: int = 19, k: int = 256, symmetric: bool = True, bias: bool = True) -> Layer:
    """Random integers over the whole grid, zero points of both signs, scales over three decades."""
    generator = torch.Generator().manual_seed(n + k + group)
    half, groups = 2 ** (bits - 1), 1 if group == -1 else k // group
    q = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, groups, generator=generator) * torch.logspace(-3, 0, n).unsqueeze(1) + 1e-4
    zero = None if symmetric else torch.randint(-half, half, (n, groups), generator=generator).float()
    return Layer(q, scale, zero, seeded(n, seed=2) if bias else None, bits)


def rounded(x: Tensor, group: int) -> np.ndarray:
    """What finite `x [M, K]` is rounded to: integers by numpy, times their float32 scales, in float64."""
    values = x.float().numpy().reshape(len(x), -1, x.shape[1] if group == -1 else group)
    step = np.abs(values).max(-1, keepdims=True) / np.float32(127.5)
    step = np.where(step == 0, np.finfo(np.float32).eps, step).astype(np.float32)
    q = np.rint(np.clip(values / step, -128, 127)).astype(np.int64)
    return (q * step.astype(np.float64)).reshape(x.shape)


def check(got: Tensor, case: Layer, x: Tensor, group: int) -> None:
    """`got` is the product in float64, up to what float32 does to sums of exact integers.

    Each of the K / 32 blocks is converted, scaled twice and added: (K / 32 + 24) u covers these, the lanes' sum, the
    zero point's own sum of blocks and the bias, times the sum of magnitudes (Higham, Accuracy and Stability, 3.1).
    """
    k = x.shape[1]
    scale = case.scale.double().repeat_interleave(k // case.scale.shape[1], 1)
    zero = torch.zeros(1, 1) if case.zero is None else case.zero.repeat_interleave(k // case.zero.shape[1], 1)
    seen = torch.from_numpy(rounded(x, group))
    bias = torch.zeros(1) if case.bias is None else case.bias.double()
    exact = seen @ ((case.q.double() - zero) * scale).t() + bias
    magnitude = seen.abs() @ ((case.q.double().abs() + zero.abs()) * scale).t() + bias.abs()
    kind = torch.finfo(x.dtype)
    error = (k / 32 + 24) * 2.0**-24 * magnitude
    error = error + kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    off = float(((got.double() - exact).abs() - error).max())
    assert off <= 0, f"off by {off:.3g} more than float32 sums of exact integers explain"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [32, 96, 256, 384])
def test_every_pair_of_groups_is_right(bits: int, symmetric: bool, k: int) -> None:
    """A scale for one block, several or the row, on either side: chunks with one scale, with several, and cut short."""
    groups = [g for g in (32, 64, 96, 128, -1) if g == -1 or k % g == 0]
    for weight_group, group, rows in product(groups, groups, (1, 7, 9)):
        case = layer(bits, weight_group, k=k, symmetric=symmetric)
        x = seeded(rows, k) * torch.logspace(-2, 2, k)
        for op in (dynamic_int8_linear, dynamic_int8_linear_ref):
            check(op(*case.args(x, group)), case, x, group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "rows"), [(1, 1), (2, 2), (3, 3), (5, 4), (33, 21)])
def test_ragged_shapes_in_every_type(bits: int, dtype: torch.dtype, n: int, rows: int) -> None:
    case = layer(bits, 128, n=n, k=1152, bias=n % 2 == 1)
    x = seeded(rows, 1152).to(dtype)
    for group in (32, -1):
        check(dynamic_int8_linear(*case.args(x, group)), case, x, group)


@pytest.mark.parametrize("rows", [6, 70])
def test_more_weights_than_one_slab_or_task_holds(rows: int) -> None:
    case = layer(8, n=300, k=1024)
    x = seeded(rows, 1024)
    check(dynamic_int8_linear(*case.args(x, -1)), case, x, -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [7, 8, 9, 13, 17, 33])
def test_tiles_are_cut_short_on_every_side(bits: int, rows: int) -> None:
    """Rows around the GEMM's first and its tiles', columns around vectors and panels, vectors of weights cut short."""
    for n, k, (weight_group, group) in product(
        (1, 16, 31, 33, 70), (32, 224), ((-1, -1), (-1, 32), (32, -1), (32, 32))
    ):
        case = layer(bits, weight_group, n=n, k=k, symmetric=n % 2 == 0, bias=k == 32)
        x = seeded(rows, k) * torch.logspace(-2, 2, k)
        check(dynamic_int8_linear(*case.args(x, group)), case, x, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 9])
def test_a_result_is_the_float32_one_rounded_once(dtype: torch.dtype, rows: int) -> None:
    """Subnormals, what only float16 makes infinite, and NaN. The kernels widen inputs before all else."""
    case, x = layer(8, 64, n=70), seeded(rows, 256).to(dtype)
    low, high = (-48, 0) if dtype == torch.bfloat16 else (-12, 8)
    case = Layer(case.q, torch.logspace(low, high, 70, base=2.0)[:, None].expand(-1, 4).contiguous(), None, None, 8)
    x[-1, 5], x[0] = torch.nan, x[0] * (2.0**-90 if dtype == torch.bfloat16 else 2.0**-10)
    for group in (32, -1):
        wide = dynamic_int8_linear(*case.args(x.float(), group))
        assert dtype == torch.bfloat16 or wide.to(dtype).isinf().any()
        assert ((wide != 0) & (wide.abs() < torch.finfo(dtype).tiny)).any()
        got = dynamic_int8_linear(*case.args(x, group))
        assert torch.equal(got.nan_to_num(nan=-1.0), wide.to(dtype).nan_to_num(nan=-1.0))
        assert got[-1].isnan().all()


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_exactly_as_specified(bits: int, group: int) -> None:
    """A row of the identity gives back one input, so each is seen as it was rounded: to the last bit."""
    x = torch.stack([
        seeded(128),
        torch.arange(128) - 63.5,  # s = 64.5 / 127.5
        torch.cat([torch.tensor([127.5, -127.5]), torch.arange(126) / 2]),  # s = 1: ties, and both ends
        -torch.cat([torch.tensor([127.5, -127.5]), torch.arange(126) / 2]),
        torch.zeros(128),
        torch.full((128,), -0.0),
        torch.logspace(-45, -30, 128),  # denormal inputs and scales
        torch.logspace(30, 38.5, 128) * torch.tensor([1.0, -1.0]).repeat(64),
        torch.full((128,), torch.finfo(torch.float32).max),
        seeded(128).cumsum(0).exp(),
    ])  # fmt: skip
    identity = Layer(torch.eye(128, dtype=torch.int8), torch.ones(128, 1), None, None, bits)
    expected = quantize_activation(x, input_format(group))
    assert len(x) >= GEMM_ROWS > 5
    for part in (slice(None), slice(5), slice(5, None)):
        assert torch.equal(dynamic_int8_linear(*identity.args(x[part], group)), expected[part])
    assert torch.equal(dynamic_int8_linear_ref(*identity.args(x, group)), expected)


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize(("bits", "weight"), [(4, -8), (4, 7), (8, -128), (8, 127)])
def test_the_largest_integers_do_not_saturate(bits: int, weight: int, group: int) -> None:
    """Every weight at an end of its range, and inputs at theirs: 127.5 is 127 under its scale of 1, -127.5 is -128.

    The largest sum is 2^24, so float32 holds every one, and the result is exact.
    """
    k = 1024
    case = Layer(torch.full((3, k), weight, dtype=torch.int8), torch.ones(3, 1), None, None, bits)
    for pattern, total in (((1, 1), 127 * k), ((-1, -1), -128 * k), ((1, -1), -k // 2), ((-1, 1), -k // 2)):
        x = (127.5 * torch.tensor(pattern)).repeat(k // 2).expand(9, k)
        for rows in (5, 9):
            got = dynamic_int8_linear(*case.args(x[:rows], group))
            assert torch.equal(got, torch.full((rows, 3), float(weight * total)))


@pytest.mark.parametrize("k", [2**17, 2**18, 32 * 1031])
@pytest.mark.parametrize(("weight", "pattern"), [(-128, (-1, -1)), (127, (-1, -1)), (-128, (1, -1))])
def test_sums_of_many_features_do_not_overflow(weight: int, pattern: tuple[int, int], k: int) -> None:
    """Up to 2^32 in all, and a number of blocks that has no divisor to cut it by."""
    case = Layer(torch.full((3, k), weight, dtype=torch.int8), torch.ones(3, 1), None, None, 8)
    x = (127.5 * torch.tensor(pattern)).repeat(k // 2).expand(9, k)
    for rows in (1, 9):
        check(dynamic_int8_linear(*case.args(x[:rows], -1)), case, x[:rows], -1)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_threads_changes_nothing(bits: int) -> None:
    case, before, results = layer(bits, 32, n=1030, k=1024), torch.get_num_threads(), []
    x = seeded(3, 1024)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([dynamic_int8_linear(*case.args(x[:rows], 32)) for rows in (1, 3)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for got in results[1:] for a, b in zip(results[0], got, strict=True))


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_batch(bits: int, group: int) -> None:
    """One kernel for all batches of fewer than `GEMM_ROWS`, at most one other for all larger ones."""
    case, x = layer(bits, 64, n=70, symmetric=False), seeded(33, 256)
    few = dynamic_int8_linear(*case.args(x[: GEMM_ROWS - 1], group))
    alone = torch.cat([dynamic_int8_linear(*case.args(row, group)) for row in x[: GEMM_ROWS - 1].split(1)])
    assert torch.equal(few, alone)
    many = dynamic_int8_linear(*case.args(x, group))
    for rows in (GEMM_ROWS, 9, 15, 16, 17, 32):
        assert torch.equal(dynamic_int8_linear(*case.args(x[-rows:], group)), many[-rows:])
    assert torch.equal(dynamic_int8_linear(*case.args(x.flip(0), group)).flip(0), many)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spoils_its_row_and_no_other(bits: int, group: int, bad: float, dtype: torch.dtype) -> None:
    case = layer(bits, 32, symmetric=False)
    for position, (rows, spoilt) in product((0, 40, 255), ((5, 2), (19, 2), (19, 18))):
        x = seeded(rows, 256).to(dtype)
        x[spoilt, position] = bad
        got = dynamic_int8_linear(*case.args(x, group))
        assert got[spoilt].isnan().all()
        x[spoilt] = 0
        others = torch.arange(rows) != spoilt
        assert torch.equal(got[others], dynamic_int8_linear(*case.args(x, group))[others])


@pytest.mark.parametrize("rows", [3, 9])
def test_a_scale_that_is_not_finite_spoils_its_column_and_no_other(rows: int) -> None:
    case, x = layer(8, 64), seeded(rows, 256)
    clean = dynamic_int8_linear(*case.args(x, 32))
    case.scale[18, 2] = torch.nan
    got = dynamic_int8_linear(*case.args(x, 32))
    assert got[:, 18].isnan().all()
    assert torch.equal(got[:, :18], clean[:, :18])


def test_zeros_give_the_bias_and_nothing_gives_nothing() -> None:
    case = layer(4, 32, symmetric=False)
    assert torch.equal(dynamic_int8_linear(*case.args(torch.zeros(3, 256), 32)), case.bias.expand(3, -1))  # type: ignore[union-attr]
    for shape in ((0, 256), (2, 0, 256)):
        assert dynamic_int8_linear(*case.args(torch.zeros(shape), 32)).shape == (*shape[:-1], 19)
    empty = layer(8, n=0)
    assert dynamic_int8_linear(*empty.args(torch.zeros(2, 256), -1)).shape == (2, 0)


def test_any_strides_and_leading_dimensions() -> None:
    case, x = layer(4, 128), seeded(256, 2, 3).permute(2, 1, 0)
    expected = dynamic_int8_linear(*case.args(x.contiguous().view(6, 256), 32)).view(3, 2, 19)
    assert torch.equal(dynamic_int8_linear(*case.args(x, 32)), expected)
    assert torch.equal(dynamic_int8_linear(*case.args(x[1, 1], 32)), expected[1, 1])
    for rows in (4, 18):
        strided = seeded(rows, 512)[:, ::2]
        got = dynamic_int8_linear(*case.args(strided, 32))
        assert torch.equal(got, dynamic_int8_linear(*case.args(strided.contiguous(), 32)))
        shifted = torch.cat([torch.zeros(1), strided.flatten()]).bfloat16()[1:].view(rows, 256)  # no vector's alignment
        assert torch.equal(
            dynamic_int8_linear(*case.args(shifted, 32)), dynamic_int8_linear(*case.args(strided.bfloat16(), 32))
        )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [32, 64, 96, 160, 256])
def test_nothing_is_read_beyond_the_weight(bits: int, k: int) -> None:
    """Weight and scales end where the next page may not be read; a row may be less than a vector, or end within one."""
    page = mmap.PAGESIZE
    ends = [mmap.mmap(-1, 4 * page) for _ in range(2)]
    libc = ctypes.CDLL(None, use_errno=True)

    def allow(access: int) -> None:
        for memory in ends:
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert libc.mprotect(ctypes.c_void_p(start + 3 * page), ctypes.c_size_t(page), access) == 0

    def at_the_end(memory: mmap.mmap, t: Tensor) -> Tensor:
        placed = torch.frombuffer(memory, dtype=t.dtype, offset=3 * page - t.nbytes, count=t.numel()).view_as(t)
        return placed.copy_(t)

    allow(0)
    for n in (1, 5, 30):
        case = layer(bits, 32, n=n, k=k)
        data = at_the_end(ends[0], pack_int4(case.q) if bits == 4 else case.q)
        scale = at_the_end(ends[1], case.scale)
        for rows in (1, 3, 9):
            x = seeded(rows, k)
            check(dynamic_int8_linear(x, data, scale, None, case.bias, 32), case, x, 32)
    allow(3)


@pytest.mark.parametrize("group", [0, 16, 48, -2, 96, 512])
def test_groups_that_no_kernel_has_are_refused(group: int) -> None:
    case, x = layer(8), seeded(2, 256)
    with pytest.raises((RuntimeError, UsageError), match=rf"{group}"):
        dynamic_int8_linear(*case.args(x, group))
    with pytest.raises(UsageError, match=rf"{group}"):
        dynamic_int8_linear_ref(*case.args(x, group))


@pytest.mark.skipif(not cpu_kernels().loaded, reason="the reference checks no operands")
def test_wrong_operands_raise_and_are_not_read() -> None:
    case = layer(4, 128)
    x, data, scale, zero, bias, group = case.args(seeded(2, 256), 32)
    for args, message in (
        ((x[:, :128], data, scale, zero, bias, group), "x has 128 features, the weight has 256"),
        ((x, data, scale[:5], zero, bias, group), "scale and zero must be contiguous float32"),
        ((x, data, scale.double(), zero, bias, group), "scale and zero must be contiguous float32"),
        ((x, data, scale, zero, bias[:3], group), "bias must have one value"),
        ((x, data[:, ::2], scale, zero, bias, group), "contiguous matrix"),
        ((x.double(), data, scale, zero, bias, group), "float32, bfloat16 or float16"),
        ((x.double().repeat(9, 1), data, scale, zero, bias, group), "float32, bfloat16 or float16"),
        ((x, data.int(), scale, zero, bias, group), "weights must be"),
        ((seeded(1, 2**18 + 32), torch.zeros(1, 2**18 + 32, dtype=torch.int8), scale[:1, :1].contiguous(), None, None,
          -1), "could overflow"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            dynamic_int8_linear(*args)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_op_keeps_its_contract(bits: int) -> None:
    case = layer(bits, 64, symmetric=False)
    for group, rows in product((32, -1), (3, 9)):
        torch.library.opcheck(dynamic_int8_linear, case.args(seeded(2, rows, 256).bfloat16(), group))


def test_it_compiles_whole() -> None:
    torch._dynamo.reset()
    case, x = layer(4, 128), seeded(2, 256)

    def forward(x: Tensor) -> Tensor:
        return dynamic_int8_linear(*case.args(x, 32)) + 1  # type: ignore[no-any-return]

    assert torch.equal(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), forward(x))


@pytest.mark.gpu
def test_the_reference_serves_a_gpu() -> None:
    case, x = layer(4, 128), seeded(3, 256)
    args = [a.cuda() if isinstance(a, Tensor) else a for a in case.args(x, 32)]
    check(dynamic_int8_linear(*args).cpu(), case, x, 32)


@pytest.mark.slow
@pytest.mark.skipif(not cpu_kernels().loaded, reason="no compiler")
@pytest.mark.parametrize("flag", ["-DINT8_EMULATED_LANES=8", "-DINT8_EMULATED_LANES=16", "-mno-avx512f"])
def test_the_layouts_of_other_processors(flag: str, tmp_path: Any) -> None:
    """This file again: on vectors of AVX-VNNI's and AVX-512's width with a loop for a dot product; without AVX-512."""
    if flag.startswith("-m") and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86 only")
    script = (
        "import sys, pytest\n"
        "import optimizer.backends.kernels.build as build\n"
        f"build.FLAGS += ({flag!r},)\n"
        "assert build.cpu_kernels().loaded, build.cpu_kernels().reason\n"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-p', 'no:cacheprovider', '-m', 'not slow and not gpu']))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
