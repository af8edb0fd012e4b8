"""The Triton kernels of weight-only linears, interpreted, against float64; their plan; the code they become."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import bf16_linear as bf16_file
from optimizer.backends.kernels import w4a16_linear as w4a16_file
from optimizer.backends.kernels import w8a16_linear as w8a16_file
from optimizer.backends.kernels import weight_only
from optimizer.backends.kernels.weight_only import decode
from optimizer.backends.kernels.weight_only_tiles import (
    MAX_ROWS,
    MIN_BLOCKS,
    NIBBLES,
    TILES,
    blocks_per_split,
    gpu_kernel,
    tile_for,
)
from optimizer.errors import UsageError
from tests.backends.kernels.linear_cases import DTYPES, Case, activations, bf16_case, quantized_case

pytest.importorskip("triton")

LAUNCH = {4: w4a16_file._w4a16_linear_cuda, 8: w8a16_file._w8a16_linear_cuda, 16: bf16_file._bf16_linear_cuda}
HALVES = (torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = 2.0**-22 if DEVICE == "cuda" else 2.0**-24
"""Of float32 sums. Tensor cores truncate where they add, which is given four times what rounding to nearest is."""


def make(bits: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Case:
    """A case whose bound knows that sums of 4-bit weights are taken over the weight plus an offset."""
    if bits == 16:
        return bf16_case(**{name: value for name, value in options.items() if name not in ("group", "symmetric")})
    offset = NIBBLES[dtype].offset if bits == 4 and dtype in NIBBLES else 0
    return quantized_case(bits, offset=offset, **options)


def launch(case: Case, bits: int, x: Tensor) -> Tensor:
    return run(bits, *case.args(x))


def run(bits: int, *args: Tensor | None) -> Tensor:
    return LAUNCH[bits](*(None if t is None else t.to(DEVICE) for t in args)).cpu()


def check(case: Case, bits: int, x: Tensor) -> None:
    rows = x.numel() // x.shape[-1]
    groups = 1 if bits == 16 else case.weight[1].shape[1]  # type: ignore[union-attr]
    kernel = gpu_kernel(rows, case.exact.shape[0], x.shape[-1], groups, x.dtype, bits)
    case.check(launch(case, bits, x), x, unit=UNIT, decoded=kernel == "decode+matmul")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_grouping_is_within_the_error_of_float32_accumulation(bits: int, group: int, symmetric: bool) -> None:
    case = make(bits, group=group, symmetric=symmetric)
    for rows in (1, 3, 17):
        check(case, bits, activations(rows, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 33, 65])
def test_every_number_of_rows(bits: int, rows: int) -> None:
    check(make(bits, n=70, k=128, group=64, symmetric=False), bits, activations(rows, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_other_types_of_activations(bits: int, dtype: torch.dtype) -> None:
    for symmetric in (True, False):
        case = make(bits, dtype, group=64, symmetric=symmetric, bias=dtype)
        for rows in (2, 33):
            check(case, bits, activations(rows, 256, dtype=dtype))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("k", [128, 1024], ids=["whole K", "split K"])
def test_bias_with_and_without_splits(bits: int, rows: int, k: int) -> None:
    case = make(bits, k=k, group=-1, bias=torch.bfloat16)
    tile = tile_for(rows, k, bits)
    assert (blocks_per_split(rows, 19, k, tile, bits) < k // tile.block_k) == (k == 1024)
    check(case, bits, activations(rows, k, dtype=torch.bfloat16))
    assert case.bias is not None
    spread = torch.stack([case.bias, torch.full_like(case.bias, torch.nan)], 1)[:, 0]
    x = activations(rows, k, dtype=torch.bfloat16)
    assert torch.equal(run(bits, x, *case.weight, spread), launch(case, bits, x))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("k", [32, 96, 1056])
def test_widths_that_no_large_block_divides(bits: int, k: int) -> None:
    case = make(bits, n=3, k=k, group=32, symmetric=False)
    check(case, bits, activations(1, k, dtype=torch.bfloat16))


def test_shapes_that_only_the_decoded_product_takes() -> None:
    check(make(4, k=96, group=16, symmetric=False), 4, activations(2, 96, dtype=torch.bfloat16))
    check(make(8, k=90, group=15, symmetric=False), 8, activations(2, 90, dtype=torch.bfloat16))
    check(make(16, k=45), 16, activations(2, 45, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 4), (3, 0)], ids=str)
def test_leading_dimensions_are_kept(bits: int, shape: tuple[int, ...]) -> None:
    case = make(bits, k=64, group=64)
    x = activations(*shape, 64, dtype=torch.bfloat16)
    got = launch(case, bits, x)
    assert got.shape == (*shape, 19)
    case.check(got, x)
    assert got.is_contiguous()


def test_no_output_features() -> None:
    empty = torch.empty(0, 16, dtype=torch.uint8)
    assert run(4, activations(2, 32, dtype=torch.bfloat16), empty, torch.empty(0, 1), None, None).shape == (2, 0)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_strided_activations_give_what_their_copy_gives(bits: int) -> None:
    case = make(bits, group=64, symmetric=False)
    x = activations(3, 256, dtype=torch.bfloat16)
    expected = launch(case, bits, x)
    spaced = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :256]
    shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(3, 256)  # no vector alignment
    odd = torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)[:, :256]  # rows 257 apart
    for other in (x.t().contiguous().t(), spaced, shifted, odd):
        assert torch.equal(launch(case, bits, other), expected)
    repeated = x[:1].expand(3, -1)
    assert torch.equal(launch(case, bits, repeated), launch(case, bits, repeated.contiguous()))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy on inf - inf, as intended
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("rows", [5, 17])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_value_that_is_not_finite_spoils_its_own_row_only(bits: int, rows: int, bad: float) -> None:
    case = make(bits, group=64, symmetric=False)
    clean = activations(rows, 256, dtype=torch.bfloat16)
    spoilt = clean.clone()
    spoilt[rows // 2, 130] = bad
    before, after = launch(case, bits, clean), launch(case, bits, spoilt)
    others = torch.arange(rows) != rows // 2
    assert not bool(torch.isfinite(after[rows // 2]).any())
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("rows", [2, 17, 65])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_that_is_not_finite_spoils_its_own_output_only(bits: int, rows: int) -> None:
    case = make(bits, group=64)
    x = activations(rows, 256, dtype=torch.bfloat16)
    before = launch(case, bits, x)
    scale = case.weight[1]
    assert scale is not None
    scale[7, 2] = torch.nan
    after = launch(case, bits, x)
    kept = torch.arange(19) != 7
    assert bool(after[:, 7].isnan().all())
    assert torch.equal(after[:, kept], before[:, kept])


def test_inputs_with_a_large_mean_keep_their_small_differences() -> None:
    """The offset of 136 is summed and taken away again: with all x near 64 it is at its worst."""
    case = make(4, group=128)
    x = (64 + activations(2, 256)).to(torch.bfloat16)
    check(case, 4, x)
    product = x.double() @ case.exact.t()
    assert bool((abs(launch(case, 4, x).double() - product) <= 2.0**-8 * abs(product) + 1e-3).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_decoded_weight_is_the_exact_one_rounded(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    case = make(bits, n=7, k=672, group=96, symmetric=symmetric)
    data, scale, zero = case.weight
    assert data is not None
    assert scale is not None
    # q - zero is an exact integer and its product with a float32 scale is rounded twice: to float32, then to dtype.
    zero = None if zero is None else zero.to(DEVICE)
    assert torch.equal(decode(data.to(DEVICE), scale.to(DEVICE), zero, bits, dtype).cpu(), case.exact.float().to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_constants_decode_every_nibble(dtype: torch.dtype) -> None:
    """The arithmetic of the PTX, on its bits: `(word & mask) | magic` is q + offset; `ones` and `minus` are so."""
    n = NIBBLES[dtype]
    stored = torch.arange(256, dtype=torch.int64)
    low, high = stored & 15, stored >> 4
    words = (low << n.left) | (high << (16 + n.left)) | 0x0F00_0F00 & ~n.mask  # what surrounds a nibble is cut off
    pairs = ((words & n.mask) | n.magic).to(torch.int32).view(dtype).view(-1, 2).float()
    assert pairs[:, 0].tolist() == (low - 8 + n.offset).tolist()
    assert pairs[:, 1].tolist() == (high - 8 + n.offset).tolist()
    constants = torch.tensor([n.ones, n.minus - 2**32], dtype=torch.int32).view(dtype)
    assert constants.tolist() == [1, 1, -n.offset, -n.offset]


def test_which_kernel_runs() -> None:
    bf16 = torch.bfloat16
    assert [gpu_kernel(rows, 512, 4096, 32, bf16) for rows in (0, 1, 8, 9, 64, 65)] == [
        "none", "gemv", "gemv", "split-k", "split-k", "decode+matmul",
    ]  # fmt: skip
    assert gpu_kernel(1, 512, 4096, 32, torch.float32) == "decode+matmul"
    assert gpu_kernel(1, 512, 4096, 32, torch.float16) == "gemv"
    assert gpu_kernel(1, 512, 4096, 1, torch.float16, bits=16) == "decode+matmul"  # two types of operand
    assert gpu_kernel(1, 512, 4096, 256, bf16) == "decode+matmul"  # groups of 16
    assert gpu_kernel(1, 512, 4095, 1, bf16) == "decode+matmul"
    assert gpu_kernel(1, 0, 4096, 1, bf16) == "none"


@pytest.mark.parametrize("bits", TILES)
def test_the_plan_covers_k_once_and_moves_no_more_than_the_weight(bits: int) -> None:
    for rows in range(1, MAX_ROWS + 1, 7):
        for n in (1, 512, 6144, 151_936):
            for k, group in ((32, 32), (96, 96), (4096, 32), (4096, 4096), (14336, 128), (4096, 64)):
                tile = tile_for(rows, group, bits)
                assert rows <= tile.block_m
                assert group % tile.block_k == 0
                assert tile.block_k >= 32
                blocks = k // tile.block_k
                each = blocks_per_split(rows, n, k, tile, bits)
                splits = -(-blocks // each)
                assert (splits - 1) * each < blocks <= splits * each  # every program has something to do
                assert splits == 1 or (each >= MIN_BLOCKS and 4 * splits * rows * n <= n * k * bits // 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_operands_that_do_not_fit_are_refused(bits: int) -> None:
    case = make(bits, group=64, symmetric=False, bias=torch.bfloat16)
    data, scale, zero = case.weight
    assert data is not None
    assert scale is not None
    assert zero is not None
    x, bias = activations(2, 256, dtype=torch.bfloat16), case.bias
    bad: dict[str, tuple[Tensor | None, ...]] = {
        "longer x": (activations(2, 512, dtype=torch.bfloat16), data, scale, zero, bias),
        "no dimension": (torch.tensor(1.0), data, scale, zero, bias),
        "float64 x": (x.double(), data, scale, zero, bias),
        "no features": (x[:, :0], data[:, :0].contiguous(), scale, zero, bias),
        "bfloat16 scale": (x, data, scale.bfloat16(), zero, bias),
        "strided scale": (x, data, scale.t().contiguous().t(), zero, bias),
        "fewer scale rows": (x, data, scale[:-1], zero, bias),
        "no scales": (x, data, scale[:, :0], zero[:, :0], bias),
        "fewer zeros": (x, data, scale, zero[:, :2].contiguous(), bias),
        "groups that do not fill the row": (x, data, scale[:, :3].contiguous(), zero[:, :3].contiguous(), bias),
        "strided weight": (x, data.t().contiguous().t(), scale, zero, bias),
        "other integers": (x, data.view(torch.uint8 if bits == 8 else torch.int8), scale, zero, bias),
        "shorter bias": (x, data, scale, zero, activations(18, dtype=torch.bfloat16)),
        "float32 bias": (x, data, scale, zero, activations(19)),
    }
    for what, args in bad.items():
        try:
            run(bits, *args)
        except UsageError:
            continue
        pytest.fail(f"{what} was accepted")


COUNT = """
import importlib, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def instructions_a_weight(file):
    build = importlib.import_module("optimizer.backends.kernels." + file).SHIPPED[0]
    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name][0] in "*iu" and name not in build.unaligned}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    labels, code, loops = {}, 0, [0]
    for line in text.splitlines():
        if label := re.match(r"\\s*(\\.L_x_\\d+):", line):
            labels[label[1]] = code
        elif instruction := re.match(r"\\s*/\\*[0-9a-f]{4,}\\*/\\s+(.*?);", line):
            code += 1
            target = re.search(r"BRA.*`\\((\\.L_x_\\d+)\\)", instruction[1])
            if target and target[1] in labels:
                loops.append(code - labels[target[1]])
    return max(loops) * 32 * build.num_warps / (build.constants["BLOCK_N"] * build.constants["BLOCK_K"])

