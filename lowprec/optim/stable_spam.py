"""Stable-SPAM (arXiv 2502.17055): Adam for training in low precision, which survives spikes of the gradient."""

import jax.numpy as jnp
import optax

from lowprec.optim.adam import scale_by_adam
from lowprec.optim.adaptive import adaptive_grad_norm, adaptive_spike_clip
from lowprec.optim.descent import Mask, descent
from lowprec.optim.labels import Chain, chain
from lowprec.optim.state_formats import StateFormat
from lowprec.typing import Array


def cosine_decay(value: float | Array, total_steps: int | Array, floor: float | Array = 0.5) -> optax.Schedule:
    """From a value to `floor` times it, along half a cosine: in update t = 1, 2, … of T = total_steps

        value · (floor + (1 - floor) · (1 + cos(π·t / (T + 1))) / 2),   t ≤ T + 1;  floor · value after that.

    (The authors' code rises again after T + 1.)
    """

    def decayed(count):
        fraction = jnp.minimum(count + 1, total_steps + 1) / (total_steps + 1)
        return value * (floor + (1 - floor) * (1 + jnp.cos(jnp.pi * fraction)) / 2)

    return decayed


def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    gamma1: float | Array | None = 0.7,
    gamma2: float | Array = 0.9,
    gamma3: float | Array | None = 0.999,
    reset_every: int | None = 1000,
    reset: str = "paper",
    total_steps: int | Array | None = None,
    eta_min: float | Array = 0.5,
    mu_format: str | StateFormat | None = None,
    nu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """adaptive_spike_clip → adaptive_grad_norm → scale_by_adam with resets → decoupled decay → learning rate.

    The defaults are those of the authors' class; they train INT4 and FP4 Llama-350M with lr 4e-4, reset_every 500, and
    in bfloat16 130M with lr 8e-4, gamma1 0.85, gamma2 0.99999. With gamma1, gamma3, reset_every and total_steps None it
    is Adam. (gamma1 = gamma2 = 0 is not: then each gradient gets the norm 1.)

    Args:
      mask: of the parameters that decay, as in `optax.adamw`.
      gamma1: of the mean norm; None: gradients are not normalized.
      gamma2: of the mean square of norms.
      gamma3: of the mean maximum; None: spikes are not clipped.
      reset_every: updates between resets of the moments; None: there are none.
      reset: "paper"; or "repo", the authors' code, whose resets restart all corrections, so that spikes are hardly
        clipped after the first one, and which makes the update of a reset from the old moments.
      total_steps: gamma1 and b1 decay to `eta_min` times themselves over so many updates (`cosine_decay`), as in all of
        the authors' scripts; None: they are constant.
      mu_format, nu_format, min_size, skip, seed: see `scale_by_adam`.
    """
    decays = lambda value: value if total_steps is None else cosine_decay(value, total_steps, eta_min)
    restarts = reset_every if reset == "repo" else None
    front = []
    if gamma3 is not None:
        front.append(adaptive_spike_clip(gamma3, correction_restarts=restarts))
    if gamma1 is not None:
        front.append(adaptive_grad_norm(decays(gamma1), gamma2, eps, correction_restarts=restarts))
    adam = scale_by_adam(
        decays(b1), b2, eps, mu_format=mu_format, nu_format=nu_format, min_size=min_size, skip=skip,
        reset_every=reset_every, reset=reset, seed=seed,
    )  # fmt: skip
    return chain(*front, adam, *descent(learning_rate, weight_decay, mask))
