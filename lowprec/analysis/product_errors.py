"""What a recipe does to one product and its two gradients: relative errors, and which part of them averages away.

    python -m lowprec.analysis.product_errors nvfp4 quartet2 [--size 256] [--draws 64]

The numbers of docs/recipes are this command's.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec import recipes
from lowprec.analysis.table import markdown_table
from lowprec.errors import UsageError, unknown
from lowprec.ops import GemmRule, qdot
from lowprec.ops.variables import ProductVariables, initial_variables, next_state
from lowprec.quantizers import EXACT, REUSE

DATA = ("gaussian", "outliers")
OUTLIERS, OUTLIER_FACTOR = 2, 50
# Steps after which running ranges are in use: the recipes of quantization-aware training wait 100.
_SETTLED = 128


@dataclass(frozen=True)
class ProductErrors:
    """Relative squared errors, Σ(found - exact)² / Σ exact², of y = x · w, dx = dy · wᵀ and dw = xᵀ · dy.

    Args:
      y: of one draw, as are dx and dw.
      dx: about the gradient of the unquantized product.
      dw: as dx.
      mean_dx: of the mean of the first 1, 2, …, n draws, about the exact gradient of the quantized forward product, as
        straight-through and other estimators define it: the error of the backward pass alone. Without bias it falls as
        1/n; a bias is a floor. One entry where nothing is drawn.
      mean_dw: as mean_dx.
    """

    y: float
    dx: float
    dw: float
    mean_dx: tuple[float, ...]
    mean_dw: tuple[float, ...]


def operands(data: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy, each (size, size), float32, Gaussian.

    Of "outliers" two features (columns) of x and two rows of dy, tokens, are 50 times as large.
    """
    if data not in DATA:
        raise unknown("kind of data", data, DATA)
    rng = np.random.default_rng(seed)
    x, w, dy = rng.normal(size=(3, size, size)).astype(np.float32)
    if data == "outliers":
        x[:, rng.choice(size, OUTLIERS, replace=False)] *= OUTLIER_FACTOR
        dy[rng.choice(size, OUTLIERS, replace=False)] *= OUTLIER_FACTOR
    return x, w, dy


def product_errors(
    recipe: str | recipes.Recipe, data: str = "gaussian", size: int = 256, draws: int = 1, seed: int = 0
) -> ProductErrors:
    """Measures the rule of the bulk of a recipe's layers, its last pattern, on one product.

    What quantizers remember is that of many steps on the same data; what they learn is as initialised. Where the rule
    normalizes x, so do the unquantized products.

    Raises:
      UsageError: (a ValueError) an unknown recipe or kind of data, or a size below 1.
    """
    if size < 1 or draws < 1:
        raise UsageError(f"a product has one row and one draw at least, not size {size} and {draws} draws")
    *_, bulk = recipes.parse(recipe).rules
    rule: GemmRule = bulk.gemm
    x, w, dy = (jnp.asarray(a) for a in operands(data, size, seed))
    variables = _settled(rule, initial_variables(x, w, rule), x, w, dy)
    keys = jax.random.split(jax.random.key(seed), draws if rule.stochastic else 1)
    errors = (np.asarray(e, np.float64) for e in _errors(rule, keys, x, w, dy, variables))
    y, dx, dw, mean_dx, mean_dw = errors
    return ProductErrors(float(y[0]), float(dx[0]), float(dw[0]), tuple(mean_dx.tolist()), tuple(mean_dw.tolist()))


def _exact_backward(rule: GemmRule) -> GemmRule:
    """The same forward product, whose gradients are computed exactly from its operands."""
    used = [EXACT if q.exact else REUSE for q in rule.fwd]
    return GemmRule(rule.fwd, (EXACT, used[1]), (EXACT, used[0]), normalize_input=rule.normalize_input)


def _products(rule, key, x, w, dy, variables):
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key, variables=variables, backend="emulate"), x, w)
    return y, *vjp(dy)


@partial(jax.jit, static_argnums=0)
def _errors(rule, keys, x, w, dy, variables):
    """Of y, dx and dw in each draw; of the running means of dx and dw about those of the exact backward pass."""
    relative = lambda error, true: jnp.sum(error**2) / jnp.sum(true**2)
    unquantized = _products(GemmRule(normalize_input=rule.normalize_input), None, x, w, dy, ProductVariables())

    def draw(totals, key):
        found = _products(rule, key, x, w, dy, variables)
        given = _products(_exact_backward(rule), key, x, w, dy, variables)[1:]
        single = [relative(f - true, true) for f, true in zip(found, unquantized, strict=True)]
        differences = [f - g for f, g in zip(found[1:], given, strict=True)]
        totals = jax.tree.map(jnp.add, totals, (differences, list(given)))
        # Both are sums over the same draws: their ratio is that of the means.
        means = [relative(error, true) for error, true in zip(*totals, strict=True)]
        return totals, (*single, *means)

    zeros = [jnp.zeros_like(x), jnp.zeros_like(w)]
    return lax.scan(draw, (zeros, zeros), keys)[1]


@partial(jax.jit, static_argnums=0)
def _settled(rule, variables, x, w, dy):
    """The variables after many steps on the same operands."""
    if not variables.state:
        return variables
    key = jax.random.key(0)

    def loss(slots):
        return jnp.vdot(qdot(x, w, rule, key=key, variables=variables._replace(slots=slots), backend="emulate"), dy)

    # dy of the loss is dy itself: all six operands are seen as they will be.
    seen = jax.grad(loss)(variables.slots)
    state = lax.fori_loop(0, _SETTLED, lambda _, state: next_state(rule, state, seen), dict(variables.state))
    return variables._replace(state=state, slots={})


def errors_table(names: Sequence[str], size: int = 256, draws: int = 64) -> str:
    """A row a recipe, as Markdown; – where nothing is drawn, so that a mean is no better than one draw."""
    header = ("recipe", "y", "dx", "dw", "backward: dx", "dw", f"mean of {draws}: dx", "dw", "outliers: y", "dx", "dw")
    rows = []
    for name in names:
        plain, outliers = product_errors(name, draws=draws, size=size), product_errors(name, "outliers", size=size)
        backward = (plain.mean_dx, plain.mean_dw)
        means = [_text(errors[-1]) if len(errors) > 1 else "–" for errors in backward]
        single = [[_text(v) for v in (errors.y, errors.dx, errors.dw)] for errors in (plain, outliers)]
        rows.append((name, *single[0], *(_text(errors[0]) for errors in backward), *means, *single[1]))
    return markdown_table(header, rows)


def _text(error):
    return "0" if error < 1e-11 else f"{error:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="RECIPE")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of all operands")
    parser.add_argument("--draws", type=int, default=64, help="of stochastic recipes")
    arguments = parser.parse_args()
    print(errors_table(arguments.names, arguments.size, arguments.draws))


if __name__ == "__main__":
    main()
