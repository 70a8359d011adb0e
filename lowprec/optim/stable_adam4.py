"""Our 4-bit Adam: what a second moment in 4 bits and gradients of low precision each need to stay stable."""

import optax

from lowprec.optim.descent import Mask
from lowprec.optim.labels import Chain
from lowprec.optim.stable_spam import stable_spam
from lowprec.optim.state_formats import StateFormat
from lowprec.optim.stored_moments import SKIPPED
from lowprec.typing import Array


def stable_adam4(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.95,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    gamma1: float | Array | None = 0.7,
    gamma2: float | Array = 0.9,
    gamma3: float | Array | None = 0.999,
    reset_every: int | None = None,
    mu_format: str | StateFormat = "de4",
    nu_format: str | StateFormat = "log4(stochastic)",
    min_size: int | None = None,
    skip: str | None = SKIPPED,
    seed: int | Array = 0,
) -> Chain:
    """Stable-SPAM's clipping and norms in front of Adam with 1.06 bytes of state a parameter.

    m: the dynamic exponent map in blocks of 128, scaled by the element of largest magnitude with its sign, which is so
    stored exactly; to nearest. v: powers of two, stochastically: to nearest it would not decay at b2 = 0.999, and on a
    linear grid the median element of a block of unlike ones gets a v ten times too large. No positive v becomes 0.
    b2 = 0.95 forgets what rounding did within tens of steps. Resets are off: nothing is left for them to repair.

    Args:
      mask: of the parameters that decay, as in `optax.adamw`.
      gamma1, gamma2, gamma3, reset_every: see `stable_spam`.
      mu_format, nu_format, min_size, seed: see `scale_by_adam`.
      skip: regular expression of paths that stay in float32: embeddings, norms and biases.
    """
    return stable_spam(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask,
        gamma1=gamma1, gamma2=gamma2, gamma3=gamma3, reset_every=reset_every,
        mu_format=mu_format, nu_format=nu_format, min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip
