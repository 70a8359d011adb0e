"""Gradients of weights that are stored as integer codes, brought to the size that the codes want (QAS)."""

from typing import Any

import jax
import optax


def quantization_aware_scaling(scales: Any) -> optax.GradientTransformation:
    """g ← g / s² (Lin et al., "On-Device Training Under 256KB Memory", arXiv 2206.15472, eq. 4).

    Weights kept in units of their scale, w̄ = w / s, have gradients s · g and so a ratio of weight to gradient that is
    s⁻² too large. After this transformation a step of SGD on w̄ is, times s, the step on w. The recipe `qas_int8`, whose
    weights are kept in their own units, needs none.

    Args:
      scales: a tree like the parameters; each leaf broadcasts to its parameter. Of a bias: s_w · s_x.
    """

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g, s: g / (s * s), updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
