"""LLM.int8: int8 products beside outlier columns in their own type, against float64 and against `QuantizedLinear`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import llm_int8_linear as module
from optimizer.backends.kernels.llm_int8_linear import llm_int8_linear, llm_int8_linear_ref
from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import UsageError
from optimizer.quant.formats import ACTIVATIONS, Format
from optimizer.quant.rtn import quantize_rtn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
WAYS: dict[str, Run] = {"kernel": module._llm_int8_linear_cuda, "reference": llm_int8_linear_ref}
both = pytest.mark.parametrize("name", WAYS)
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow)")


def arguments(rows: int, n: int = 70, k: int = 200, outliers: tuple[int, ...] = (5, 77, 199)) -> tuple[Tensor, ...]:
    """Standard normal inputs, below 6, but for one value in each outlier column; weights and scales; a bias."""
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(rows, k, generator=generator)
    for column in outliers:
        x[column % rows, column] = 20.0 + column / 16
    data = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, 1, generator=generator) + 0.01) / 128
    return tuple(t.to(DEVICE) for t in (x, data, scale, torch.randn(n, generator=generator)))


def check(got: Tensor, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> None:
    """Within what float32 may be off: K + 16 roundings u = 2⁻²⁴ of the sum of magnitudes, and the result's own.

    Elements are worked out in float32 as the definition has them: a quotient on the edge between two is what it is.
    """
    k, wide = x.shape[-1], x.double().reshape(-1, x.shape[-1])
    outliers = (wide.abs() > threshold).any(0)
    inner = x.float().reshape(-1, k).masked_fill(outliers, 0)
    step = inner.abs().amax(1, keepdim=True) / 127.5
    step[step == 0] = 1.0
    values = torch.where(outliers, wide, (inner / step).round().clamp(-128, 127).double() * step.double())
    weight = data.double() * scale.double()
    exact, sums = values @ weight.t(), values.abs() @ weight.abs().t()
    if bias is not None:
        exact, sums = exact + bias.double(), sums + bias.double().abs()
    error = (k + 16) * 2.0**-24 * sums
    kind = torch.finfo(x.dtype)
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], len(data)))
    assert bool(((got.reshape(exact.shape).double() - exact).abs() <= error).all())


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product_is_within_the_error_of_float32(name: str, rows: int, dtype: torch.dtype) -> None:
    x, *rest = arguments(rows)
    check(WAYS[name](x.to(dtype), *rest, 6.0), x.to(dtype), *rest, 6.0)


@both
@pytest.mark.parametrize("outliers", [(), tuple(range(40)), tuple(range(200))], ids=len)
def test_no_outliers_more_than_a_step_and_all_columns(name: str, outliers: tuple[int, ...]) -> None:
    x, *rest = arguments(3, outliers=outliers)
    check(WAYS[name](x, *rest, 6.0), x, *rest, 6.0)


@both
def test_a_value_at_the_threshold_is_no_outlier(name: str) -> None:
    x, data, scale, _ = arguments(2, outliers=())
    x[1, 9] = -6.0
    at, above = WAYS[name](x, data, scale, None, 6.0), WAYS[name](x, data, scale, None, 5.99)
    check(at, x, data, scale, None, 6.0)
    check(above, x, data, scale, None, 5.99)
    assert not torch.equal(at[1], above[1])
    assert bool((at[0] != above[0]).any())  # the column leaves the other row's rounding too


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_the_layer_simulates(name: str, dtype: torch.dtype) -> None:
    x = arguments(5)[0].to(dtype)
    weight = quantize_rtn(torch.randn(70, 200, generator=torch.Generator().manual_seed(3)), Format(8))
    simulated = QuantizedLinear(weight, activation=ACTIVATIONS["llm-int8"])(x.cpu()).double()
    got = WAYS[name](x, weight.q.to(DEVICE), weight.scale.float().to(DEVICE), None, 6.0).cpu().double()
    check(got.to(dtype).to(DEVICE), x, weight.q.to(DEVICE), weight.scale.float().to(DEVICE), None, 6.0)
    sums = x.cpu().double().abs() @ weight.dequantize().double().abs().t()
    # Two float32 sums, and two roundings to the type of x.
    assert bool(((got - simulated).abs() <= 2 * (216 * 2.0**-24 + torch.finfo(dtype).eps) * sums).all())


@no_numpy_warnings
@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [5, 6], ids=["outlier", "inner"])
def test_what_is_not_finite_spoils_its_own_row(name: str, bad: float, column: int) -> None:
    x, *rest = arguments(5)
    x[2, column] = bad
    y = WAYS[name](x, *rest, 6.0)
    assert not bool(y[2].isfinite().any())
    assert bool(y[[0, 1, 3, 4]].isfinite().all())
    finite = x.clone()
    finite[2, column] = 50.0 if bad == torch.inf else 0.0
    assert torch.equal(y[[0, 1, 3, 4]], WAYS[name](finite, *rest, 6.0)[[0, 1, 3, 4]])


@both
def test_strided_shaped_and_empty_inputs(name: str) -> None:
    x, *rest = arguments(6)
    run = WAYS[name]
    plain = run(x, *rest, 6.0)
    assert torch.equal(run(torch.cat([x, x], 1)[:, 200:], *rest, 6.0), plain)
    assert torch.equal(run(x.t().contiguous().t(), *rest, 6.0), plain)
    assert torch.equal(run(x.view(2, 3, 200), *rest, 6.0), plain.view(2, 3, 70))
    assert run(x[:0], *rest, 6.0).shape == (0, 70)
    data, scale, _ = rest
    assert run(x, data[:0], scale[:0], None, 6.0).shape == (6, 0)


@both
def test_wrong_inputs_raise(name: str) -> None:
    x, data, scale, bias = arguments(2)
    with pytest.raises(UsageError):
        WAYS[name](x.long(), data, scale, bias, 6.0)
    with pytest.raises((UsageError, RuntimeError)):
        WAYS[name](x[:, :100], data, scale, bias, 6.0)
    with pytest.raises((UsageError, RuntimeError)):
        WAYS[name](x, data, scale, bias[:3], 6.0)


def test_outliers_are_listed_in_order() -> None:
    if DEVICE == "cuda":
        pytest.skip("calls one kernel interpreted")
    marked = torch.zeros(2500, dtype=torch.int8)
    wanted = [0, 1, 1023, 1024, 2047, 2499]
    marked[wanted] = 1
    columns, count = torch.full((2500,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    module._list_kernel[(1,)](marked, columns, count, 2500, **module._LIST)
    assert count.tolist() == [len(wanted)]
    assert columns[: len(wanted)].tolist() == wanted
    assert bool((columns[len(wanted) :] == -1).all())


def test_opcheck_and_full_graph() -> None:
    x, *rest = (t.cpu() for t in arguments(3))
    torch.library.opcheck(llm_int8_linear, (x, *rest, 6.0))
    compiled = torch.compile(lambda x: llm_int8_linear(x, *rest, 6.0), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), llm_int8_linear_ref(x, *rest, 6.0))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 1000])
def test_the_op_on_a_gpu_without_waiting_for_it(rows: int) -> None:
    x, *rest = arguments(rows, 4096, 2048, outliers=(5, 77, 1999))
    x = x.to(torch.bfloat16)
    llm_int8_linear(x, *rest, 6.0)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = llm_int8_linear(x, *rest, 6.0)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    check(y, x, *rest, 6.0)
