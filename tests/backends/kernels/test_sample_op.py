"""Sampling in a graph, Triton and reference: greedy, cuts and draws against `probabilities`, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.backends.kernels import sampling as module
from optimizer.backends.kernels.sampling import sample_tokens, sample_tokens_ref
from optimizer.backends.sampling import Sampling, probabilities
from optimizer.errors import UsageError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHIPPED_BLOCK = module.BLOCK
LAUNCHES: dict[str, Callable[..., Tensor]] = {"kernel": module._sample_tokens_cuda, "reference": sample_tokens_ref}
no_numpy_warnings = pytest.mark.filterwarnings("ignore:(invalid value|overflow)")
CUTS = [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.3), (0, 0.95), (9, 0.6), (50, 0.99), (10_000, 1.0), (0, 0.0)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks that are still short: the interpreter is slow."""
    monkeypatch.setattr(module, "BLOCK", 64)


def logits_of(rows: int, v: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, v, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * 3


def arguments(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, uniform: Any = 0.5
) -> tuple[Tensor, ...]:
    """The same options for every row; `uniform` may differ."""
    rows = len(logits)
    numbers = torch.as_tensor(uniform, dtype=torch.float32).expand(rows).to(DEVICE)
    options = torch.tensor([temperature, top_p]).unsqueeze(1).expand(2, rows).to(DEVICE)
    return logits, options[0], torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE), options[1], numbers


