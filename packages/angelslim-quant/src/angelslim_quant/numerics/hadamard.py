"""Hadamard matrices of many orders, and fast multiplication by them.

An order n = K * 2^k is the Kronecker product of a matrix of order K, built after Paley from the squares of a finite
field or after Williamson from four circulants, and of Sylvester's of order 2^k. Where no K is found, the product is
block-diagonal in blocks of the largest power of two that divides n.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from angelslim_core.transforms import sylvester

# order -> first halves of the first rows of Williamson's four symmetric circulants, + for 1, for orders that Paley's
# fields do not reach (N. J. A. Sloane's library of Hadamard matrices lists them)
WILLIAMSON = {
    92: ("+++-+++-+---", "+++---++-+-+", "+-++-++--+++", "++---+---+-+"),
    116: ("++--+--+-+++-++", "++++-++-+---+++", "+-+---++--+-+++", "+++---++--+-+--"),
    156: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    172: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}
# largest order built without a Kronecker product: beyond it a multiplication is no longer fast
MAX_CORE = 1024


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [size, size] of scaled Hadamard blocks.

    Args:
        size: its order; an axis of several times this size is rotated block by block.
        seed: of random signs for the rows, None for none.
    """

    size: int
    seed: int | None = None

    @property
    def block(self) -> int:
        """Channels that are mixed with each other: `size`, or the largest power of two that divides it."""
        return math.prod(factors(self.size))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` @ Q along the last axis, in the dtype of `x`."""
        core, left, right = factors(self.size)
        y = x.reshape(-1, self.size)
        if self.seed is not None:
            y = y * signs(self.size, self.seed).to(y)
        y = y.reshape(-1, core, left, right)
        if right > 1:
            y = y @ sylvester(right).to(y)
        if left > 1:
            y = sylvester(left).to(y) @ y
        if core > 1:
            y = (williamson if core in WILLIAMSON else paley)(core).to(y).T @ y.reshape(-1, core, left * right)
        return (y * self.block**-0.5).reshape(x.shape)


@lru_cache
def factors(size: int) -> tuple[int, int, int]:
    """Orders (K, 2^i, 2^j) of the Kronecker product of one block."""
    even = size & -size
    odd = size // even
    core = 1
    if odd > 1:
        orders = (odd << i for i in range(2, even.bit_length()) if odd << i <= MAX_CORE)
        core = next((order for order in orders if order in WILLIAMSON or _prime_power(order)), 1)
        even = size // core if core > 1 else even
    exponent = even.bit_length() - 1
    return core, 1 << exponent // 2, 1 << (exponent + 1) // 2


@lru_cache
def signs(size: int, seed: int) -> Tensor:
    """Random +1 and -1, [size]."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@lru_cache
def williamson(order: int) -> Tensor:
    """Williamson's matrix: H H^T = order * I, entries +1 and -1; a key of `WILLIAMSON`."""
    halves = [torch.tensor([1.0 if sign == "+" else -1.0 for sign in half]) for half in WILLIAMSON[order]]
    a, b, c, d = (_circulant(torch.cat([half, half[1:].flip(0)])) for half in halves)
    return torch.cat([torch.cat(row, 1) for row in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])


def _circulant(row: Tensor) -> Tensor:
    """[n, n] of which each row is the one before, moved on by one."""
    places = torch.arange(row.numel())
    return row[(places[None] - places[:, None]) % row.numel()]


@lru_cache
def paley(order: int) -> Tensor:
    """Paley's matrix: H H^T = order * I, entries +1 and -1.

    The field has q = order - 1 elements where q = 3 (mod 4), else q = order / 2 - 1.
    """
    found = _prime_power(order)
    assert found
    prime, degree = found
    q = prime**degree
    residues = _residues(prime, degree)
    bordered = torch.ones(q + 1, q + 1)
    bordered[0, 0] = 0
    bordered[1:, 1:] = residues
    if q % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + torch.eye(q + 1)
    return torch.kron(bordered, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1], [-1, -1]]))


def _prime_power(order: int) -> tuple[int, int] | None:
    """(p, m) of a field that gives a matrix of this order."""
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 != rest:
            continue
        prime = next((p for p in range(3, q + 1, 2) if q % p == 0), 0)
        for degree in (1, 2, 3):
            if prime and prime**degree == q:
                return prime, degree
    return None


def _residues(prime: int, degree: int) -> Tensor:
    """chi(a - b) for all elements a, b of the field: 0, +1 for a square, -1 otherwise."""
    elements = list(itertools.product(range(prime), repeat=degree))
    position = {element: i for i, element in enumerate(elements)}
    # x^degree as a polynomial of lower degree; of degree 2 or 3 it is irreducible if it has no root
    reduce = next(
        tail for tail in elements if degree == 1 or all((pow(x, degree, prime) - sum(c * x**i for i, c in enumerate(tail))) % prime for x in range(prime))
    )
    chi = torch.full((len(elements),), -1.0)
    for element in elements:
        chi[position[_square(element, reduce, prime)]] = 1
    chi[0] = 0
    table = torch.tensor(elements)
    digits = (table[:, None] - table[None]) % prime
    weights = torch.tensor([prime ** (degree - 1 - i) for i in range(degree)])
    return chi[(digits * weights).sum(-1)]


def _square(element: tuple[int, ...], reduce: tuple[int, ...], prime: int) -> tuple[int, ...]:
    degree = len(element)
    product = [0] * (2 * degree - 1)
    for (i, a), (j, b) in itertools.product(enumerate(element), repeat=2):
        product[i + j] += a * b
    for i in range(2 * degree - 2, degree - 1, -1):
        for j, c in enumerate(reduce):
            product[i - degree + j] += product[i] * c
    return tuple(c % prime for c in product[:degree])
