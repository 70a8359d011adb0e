"""Muon with its one moment in eight bits, or fewer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec.optim.adam import adamw
from lowprec.optim.descent import descent
from lowprec.optim.matrices import NO_MATRICES, matrix_mask
from lowprec.optim.quantize_state import quantize_state
from lowprec.optim.state_formats import StateFormat
from lowprec.optim.stored_moments import MIN_SIZE
from lowprec.typing import Array


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float | Array = 0.95,
    newton_schulz_steps: int = 5,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    mu_format: str | StateFormat | None = None,
    nu_format: str | StateFormat | None = None,
    min_size: int = MIN_SIZE,
    vectors: str = NO_MATRICES,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan, github.com/KellerJordan/modded-nanogpt) of matrices, AdamW of all else. Of a matrix M × N:

        m ← beta·m + (1 - beta)·g;   W ← W - lr · (√max(1, N / M) · U Vᵀ + weight_decay · W),   U Σ Vᵀ ≈ m

    by `newton_schulz_steps` Newton–Schulz iterations on m (with nesterov, on beta·m + (1 - beta)·g; both with bias
    correction), as in `optax.contrib.muon`, which this is on matrices of two axes when nothing is stored in fewer bits
    (there AdamW has Nesterov's momentum, too). Stacks of matrices, over the last two axes, are updated one by one.

    Args:
      consistent_rms: root mean square of all updates, whatever their shape (0.2 is that of AdamW), instead of √(N / M).
      b1, b2, eps: of AdamW. eps is that of the iteration, too.
      adam_learning_rate: of AdamW; None: the same.
      mu_format: of m, and of the first moments of AdamW; None: float32.
      nu_format: of the second moments of AdamW.
      min_size: moments of smaller parameters are float32.
      vectors: regular expression; parameters whose whole path matches, or of one axis, are AdamW's.
      seed: of stochastic rounding.
    """
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    dimensions_of = functools.partial(jax.tree.map, lambda _: dimensions)
    scale: Any = optax.contrib.scale_by_muon(
        ns_steps=newton_schulz_steps,
        beta=beta,
        eps=eps,
        mu_dtype=jnp.float32,
        nesterov=nesterov,
        weight_dimension_numbers=dimensions_of,
    )

    def by_shape(u):
        rows, columns = u.shape[-2:]
        return u * (
            max(1, columns / rows) ** 0.5 if consistent_rms is None else max(rows, columns) ** 0.5 * consistent_rms
        )

    formats: Any = {"mu_format": mu_format, "nu_format": nu_format, "min_size": min_size, "seed": seed}
    rules = {
        "muon": optax.chain(
            quantize_state(scale, mu=mu_format, nu=None, min_size=min_size, skip=None, seed=seed),
            optax.stateless(lambda updates, _: jax.tree.map(by_shape, updates)),
            *descent(learning_rate, weight_decay),
        ),
        "adam": adamw(
            learning_rate if adam_learning_rate is None else adam_learning_rate, b1, b2, eps, weight_decay, **formats
        ),
    }
    labels = lambda params: jax.tree.map(lambda matrix: "muon" if matrix else "adam", matrix_mask(params, vectors))
    return optax.partition(rules, labels)
