"""Every linear op, compiled and reference, against float64: shapes, strides, non-finite values, bad operands."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from tests.backends.kernels.linear_cases import DTYPES, Case, activations, bf16_case, quantized_case

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)
"""Every blocking of the GEMV, the GEMM from 16, and that of bfloat16 instructions from 8 in tiles of 8."""

CASES: dict[str, Callable[[], Case]] = {
    "bf16": bf16_case,
    "bf16-wide": lambda: bf16_case(n=1, k=4096),
    "bf16-narrow": lambda: bf16_case(n=300, k=32),
    **{
        f"int{bits}-g{group}{'' if symmetric else '-asym'}": lambda b=bits, g=group, s=symmetric: quantized_case(  # type: ignore[misc]
            b, group=g, symmetric=s
        )
        for bits in (4, 8)
        for group in (32, 64, 128, -1)
        for symmetric in (True, False)
    },
    "int4-one-row": lambda: quantized_case(4, n=1, k=32, group=32, symmetric=False),
    "int8-one-row": lambda: quantized_case(8, n=1, k=32, group=32, symmetric=False),
    "int4-many-rows": lambda: quantized_case(4, n=500, k=96, group=32),
}
AMX = torch.cpu._is_amx_tile_supported()  # there many bfloat16 rows are oneDNN's
ONE_OF_EACH = ("bf16", "int4-g64-asym", "int8-g64-asym")


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    cpu_kernels()


@pytest.fixture
def compiled() -> None:
    if not cpu_kernels().loaded:
        pytest.skip(f"no compiled kernels: {cpu_kernels().reason}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_and_reference_are_within_the_error_of_float32_accumulation(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    for rows in ROWS:
        x = activations(rows, case.exact.shape[1], dtype=dtype)
        case.check(case.op(*case.args(x)), x)
        case.check(case.reference(*case.args(x)), x)


@pytest.mark.skipif(AMX, reason="weights are rounded to bfloat16 for AMX")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_many_bfloat16_rows_meet_integers_that_are_not_rounded(bits: int, symmetric: bool) -> None:
    """A decoded weight has more bits than bfloat16, q - zero does not: what is left is the error of float32 sums.

    Panels of 16 or 32 columns and the 16 pairs of a block are cut short by n and k.
    """
    for n, k, group, rows in product((1, 16, 17, 33, 70), (32, 96, 384), (32, -1), (16, 17, 33)):
        case = quantized_case(bits, n=n, k=k, group=group, symmetric=symmetric, bias=torch.bfloat16)
        assert case.bias is not None
        x = activations(rows, k, dtype=torch.bfloat16)
        got, product_ = case.op(*case.args(x)), x.double() @ case.exact.t() + case.bias.double()
        sums = x.double().abs() @ case.exact.abs().t() + case.bias.double().abs()
        error = (k + 16) * 2.0**-24 * sums  # linear_cases.py says why
        off = (got.double() - product_).abs() - error - 2.0**-8 * (product_.abs() + error)
        assert bool((off <= 0).all()), f"off by {float(off.max()):.3g}"


def test_zero_points_need_not_be_integers() -> None:
    """bfloat16 does not hold q - zero then, which costs what a decoded weight does."""
    case = quantized_case(8, group=64, symmetric=False)
    data, scale, zero = case.weight
    assert scale is not None
    assert zero is not None
    moved = (scale.double().repeat_interleave(64, 1) * 0.3, data, scale, zero + 0.3)
    case = replace(case, weight=moved[1:], exact=case.exact - moved[0], magnitude=case.magnitude + moved[0])
    for rows, dtype in product((3, 20), DTYPES):
        x = activations(rows, 256, dtype=dtype)
        case.check(case.op(*case.args(x)), x, decoded=dtype == torch.bfloat16)


@pytest.mark.parametrize("make", [bf16_case, lambda **o: quantized_case(4, **o), lambda **o: quantized_case(8, **o)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_bias(make: Callable[..., Case], dtype: torch.dtype, rows: int) -> None:
    case = make(bias=dtype)
    x = activations(rows, 256, dtype=dtype)
    case.check(case.op(*case.args(x)), x)
    case.check(case.reference(*case.args(x)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_strided_bias_is_read_by_its_strides(dtype: torch.dtype) -> None:
    case = quantized_case(8, bias=dtype)
    assert case.bias is not None
    spread = torch.stack([case.bias, torch.full_like(case.bias, torch.nan)], 1)[:, 0]
    x = activations(2, 256, dtype=dtype)
    assert torch.equal(case.op(x, *case.weight, spread), case.op(*case.args(x)))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 9), (0, 4), (3, 0)], ids=str)
def test_leading_dimensions_are_kept(name: str, shape: Sequence[int]) -> None:
    case = CASES[name]()
    x = activations(*shape, 256)
    got = case.op(*case.args(x))
    assert got.shape == (*shape, 19)
    case.check(got, x)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 18])
def test_strided_activations_give_what_their_copy_gives(name: str, dtype: torch.dtype, rows: int) -> None:
    case = CASES[name]()
    x = activations(rows, 256, dtype=dtype)
    expected = case.op(*case.args(x))
    transposed = x.t().contiguous().t()
    spaced = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :256]
    shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(rows, 256)  # no vector alignment
    for other in (transposed, spaced, shifted):
        assert torch.equal(case.op(*case.args(other)), expected)
    repeated = x[:1].expand(rows, -1)
    assert torch.equal(case.op(*case.args(repeated)), case.op(*case.args(repeated.contiguous())))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_that_is_not_finite_spoils_its_own_row_only(
    name: str, rows: int, bad: float, dtype: torch.dtype
) -> None:
    case = CASES[name]()
    clean = activations(rows, 256, dtype=dtype)
    spoilt = clean.clone()
    spoilt[rows // 2, 130] = bad
    for run in (case.op, case.reference):
        before, after = run(*case.args(clean)), run(*case.args(spoilt))
        assert not bool(torch.isfinite(after[rows // 2]).any())
        others = torch.arange(rows) != rows // 2
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_that_is_not_finite_spoils_its_own_output_only(bits: int, rows: int, dtype: torch.dtype) -> None:
    case = quantized_case(bits, group=64)
    x = activations(rows, 256, dtype=dtype)
    before = case.op(*case.args(x))
    scale = case.weight[1]
    assert scale is not None
    scale[7, 2] = torch.nan
    after = case.op(*case.args(x))
    kept = torch.arange(19) != 7
    assert bool(after[:, 7].isnan().all())
    assert torch.equal(after[:, kept], before[:, kept])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rows_do_not_depend_on_their_company(name: str) -> None:
    case = CASES[name]()
    x = activations(4, 256)
    whole = case.op(*case.args(x))
    for row in range(4):
        case.check(whole[row], x[row])
    assert torch.equal(case.op(*case.args(x.flip(0))).flip(0), whole)


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(AMX or not torch.cpu._is_avx512_bf16_supported(), reason="not our GEMM")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_many_bfloat16_rows_do_not_depend_on_their_company(name: str) -> None:
    case = CASES[name]()
    x = activations(33, 256, dtype=torch.bfloat16)
    whole = case.op(*case.args(x))
    for rows in (8, 9, 16, 31):
        assert torch.equal(case.op(*case.args(x[-rows:])), whole[-rows:])
    assert torch.equal(case.op(*case.args(x.flip(0))).flip(0), whole)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, rows: int, dtype: torch.dtype) -> None:
    case = CASES[name]()
    torch.library.opcheck(case.op, case.args(activations(rows, 256, dtype=dtype)))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_op_stays_whole_in_a_full_graph(name: str) -> None:
    case = CASES[name]()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def double(x: Tensor) -> Tensor:
        return case.op(*case.args(x)) * 2

    x = activations(3, 256)
    got = torch.compile(double, backend=keep, fullgraph=True)(x)
    assert torch.equal(got, double(x))
    assert sum(node.target is case.op for node in graphs[0].graph.nodes) == 1


def refused(op: Callable[..., Tensor], args: tuple[Tensor | None, ...]) -> bool:
    try:
        op(*args)
    except (RuntimeError, IndexError):
        return True
    return False


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bits", [4, 8])
def test_operands_that_do_not_fit_are_refused_and_never_read_past(bits: int) -> None:
    case = quantized_case(bits, group=64, symmetric=False, bias=torch.float32)
    data, scale, zero = case.weight
    assert data is not None
    assert scale is not None
    assert zero is not None
    x, bias = activations(2, 256), case.bias
    bad: dict[str, tuple[Tensor | None, ...]] = {
        "longer x": (activations(2, 512), data, scale, zero, bias),
        "shorter x": (activations(2, 128), data, scale, zero, bias),
        "no dimension": (torch.tensor(1.0), data, scale, zero, bias),
        "no features": (activations(2, 0), data[:, :0], scale, zero, bias),
        "float64 x": (x.double(), data, scale, zero, bias),
        "integer x": (x.int(), data, scale, zero, bias),
        "bfloat16 scale": (x, data, scale.bfloat16(), zero, bias),
        "float64 zero": (x, data, scale, zero.double(), bias),
        "integer zero": (x, data, scale, zero.to(torch.int8), bias),
        "flat scale": (x, data, scale.flatten(), zero, bias),
        "transposed scale": (x, data, scale.t().contiguous(), zero, bias),
        "strided scale": (x, data, scale.t().contiguous().t(), zero, bias),
        "fewer scale rows": (x, data, scale[:-1], zero, bias),
        "no scales": (x, data, scale[:, :0], zero[:, :0], bias),
        "fewer zeros": (x, data, scale, zero[:, :2].contiguous(), bias),
        "groups of 16": (x, data, scale.repeat(1, 4), zero.repeat(1, 4), bias),
        "groups that do not fill the row": (x, data, scale[:, :3].contiguous(), zero[:, :3].contiguous(), bias),
        "strided weight": (x, data.t().contiguous().t(), scale, zero, bias),
        "flat weight": (x, data.flatten(), scale, zero, bias),
        "other integers": (x, data.view(torch.uint8 if bits == 8 else torch.int8), scale, zero, bias),
        "wider integers": (x, data.view(torch.int16), scale, zero, bias),
        "shorter bias": (x, data, scale, zero, activations(18)),
        "float64 bias": (x, data, scale, zero, activations(19).double()),
    }
    assert [what for what, args in bad.items() if not refused(case.op, args)] == []


@pytest.mark.usefixtures("compiled")
def test_a_dense_weight_of_another_type_is_refused() -> None:
    weight = activations(19, 256)
    for other in (weight, weight.half(), weight.double(), weight.bfloat16().view(torch.int16)):
        with pytest.raises(RuntimeError, match="weights must be"):
            torch.ops.optimizer.bf16_linear(activations(2, 256), other, None)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        torch.ops.optimizer.bf16_linear(activations(2, 48), activations(19, 48).bfloat16(), None)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_reference_refuses_a_wrong_width(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(RuntimeError):
        case.reference(*case.args(activations(2, 128)))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "flags",
    [("-DBFLOAT16_EMULATED",), ("-DBFLOAT16_EMULATED", "-mno-avx512f"), ("-mno-avx512f",), ("-mamx-bf16",)],
    ids=" ".join,
)
def test_the_kernels_of_other_processors(flags: tuple[str, ...], tmp_path: Path) -> None:
    """This file and that of the floats again: with the bfloat16 instruction spelt out, for AVX2, and for AMX.

    The last leaves the GEMM to ATen, and uses no instruction of AMX itself.
    """
    if any(flag.startswith("-m") for flag in flags) and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86 only")
    files = [__file__, str(Path(__file__).with_name("test_float_linear.py"))]
    wanted = ["-m", "not slow and not gpu", "-k", "not many_bfloat16_rows" if "-mamx-bf16" in flags else ""]
    script = (
        "import sys, pytest\n"
        "import optimizer.backends.kernels.build as build\n"
        f"build.FLAGS += {flags!r}\n"
        "assert build.cpu_kernels().loaded, build.cpu_kernels().reason\n"
        f"sys.exit(pytest.main([*{files!r}, '-q', '-p', 'no:cacheprovider', *{wanted!r}]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
