"""The linear that decodes its weight: its product, the op's contract, and inputs of the wrong shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.decoded_linear import decoded_linear
from optimizer.quant.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format
from optimizer.quant.packing import pack_nibbles
from optimizer.quant.rtn import quantize_rtn

FORMATS = [FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK, NVFP4, MXFP4, Format(8, False, -1)]


def arguments(format: Format, n: int = 130, k: int = 160, bias: bool = True) -> tuple[tuple[object, ...], Tensor]:
    """What follows `x` in a call of the op, and the weight in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_rtn(torch.randn(n, k, generator=generator), format)
    data = pack_nibbles(weight.q) if format.bits == 4 else weight.q
    zero = None if weight.zero is None else weight.zero.float()
    b = torch.randn(n, generator=generator) if bias else None
    blocks = format.granularity == "block"
    return (data, weight.scale, zero, weight.global_scale, b, blocks), weight.dequantize(torch.float64)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_decoded_weight(format: Format, bias: bool) -> None:
    rest, exact = arguments(format, bias=bias)
    x = activations(2, 3, 160)
    expected = x.double() @ exact.t()
    sums = x.double().abs() @ exact.abs().t()
    if isinstance(rest[4], Tensor):
        expected, sums = expected + rest[4].double(), sums + rest[4].double().abs()
    # Weights are decoded with two roundings, and 160 terms accumulated in float32.
    assert bool(((decoded_linear(x, *rest).double() - expected).abs() <= (160 + 16) * 2.0**-24 * sums).all())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(format: Format, dtype: torch.dtype) -> None:
    rest, _ = arguments(format)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The schema's check multiplies each argument by a number, which 8-bit floats have no kernel for.
    torch.library.opcheck(
        decoded_linear,
        (activations(2, 160).to(dtype), *rest),
        test_utils=checks[1:] if format.kind == "float" else checks,
    )


def test_strided_and_empty_inputs() -> None:
    rest, _ = arguments(NVFP4)
    x = activations(160, 4).t()
    assert torch.equal(decoded_linear(x, *rest), decoded_linear(x.contiguous(), *rest))
    assert decoded_linear(activations(0, 160), *rest).shape == (0, 130)


def test_wrong_inputs_raise() -> None:
    (data, scale, *rest), _ = arguments(FP8_CHANNEL)
    assert isinstance(data, Tensor)
    with pytest.raises(RuntimeError):
        decoded_linear(activations(2, 96), data, scale, *rest)
    with pytest.raises((RuntimeError, KeyError)):
        decoded_linear(activations(2, 160), data.float(), scale, *rest)
