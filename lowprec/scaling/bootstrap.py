"""The bootstrap: what else the constants could be, had other runs been drawn from the same world."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.errors import UsageError, unknown


@dataclass(frozen=True)
class Bootstrap:
    """Refits of resampled tables.

    Args:
      params: the constants of the fit itself.
      samples: constant -> its value in each refit.
    """

    params: dict[str, float]
    samples: dict[str, np.ndarray]

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """The percentile interval of a constant.

        Raises:
          UsageError: for an unknown constant.
        """
        return percentiles(self._of(name), level)

    def standard_error(self, name: str) -> float:
        """The standard deviation of a constant over the refits."""
        return float(np.std(self._of(name), ddof=1))

    def derived(self, quantity: Callable[[Mapping[str, float]], float]) -> np.ndarray:
        """A quantity that follows from the constants, in each refit.

        Args:
          quantity: of constants by name, e.g. `lambda p: compute_optimal(p, 1e21).tokens`.
        """
        count = len(next(iter(self.samples.values())))
        return np.array([quantity({k: float(v[i]) for k, v in self.samples.items()}) for i in range(count)])

    def derived_interval(
        self, quantity: Callable[[Mapping[str, float]], float], level: float = 0.95
    ) -> tuple[float, float]:
        """The percentile interval of a quantity that follows from the constants."""
        return percentiles(self.derived(quantity), level)

    def _of(self, name: str) -> np.ndarray:
        if name not in self.samples:
            raise unknown("constant", name, self.samples)
        return self.samples[name]


def percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The middle share of the values.

    Raises:
      UsageError: if the level is not within 0 and 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"level is a share between 0 and 1, not {level:g}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_weights(rows: int, n: int, seed: int, clusters: Any = None) -> np.ndarray:
    """How often each row is drawn in each of n tables: shape [n, rows].

    Args:
      rows: of the table.
      n: how many tables.
      seed: of the draws.
      clusters: labels of rows that are drawn together; every row by itself if not given.

    Raises:
      UsageError: for labels of another length, or fewer than two of them.
    """
    labels = np.arange(rows) if clusters is None else np.asarray(clusters)
    if labels.shape != (rows,):
        raise UsageError(f"clusters must have one label for each of the {rows} runs; their shape is {labels.shape}")
    kinds, index = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        raise UsageError("a bootstrap needs at least two clusters of runs")
    counts = np.random.default_rng(seed).multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=n)
    return counts[:, index].astype(np.float64)
