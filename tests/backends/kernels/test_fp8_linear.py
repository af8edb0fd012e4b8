"""The product of 8-bit floats under every kind of scale, by every kernel, against float64; and which kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import fp8_linear as module
from optimizer.backends.kernels.fp8_linear import fp8_linear, fp8_linear_ref, gpu_kernel
from optimizer.backends.kernels.scaled_matmul import SPLIT_COLUMNS, multiply
from optimizer.backends.kernels.scaled_operands import operands
from optimizer.errors import UsageError
from optimizer.quant.formats import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 3, 20, 70)  # the GEMV and every tile, all ragged
SCALES = [
    ("token", "row"),
    ("tensor", "tensor"),
    ("tensor", "row"),
    ("group", "block"),
    ("token", "block"),
    ("group", "row"),
]
Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def arguments(rows: int, n: int, k: int, inputs: str = "token", weights: str = "row", bias: bool = True) -> Args:
    """Elements of every size, scales of two decades; products stay within float16."""
    generator = torch.Generator().manual_seed(n + k)
    q, data = ((torch.randn(m, k, generator=generator) * 8).to(torch.float8_e4m3fn) for m in (rows, n))
    shapes = {"tensor": (1,), "token": (rows, 1), "group": (rows, k // BLOCK)}
    weight_shapes = {"tensor": (1, 1), "row": (n, 1), "block": (-(-n // BLOCK), -(-k // BLOCK))}
    q_scale = (torch.rand(*shapes[inputs], generator=generator) + 0.01) / 8
    scale = (torch.rand(*weight_shapes[weights], generator=generator) + 0.01) / 8
    b = torch.randn(n, generator=generator) if bias else None
    return tuple(None if t is None else t.to(DEVICE) for t in (q, q_scale, data, scale, b))  # type: ignore[return-value]


def spread(scale: Tensor, rows: int, k: int) -> Tensor:
    """One scale an element, `[rows, k]` float64, whatever shares one."""
    wide = scale.double().reshape(-1, scale.shape[-1])
    for dim, size in enumerate((rows, k)):
        if wide.shape[dim] != 1 and wide.shape[dim] != size:
            wide = wide.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return wide.expand(rows, k)


def check(got: Tensor, args: Args, dtype: torch.dtype, *, tensor_core: bool = False) -> None:
    """Within what float32 sums in any order may be off, (K + 16) u of the magnitudes with u = 2⁻²⁴, and rounded once.

    A tensor core adds 32 products to a sum at a time and cuts each of the 33 at 2⁻¹³ of the largest.
    """
    q, q_scale, data, scale, bias = args
    k = q.shape[1]
    a = q.double() * spread(q_scale, len(q), k)
    b = data.double() * spread(scale, len(data), k)
    exact, sums = a @ b.t(), a.abs() @ b.abs().t()
    if bias is not None:
        exact, sums = exact + bias.double(), sums + bias.double().abs()
    error = ((k + 16) * 2.0**-24 + (33 * 2.0**-13 if tensor_core else 0.0)) * sums
    kind = torch.finfo(dtype)
    error += kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    assert bool(((got.double() - exact).abs() <= error).all())


@pytest.mark.parametrize(("inputs", "weights"), SCALES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_tile_and_scale_is_within_the_error_of_float32(rows: int, inputs: str, weights: str) -> None:
    args = arguments(rows, 133, 384, inputs, weights)
    check(module._fp8_linear_cuda(*args, torch.float32), args, torch.float32, tensor_core=DEVICE == "cuda")
    check(fp8_linear_ref(*args, torch.float32), args, torch.float32)


@pytest.mark.parametrize(("inputs", "weights"), [("token", "row"), ("token", "block")])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_k_and_every_result_type(dtype: torch.dtype, rows: int, inputs: str, weights: str) -> None:
    args = arguments(rows, 33, 200, inputs, weights, bias=False)
    check(module._fp8_linear_cuda(*args, dtype), args, dtype, tensor_core=DEVICE == "cuda")
    check(fp8_linear_ref(*args, dtype), args, dtype)


@pytest.mark.parametrize(("inputs", "weights"), [("token", "row"), ("group", "block")])
@pytest.mark.parametrize("rows", [3, 20])
def test_sums_split_along_k(rows: int, inputs: str, weights: str) -> None:
    args = arguments(rows, 40, 2 * SPLIT_COLUMNS + 128, inputs, weights)
    op = operands(*args, torch.float32, torch.float8_e4m3fn)
    check(multiply(op, torch.float32, processors=64), args, torch.float32, tensor_core=DEVICE == "cuda")


@pytest.mark.parametrize("run", [module._fp8_linear_cuda, fp8_linear_ref])
@pytest.mark.parametrize(("inputs", "weights"), [("token", "row"), ("group", "block")])
@pytest.mark.parametrize("rows", [1, 3])
def test_scales_that_are_nan_spoil_what_they_scale(run: Any, rows: int, inputs: str, weights: str) -> None:
    args = arguments(rows, 133, 256, inputs, weights)
    args[1][rows - 1, -1] = torch.nan
    y = run(*args, torch.float32)
    assert bool(y[rows - 1].isnan().all())
    assert not bool(y[: rows - 1].isnan().any())
    args[1].nan_to_num_(0.1)
    args[3][0, 0] = torch.nan
    y = run(*args, torch.float32)
    spoiled = 1 if weights == "row" else BLOCK
    assert bool(y[:, :spoiled].isnan().all())
    assert not bool(y[:, spoiled:].isnan().any())


def test_strided_shaped_and_empty_inputs() -> None:
    q, q_scale, data, scale, bias = arguments(6, 33, 256, "group", "block")
    expected = fp8_linear_ref(q, q_scale, data, scale, bias, torch.float32)
    for run in (module._fp8_linear_cuda, fp8_linear_ref):
        wide = torch.cat([q.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)
        strided = run(wide[:, 256:], q_scale.t().contiguous().t(), data, scale, bias, torch.float32)
        plain = run(q, q_scale, data, scale, bias, torch.float32)
        assert torch.equal(strided, plain)
        shaped = run(q.view(2, 3, 256), q_scale.view(2, 3, 2), data, scale, bias, torch.float32)
        assert torch.equal(shaped, plain.view(2, 3, 33))
        assert run(q[:0], q_scale[:0], data, scale, bias, torch.float32).shape == (0, 33)
        assert run(q, q_scale, data[:0], scale[:0], None, torch.float32).shape == (6, 0)
        check(run(q, q_scale, data, scale, bias, torch.float32), (q, q_scale, data, scale, bias), torch.float32)
    assert expected.shape == (6, 33)


def test_wrong_inputs_raise() -> None:
    q, q_scale, data, scale, bias = arguments(2, 200, 256)
    wrong = (
        (q.float(), q_scale, data, scale, bias), (q, q_scale, data[:, :16], scale, bias),
        (q, torch.ones(2, 3, device=DEVICE), data, scale, bias), (q, q_scale.bfloat16(), data, scale, bias),
        (q, q_scale, data, torch.ones(2, 1, device=DEVICE), bias), (q, q_scale, data, scale.t(), bias),
        (q, q_scale, data, scale, bias[:2]),  # type: ignore[index]
    )  # fmt: skip
    for args in wrong:
        for run in (module._fp8_linear_cuda, fp8_linear_ref):
            with pytest.raises(UsageError):
                run(*args, torch.float32)


@pytest.mark.parametrize(("inputs", "weights"), [("tensor", "tensor"), ("group", "block")])
def test_opcheck_and_full_graph(inputs: str, weights: str) -> None:
    args = tuple(None if t is None else t.cpu() for t in arguments(3, 9, 256, inputs, weights))
    # The schema's check multiplies each argument by a number, which 8-bit floats have no kernel for.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_linear, (*args, torch.bfloat16), test_utils=checks)
    compiled = torch.compile(lambda q: fp8_linear(q, *args[1:], torch.float16), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(args[0]), fp8_linear_ref(*args, torch.float16))  # type: ignore[arg-type]


def test_which_kernel_runs() -> None:
    base: dict[str, Any] = {
        "blocks": False, "tensor_scales": False, "dtype": torch.bfloat16, "bias": None, "capability": (9, 0)
    }  # fmt: skip

    def kernel(rows: int, n: int = 4096, k: int = 4096, **changed: Any) -> str:
        return gpu_kernel(rows, n, k, **base | changed)

    assert [kernel(rows) for rows in (1, 2, 16, 17)] == ["gemv", "few_rows", "few_rows", "scaled_mm"]
    assert kernel(64, n=4104) == kernel(64, k=4104) == kernel(64, k=0) == kernel(64, blocks=True) == "gemm"
    assert kernel(64, dtype=torch.float16) == kernel(64, bias=torch.float32) == "gemm"
    assert kernel(64, dtype=torch.float16, tensor_scales=True) == kernel(64, bias=torch.bfloat16) == "scaled_mm"
    assert kernel(64, capability=None) == "gemm"
    assert kernel(1, capability=(8, 0)) == kernel(64, capability=(8, 6)) == "reference"
    assert kernel(64, capability=(8, 9)) == kernel(64, capability=(10, 0)) == "scaled_mm"


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "weights"), SCALES)
@pytest.mark.parametrize("rows", [1, 16, 17, 100, 1000])
def test_the_op_on_a_gpu(rows: int, inputs: str, weights: str) -> None:
    args = arguments(rows, 4096, 2048, inputs, weights, bias=False)
    check(fp8_linear(*args, torch.bfloat16), args, torch.bfloat16, tensor_core=True)
