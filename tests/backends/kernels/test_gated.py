"""Gated activations, Triton and reference, against float64, and against product-then-quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optimizer.backends.kernels import gated as module
from optimizer.backends.kernels.gated import (
    gelu_mul,
    gelu_mul_quantize,
    gelu_mul_ref,
    silu_mul,
    silu_mul_quantize,
    silu_mul_ref,
)
from optimizer.backends.kernels.rounding import FORMATS, as_bytes
from optimizer.errors import UsageError
from optimizer.quant.activations import activation_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow)")

Launch = Callable[[Tensor, Tensor], Tensor]
SILU: dict[str, Launch] = {"kernel": module._silu_mul_cuda, "reference": silu_mul_ref}
ACTIVATIONS: dict[str, tuple[dict[str, Launch], Callable[[Tensor], Tensor]]] = {
    "silu": (SILU, F.silu),
    **{
        approximate: (
            {
                "kernel": lambda g, u, a=approximate: module._gelu_mul_cuda(g, u, a),  # type: ignore[misc]
                "reference": lambda g, u, a=approximate: gelu_mul_ref(g, u, a),  # type: ignore[misc]
            },
            lambda g, a=approximate: F.gelu(g, approximate=a),  # type: ignore[misc]
        )
        for approximate in ("none", "tanh")
    },
}
QUANTIZED: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "silu": (module._silu_mul_quantize_cuda, silu_mul_quantize, ()),
    "none": (module._gelu_mul_quantize_cuda, gelu_mul_quantize, ("none",)),
    "tanh": (module._gelu_mul_quantize_cuda, gelu_mul_quantize, ("tanh",)),
}


def merged(*shape: int, dtype: torch.dtype = torch.float32, size: float = 4.0) -> tuple[Tensor, Tensor]:
    """Gate and up as the halves of one random tensor."""
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0)) * size
    gate, up = x.to(dtype).to(DEVICE).chunk(2, -1)
    return gate, up


def check(got: Tensor, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
    """`got` has the type and shape of `gate` and is within the error of float32 arithmetic that rounds once.

    With u = 2⁻²⁴: the argument of an exp is off by up to (4 + 3 |argument|) u and so is what comes of it, relative to
    itself: the argument is g for silu, and up to 1.6 |g| + 0.072 |g|³ for the tanh form. Beyond 104 float32 has nothing
    of it. Functions that add 1 to an erf or a tanh are off by 3 u |g| where those are near -1. The product adds u.
    """
    g, other = gate.double(), up.double()
    exact = activation(g) * other
    unit, kind = 2.0**-24, torch.finfo(gate.dtype)
    argument = (1.6 * g.abs() + 0.072 * g.abs() ** 3).clamp(max=104)
    error = unit * ((8 + 3 * argument) * exact.abs() + 3 * g.abs() * other.abs())
    tiny = torch.finfo(torch.float32).smallest_normal * other.abs()
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps + tiny
    assert got.dtype == gate.dtype
    assert got.shape == gate.shape
    assert got.is_contiguous()
    assert bool(((got.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("name", ["kernel", "reference"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200), (1, 1), (2, 2500), (2, 0, 7), (7,), (2, 1, 3, 40)], ids=str)
def test_within_the_error_of_float32(name: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    launches, activation = ACTIVATIONS[kind]
    gate, up = merged(*shape, dtype=dtype)
    check(launches[name](gate, up), gate, up, activation)


@pytest.mark.parametrize("name", ["kernel", "reference"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_of_any_size_neither_overflow_nor_cancel(name: str, kind: str) -> None:
    launches, activation = ACTIVATIONS[kind]
    sizes = torch.logspace(-30, 4, 300)
    gate = torch.cat([-sizes, sizes, torch.zeros(1)]).unsqueeze(0).to(DEVICE)
    up = torch.linspace(-2, 2, gate.numel()).unsqueeze(0).to(DEVICE)
    check(launches[name](gate, up), gate, up, activation)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("to", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "dtype"), [(200, d) for d in DTYPES] + [(n, torch.float32) for n in (1, 3000, 17000)])
def test_quantized_equals_product_then_quantize(kind: str, to: torch.dtype, n: int, dtype: torch.dtype) -> None:
    launch, op, rest = QUANTIZED[kind]
    gate, up = merged(2, n, dtype=dtype)
    up[1] = 0
    reference, _ = ACTIVATIONS[kind]
    pairs = [(launch(gate, up, *rest, to), reference["kernel"](gate, up).cpu())]
    if DEVICE == "cpu":
        pairs.append((op(gate, up, *rest, to), reference["reference"](gate, up)))
    for (q, scale), before in pairs:
        wanted, steps, _ = activation_elements(before, FORMATS[to])
        assert torch.equal(as_bytes(q.cpu()), as_bytes(wanted))
        assert torch.equal(scale.cpu(), steps)


@pytest.mark.parametrize("n", [200, 1100])
def test_strided_rows_give_what_their_copies_give(n: int) -> None:
    gate, up = merged(3, n)
    columns = up.t().contiguous().t()
    repeated = gate[:1].expand(3, -1)
    for launch in (
        module._silu_mul_cuda,
        lambda *a: module._silu_mul_quantize_cuda(*a, torch.int8)[0],
    ):
        expected = launch(gate.contiguous(), up.contiguous())
        assert torch.equal(launch(gate, columns), expected)
        assert torch.equal(launch(repeated, up)[:1], expected[:1])


@no_numpy_warnings
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1], ids=["gate", "up"])
def test_what_is_not_finite_spoils_its_own_element_and_scale(kind: str, bad: float, where: int) -> None:
    launches, _ = ACTIVATIONS[kind]
    gate, up = merged(10, 40)
    clean = launches["kernel"](gate, up)
    (gate, up)[where][4, 17] = bad
    for launch in launches.values():
        assert not bool(launch(gate, up)[4, 17].isfinite())
    spoilt = launches["kernel"](gate, up)
    spoilt[4, 17] = clean[4, 17]
    assert torch.equal(spoilt, clean)
    launch_quantized, _, rest = QUANTIZED[kind]
    q, scale = launch_quantized(gate, up, *rest, torch.float8_e4m3fn)
    assert scale.isnan().flatten().tolist() == [row == 4 for row in range(10)]
    assert not bool(as_bytes(q)[4].any())


@pytest.mark.parametrize("launch", [module._silu_mul_cuda, silu_mul_ref, silu_mul], ids=["kernel", "reference", "op"])
def test_wrong_inputs_raise(launch: Launch) -> None:
    gate, up = merged(2, 40)
    for bad in ((gate, up[:1]), (gate, up.bfloat16()), (gate.double(), up.double()), (gate[:, :0], up[:, :0])):
        with pytest.raises(UsageError, match="must be"):
            launch(*bad)


@pytest.mark.parametrize("launch", [module._gelu_mul_cuda, gelu_mul_ref, gelu_mul], ids=["kernel", "reference", "op"])
def test_only_two_forms_of_gelu(launch: Callable[[Tensor, Tensor, str], Tensor]) -> None:
    with pytest.raises(UsageError, match="'none' or 'tanh'"):
        launch(*merged(2, 40), "sigmoid")


@pytest.mark.parametrize("launch", [module._silu_mul_quantize_cuda, silu_mul_quantize], ids=["kernel", "op"])
def test_only_two_types_to_quantize_to(launch: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        launch(*merged(2, 40), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up = merged(2, 3, 40, dtype=dtype)
    torch.library.opcheck(silu_mul, (gate, up.mT.contiguous().mT))
    torch.library.opcheck(gelu_mul, (gate, up, "tanh"))
    torch.library.opcheck(silu_mul_quantize, (gate, up, torch.int8))
    torch.library.opcheck(gelu_mul_quantize, (gate, up, "none", torch.int8))


def test_the_ops_stay_whole_in_a_full_graph() -> None:
    x = torch.cat(merged(2, 40), -1)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x.chunk(2, -1)
        return silu_mul(gate, up) * 2, gelu_mul(gate, up, "tanh"), *silu_mul_quantize(gate, up, torch.float8_e4m3fn)

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    for one, other in zip(got, step(x), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("n", [128, 1000, 14336, 28672])
def test_the_ops_on_a_device(kind: str, n: int) -> None:
    gate, up = (t.cuda() for t in merged(33, n, dtype=torch.bfloat16))
    launches, activation = ACTIVATIONS[kind]
    op = silu_mul if kind == "silu" else gelu_mul
    rest = QUANTIZED[kind][2]
    check(op(gate, up, *rest), gate, up, activation)
    check(launches["reference"](gate, up), gate, up, activation)
    for to in FORMATS:
        q, scale = QUANTIZED[kind][1](gate, up, *rest, to)
        wanted, steps, _ = activation_elements(op(gate, up, *rest).cpu(), FORMATS[to])
        assert torch.equal(as_bytes(q.cpu()), as_bytes(wanted))  # no sum, so every build computes the same
        assert torch.equal(scale.cpu(), steps)
