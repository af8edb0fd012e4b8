"""8- and 4-bit floats, compiled and reference, against float64: every code, scales of every kind, bad operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.float_linear import (
    float_linear,
    float_linear_ref,
    has_nan,
    pack_float4,
    takes,
    unpack_float4,
)
from tests.backends.kernels.linear_cases import DTYPES, activations

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
ROWS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 33)  # every blocking of the GEMV, and the GEMM from 16
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    cpu_kernels()


@dataclass
class Case:
    data: Tensor
    scale: Tensor
    global_scale: Tensor | None
    exact: Tensor  # float64 [N, K]

    def check(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """K float32 operations each round a partial sum of at most Σ|x w|; the scale of a byte rounds twice more; with
        bfloat16 products the weight does too. The result rounds once to its type."""
        exact = x.double() @ self.exact.T + (0 if bias is None else bias.double())
        sums = x.double().abs() @ self.exact.abs().T + (0 if bias is None else bias.double().abs())
        native = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        bound = sums * ((x.shape[-1] + 4) * 2.0**-24 + (2.0**-8 if native else 0)) + exact.abs() * EPS[x.dtype]
        off = (y.double() - exact).abs() - bound * 1.01 - 2.0**-24
        assert y.dtype == x.dtype
        assert bool((off <= 0).all()), f"off by {float(off.max()):.3g}"


def scales(kind: str, n: int, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stored scales, the global one, and what they stand for in float64."""
    if kind == "float32":
        scale = torch.rand(n, groups, generator=generator) * torch.logspace(-3, 0, n)[:, None] + 1e-4
        return scale, None, scale.double()
    if kind == "e8m0":
        exponents = torch.randint(-20, -8, (n, groups), generator=generator)
        return torch.exp2(exponents.float()).to(torch.float8_e8m0fnu), None, torch.exp2(exponents.double())
    scale = torch.rand(n, groups, generator=generator).mul(400).to(torch.float8_e4m3fn)
    scale[0, 0] = 2.0**-9  # the smallest subnormal
    total = torch.tensor([37.5])
    return scale, total, scale.double() / 37.5