def stated(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution of `probabilities` `[B, V]`, in float64."""
    tiny = torch.finfo(torch.float32).tiny
    sampling = Sampling(temperature, top_k or None, max(top_p, tiny))
    return probabilities(logits.float().cpu(), sampling).double()


def check_draws(launch: Callable[..., Tensor], logits: Tensor, uniform: Tensor, *options: Any) -> None:
    """Each token is the one at `uniform` of the distribution function, or its neighbour where it is near a step.

    Near is what float32 probabilities allow: V of them off by 2⁻²² of themselves, and V / BLOCK + 32 units of 2⁻²⁴ for
    the sums of the kernel.
    """
    v = logits.shape[1]
    near = 2.0**-22 + (v / module.BLOCK + 32) * 2.0**-24
    probs = stated(logits, *options)
    steps = probs.cumsum(-1) / probs.sum(-1, keepdim=True)
    got = launch(*arguments(logits, *options, uniform)).cpu().unsqueeze(1)
    assert bool((probs.gather(1, got) > 0).all())
    end = steps.gather(1, got).squeeze(1)
    begin = end - probs.gather(1, got).squeeze(1)
    u = uniform.expand(len(logits)).double()
    assert bool(((begin - near <= u) & (u <= end + near)).all())


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("v", [1, 37, 128, 700])
def test_greedy_takes_the_largest_and_the_first_of_equals(name: str, v: int) -> None:
    logits = logits_of(3, v)
    assert torch.equal(LAUNCHES[name](*arguments(logits, 0.0)), logits.argmax(-1))
    places = [v // 3, v // 2, v - 1]
    for place in places:
        logits[:, place] = 100.0
    assert LAUNCHES[name](*arguments(logits, 0.0)).tolist() == [v // 3] * 3
    assert LAUNCHES[name](*arguments(logits, -1.0, 5, 0.5)).tolist() == [v // 3] * 3


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_draws_invert_the_stated_distribution(name: str, top_k: int, top_p: float) -> None:
    logits = logits_of(1, 97).expand(4, -1)
    check_draws(LAUNCHES[name], logits, (torch.arange(4) + 0.5) / 4, 1.5, top_k, top_p)


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (40, 0.9)])
def test_draws_with_blocks_as_shipped(name: str, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", SHIPPED_BLOCK)
    uniform = torch.tensor([0.0, 0.77, 1 - 2**-24])
    check_draws(LAUNCHES[name], logits_of(3, 9000), uniform, 1.0, top_k, top_p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_any_float(dtype: torch.dtype) -> None:
    logits = logits_of(3, 150).to(dtype)
    check_draws(module._sample_tokens_cuda, logits, (torch.arange(3) + 0.5) / 3, 0.9, 20, 1.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from([-4.0, -1.5, -0.25, 0.0, -0.0, 0.5, 2.0, 6.0]), min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 8.0]),
    top_k=st.integers(-1, 45),
    top_p=st.sampled_from([0.0, 1e-6, 0.123, 0.5, 0.871, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_kernel_and_reference_agree_also_on_ties(
    values: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    logits = torch.tensor([values], device=DEVICE)
    given_to = arguments(logits, temperature, top_k, top_p, uniform)
    drawn, wanted = (launch(*given_to) for launch in (module._sample_tokens_cuda, sample_tokens_ref))
    if not torch.equal(drawn, wanted):
        nudged = [
            sample_tokens_ref(*arguments(logits, temperature, top_k, p, u))
            for p in (top_p, top_p - 33 * 2.0**-24, top_p + 33 * 2.0**-24)
            for u in (uniform, uniform - 33 * 2.0**-24, uniform + 33 * 2.0**-24)
        ]
        assert any(torch.equal(drawn, other) for other in nudged)


@pytest.mark.parametrize("name", LAUNCHES)
def test_equals_stay_or_go_together(name: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, -1.0]]).expand(3, -1).to(DEVICE)
    uniform = (torch.arange(3) + 0.5) / 3
    for options in ((1.0, 2, 1.0), (1.0, 0, 0.3), (1.0, 1, 0.3)):
        counts = LAUNCHES[name](*arguments(logits, *options, uniform)).bincount(minlength=5)
        assert counts.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", LAUNCHES)
def test_rows_have_options_of_their_own(name: str) -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(5, -1).to(DEVICE)
    got = LAUNCHES[name](
        logits,
        torch.tensor([0.0, 1.0, 1.0, 1.0, 1e-20], device=DEVICE),
        torch.tensor([0, 2, 0, 0, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0], device=DEVICE),
        torch.tensor([0.99, 0.99, 0.7, 0.99, 0.99], device=DEVICE),
    )
    assert got.tolist() == [0, 1, 1, 3, 0]
    assert got.dtype == torch.int64


@pytest.mark.parametrize("name", LAUNCHES)
def test_masked_tokens_are_never_drawn(name: str) -> None:
    logits = logits_of(6, 90)
    logits[:, ::2] = -math.inf
    for top_k, top_p in ((0, 1.0), (60, 0.9)):
        got = LAUNCHES[name](*arguments(logits, 2.0, top_k, top_p, [0.0, 0.4, 1 - 2**-24, 1.0, 7.0, -1.0]))
        assert bool((got % 2 == 1).all())


@no_numpy_warnings
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_row_without_a_distribution_gives_no_token(name: str) -> None:
    logits = logits_of(5, 50)
    logits[0, 7] = math.nan
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[4, 7] = -math.inf
    for temperature in (0.0, 1.0):
        got = LAUNCHES[name](*arguments(logits, temperature, 20, 0.9))
        clean = LAUNCHES[name](*arguments(logits[3:], temperature, 20, 0.9))
        assert got.tolist() == [-1, -1, -1, *clean.tolist()]
        assert min(clean.tolist()) >= 0


@no_numpy_warnings
@pytest.mark.parametrize("name", LAUNCHES)
def test_huge_and_tiny_logits(name: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38], [1e-40, 0.0, -1e-40]], device=DEVICE)
    assert LAUNCHES[name](*arguments(logits, 1.0, 0, 1.0, [0.6, 0.5])).tolist() == [2, 1]
    assert LAUNCHES[name](*arguments(logits, 1e-45, 0, 1.0, [0.4, 0.9])).tolist()[0] == 0


def test_strided_and_empty_inputs() -> None:
    logits = logits_of(2, 60)
    wanted = module._sample_tokens_cuda(*arguments(logits, 1.0, 10, 0.9))
    spaced = torch.cat([logits, torch.full_like(logits, math.nan)], 1)[:, :60]
    for other in (spaced, logits.t().contiguous().t()):
        assert torch.equal(module._sample_tokens_cuda(*arguments(other, 1.0, 10, 0.9)), wanted)
    for launch in LAUNCHES.values():
        assert launch(*arguments(logits[:0])).shape == (0,)


@pytest.mark.parametrize("launch", [*LAUNCHES.values(), sample_tokens], ids=[*LAUNCHES, "op"])
def test_wrong_inputs_raise(launch: Callable[..., Tensor]) -> None:
    good = arguments(logits_of(2, 9))
    for place, bad in (
        (0, good[0][0]),
        (0, good[0].long()),
        (0, good[0][:, :0]),
        (1, good[1][:1]),
        (1, good[1].double()),
        (2, good[2].long()),
        (4, good[4].unsqueeze(1)),
    ):
        with pytest.raises(UsageError, match="must be"):
            launch(*good[:place], bad, *good[place + 1 :])


def test_opcheck_and_full_graph() -> None:
    given_to = tuple(t.contiguous() for t in arguments(logits_of(3, 40), 1.0, 5, 0.9))
    torch.library.opcheck(sample_tokens, given_to)

    def step(*given_to: Tensor) -> Tensor:
        return sample_tokens(*given_to) + 1

    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*given_to), step(*given_to))


@pytest.mark.gpu
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_the_op_on_a_device(top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", SHIPPED_BLOCK)
    logits = logits_of(16, 128_256).cuda()
    uniform = torch.rand(16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        check_draws(sample_tokens, logits.to(dtype), uniform, 0.8, top_k, top_p)
    assert torch.equal(sample_tokens(*arguments(logits, 0.0)), logits.argmax(-1))
