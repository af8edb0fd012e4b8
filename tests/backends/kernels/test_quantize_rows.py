"""Rounding of rows and groups to int8 and e4m3: Triton and reference against the definition, worked out by search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels import quantize_rows as module
from optimizer.backends.kernels.quantize_rows import quantize_rows, quantize_rows_ref
from optimizer.errors import UsageError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (torch.int8, torch.float8_e4m3fn)
CASES = [((1, 7), -1), ((9, 200), -1), ((2, 3, 256), 128), ((5, 384), 32), ((2, 3000), -1), ((2, 17000), -1)]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
Quantize = Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]]
WAYS: dict[str, Quantize] = {"kernel": module._quantize_rows_cuda, "reference": quantize_rows_ref}
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values whose sizes span four decades along a row: e4m3 needs its subnormals for the small ones."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2.5, 1.5, shape[-1])
    return x.to(dtype).to(DEVICE)


def defined(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Elements and scales as float64 by the definition: NumPy's float32 quotients, then the nearest of all elements."""
    group = x.shape[-1] if group == -1 else group
    values = x.cpu().float().numpy().reshape(*x.shape[:-1], -1, group)
    scale = np.abs(values).max(-1) / np.float32(127.5 if dtype == torch.int8 else 448)
    quotient = torch.from_numpy(values / scale[..., None]).double().reshape(x.shape)
    if dtype == torch.int8:
        grid = torch.arange(-128, 128).double()
        even = grid.remainder(2) == 0
    else:
        codes = torch.arange(256)[~E4M3.isnan()]
        grid, even = E4M3[codes], codes % 2 == 0
    best = torch.full(x.shape, torch.inf, dtype=torch.float64)
    q = torch.zeros(x.shape, dtype=torch.float64)
    for element, is_even in zip(grid.tolist(), even.tolist(), strict=True):
        distance = (quotient - element).abs()
        closer = (distance < best) | (distance == best) & is_even
        q, best = torch.where(closer, element, q), torch.minimum(best, distance)
    return q, torch.from_numpy(scale).double()


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Equal to the bit, scales that are NaN included."""
    bits = [(g.view(torch.uint8), e.view(torch.uint8)) for g, e in zip(got, expected, strict=True)]
    return all(torch.equal(g.cpu(), e.cpu()) for g, e in bits)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "group"), CASES[:4], ids=str)
def test_elements_are_the_nearest(name: str, kind: torch.dtype, shape: tuple[int, ...], group: int) -> None:
    x = draw(*shape)
    q, scale = WAYS[name](x, group, kind)
    expected, expected_scale = defined(x, group, kind)
    assert (q.dtype, q.shape, scale.dtype) == (kind, x.shape, torch.float32)
    assert scale.shape == (*x.shape[:-1], x.shape[-1] // (group if group > 0 else x.shape[-1]))
    assert torch.equal(scale.cpu().double(), expected_scale)
    assert torch.equal(q.cpu().double(), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "group"), CASES, ids=str)
def test_the_kernel_is_the_reference_to_the_bit(
    kind: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], group: int
) -> None:
    x = draw(*shape, dtype=dtype)
    assert same(WAYS["kernel"](x, group, kind), quantize_rows_ref(x.cpu(), group, kind))


@pytest.mark.parametrize("name", WAYS)
def test_ties_go_to_even_and_the_ends_are_kept(name: str) -> None:
    x = torch.tensor([[127.5, -127.5, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0]], device=DEVICE)
    q, scale = WAYS[name](x, -1, torch.int8)
    assert scale.tolist() == [[1.0]]
    assert q.tolist() == [[127, -128, 0, 2, 2, 0, -2, 0]]
    x = torch.tensor([[448.0, 432.0, 17.0, 19.0, 2**-10, 3 * 2**-10, -(2**-11), 0.0]], device=DEVICE)
    q, scale = WAYS[name](x, -1, torch.float8_e4m3fn)
    assert scale.tolist() == [[1.0]]
    assert q.float().tolist() == [[448.0, 448.0, 16.0, 20.0, 0.0, 2**-8, -0.0, 0.0]]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_of_zeros_or_of_less_than_a_scale_has_the_smallest_one(name: str, kind: torch.dtype) -> None:
    x = torch.zeros(2, 64, device=DEVICE)
    x[1, 3] = 2.0**-149
    q, scale = WAYS[name](x, -1, kind)
    assert scale.tolist() == [[2.0**-23]] * 2
    assert not bool(q.float().any())


@no_numpy_warnings
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_own_group(name: str, kind: torch.dtype, bad: float) -> None:
    x = draw(4, 256)
    clean, clean_scale = WAYS[name](x, 128, kind)
    x[2, 130] = bad
    q, scale = WAYS[name](x, 128, kind)
    spoiled = torch.zeros_like(scale, dtype=torch.bool)
    spoiled[2, 1] = True
    assert torch.equal(scale.isnan(), spoiled)
    assert torch.equal(scale[~spoiled], clean_scale[~spoiled])
    others = ~spoiled.repeat_interleave(128, 1)
    assert torch.equal(q.float()[others], clean.float()[others])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_columns_to_skip_count_as_zeros(kind: torch.dtype) -> None:
    x = draw(3, 200)
    x[1, 7] = torch.inf
    skip = torch.zeros(200, dtype=torch.int8, device=DEVICE)
    skip[[7, 199]] = 1
    assert same(module.launch(x, -1, kind, skip), quantize_rows_ref(x.cpu().masked_fill(skip.cpu() != 0, 0), -1, kind))


@pytest.mark.parametrize("name", WAYS)
def test_strided_and_empty_inputs(name: str) -> None:
    wide = draw(6, 512)
    for x in (wide[:, 128:256], wide[::2, :128], wide.t()[:128], wide.view(2, 3, 512)[:, 1, :128]):
        assert same(WAYS[name](x, -1, torch.int8), WAYS[name](x.contiguous(), -1, torch.int8))
    q, scale = WAYS[name](wide[:0], 128, torch.int8)
    assert (q.shape, scale.shape) == ((0, 512), (0, 4))


@pytest.mark.parametrize("name", WAYS)
def test_wrong_inputs_raise(name: str) -> None:
    x = draw(2, 96)
    for bad, group, kind in (
        (x, 64, torch.int8), (x, 0, torch.int8), (x, -1, torch.int32), (x.long(), -1, torch.int8),
        (x[:, :0], -1, torch.int8), (x.sum(), -1, torch.int8),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            WAYS[name](bad, group, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("group", [-1, 128])
def test_opcheck_and_full_graph(kind: torch.dtype, group: int) -> None:
    x = draw(3, 256, dtype=torch.bfloat16).cpu()
    torch.library.opcheck(quantize_rows, (x, group, kind))
    compiled = torch.compile(lambda x: quantize_rows(x * 2, group, kind), backend="aot_eager", fullgraph=True)
    assert same(compiled(x), quantize_rows_ref(x * 2, group, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "group"), [((4096, 4096), -1), ((300, 28672), -1), ((512, 4096), 128)], ids=str)
def test_the_op_on_a_gpu_is_the_reference_to_the_bit(kind: torch.dtype, shape: tuple[int, ...], group: int) -> None:
    x = draw(*shape, dtype=torch.bfloat16)
    assert same(quantize_rows(x, group, kind), quantize_rows_ref(x.cpu(), group, kind))
