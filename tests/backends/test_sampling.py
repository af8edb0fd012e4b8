"""Draws follow the distribution that is stated, cuts keep what they should, and no global state is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from optimizer.backends.sampling import Sampling, in_parts, most_likely, probabilities, sample
from optimizer.errors import UsageError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])


def kept(logits: torch.Tensor, **options: Any) -> list[int]:
    """Tokens of the first row that can still be drawn."""
    return probabilities(logits, Sampling(temperature=1.0, **options))[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, top_p=0.8), Sampling(1.3, top_k=5, top_p=0.9)],
    ids=str,
)
def test_draws_follow_the_stated_probabilities(sampling: Sampling) -> None:
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    tokens = sample(LOGITS.expand(draws, -1), sampling, generator)
    counts = tokens.bincount(minlength=6)
    # The distribution from first principles, in Python.
    weights = [math.exp(v / sampling.temperature) for v in LOGITS[0].tolist()]  # in falling order already
    weights = [w if sampling.top_k is None or i < sampling.top_k else 0.0 for i, w in enumerate(weights)]
    weights = [w / sum(weights) for w in weights]
    if sampling.top_p is not None:
        weights = [w if sum(weights[:i]) < sampling.top_p else 0.0 for i, w in enumerate(weights)]
        weights = [w / sum(weights) for w in weights]
    alive = [i for i, w in enumerate(weights) if w]
    assert int(counts.sum()) == int(counts[alive].sum()) == draws
    expected = [weights[i] * draws for i in alive]
    assert chisquare(counts[alive].tolist(), expected, sum_check=False).pvalue > 1e-4  # a fixed seed: no flakes


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0], [3.0, -1.0, 2.0]])
    assert sample(logits, Sampling()).tolist() == [1, 0]


def test_top_k() -> None:
    assert kept(LOGITS, top_k=1) == [0]
    assert kept(LOGITS, top_k=4) == [0, 1, 2, 3]
    assert kept(LOGITS, top_k=6) == kept(LOGITS, top_k=10_000) == kept(LOGITS) == list(range(6))
    assert kept(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), top_k=2) == [1, 2, 3]  # equals stay or go together


def test_top_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept(logits, top_p=1e-9) == [0]  # never empty
    assert kept(logits, top_p=0.49) == [0]
    assert kept(logits, top_p=0.51) == [0, 1]
    assert kept(logits, top_p=0.76) == [0, 1, 2]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits.flip(1), top_p=0.51) == [2, 3]  # by probability, not by place
    renormalized = probabilities(logits, Sampling(1.0, top_p=0.51))
    torch.testing.assert_close(renormalized, torch.tensor([[2 / 3, 1 / 3, 0, 0]]))


def test_top_k_cuts_before_top_p() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(logits, top_k=2, top_p=0.56) == [0]  # 0.4 / 0.7 = 0.571 already holds it
    assert kept(logits, top_p=0.56) == [0, 1]


def test_rows_are_cut_on_their_own() -> None:
    logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    got = probabilities(logits, Sampling(1.0, top_k=2, top_p=0.9))
    assert torch.equal(got[0], got[1].flip(0))


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy_and_not_nan(temperature: float) -> None:
    logits = LOGITS * 1e4
    assert probabilities(logits, Sampling(temperature)).tolist() == [[1, 0, 0, 0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(1e-6, 1e6),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(0, 1, exclude_min=True),
)
def test_always_a_distribution_that_keeps_the_best(
    values: list[float], temperature: float, k: int | None, p: float | None
) -> None:
    logits = torch.tensor([values])
    got = probabilities(logits, Sampling(temperature, k, p))
    assert bool((got >= 0).all())
    assert float(got.sum()) == pytest.approx(1, abs=1e-4)
    # Logits this near have one probability in float32, and top-p may keep either.
    assert float(logits.max() - logits[0, got.argmax()]) / temperature <= 2.0**-22


def test_a_generator_of_its_own_repeats_and_leaves_the_global_one() -> None:
    state, logits = torch.get_rng_state(), LOGITS.expand(100, -1)
    draws = [sample(logits, Sampling(1.0), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("parts", [1, 8, 64])
def test_the_largest_of_parts_is_the_largest_of_all(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    logits = torch.randn(50, 3, 128, generator=generator)
    ties = torch.randint(0, 3, (50, 3, 128), generator=generator).float()
    hidden = logits.masked_fill(logits < 2.5, -torch.inf)  # most rows have few others, some none
    broken = logits.clone()
    broken[::2, :, 77] = torch.nan
    for case in (logits, ties, hidden, torch.full_like(logits, -torch.inf), broken, logits.bfloat16()):
        assert torch.equal(in_parts(case, parts), case.argmax(-1))


def test_a_cpu_looks_for_the_largest_at_once() -> None:
    logits = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(most_likely(logits), logits.argmax(-1))
