"""Losses of a student against its teacher: of logits, of the largest logits alone, of hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.typing import Array, Float


def logit_divergence(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of each prediction, float32 (Hinton, arXiv 1503.02531).

    T² keeps the size of its gradient independent of T. No gradient reaches the teacher.
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(lax.stop_gradient(teacher), temperature)
    return np.float32(temperature**2) * _divergence(log_p, log_q)


def top_divergence(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], k: int, temperature: float = 1.0
) -> Float[Array, "..."]:
    """`logit_divergence` of k + 1 outcomes: the teacher's k most likely, and all others lumped into one.

    Lumping never raises a divergence, so that this is a lower bound of the full one; it sees also how much probability
    the student leaves to the others, which probabilities renormalised over the k would not.

    Raises:
      UsageError: (a ValueError) unless 1 <= k <= V.
    """
    if not 1 <= k <= teacher.shape[-1]:
        raise UsageError(f"the {k} largest of {teacher.shape[-1]} logits: k lies between 1 and their number")
    if k == teacher.shape[-1]:
        return logit_divergence(student, teacher, temperature)
    _, top = lax.top_k(lax.stop_gradient(teacher), k)
    chosen = jnp.sum(jax.nn.one_hot(top, teacher.shape[-1], dtype=bool), axis=-2, dtype=bool)

    def outcomes(logits):
        log_p = _log_softmax(logits, temperature)
        rest = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, log_p), axis=-1, keepdims=True)
        return jnp.concatenate([jnp.take_along_axis(log_p, top, axis=-1), rest], axis=-1)

    divergence = _divergence(outcomes(lax.stop_gradient(teacher)), outcomes(student))
    return np.float32(temperature**2) * divergence


def hidden_error(student: Float[Array, "..."], teacher: Float[Array, "..."], eps: float = 1e-6) -> Float[Array, ""]:
    """‖student - teacher‖² / (‖teacher‖² + eps) of one layer's hidden states, float32 (AST, arXiv 2407.20584)."""
    target = lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.sum((student.astype(jnp.float32) - target) ** 2) / (jnp.sum(target**2) + np.float32(eps))


def _log_softmax(logits, temperature):
    return jax.nn.log_softmax(logits.astype(jnp.float32) / np.float32(temperature), axis=-1)


def _divergence(log_p, log_q):
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)
