"""The product of integers: exact sums, scaled as float32, by every kernel; which kernel runs; and its schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import int8_linear as module
from optimizer.backends.kernels.int8_linear import gpu_kernel, int8_linear, int8_linear_ref, int8_sums
from optimizer.backends.kernels.scaled_matmul import SPLIT_COLUMNS, TILES, combine, multiply, schedule
from optimizer.backends.kernels.scaled_operands import operands
from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 3, 20, 70)  # the GEMV and every tile, all ragged
Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def arguments(rows: tuple[int, ...], n: int, k: int, *, static: bool = False, bias: bool = True) -> Args:
    """Integers over the whole range, scales of two decades; products stay within float16."""
    generator = torch.Generator().manual_seed(n + k)
    q, data = (torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in ((*rows, k), (n, k)))
    q_scale = (torch.rand(*((1,) if static else (*rows, 1)), generator=generator) + 0.01) / 128
    scale = (torch.rand(n, 1, generator=generator) + 0.01) / 128
    b = torch.randn(n, generator=generator) if bias else None
    return tuple(None if t is None else t.to(DEVICE) for t in (q, q_scale, data, scale, b))  # type: ignore[return-value]


def check(got: Tensor, args: Args, dtype: torch.dtype) -> None:
    """Within the roundings of an exact sum: to float32, twice by a scale, once by the bias, and to its own type.

    With u = 2⁻²⁴ that is 3 u of the product and u of the result, then half a last place of `dtype`.
    """
    q, q_scale, data, scale, bias = (None if t is None else t.double() for t in args)
    product = (q @ data.t()) * q_scale * scale.t()
    exact = product if bias is None else product + bias
    error = 2.0**-24 * (3.01 * product.abs() + 1.01 * exact.abs())
    kind = torch.finfo(dtype)
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    assert bool(((got.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_tile_is_within_the_roundings_of_an_exact_sum(rows: int, dtype: torch.dtype) -> None:
    args = arguments((rows,), 133, 200)
    check(module._int8_linear_cuda(*args, dtype), args, dtype)
    check(int8_linear_ref(*args, dtype), args, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_sums_split_along_k(rows: int, bias: bool) -> None:
    args = arguments((rows,), 40, 2 * SPLIT_COLUMNS + 130, bias=bias)
    op = operands(*args, torch.float32, torch.int8)
    assert rows == 1 or schedule(rows, 40, op.a.shape[1], 64)[2] < op.a.shape[1]
    split = multiply(op, torch.float32, processors=64)
    check(split, args, torch.float32)
    assert torch.equal(split, multiply(op, torch.float32, processors=1))  # the sums are exact, however they are split
    addend = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for processors in (1, 64):
        y = multiply(op, torch.float32, addend, processors=processors)
        expected = split.double() + addend.double() * op.b_scale.double().t()
        # Both results are rounded a few times each, of terms no larger than the sum of their magnitudes.
        size = split.double().abs() + addend.double().abs() * op.b_scale.double().t() + 5
        assert bool(((y.double() - expected).abs() <= 10 * 2.0**-24 * size).all())


def test_more_tiles_than_a_group_and_than_programs() -> None:
    args = arguments((1100,), 133, 16)  # 9 × 2 tiles of 128
    op = operands(*args, torch.float32, torch.int8)
    check(multiply(op, torch.float32, processors=3), args, torch.float32)


@pytest.mark.parametrize("rows", [17, 40])
def test_cublas_sums_are_finished_by_the_scaling_kernel(rows: int) -> None:
    args = arguments((2, rows), 24, 64, static=True)
    assert gpu_kernel(2 * rows, 24, 64) == "int_mm"
    check(module._int8_linear_cuda(*args, torch.bfloat16), args, torch.bfloat16)


def test_sums_beyond_float32_are_exact() -> None:
    k = 5000
    a, b = torch.full((2, k), -128, dtype=torch.int8), torch.full((3, k), -128, dtype=torch.int8)
    a[0, 17], b[2, 4000] = 127, 1  # sums that are not multiples of 128 · 128
    exact = a.long() @ b.long().t()
    assert int(exact.max()) > 2**24
    assert torch.equal(int8_sums(a, b).long(), exact)
    ones = torch.ones(3, 1, device=DEVICE)
    y = module._int8_linear_cuda(a.to(DEVICE), ones[:2], b.to(DEVICE), ones, None, torch.float32)
    assert torch.equal(y.cpu(), exact.float())


@pytest.mark.parametrize("rows", ROWS)
def test_a_scale_that_is_nan_spoils_its_row(rows: int) -> None:
    args = arguments((rows,), 33, 64)
    clean = module._int8_linear_cuda(*args, torch.float32)
    args[1][rows // 2] = torch.nan
    for y in (module._int8_linear_cuda(*args, torch.float32), int8_linear_ref(*args, torch.float32)):
        assert bool(y[rows // 2].isnan().all())
        keep = torch.arange(rows) != rows // 2
        assert not bool(y[keep].isnan().any())
    assert torch.equal(module._int8_linear_cuda(*args, torch.float32)[keep], clean[keep])


def test_strided_one_dimensional_and_empty_inputs() -> None:
    q, q_scale, data, scale, bias = arguments((6,), 33, 64)
    expected = int8_linear_ref(q, q_scale, data, scale, bias, torch.float32)
    wide = torch.cat([q, q], 1)
    for rows in (wide[:, 64:], wide.t()[:64].contiguous().t()):
        for run in (module._int8_linear_cuda, int8_linear_ref):
            assert torch.equal(run(rows, q_scale, data.t().contiguous().t(), scale, bias, torch.float32), expected)
    one = module._int8_linear_cuda(q[0], q_scale[0], data, scale, bias, torch.float32)
    assert torch.equal(one, expected[0])
    for run in (module._int8_linear_cuda, int8_linear_ref):
        assert run(q[:0], q_scale[:0], data, scale, bias, torch.float32).shape == (0, 33)
        assert run(q, q_scale, data[:0], scale[:0], None, torch.float32).shape == (6, 0)
        no_features = run(q[:, :0], q_scale, data[:, :0], scale, bias, torch.float32)
        assert torch.equal(no_features, bias.expand(6, 33))  # type: ignore[union-attr]


def test_wrong_inputs_raise() -> None:
    q, q_scale, data, scale, bias = arguments((2,), 5, 32)
    wrong = (
        (q.float(), q_scale, data, scale, bias), (q, q_scale, data[:, :16], scale, bias),
        (q, q_scale[:1], data, scale, bias), (q, q_scale.double(), data, scale, bias),
        (q, q_scale, data, scale[:1], bias), (q, q_scale, data, scale, bias[:2]),  # type: ignore[index]
    )  # fmt: skip
    for args in wrong:
        for run in (module._int8_linear_cuda, int8_linear_ref):
            with pytest.raises(UsageError):
                run(*args, torch.float32)
    with pytest.raises(UsageError, match="float32"):
        int8_linear_ref(q, q_scale, data, scale, bias, torch.int8)
    with pytest.raises(UsageError, match="overflow"):
        int8_linear_ref(q.repeat(1, 4096), q_scale, data.repeat(1, 4096), scale, bias, torch.float32)


def test_opcheck_and_full_graph() -> None:
    args = tuple(None if t is None else t.cpu() for t in arguments((2, 3), 9, 32))
    torch.library.opcheck(int8_linear, (*args, torch.bfloat16))
    compiled = torch.compile(lambda q: int8_linear(q, *args[1:], torch.float16), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(args[0]), int8_linear_ref(*args, torch.float16))  # type: ignore[arg-type]


def test_which_kernel_runs() -> None:
    assert [gpu_kernel(rows, 4096, 4096) for rows in (1, 2, 16, 17)] == ["gemv", "few_rows", "few_rows", "int_mm"]
    assert gpu_kernel(64, 4095, 4096) == gpu_kernel(64, 4096, 4100) == gpu_kernel(64, 8, 0) == "gemm"


@pytest.mark.parametrize("rows", [2, 16, 17, 64, 65, 5000])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1024, 14336), (28672, 4096), (100, 1000), (64, 0)])
def test_a_schedule_covers_k_in_steps_and_keeps_to_the_processors(rows: int, n: int, k: int) -> None:
    tile, programs, columns = schedule(rows, n, k, 132)
    tiles = -(-rows // tile.m) * -(-n // tile.n)
    splits = -(-k // columns) if columns else 1
    assert tile == min((t for t in TILES if rows <= t.rows), key=lambda t: t.rows)
    assert columns % BLOCK == 0
    assert columns * splits >= k
    assert 1 <= programs <= min(tiles, 132 * tile.resident)
    assert splits == 1 or (tiles * splits <= 132 and columns >= SPLIT_COLUMNS)


def test_the_scaling_kernel_adds_parts_in_order() -> None:
    args = arguments((3,), 2000, 32)
    op = operands(*args, torch.float32, torch.int8)
    total = int8_sums(op.a, op.b)
    halves = torch.stack([total - 7, torch.full_like(total, 7)])
    check(combine(halves, op, torch.float32), args, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100, 1000])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 14336), (1001, 1000)])
def test_the_op_on_a_gpu(rows: int, n: int, k: int) -> None:
    args = arguments((rows,), n, k)
    check(int8_linear(*args, torch.bfloat16), args, torch.bfloat16)