def case(bits: int, kind: str, group: int, n: int = 19, k: int = 256) -> Case:
    generator = torch.Generator().manual_seed(n + k + group)
    scale, total, wide = scales(kind, n, k // group, generator)
    if bits == 4:
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        values = E2M1[(codes & 7).long()] * torch.where(codes > 7, -1, 1)
        data = pack_float4(codes)
    else:
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
        exponent, mantissa = ((codes >> 3) & 15).long(), (codes & 7).double()
        size = torch.where(exponent > 0, (8 + mantissa) * torch.exp2((exponent - 10).double()), mantissa * 2.0**-9)
        values, data = size * torch.where(codes > 127, -1, 1), codes.view(torch.float8_e4m3fn)
    return Case(data, scale, total, values * wide.repeat_interleave(group, 1))


CASES: dict[str, Callable[[], Case]] = {
    "fp8-channel": lambda: case(8, "float32", 256),
    "fp8-g128": lambda: case(8, "float32", 128),
    "fp8-g32": lambda: case(8, "float32", 32),
    "fp8-e8m0": lambda: case(8, "e8m0", 32),
    "nvfp4": lambda: case(4, "e4m3", 16),
    "nvfp4-odd": lambda: case(4, "e4m3", 16, n=3, k=96),
    "fp4-g32-e4m3": lambda: case(4, "e4m3", 32),
    "mxfp4": lambda: case(4, "e8m0", 32),
    "fp4-channel": lambda: case(4, "float32", 256),
    "fp4-one-block": lambda: case(4, "float32", 32, n=1, k=32),
    "fp4-half": lambda: case(4, "float32", 16, n=5, k=64),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_and_reference_are_within_the_error_of_float32_accumulation(name: str, dtype: torch.dtype) -> None:
    c = CASES[name]()
    for rows in ROWS:
        x = activations(rows, c.exact.shape[1], dtype=dtype)
        for run in (float_linear, float_linear_ref):
            c.check(run(x, c.data, c.scale, c.global_scale, None), x)


def test_every_finite_code_decodes_exactly() -> None:
    codes = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn)[None]
    for position in range(256):
        x = torch.zeros(1, 256)
        x[0, position] = 1.0
        assert float_linear(x, weight, torch.ones(1, 1), None, None).item() == weight[0, position].float().item()
    nibbles = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    got = float_linear(torch.eye(32), pack_float4(nibbles), torch.ones(1, 1), None, None)[:, 0]
    assert got.tolist() == torch.cat([E2M1, -E2M1]).float().repeat(2).tolist()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_every_scale_of_a_byte_is_what_torch_takes_it_for(kind: torch.dtype) -> None:
    scale = torch.arange(256, dtype=torch.uint8).view(kind)[:, None]
    ones = torch.ones(256, 32).to(torch.float8_e4m3fn)
    x = torch.zeros(1, 32)
    x[0, 0] = 1.0
    got = float_linear(x, ones, scale, None, None)[0]
    expected = scale.float()[:, 0]
    subnormal = expected.abs() < torch.finfo(torch.float32).tiny  # 2^-127, which vector code may flush
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~(expected.isnan() | subnormal)
    assert torch.equal(got[known], expected[known])


@pytest.mark.parametrize("name", ["fp8-g128", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_bias_leading_dimensions_and_strides(name: str, rows: int) -> None:
    c, bias = CASES[name](), torch.randn(19, generator=torch.Generator().manual_seed(3))
    x = activations(rows, 256)
    y = float_linear(x, c.data, c.scale, c.global_scale, bias)
    c.check(y, x, bias)
    spaced = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :256]
    assert torch.equal(float_linear(spaced, c.data, c.scale, c.global_scale, bias), y)
    assert torch.equal(float_linear(x[None, :, None], c.data, c.scale, c.global_scale, bias), y[None, :, None])


@pytest.mark.parametrize("name", ["fp8-channel", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_a_value_that_is_not_finite_spoils_its_own_row_only(name: str, rows: int) -> None:
    c, clean = CASES[name](), activations(rows, 256)
    for bad in (float("nan"), float("inf")):
        spoilt = clean.clone()
        spoilt[rows // 2, 130] = bad
        before, after = (float_linear(x, c.data, c.scale, c.global_scale, None) for x in (clean, spoilt))
        touched = c.exact[:, 130] != 0
        assert not bool(torch.isfinite(after[rows // 2][touched]).any())
        others = torch.arange(rows) != rows // 2
        assert torch.equal(after[others], before[others])


def test_codes_pack_and_nan_is_found() -> None:
    codes = torch.randint(0, 16, (5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_float4(pack_float4(codes)), codes)
    weight = torch.zeros(2, 32).to(torch.float8_e4m3fn)
    assert not has_nan(weight)
    weight[1, 3] = torch.nan
    assert has_nan(weight)
    assert not has_nan(codes)


def test_what_the_kernel_takes() -> None:
    assert takes(8, 256, 1)
    assert takes(4, 256, 16)
    assert takes(8, 256, 8)
    assert not takes(8, 256, 16)  # groups of 16 are for 4 bits
    assert not takes(4, 48, 3)
    assert not takes(8, 33, 1)
    assert not takes(8, 256, 3)


def test_wrong_operands_raise() -> None:
    if not cpu_kernels().loaded:
        pytest.skip(f"no compiled kernels: {cpu_kernels().reason}")
    c, x = CASES["fp8-channel"](), activations(2, 256)
    wrong: list[tuple[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], str]] = [
        ((x[:, :128], c.data, c.scale, None, None), "x has 128 features"),
        ((x, c.data, c.scale.repeat(1, 16), None, None), "every group must be a multiple of 32"),
        ((x, c.data, c.scale.double(), None, None), "scale and zero must be contiguous float32"),
        ((x, c.data, c.scale, torch.ones(1), None), "a global scale is one float32 over scales of one byte"),
        ((x, c.data, c.scale, None, torch.ones(3)), "bias must have one value for each"),
        ((x, c.data.t(), c.scale, None, None), "contiguous matrix"),
    ]
    for args, reason in wrong:
        with pytest.raises(RuntimeError, match=reason):
            float_linear(*args)


def test_the_op_is_what_pytorch_asks_of_one() -> None:
    for name in ("fp8-channel", "mxfp4"):
        c = CASES[name]()
        tests = (
            "test_autograd_registration",
            "test_faketensor",
        )  # test_schema compares values, which fp8 has no kernel for
        torch.library.opcheck(
            float_linear, (activations(2, 256), c.data, c.scale, c.global_scale, None), test_utils=tests
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_decodes_and_multiplies(name: str) -> None:
    c = CASES[name]()
    x = activations(3, c.exact.shape[1])
    total = None if c.global_scale is None else c.global_scale.cuda()
    y = float_linear(x.cuda(), c.data.cuda(), c.scale.cuda(), total, None).cpu()
    c.check(y, x)
