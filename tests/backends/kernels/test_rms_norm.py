"""RMSNorm and its fusions, Triton and reference, against float64, and against norm-then-quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import rms_norm as module
from optimizer.backends.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_quantize,
    add_rms_norm_ref,
    rms_norm,
    rms_norm_quantize,
    rms_norm_ref,
)
from optimizer.backends.kernels.rounding import FORMATS
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 200, 1000, 3000, 5000, 17000)  # one of every size, all ragged; the last walks the row
CASES = [(n, torch.float32) for n in WIDTHS] + [(n, dtype) for n in (200, 3000) for dtype in DTYPES[1:]]
EPS = 1e-6
on_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="builds may sum in different orders; see the gpu test")
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")

norm, add_norm = module._rms_norm_cuda, module._add_rms_norm_cuda
NORMS: dict[str, Callable[..., Tensor]] = {"kernel": norm, "reference": rms_norm_ref}
ADDED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"kernel": add_norm, "reference": add_rms_norm_ref}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random rows whose sizes span three decades."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1:
        x *= torch.logspace(-1.5, 1.5, shape[-2]).unsqueeze(1)
    return x.to(dtype).to(DEVICE)


def check(got: Tensor, x: Tensor, weight: Tensor, offset: float = 0.0, eps: float = EPS) -> None:
    """`got` has the type and shape of `x` and is within the error of float32 arithmetic that rounds once.

    With u = 2⁻²⁴, N squares summed in any order are off by (N + 2) u of themselves, and their root by half of that; the
    few operations around it add 8 u. The result is then rounded to its own type, half a last place off.
    """
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)
    kind = torch.finfo(x.dtype)
    error = (x.shape[-1] / 2 + 9) * 2.0**-24 * exact.abs()
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert got.is_contiguous()
    assert bool(((got.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_norm_is_within_the_error_of_float32(name: str, n: int, dtype: torch.dtype) -> None:
    x, weight = draw(11 if n < 300 else 2, n, dtype=dtype), draw(n, dtype=dtype, seed=1)
    check(NORMS[name](x, weight, EPS, 0.0), x, weight)


@pytest.mark.parametrize("name", NORMS)
def test_the_offset_is_added_to_the_weight_in_float32(name: str) -> None:
    x = draw(3, 200, dtype=torch.bfloat16)
    weight = draw(200, dtype=torch.bfloat16, seed=1) * 2**-10  # 1 + weight in bfloat16 would be 1
    check(NORMS[name](x, weight, EPS, 1.0), x, weight, 1.0)
    check(NORMS[name](x, weight.float(), 0.5, 1.0), x, weight, 1.0, 0.5)


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_the_sum_is_that_of_the_type_and_it_is_what_is_normalized(name: str, n: int, dtype: torch.dtype) -> None:
    x, residual, weight = draw(2, n, dtype=dtype), draw(2, n, dtype=dtype, seed=2), draw(n, dtype=dtype, seed=1)
    y, total = ADDED[name](x, residual, weight, EPS, 0.0)
    assert torch.equal(total, x + residual)
    check(y, total, weight)


@on_a_cpu
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_quantized_equals_norm_then_quantize(n: int, dtype: torch.dtype, to: torch.dtype) -> None:
    x, residual, weight = draw(2, n, dtype=dtype), draw(2, n, dtype=dtype, seed=2), draw(n, dtype=dtype, seed=1)
    x[1], residual[1] = 0, 0
    y, total = add_norm(x, residual, weight, EPS, 1.0)
    for got, before in (
        (module._rms_norm_quantize_cuda(x, weight, EPS, 1.0, to), norm(x, weight, EPS, 1.0)),
        (module._add_rms_norm_quantize_cuda(x, residual, weight, EPS, 1.0, to), y),
        (rms_norm_quantize(x, weight, EPS, 1.0, to), rms_norm(x, weight, EPS, 1.0)),
        (add_rms_norm_quantize(x, residual, weight, EPS, 1.0, to), add_rms_norm(x, residual, weight, EPS, 1.0)[0]),
    ):
        q, scale, _ = activation_elements(before, FORMATS[to])
        assert torch.equal(got[0].float(), q.float())
        assert torch.equal(got[1], scale)
        assert len(got) == 2 or torch.equal(got[2], total)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 9), (0,), (3, 0)], ids=str)
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape, 200), draw(200, seed=1)
    for launch in NORMS.values():
        check(launch(x, weight, EPS, 0.0), x, weight)
    q, scale, total = module._add_rms_norm_quantize_cuda(x, x, weight, EPS, 0.0, torch.int8)
    assert (q.shape, scale.shape, total.shape) == ((*shape, 200), (*shape, 1), (*shape, 200))


@pytest.mark.parametrize("n", [200, 17000])
def test_strided_rows_give_what_their_copies_give(n: int) -> None:
    x, residual, weight = draw(2, n), draw(2, n, seed=2), draw(n, seed=1)
    expected = add_norm(x, residual, weight, EPS, 0.0)
    spaced = torch.cat([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)], 1)[:, n : 2 * n]
    columns = residual.t().contiguous().t()
    gain = torch.stack([weight, torch.full_like(weight, math.nan)], 1)[:, 0]
    for got, wanted in zip(add_norm(spaced, columns, gain, EPS, 0.0), expected, strict=True):
        assert torch.equal(got, wanted)
    middle = torch.stack([x, torch.full_like(x, math.nan)], 1)[:, :1]  # [3, 1, N] of [3, 2, N]
    assert torch.equal(norm(middle, weight, EPS, 0.0)[:, 0], norm(x, weight, EPS, 0.0))
    repeated = x[:1].expand(4, -1)
    assert torch.equal(norm(repeated, weight, EPS, 0.0), norm(x, weight, EPS, 0.0)[:1].expand(4, -1))


@no_numpy_warnings
@pytest.mark.parametrize(("rows", "n"), [(10, 200), (2, 17000)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_row_and_no_other(rows: int, n: int, bad: float) -> None:
    x, weight = draw(rows, n), draw(n, seed=1)
    clean = norm(x, weight, EPS, 0.0)
    x[1, n - 3] = bad
    others = torch.arange(rows) != 1
    for launch in NORMS.values():
        y = launch(x, weight, EPS, 0.0)
        assert bool(y[1, n - 3].isnan())
        assert y.isfinite().all(1).tolist() == others.tolist()
    assert torch.equal(norm(x, weight, EPS, 0.0)[others], clean[others])
    q, scale = module._rms_norm_quantize_cuda(x, weight, EPS, 0.0, torch.int8)
    assert scale.isnan().flatten().tolist() == [row == 1 for row in range(rows)]
    assert not bool(q[1].any())


def test_rows_do_not_depend_on_their_company() -> None:
    x, weight = draw(9, 130), draw(130, seed=1)
    whole = norm(x, weight, EPS, 0.0)
    for row in range(9):
        assert torch.equal(norm(x[row], weight, EPS, 0.0), whole[row])


@pytest.mark.parametrize("launch", [norm, rms_norm_ref, rms_norm], ids=["kernel", "reference", "op"])
def test_wrong_inputs_raise(launch: Callable[..., Any]) -> None:
    x, weight = draw(2, 40), draw(40)
    for bad in ((x, weight[:39]), (x, weight.int()), (x.double(), weight), (x.int(), weight), (x[:, :0], weight[:0])):
        with pytest.raises(UsageError, match="must be"):
            launch(*bad, EPS, 0.0)


@pytest.mark.parametrize("launch", [add_norm, add_rms_norm_ref], ids=["kernel", "reference"])
def test_a_residual_of_another_shape_or_type_raises(launch: Callable[..., Any]) -> None:
    x, weight = draw(2, 40), draw(40)
    for residual in (x[:1], x.bfloat16(), x[0]):
        with pytest.raises(UsageError, match="must be as x"):
            launch(x, residual, weight, EPS, 0.0)


@pytest.mark.parametrize("launch", [module._rms_norm_quantize_cuda, rms_norm_quantize], ids=["kernel", "op"])
def test_only_two_types_to_quantize_to(launch: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        launch(draw(2, 40), draw(40), EPS, 0.0, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = draw(2, 3, 40, dtype=dtype), draw(40, dtype=dtype)
    torch.library.opcheck(rms_norm, (x.mT.contiguous().mT, weight, EPS, 0.0))
    torch.library.opcheck(add_rms_norm, (x, x, weight, EPS, 0.0))
    torch.library.opcheck(rms_norm_quantize, (x, weight, EPS, 0.0, torch.int8))
    torch.library.opcheck(add_rms_norm_quantize, (x, x, weight, EPS, 0.0, torch.int8))


def test_the_ops_stay_whole_in_a_full_graph() -> None:
    x, weight = draw(2, 40), draw(40, seed=1)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        q, scale, total = add_rms_norm_quantize(x, x, weight, EPS, 0.0, torch.float8_e4m3fn)
        return q, scale * 2, rms_norm(total, weight, EPS, 1.0)

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    for one, other in zip(got, step(x), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 1000, 4096, 5120, 17000])
@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_the_ops_on_a_device(n: int, to: torch.dtype) -> None:
    x, residual, weight = (t.cuda() for t in (draw(33, n), draw(33, n, seed=2), draw(n, seed=1)))
    x, residual = x.bfloat16(), residual.bfloat16()
    check(rms_norm(x, weight, EPS, 0.0), x, weight)
    y, total = add_rms_norm(x, residual, weight, EPS, 0.0)
    check(y, total, weight)
    assert torch.equal(total, x + residual)
    q, scale, again = add_rms_norm_quantize(x, residual, weight, EPS, 0.0, to)
    assert torch.equal(again, total)
    # Another build may sum in another order, which moves y to its neighbour, 2⁻⁷ of it away. From there int8 is half a
    # step off; e4m3 is 2⁻⁴ of y off, or where it is subnormal half of its 2⁻⁹.
    size, step = y.double().abs(), scale.double()
    error = 0.51 * step if to == torch.int8 else 2.0**-10 * step + 2.0**-4 * 1.01 * size
    assert bool(((q.double() * step - y.double()).abs() <= error + 2.0**-7 * size).all())
