"""Hadamard matrices, and the random rotations made of them that spread an outlier over all channels.

A Hadamard matrix `H [n, n]` has entries ±1 and `H Hᵀ = n I`, so `H / √n` is orthogonal and each of its columns mixes
every channel with equal weight: a vector with one entry `c` among small ones becomes one whose entries are all about
`c / √n`. QuaRot (https://arxiv.org/abs/2404.00456) and SpinQuant (https://arxiv.org/abs/2405.16406) fold such
rotations into the weights of a model. Signs are drawn at random first, so that no direction that a model prefers (a
constant, say) is left standing on one channel: `Q = diag(s) H / √n`, and a row vector `x` becomes `x Q`.

Constructions, by order (p is a prime; see https://en.wikipedia.org/wiki/Hadamard_matrix):

    1, and 2 n from n   Sylvester   [[H, H], [H, -H]]
    p + 1,  p = 3 mod 4 Paley I     I + [[0, 1ᵀ], [-1, J]]
    2p + 2, p = 1 mod 4 Paley II    C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]],  C = [[0, 1ᵀ], [1, J]]

with `J[i, j] = 1` where `i - j` is a square mod p, -1 where it is none, 0 on the diagonal. A width that none of them
reaches (any that is no multiple of 4, and a few that are) is cut into equal blocks of the largest order that divides
it: still exactly orthogonal, but an outlier is spread over its block only. An odd width is left with signs alone.

Worked example, n = 2, `s = [1, -1]`: `Q = diag(s) [[1, 1], [1, -1]] / √2 = [[0.71, 0.71], [-0.71, 0.71]]`. The vector
`x = [8, 0.4]` becomes `x Q = [5.37, 5.94]`: same length, and the largest entry is 5.9 instead of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.errors import UsageError

_SYLVESTER = 64
"""Rows of the largest power-of-two factor: small matrix products are faster than 6 passes over memory."""


@dataclass(frozen=True)
class Rotation:
    """`Q = diag(signs) (I ⊗ H) / √block`, orthogonal `[n, n]`, kept as `signs [n]` and the order `block` of H."""

    signs: Tensor
    block: int

    @property
    def n(self) -> int:
        """Channels."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """`x Q` for `x [..., n]`, in the type and on the device of `x`; no `[n, n]` matrix is made."""
        if x.shape[-1] != self.n:
            raise UsageError(f"a rotation of {self.n} channels was given {list(x.shape)}. The last axis holds them.")
        y = (x * self.signs.to(x)).reshape(-1, self.block)
        for factor in _factors(self.block):
            # Contract the leading axis and put it last: after all factors the axes are in their order again.
            y = y.view(len(y), len(factor), self.block // len(factor)).transpose(1, 2) @ factor.to(x)
            y = y.reshape(len(y), self.block)
        turned: Tensor = y / self.block**0.5
        return turned.view(x.shape)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """`Q [n, n]` itself."""
        return self.apply(torch.eye(self.n, dtype=dtype))

    def repeated(self, times: int) -> Rotation:
        """This rotation for each of `times` stretches of n channels: one for every head."""
        return Rotation(self.signs.repeat(times), self.block)


def rotation(n: int, *, seed: int | None) -> Rotation:
    """A rotation of n channels with signs drawn from `seed` (all +1 for None); its `block` is n where n has an H."""
    block = largest_order(n)
    if seed is None:
        return Rotation(torch.ones(n, dtype=torch.int8), block)
    draw = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return Rotation(2 * draw - 1, block)


def hadamard(n: int) -> Tensor:
    """`H [n, n]` int8, entries ±1, `H Hᵀ = n I`. Raises `UsageError` for an order that no rule here constructs."""
    if not constructible(n):
        raise UsageError(
            f"no Hadamard matrix of order {n} can be constructed here: orders are 2^k and 2^k m with m = p + 1 or "
            f"2p + 2 of a prime p. rotation({n}) works in blocks of {largest_order(n) if n > 0 else 'a positive n'}."
        )
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in _factors(n):
        matrix = torch.kron(matrix, factor)
    return matrix


def constructible(n: int) -> bool:
    """Whether `hadamard(n)` exists here."""
    return n > 0 and _core(n) is not None


def largest_order(n: int) -> int:
    """The largest divisor of n that is the order of a constructible Hadamard matrix; n itself where it is one."""
    if n < 1:
        raise UsageError(f"a rotation needs at least 1 channel, got {n}.")
    return next(n // parts for parts in range(1, n + 1) if n % parts == 0 and constructible(n // parts))


def _core(n: int) -> int | None:
    """The smallest order `m` built by Paley's rules (or 1) with `n = 2^k m`."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    m = 4 * odd
    while n % m == 0:
        if _paley_prime(m):
            return m
        m *= 2
    return None


def _factors(n: int) -> list[Tensor]:
    """Matrices whose Kronecker product is `H [n, n]`: Sylvester's, no larger than 64, then Paley's."""
    m = _core(n)
    assert m is not None, n
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    factors, rest = [], n // m
    while rest > 1:
        size, factor = min(rest, _SYLVESTER), torch.ones(1, 1, dtype=torch.int8)
        while len(factor) < size:
            factor = torch.kron(factor, pair)
        factors.append(factor)
        rest //= size
    return factors if m == 1 else [*factors, _paley(m)]


def _paley_prime(order: int) -> int:
    """The prime of Paley's first or second construction for this order; 0 when neither has one."""
    for prime, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if prime % 4 == residue and prime > 2 and all(prime % d for d in range(3, int(prime**0.5) + 1, 2)):
            return prime
    return 0


def _paley(order: int) -> Tensor:
    p = _paley_prime(order)
    residues = torch.full((p,), -1, dtype=torch.int8)
    residues[torch.arange(p).square() % p] = 1
    residues[0] = 0
    index = torch.arange(p)
    core = torch.zeros(p + 1, p + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 1:] = residues[(index[:, None] - index) % p]
    eye = torch.eye(p + 1, dtype=torch.int8)
    if order == p + 1:
        core[1:, 0] = -1
        return core + eye
    core[1:, 0] = 1
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8)
    return torch.kron(core, plus) + torch.kron(eye, minus)
