"""Hadamard matrices are what they claim for every order, and rotations are orthogonal whatever the width."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from optimizer.errors import UsageError
from optimizer.quant.hadamard import Rotation, constructible, hadamard, largest_order, rotation

HIDDEN_SIZES = (384, 576, 640, 768, 896, 960, 1024, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 5120, 6656)
HIDDEN_SIZES += (7168, 8192, 11008, 14336, 18944)


@pytest.mark.parametrize("n", [n for n in range(1, 261) if constructible(n)] + [384, 768, 896, 1536])
def test_entries_are_signs_and_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard(n).double()
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 4, 128, 256])
def test_powers_of_two_are_sylvester(n: int) -> None:
    assert torch.equal(hadamard(n).long(), torch.from_numpy(scipy.linalg.hadamard(n)))


def test_every_common_width_and_each_small_order_has_a_matrix() -> None:
    assert all(constructible(n) for n in HIDDEN_SIZES)
    # 52 and 92 need a prime power or Williamson's method; every other multiple of 4 up to 96 has a rule here.
    assert [n for n in range(4, 97, 4) if not constructible(n)] == [52, 92]
    assert not any(constructible(n) for n in (-4, 0, 3, 6, 10, 100001))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 30, 36, 52, 92, 100, 129, 384, 1022])
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_a_rotation_is_orthogonal_to_1e_12(n: int, seed: int | None) -> None:
    matrix = rotation(n, seed=seed).matrix()
    assert float((matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-12
    assert float((matrix.T @ matrix - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize(("n", "block"), [(384, 384), (52, 4), (92, 4), (30, 2), (7, 1), (200, 200), (60 * 13, 780)])
def test_the_block_is_the_largest_order_that_divides_the_width(n: int, block: int) -> None:
    assert rotation(n, seed=0).block == largest_order(n) == block
    assert all(not constructible(d) for d in range(block + 1, n + 1) if n % d == 0)


@pytest.mark.parametrize("n", [12, 48, 156, 256, 384, 8192 // 16])
def test_the_fast_product_is_the_product_with_the_matrix(n: int) -> None:
    turn = rotation(n, seed=3)
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    block = torch.block_diag(*[hadamard(turn.block).double()] * (n // turn.block)) / turn.block**0.5
    expected = x @ (turn.signs.double()[:, None] * block)
    torch.testing.assert_close(turn.apply(x), expected, atol=1e-12, rtol=0)
    assert torch.equal(x, before)
    assert turn.apply(x[:0]).shape == (0, 5, n)
    assert turn.apply(x.transpose(0, 1)[:, :, :]).shape == (5, 3, n)  # not contiguous


def test_the_worked_example() -> None:
    turn = Rotation(torch.tensor([1, -1]), 2)
    half = 0.5**0.5
    torch.testing.assert_close(turn.matrix(), torch.tensor([[half, half], [-half, half]], dtype=torch.float64))
    turned = turn.apply(torch.tensor([8.0, 0.4]))
    torch.testing.assert_close(turned, torch.tensor([5.37, 5.94]), atol=5e-3, rtol=0)


def test_one_outlier_is_spread_evenly_and_a_constant_is_not_gathered() -> None:
    n = 384
    turn = rotation(n, seed=0)
    spike = torch.zeros(n, dtype=torch.float64)
    spike[17] = 100
    torch.testing.assert_close(turn.apply(spike).abs(), torch.full_like(spike, 100 / n**0.5))
    constant = torch.ones(512, dtype=torch.float64)
    assert float(rotation(512, seed=None).apply(constant).abs().max()) == pytest.approx(512**0.5)  # all on one channel
    assert float(rotation(512, seed=0).apply(constant).abs().max()) < 5


def test_signs_follow_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    assert torch.equal(rotation(64, seed=1).signs, rotation(64, seed=1).signs)
    assert not torch.equal(rotation(64, seed=1).signs, rotation(64, seed=2).signs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(rotation(64, seed=1).signs.tolist()) == {-1, 1}


def test_a_repeated_rotation_turns_every_head_alike() -> None:
    turn = rotation(12, seed=0)
    x = torch.randn(4, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn.repeated(3).apply(x.reshape(4, 36)).view(4, 3, 12), turn.apply(x))


@pytest.mark.parametrize("n", [-1, 0, 3, 52, 129])
def test_an_order_without_a_rule_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"order {n} "):
        hadamard(n)


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 channel, got 0"):
        rotation(0, seed=None)
    with pytest.raises(UsageError, match=r"of 12 channels was given \[2, 13\]"):
        rotation(12, seed=None).apply(torch.zeros(2, 13))
