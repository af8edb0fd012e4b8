"""LayerNorm and its fusions, Triton and reference, against float64, and against norm-then-quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import layer_norm as module
from optimizer.backends.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_quantize,
    add_layer_norm_ref,
    layer_norm,
    layer_norm_quantize,
    layer_norm_ref,
)
from optimizer.backends.kernels.rounding import FORMATS
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 200, 1000, 3000, 5000, 17000)  # one of every size, all ragged; the last walks the row
CASES = [(n, torch.float32) for n in WIDTHS] + [(n, dtype) for n in (200, 3000) for dtype in DTYPES[1:]]
EPS = 1e-5
on_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="builds may sum in different orders; see the gpu test")
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")

norm, add_norm = module._layer_norm_cuda, module._add_layer_norm_cuda
NORMS: dict[str, Callable[..., Tensor]] = {"kernel": norm, "reference": layer_norm_ref}
ADDED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"kernel": add_norm, "reference": add_layer_norm_ref}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random rows whose sizes span three decades."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1:
        x *= torch.logspace(-1.5, 1.5, shape[-2]).unsqueeze(1)
    return x.to(dtype).to(DEVICE)


def check(got: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> None:
    """`got` has the type and shape of `x` and is within the error of float32 arithmetic that rounds once.

    With u = 2⁻²⁴ and z the normalized row before weight and bias: a first mean that is off only shifts what is centred
    next, each element of which is rounded by u |c|. Their mean is off by at most (N + 3) u of their root mean square,
    which is at most 1 in units of z, and their squares by (N + 6) u, half of that after the root. So z is off by
    (N + 4 + (N / 2 + 10) |z|) u, whatever the mean of the row. What weight and bias add is rounded by u each time, and
    the result to its own type, half a last place off.
    """
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    z = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    gain = 1.0 if weight is None else weight.double()
    shift = 0.0 if bias is None else bias.double()
    exact = z * gain + shift
    n, unit, kind = x.shape[-1], 2.0**-24, torch.finfo(x.dtype)
    error = (n + 4 + (n / 2 + 12) * z.abs()) * unit * torch.as_tensor(gain).abs() + 2 * unit * exact.abs()
    error = error + kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert got.is_contiguous()
    assert bool(((got.double() - exact).abs() <= error).all())


def operands(rows: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, residual, weight, bias."""
    return (
        draw(rows, n, dtype=dtype),
        draw(rows, n, dtype=dtype, seed=2),
        draw(n, dtype=dtype, seed=1),
        draw(n, dtype=dtype, seed=3),
    )


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_norm_is_within_the_error_of_float32(name: str, n: int, dtype: torch.dtype) -> None:
    x, _, weight, bias = operands(11 if n < 300 else 2, n, dtype)
    check(NORMS[name](x, weight, bias, EPS), x, weight, bias)


@pytest.mark.parametrize("name", NORMS)
def test_weight_and_bias_may_be_absent_or_of_another_type(name: str) -> None:
    x, _, weight, bias = operands(3, 200, torch.bfloat16)
    for gain in (None, weight, weight.float()):
        for shift in (None, bias, bias.float()):
            check(NORMS[name](x, gain, shift, 0.5), x, gain, shift, 0.5)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", [200, 17000])
@pytest.mark.parametrize("mean", [1e4, -1e4, 3e6])
def test_a_large_mean_costs_no_precision(name: str, n: int, mean: float) -> None:
    x, _, weight, bias = operands(2, n)
    x = x + mean
    check(NORMS[name](x, weight, bias, EPS), x, weight, bias)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("value", [0.0, 1e4, 0.1, -7e6])
def test_a_constant_row_is_the_bias(name: str, value: float) -> None:
    x = torch.full((2, 777), value, device=DEVICE)
    bias = draw(777)
    check(NORMS[name](x, None, bias, EPS), x, None, bias)


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_the_sum_is_that_of_the_type_and_it_is_what_is_normalized(name: str, n: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias = operands(2, n, dtype)
    y, total = ADDED[name](x, residual, weight, bias, EPS)
    assert torch.equal(total, x + residual)
    check(y, total, weight, bias)


@on_a_cpu
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_quantized_equals_norm_then_quantize(n: int, dtype: torch.dtype, to: torch.dtype) -> None:
    x, residual, weight, bias = operands(2, n, dtype)
    y, total = add_norm(x, residual, weight, bias, EPS)
    for got, before in (
        (module._layer_norm_quantize_cuda(x, weight, None, EPS, to), norm(x, weight, None, EPS)),
        (module._add_layer_norm_quantize_cuda(x, residual, weight, bias, EPS, to), y),
        (layer_norm_quantize(x, weight, None, EPS, to), layer_norm(x, weight, None, EPS)),
        (
            add_layer_norm_quantize(x, residual, weight, bias, EPS, to),
            add_layer_norm(x, residual, weight, bias, EPS)[0],
        ),
    ):
        q, scale, _ = activation_elements(before, FORMATS[to])
        assert torch.equal(got[0].float(), q.float())
        assert torch.equal(got[1], scale)
        assert len(got) == 2 or torch.equal(got[2], total)


def test_columns_outside_a_row_do_not_count_in_its_scale() -> None:
    x = torch.full((1, 3), 1e4, device=DEVICE)  # 1e4 from the mean is what an empty column would be
    x[0, 0] += 1e-3
    y, (q, scale) = norm(x, None, None, EPS), module._layer_norm_quantize_cuda(x, None, None, EPS, torch.int8)
    assert torch.equal(scale, activation_elements(y, FORMATS[torch.int8])[1])
    assert int(q.abs().max()) >= 127


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 9), (0,), (3, 0)], ids=str)
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape, 200), draw(200, seed=1)
    for launch in NORMS.values():
        check(launch(x, weight, None, EPS), x, weight, None)
    q, scale, total = module._add_layer_norm_quantize_cuda(x, x, weight, weight, EPS, torch.int8)
    assert (q.shape, scale.shape, total.shape) == ((*shape, 200), (*shape, 1), (*shape, 200))


