"""The isoFLOP method: at each budget of compute the size with the least loss, then a power law through those sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.errors import UsageError, require

FEWEST_SIZES = 4


@dataclass(frozen=True)
class Isoflop:
    """Compute-optimal sizes N* = coefficient · C^exponent.

    Args:
      compute: the budgets with a minimum inside of their sizes, FLOP.
      parameters: N* of each.
      tokens: D* of each.
      loss: at the minimum.
      exponent: of the power law.
      coefficient: of the power law.
      samples: the exponent in each resampled table.
      flags: budgets that say nothing, and why.
    """

    compute: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    exponent: float
    coefficient: float
    samples: np.ndarray
    flags: tuple[str, ...]

    def optimal(self, compute: float) -> float:
        """N* at a budget in FLOP."""
        return self.coefficient * compute**self.exponent

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The percentile interval of the exponent."""
        low, high = np.quantile(self.samples, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def isoflop(
    table: Mapping[str, Any], *, flops: float = 6.0, tolerance: float = 0.1, resamples: int = 500, seed: int = 0
) -> Isoflop:
    """Parabolas of log loss over log N at each budget (arXiv 2203.15556, approach 2).

    Args:
      table: N, D and loss, one entry a run.
      flops: FLOP per parameter and token.
      tolerance: how far apart runs of one budget may be, as a ratio less 1.
      resamples: refits with the residuals of the parabolas resampled.
      seed: of those.

    Raises:
      UsageError: for columns that are missing, or fewer than two budgets with a minimum.
    """
    for name in ("N", "D", "loss"):
        if name not in table:
            raise UsageError(f"isoFLOP needs the columns N, D and loss; {name} is missing from {', '.join(table)}")
    require(tolerance > 0, "tolerance", "positive", tolerance)
    n, d, loss = (np.asarray(table[name], np.float64) for name in ("N", "D", "loss"))
    log_c, x, y = np.log(flops * n * d), np.log(n), np.log(loss)
    if not np.isfinite([log_c, x, y]).all():
        raise UsageError("N, D and loss must be finite and positive in every row")
    order = np.argsort(log_c, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(log_c[order]) > np.log1p(tolerance)) + 1)
    rng, flags, minima, resampled = np.random.default_rng(seed), [], [], []
    for rows in groups:
        budget = float(np.mean(log_c[rows]))
        if len(np.unique(x[rows])) < FEWEST_SIZES:
            flags.append(f"{np.exp(budget):.3g} FLOP has fewer than {FEWEST_SIZES} sizes")
            continue
        curve = np.polynomial.Polynomial.fit(
            x[rows], y[rows], 2, domain=[x[rows].min(), x[rows].max()], window=[x[rows].min(), x[rows].max()]
        )
        at = _vertex(curve.coef)
        if not x[rows].min() < at < x[rows].max():
            flags.append(f"the least loss at {np.exp(budget):.3g} FLOP lies beyond its sizes")
            continue
        minima.append((budget, at, float(curve(at))))
        fitted = curve(x[rows])
        spread = (y[rows] - fitted) * np.sqrt(len(rows) / max(len(rows) - 3, 1))
        noise = rng.choice(spread, (resamples, len(rows)))
        resampled.append([_vertex(np.polynomial.polynomial.polyfit(x[rows], fitted + e, 2)) for e in noise])
    if len(minima) < 2:
        raise UsageError(f"fewer than two budgets have a minimum inside of their sizes: {'; '.join(flags)}")
    budgets, sizes, losses = np.array(minima).T
    exponent, intercept = np.polyfit(budgets, sizes, 1)
    samples = np.array([np.polyfit(budgets, each, 1)[0] for each in np.array(resampled).T])
    compute, parameters = np.exp(budgets), np.exp(sizes)
    return Isoflop(
        *(compute, parameters, compute / (flops * parameters), np.exp(losses)),
        *(float(exponent), float(np.exp(intercept)), samples, tuple(flags)),
    )


def _vertex(coefficients: np.ndarray) -> float:
    """Where a parabola that opens upwards is least; infinite for others."""
    _, slope, curvature = coefficients
    return float(-slope / (2 * curvature)) if curvature > 0 else float("inf")
