"""SOLO (arXiv 2505.00347): Adam of 2 to 4 bits a moment."""

import optax

from lowprec.optim.adam import adamw
from lowprec.optim.descent import Mask
from lowprec.optim.labels import Chain
from lowprec.optim.state_formats import StateFormat
from lowprec.typing import Array


def solo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | Array = 0.8,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    mask: Mask = None,
    mu_format: str | StateFormat = "de4",
    nu_format: str | StateFormat = "log2(stochastic)",
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """`adamw` with v in 2 bits: powers α⁰ … α³ of a base of each block, whose 10 % quantile is α³, rounded
    stochastically in the logarithm; and m in 4 bits. A smaller b1 has m forget its rounding errors sooner.

    Args:
      mask: of the parameters that decay, as in `optax.adamw`.
      mu_format, nu_format, min_size, skip, seed: see `scale_by_adam`.
    """
    return adamw(
        learning_rate, b1, b2, eps, weight_decay, mask=mask,
        mu_format=mu_format, nu_format=nu_format, min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip
