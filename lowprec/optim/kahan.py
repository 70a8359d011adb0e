"""bfloat16 parameters and, in the optimizer's state, what rounding them has taken away: Kahan's sum."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from lowprec.optim.narrow_weights import Narrow, narrow_weights
from lowprec.optim.split_floats import join
from lowprec.optim.stochastic_weights import is_narrow


def kahan(tx: optax.GradientTransformation) -> Narrow:
    """An optimizer of parameters narrower than float32 that makes up for their rounding at the next update:

        y = w + c + update,   w ← nearest(y),   c ← nearest(y - w)

    c is in the dtype of the parameter, and the optimizer sees w + c. ("Revisiting BFloat16 Training", Zamirai et al.,
    arXiv 2010.06192, algorithm 2; there the intermediate sums are bfloat16, too.) Parameters in float32 stay as they
    are.

    Args:
      tx: the whole optimizer, its learning rate and decay among it.
    """
    return narrow_weights(tx, Kahan())


@dataclass(frozen=True)
class Kahan:
    """`narrow_weights.Storage` by a compensation."""

    seed = None

    def stores(self, w):
        return is_narrow(w)

    def start(self, w):
        return jnp.zeros_like(w)

    def load(self, w, rest):
        return join(w, rest)

    def rounded(self, total, like, key, rows):
        return total.astype(like.dtype)

    def rest(self, total, w):
        return (total - w.astype(jnp.float32)).astype(w.dtype)
