"""LittleBit: a linear layer of two binary factors with three scales, below one bit a weight (arXiv 2506.13771)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.typing import Array, Float

STEEPNESS = 100.0  # of the smooth sign whose slope stands for that of the sign


class Factors(NamedTuple):
    """W (O, I) ≈ diag(u1) · sign(U) · diag(v1 ⊙ u2) · sign(V) · diag(v2).

    Attributes:
      U: (O, r); V: (r, I). Latent: the layer sees their signs.
      u1: (O,); u2, v1: (r,); v2: (I,).
    """

    U: Float[Array, "O r"]
    V: Float[Array, "r I"]
    u1: Float[Array, " O"]
    u2: Float[Array, " r"]
    v1: Float[Array, " r"]
    v2: Float[Array, " I"]

    def apply(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """x · Wᵀ by two products with signs."""
        hidden = ((x * self.v2) @ smooth_sign(self.V).T) * (self.v1 * self.u2)
        return (hidden @ smooth_sign(self.U).T) * self.u1

    def dense(self) -> Float[Array, "O I"]:
        """W itself."""
        middle = smooth_sign(self.U) * (self.v1 * self.u2) @ smooth_sign(self.V)
        return self.u1[:, None] * middle * self.v2


def rank_for_bits(outputs: int, inputs: int, bits: float, residual: bool = True) -> int:
    """The rank whose signs and 16-bit scales come to so many bits a weight: a multiple of 8, at least 8."""
    if bits <= 0:
        raise UsageError(f"bits per weight are above 0, not {bits:g}")
    copies = 2 if residual else 1
    rank = (outputs * inputs * bits - 16 * copies * (outputs + inputs)) / (copies * (outputs + inputs + 16))
    return max(int(rank) // 8 * 8, 8)


def bits_per_weight(outputs: int, inputs: int, rank: int, residual: bool = True) -> float:
    """Stored bits a weight: one for each sign, 16 for each of the three scales (v1 ⊙ u2 is one)."""
    each = rank * (outputs + inputs) + 16 * (outputs + inputs + rank)
    return each * (2 if residual else 1) / (outputs * inputs)


def factorize(w: Float[Array, "O I"], rank: int) -> Factors:
    """Dual-SVID: the singular value decomposition of W, then one of rank 1 of each factor's magnitudes (§3.2)."""
    u, s, vt = jnp.linalg.svd(jnp.asarray(w, jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    left, right = u[:, :rank] * root, root[:, None] * vt[:rank]
    missing = rank - left.shape[1]
    left, right = jnp.pad(left, ((0, 0), (0, max(missing, 0)))), jnp.pad(right, ((0, max(missing, 0)), (0, 0)))
    (u1, u2), (v1, v2) = _rank_one(jnp.abs(left)), _rank_one(jnp.abs(right))
    return Factors(left, right, u1, u2, v1, v2)


def factorize_with_residual(w: Float[Array, "O I"], rank: int) -> tuple[Factors, Factors]:
    """A second set of factors takes what the first leaves over."""
    first = factorize(w, rank)
    return first, factorize(jnp.asarray(w, jnp.float32) - first.dense(), rank)


class LittleBitDense(nn.Module):
    """y = x · Wᵀ, W of one or two sets of `Factors`; made from a trained W by `factorize`, or by chance.

    Args:
      features: O.
      bits: per weight; decides the rank.
      residual: a second set of factors.
    """

    features: int
    bits: float = 1.0
    residual: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        inputs = x.shape[-1]
        rank = rank_for_bits(self.features, inputs, self.bits, self.residual)

        def start(key):
            w = nn.initializers.lecun_normal()(key, (inputs, self.features)).T
            return factorize_with_residual(w, rank) if self.residual else (factorize(w, rank),)

        parts = self.param("factors", lambda key: [part._asdict() for part in start(key)])
        return jnp.sum(jnp.stack([Factors(**part).apply(x) for part in parts]), axis=0)


@jax.custom_jvp
def smooth_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sign(x), +1 at zero, with the slope α · (1 - tanh²(α x)) of tanh(α x), α = 100."""
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)


@smooth_sign.defjvp
def _smooth_sign_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    slope = np.float32(STEEPNESS) * (1 - jnp.tanh(np.float32(STEEPNESS) * x) ** 2)
    return smooth_sign(x), (slope * tangent).astype(x.dtype)


def _rank_one(magnitudes):
    """a, b ≥ 0 with a · bᵀ the best product of rank 1."""
    u, s, vt = jnp.linalg.svd(magnitudes, full_matrices=False)
    root = jnp.sqrt(s[0])
    return jnp.abs(u[:, 0]) * root, jnp.abs(vt[0]) * root
