"""GELU of a sum with a bias, Triton and reference, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels import bias_gelu as module
from optimizer.backends.kernels.bias_gelu import bias_gelu, bias_gelu_ref
from optimizer.errors import UsageError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "kernel": module._bias_gelu_cuda,
    "reference": bias_gelu_ref,
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype).to(DEVICE)


def check(got: Tensor, x: Tensor, bias: Tensor, approximate: str) -> None:
    """`got` has the type and shape of `x` and is within the error of float32 arithmetic that rounds once.

    With u = 2⁻²⁴: the sum s is off by u |s|, and gelu is nowhere steeper than 1.13. Adding 1 to an erf or a tanh is off
    by 3 u |s| where that is near -1; an exp by (4 + 3 |its argument|) u of itself, and the argument of the tanh form is
    up to 1.6 |s| + 0.072 |s|³, beyond 104 of which float32 has nothing.
    """
    s = x.double() + bias.double()
    exact = F.gelu(s, approximate=approximate)
    kind = torch.finfo(x.dtype)
    argument = (1.6 * s.abs() + 0.072 * s.abs() ** 3).clamp(max=104)
    error = 2.0**-24 * ((8 + 3 * argument) * exact.abs() + 5 * s.abs())
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert got.is_contiguous()
    assert bool(((got.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200), (1, 1), (2, 2500), (2, 0, 7), (7,), (2, 1, 3, 40)], ids=str)
def test_within_the_error_of_float32(name: str, approximate: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, bias = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    check(LAUNCHES[name](x, bias, approximate), x, bias, approximate)


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_sum_is_not_rounded_to_16_bits(name: str) -> None:
    x, bias = draw(4, 100, dtype=torch.bfloat16), draw(100, seed=1)
    check(LAUNCHES[name](x, bias, "none"), x, bias, "none")
    huge = torch.full((1, 100), 3e38, device=DEVICE, dtype=torch.bfloat16)
    check(LAUNCHES[name](huge, -0.5 * huge[0].float(), "none"), huge, -0.5 * huge[0].float(), "none")


def test_strided_rows_give_what_their_copies_give() -> None:
    x, bias = draw(3, 1100), draw(1100, seed=1)
    expected = module._bias_gelu_cuda(x, bias, "tanh")
    spaced = torch.cat([x, torch.full_like(x, math.nan)], 1)[:, :1100]
    gaps = torch.stack([bias, torch.full_like(bias, math.nan)], 1)[:, 0]
    for other in (spaced, x.t().contiguous().t()):
        assert torch.equal(module._bias_gelu_cuda(other, gaps, "tanh"), expected)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_element_only(name: str, approximate: str, bad: float) -> None:
    x, bias = draw(3, 40), draw(40, seed=1)
    wanted = LAUNCHES[name](x, bias, approximate)
    x[1, 17] = wanted[1, 17] = bad
    assert torch.equal(LAUNCHES[name](x, bias, approximate).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("launch", [*LAUNCHES.values(), bias_gelu], ids=[*LAUNCHES, "op"])
def test_wrong_inputs_raise(launch: Callable[[Tensor, Tensor, str], Tensor]) -> None:
    x, bias = draw(2, 40), draw(40)
    for bad in ((x, bias[:39]), (x, bias.int()), (x.double(), bias), (x[:, :0], bias[:0])):
        with pytest.raises(UsageError, match="must be"):
            launch(*bad, "none")
    with pytest.raises(UsageError, match="'none' or 'tanh'"):
        launch(x, bias, "fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_and_full_graph(dtype: torch.dtype) -> None:
    x, bias = draw(2, 3, 40, dtype=dtype), draw(40)
    torch.library.opcheck(bias_gelu, (x.mT.contiguous().mT, bias, "tanh"))

    def double(x: Tensor) -> Tensor:
        return bias_gelu(x, bias, "none") * 2

    assert torch.equal(torch.compile(double, backend="aot_eager", fullgraph=True)(x), double(x))


@pytest.mark.gpu
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("n", [128, 1000, 14336])
def test_the_op_on_a_device(approximate: str, n: int) -> None:
    x, bias = draw(33, n, dtype=torch.bfloat16).cuda(), draw(n, seed=1).cuda()
    check(bias_gelu(x, bias, approximate), x, bias, approximate)
