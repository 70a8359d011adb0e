"""`lowprec formats compare`: what formats do to data of several distributions."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec import formats
from lowprec.analysis.format_table import bits_per_value
from lowprec.analysis.table import markdown_table
from lowprec.errors import UsageError
from lowprec.formats import BlockFormat
from lowprec.quantizers import fake_quant

COLUMNS = 1024
OUTLIER_COLUMNS, OUTLIER_FACTOR = 8, 50
DISTRIBUTIONS = ("Gaussian", "Laplace", "Student-t, 3 dof", "Gaussian with outliers")


@dataclass(frozen=True)
class Comparison:
    """What one format does to the data of one distribution: x becomes q.

    Args:
      relative_mse: Σ(q - x)² / Σx².
      alignment: ⟨q, x⟩ / ⟨x, x⟩; 1 where rounding does not shrink or stretch on average.
    """

    distribution: str
    format: str
    bits_per_value: float
    relative_mse: float
    alignment: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise; infinite for exact values."""
        with np.errstate(divide="ignore"):
            return float(-10 * np.log10(self.relative_mse))


def samples(distribution: str, size: int, seed: int) -> np.ndarray:
    """float32 data (size, 1024) of unit variance; with outliers 8 of the columns are 50 times as large."""
    rng = np.random.default_rng(seed)
    shape = (size, COLUMNS)
    match distribution:
        case "Laplace":
            x = rng.laplace(scale=np.sqrt(1 / 2), size=shape)
        case "Student-t, 3 dof":
            x = rng.standard_t(3, size=shape) / np.sqrt(3)
        case _:
            x = rng.normal(size=shape)
    if distribution == "Gaussian with outliers":
        x[:, rng.choice(COLUMNS, OUTLIER_COLUMNS, replace=False)] *= OUTLIER_FACTOR
    return x.astype(np.float32)


def compare(names: Sequence[str], size: int = 1024, seed: int = 0) -> list[Comparison]:
    """Rounds the same data to each format, blocks along the last axis, to nearest.

    An element format stands twice: as it is, a cast without a scale, and with the absmax scale of the tensor.

    Args:
      names: of formats, two at least.
      size: how many rows of 1024 values.
    Raises:
      UsageError: (a ValueError) fewer than two names, an unknown one, a format without negative values, no rows
        or a negative seed.
    """
    if len(names) < 2:
        raise UsageError("compare needs two formats at least, e.g. lowprec formats compare mxfp4 nvfp4")
    if size < 1:
        raise UsageError(f"the data have one row of {COLUMNS} values at least, not {size}")
    if seed < 0:
        raise UsageError(f"a seed is not negative; {seed} is")
    candidates = dict.fromkeys(candidate for name in names for candidate in _with_scaled(name))
    results = []
    for distribution in DISTRIBUTIONS:
        x = samples(distribution, size, seed)
        exact = x.astype(np.float64)
        energy = np.vdot(exact, exact)
        for name in candidates:
            q = np.asarray(fake_quant(jnp.asarray(x), name, pad=True), np.float64)
            mse, alignment = np.vdot(q - exact, q - exact) / energy, np.vdot(q, exact) / energy
            bits = bits_per_value(formats.parse(name))
            results.append(Comparison(distribution, name, bits, float(mse), float(alignment)))
    return results


def _with_scaled(name):
    fmt = formats.parse(name)
    if fmt.min >= 0:
        raise UsageError(f"{name} has no negative values, and the data have: there is nothing to compare")
    return (name,) if isinstance(fmt, BlockFormat) else (name, f"{name}@tensor")


def comparison_table(results: Sequence[Comparison]) -> str:
    """One row a distribution and format."""
    header = ("data", "format", "bits/value", "relative MSE", "SQNR dB", "alignment")
    rows = [
        (r.distribution, r.format, f"{r.bits_per_value:g}", f"{r.relative_mse:.3g}", f"{r.sqnr_db:.2f}",
         f"{r.alignment:.4f}")
        for r in results
    ]  # fmt: skip
    return markdown_table(header, rows, left=2)
