"""Hadamard matrices whose order is no power of two: Paley's two constructions, and Williamson's where they fail."""

from functools import cache
from itertools import product

import numpy as np

# Four circulant matrices of ±1 of order n, A·Aᵀ + B·Bᵀ + C·Cᵀ + D·Dᵀ = 4n: bit i of a number says that entry i of the
# first column is -1. They give the matrices of order 4n that no construction of Paley's reaches. Found by search over
# unions of orbits of a multiplier modulo n (the method of Baumert, Golomb and Hall 1962; Williamson 1944 for 172).
_CIRCULANTS = {
    23: (0x6A0056, 0x1CC338, 0x6542A6, 0x6C7E36),
    29: (0x1A700396, 0x4873848, 0x14EC0DCA, 0x15E4C9EA),
    39: (0x19F0597926, 0x19F20CD474, 0x186A55FF5A, 0x7F6BA276BC),
    43: (0x730A26450CE, 0x14D42F42B28, 0x385B3FCDA1C, 0x207AC935E04),
}
_LARGEST_BASE = 1024  # a base costs its own order of operations for each value


@cache
def base_matrix(order: int) -> np.ndarray | None:
    """A matrix of ±1 with H·Hᵀ = order · 1, for a multiple of 4 (or 1); None if none is constructed here."""
    if order == 1:
        return np.ones((1, 1), np.float32)
    if order % 4:
        return None
    field = _field(order - 1)
    if field is not None:
        return _paley_skew(_residues(*field))
    field = _field(order // 2 - 1) if order % 8 == 4 else None
    if field is not None:
        return _paley_symmetric(_residues(*field))
    return _goethals_seidel(order // 4)


def split_order(length: int) -> tuple[int, int] | None:
    """(base, power of two) whose Kronecker product is as long as an axis; None if no such matrix is constructed here.

    Of several the smallest base, as the power of two costs little.
    """
    if length < 1:
        return None
    power = length & -length
    if power == length:
        return 1, length
    base = 4 * (length // power)
    while length % base == 0 and base <= _LARGEST_BASE:
        if base_matrix(base) is not None:
            return base, length // base
        base *= 2
    return None


def next_length(length: int, step: int = 1) -> int:
    """The nearest length from this one, upwards or (step -1) downwards, that has a matrix. Below 1 there is none."""
    while split_order(length) is None:
        length += step
    return length


def _paley_skew(Q):
    """Paley I: order q + 1 for q ≡ 3 mod 4, H = 1 + S with S skew."""
    q = len(Q)
    border = np.zeros((q + 1, q + 1), np.float32)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1, Q
    return border + np.eye(q + 1, dtype=np.float32)


def _paley_symmetric(Q):
    """Paley II: order 2 (q + 1) for q ≡ 1 mod 4."""
    q = len(Q)
    border = np.zeros((q + 1, q + 1), np.float32)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, 1, Q
    off, on = (np.array(entries, np.float32) for entries in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return np.kron(border, off) + np.kron(np.eye(q + 1, dtype=np.float32), on)


def _goethals_seidel(n):
    if n not in _CIRCULANTS:
        return None
    index = (np.arange(n)[:, None] - np.arange(n)) % n
    rows = ([1 - 2 * (bits >> i & 1) for i in range(n)] for bits in _CIRCULANTS[n])
    a, b, c, d = (np.array(row, np.float32)[index] for row in rows)
    r = np.eye(n, dtype=np.float32)[::-1]
    br, cr, dr, btr, ctr, dtr = (m @ r for m in (b, c, d, b.T, c.T, d.T))
    return np.block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])


def _residues(prime, degree):
    """Jacobsthal's matrix of the field of prime^degree elements: the quadratic character of all differences."""
    digits = np.array(list(product(range(prime), repeat=degree)))
    place = prime ** np.arange(degree)[::-1]
    character = np.full(prime**degree, -1, np.float32)
    for element in digits:
        character[np.dot(_multiply(element, element, prime, degree), place)] = 1
    character[0] = 0
    return character[(digits[:, None] - digits) % prime @ place]


def _multiply(a, b, prime, degree):
    """Polynomials over the prime field, modulo the field's own."""
    modulus = _modulus(prime, degree)
    result = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += int(x * y)
    for i in range(len(result) - 1, degree - 1, -1):
        for j in range(degree):
            result[i - degree + j] -= result[i] * modulus[j]
    return tuple(value % prime for value in result[:degree])


@cache
def _modulus(prime, degree):
    """The lower coefficients of an irreducible x^degree + …: of degree 2 or 3, one without a root."""
    value = lambda coefficients, x: x**degree + sum(c * x**i for i, c in enumerate(coefficients))
    for coefficients in product(range(prime), repeat=degree):
        if degree == 1 or all(value(coefficients, x) % prime for x in range(prime)):
            return coefficients
    raise AssertionError("every field has irreducible polynomials of every degree")


def _field(q):
    """(prime, degree ≤ 3) of the field with q elements; None if there is none, or q is even."""
    for degree in (1, 2, 3):
        prime = round(q ** (1 / degree)) if q > 1 else 0
        if prime**degree == q and prime > 2 and all(prime % d for d in range(2, int(prime**0.5) + 1)):
            return prime, degree
    return None