@pytest.mark.parametrize("n", [200, 17000])
def test_strided_rows_give_what_their_copies_give(n: int) -> None:
    x, residual, weight, bias = operands(2, n)
    expected = add_norm(x, residual, weight, bias, EPS)
    spaced = torch.cat([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)], 1)[:, n : 2 * n]
    columns = residual.t().contiguous().t()
    gain, shift = (torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0] for t in (weight, bias))
    for got, wanted in zip(add_norm(spaced, columns, gain, shift, EPS), expected, strict=True):
        assert torch.equal(got, wanted)


@no_numpy_warnings
@pytest.mark.parametrize(("rows", "n"), [(10, 200), (2, 17000)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_row_and_no_other(rows: int, n: int, bad: float) -> None:
    x, _, weight, bias = operands(rows, n)
    clean = norm(x, weight, bias, EPS)
    x[1, n - 3] = bad
    others = torch.arange(rows) != 1
    for launch in NORMS.values():
        y = launch(x, weight, bias, EPS)
        assert bool(y[1].isnan().all())
        assert bool(y[others].isfinite().all())
    assert torch.equal(norm(x, weight, bias, EPS)[others], clean[others])
    q, scale = module._layer_norm_quantize_cuda(x, weight, bias, EPS, torch.int8)
    assert scale.isnan().flatten().tolist() == [row == 1 for row in range(rows)]
    assert not bool(q[1].any())


@pytest.mark.parametrize("launch", [norm, layer_norm_ref, layer_norm], ids=["kernel", "reference", "op"])
def test_wrong_inputs_raise(launch: Callable[..., Any]) -> None:
    x, weight = draw(2, 40), draw(40)
    for bad in ((x, weight[:39], None), (x, None, weight[:39]), (x, weight.int(), None), (x.double(), weight, weight)):
        with pytest.raises(UsageError, match="must be"):
            launch(*bad, EPS)


@pytest.mark.parametrize("launch", [add_norm, add_layer_norm_ref], ids=["kernel", "reference"])
def test_a_residual_of_another_shape_or_type_raises(launch: Callable[..., Any]) -> None:
    x = draw(2, 40)
    for residual in (x[:1], x.bfloat16(), x[0]):
        with pytest.raises(UsageError, match="must be as x"):
            launch(x, residual, None, None, EPS)


@pytest.mark.parametrize("launch", [module._layer_norm_quantize_cuda, layer_norm_quantize], ids=["kernel", "op"])
def test_only_two_types_to_quantize_to(launch: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        launch(draw(2, 40), None, None, EPS, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = draw(2, 3, 40, dtype=dtype), draw(40, dtype=dtype)
    torch.library.opcheck(layer_norm, (x.mT.contiguous().mT, weight, None, EPS))
    torch.library.opcheck(add_layer_norm, (x, x, None, weight, EPS))
    torch.library.opcheck(layer_norm_quantize, (x, weight, weight, EPS, torch.int8))
    torch.library.opcheck(add_layer_norm_quantize, (x, x, weight, weight, EPS, torch.int8))


def test_the_ops_stay_whole_in_a_full_graph() -> None:
    x, weight = draw(2, 40), draw(40, seed=1)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        q, scale, total = add_layer_norm_quantize(x, x, weight, None, EPS, torch.float8_e4m3fn)
        return q, scale * 2, layer_norm(total, None, weight, EPS)

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    for one, other in zip(got, step(x), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 1000, 4096, 5120, 17000])
@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_the_ops_on_a_device(n: int, to: torch.dtype) -> None:
    x, residual, weight, bias = (t.cuda() for t in operands(33, n))
    x, residual = x.bfloat16(), residual.bfloat16()
    check(layer_norm(x, weight, bias, EPS), x, weight, bias)
    shifted = x.float() + 1e4
    check(layer_norm(shifted, weight, bias, EPS), shifted, weight, bias)
    y, total = add_layer_norm(x, residual, weight, bias, EPS)
    check(y, total, weight, bias)
    assert torch.equal(total, x + residual)
    q, scale, again = add_layer_norm_quantize(x, residual, weight, bias, EPS, to)
    assert torch.equal(again, total)
    # Another build may sum in another order, which moves y to its neighbour, 2⁻⁷ of it away. From there int8 is half a
    # step off; e4m3 is 2⁻⁴ of y off, or where it is subnormal half of its 2⁻⁹. Where z · weight and the bias cancel y
    # may move by more than its neighbour: by the float32 error of what cancels, far below a step.
    size, step = y.double().abs(), scale.double()
    error = 0.52 * step if to == torch.int8 else 2.0**-9 * step + 2.0**-4 * 1.01 * size
    assert bool(((q.double() * step - y.double()).abs() <= error + 2.0**-7 * size).all())