print(*map(instructions_a_weight, sys.argv[1:]))
"""
"""Instructions in the longest loop of each file's first build, over the weights that a thread decodes in it."""


def test_the_docstring_counts_instructions_as_the_compiler_emits_them() -> None:
    said = {"w4a16_linear": 2.1, "w8a16_linear": 3.5}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COUNT, *said], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    for counted, stated in zip(map(float, run.stdout.split()), said.values(), strict=True):
        assert 0 < counted <= stated + 0.05
        assert str(stated) in (weight_only.__doc__ or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_ops_on_a_device(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for n, k, group in ((70, 512, 64), (1000, 4096, 128), (300, 1024, -1), (19, 96, 32)):
        case = make(bits, dtype, n=n, k=k, group=group, symmetric=symmetric, bias=dtype)
        groups = 1 if bits == 16 else case.weight[1].shape[1]  # type: ignore[union-attr]
        for rows in (1, 3, 8, 16, 17, 33, 64, 65, 200):
            x = activations(rows, k, dtype=dtype)
            args = [None if t is None else t.cuda() for t in case.args(x)]
            decoded = gpu_kernel(rows, n, k, groups, dtype, bits) == "decode+matmul"
            case.check(case.op(*args).cpu(), x, unit=UNIT, decoded=decoded)
            if rows == 3:
                torch.library.opcheck(case.op, tuple(args))
