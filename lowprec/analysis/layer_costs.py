"""What each candidate format would cost each layer of a model, by one of four measures of sensitivity.

hessian: tr(H_l) / n_l · ‖W_l - Q(W_l)‖², tr(H_l) the trace of the layer's block of the Hessian and n_l its number of
  weights (HAWQ-V2, arXiv 1911.03852, eq. 2; HAWQ-V3, arXiv 2011.10680); a negative trace counts as none.
eigenvalue: (|mean λ_l| + std λ_l) · ‖W_l - Q(W_l)‖², λ_l the eigenvalue of largest magnitude of that block, by power
  iteration on each batch (Q-BERT, arXiv 1909.05840, eq. 1); the worst direction instead of the mean one.
fisher: Σ F_i (W - Q(W))_i², F the diagonal of the empirical Fisher information.
path: the layer's part of L(Q(W)) - L(W), all layers being taken to the format together: the integral of the gradient.

All but path are twice what Taylor's second order says of the loss. Q is the rounding of a recipe's short form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.analysis.allocation import CostTable, natural_order
from lowprec.analysis.product_weights import by_layer, rounded, stored_bytes
from lowprec.analysis.sensitivity import fisher, hessian_trace, matrix_sum, path_attributions, top_eigenvalues
from lowprec.errors import UsageError, unknown
from lowprec.formats.grammar import parse
from lowprec.typing import Array, Float

Tree = Any
MEASURES = ("hessian", "eigenvalue", "fisher", "path")
# What a cost is multiplied by to be a change of the loss.
LOSS_FACTOR = {"hessian": 0.5, "eigenvalue": 0.5, "fisher": 0.5, "path": 1.0}


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """What was measured.

    Attributes:
      table: costs, and sizes in bytes.
      weights: layer path -> its number of weights.
      curvature: layer path -> (mean, standard error) of the trace of the Hessian, or (mean, standard deviation over the
        batches) of its top eigenvalue; empty for measures without.
    """

    table: CostTable
    weights: Mapping[str, int]
    curvature: Mapping[str, tuple[float, float]]


def layer_costs(
    losses: Callable[[Tree, Any], Float[Array, " B"]],
    weights: Tree,
    batches: Sequence[Any],
    formats: Sequence[str],
    *,
    measure: str = "hessian",
    samples: int = 16,
    key: jax.Array,
) -> LayerCosts:
    """Measures; everything is compiled once, however many layers and batches there are.

    Args:
      losses: of the weights and the examples of a batch: one for each example.
      weights: of `ProductWeights`.
      batches: trees with rows of examples, all of the same shapes.
      formats: names of the candidates.
      measure: one of `MEASURES`.
      samples: for each batch: draws of the Hessian's trace, power iterations, or points of the path.
      key: of the draws.
    Raises:
      UsageError: (a ValueError) unknown measure, formats that are one, too few samples.
    """
    if measure not in MEASURES:
        raise unknown("measure of sensitivity", measure, MEASURES)
    if len({str(parse(name)) for name in formats}) < len(formats) or not formats:
        raise UsageError(f"candidate formats: one or more, each once; not {', '.join(formats)}")
    if samples < 2:
        raise UsageError(f"a sensitivity takes 2 samples or more, not {samples}")
    candidates = {name: jax.jit(rounded, static_argnums=1)(weights, name) for name in formats}
    count = jax.tree.map(lambda leaf: jnp.full(leaf.shape[:-2], leaf.shape[-2] * leaf.shape[-1]), weights)
    curvature = {}
    if measure == "hessian":
        costs, curvature = _by_hessian(losses, weights, batches, candidates, count, samples, key)
    elif measure == "eigenvalue":
        costs, curvature = _by_eigenvalue(losses, weights, batches, candidates, samples, key)
    elif measure == "fisher":
        costs = _by_fisher(losses, weights, batches, candidates)
    else:
        costs = _by_path(losses, weights, batches, candidates, samples)
    sizes = {name: by_layer(_spread(stored_bytes(weights, name), count)) for name in formats}
    numbers = by_layer(count)
    layers = natural_order(tuple(numbers))
    columns = lambda of: np.array([[of[name][layer] for name in formats] for layer in layers])
    table = CostTable(
        layers, tuple(formats), columns({name: by_layer(costs[name]) for name in formats}), columns(sizes)
    )
    return LayerCosts(table, {layer: int(numbers[layer]) for layer in layers}, curvature)


def _by_hessian(losses, weights, batches, candidates, count, samples, key):
    run = jax.jit(
        lambda weights, batch, key: hessian_trace(
            lambda w: jnp.mean(losses(w, batch)), weights, key, samples, matrix_sum
        )
    )
    found = [run(weights, batch, jax.random.fold_in(key, index)) for index, batch in enumerate(batches)]
    mean = _mean([estimate.mean for estimate in found])
    squares = _mean([jax.tree.map(jnp.square, estimate.sem) for estimate in found])
    sem = by_layer(jax.tree.map(lambda leaf: jnp.sqrt(leaf / len(found)), squares))
    omega = jax.tree.map(lambda trace, n: jnp.maximum(trace, 0) / n, mean, count)
    costs = {
        name: jax.tree.map(lambda o, w, q: o * matrix_sum((w - q) ** 2), omega, weights, candidate)
        for name, candidate in candidates.items()
    }
    return costs, {layer: (value, sem[layer]) for layer, value in by_layer(mean).items()}


def _by_eigenvalue(losses, weights, batches, candidates, iterations, key):
    run = jax.jit(
        lambda weights, batch, key: top_eigenvalues(
            lambda w: jnp.mean(losses(w, batch)), weights, key, iterations, matrix_sum
        )
    )
    found = [run(weights, batch, jax.random.fold_in(key, index)) for index, batch in enumerate(batches)]
    mean = _mean(found)
    spread = jax.tree.map(lambda *each: jnp.std(jnp.stack(each), axis=0), *found)
    omega = jax.tree.map(lambda value, std: jnp.abs(value) + std, mean, spread)
    costs = {
        name: jax.tree.map(lambda o, w, q: o * matrix_sum((w - q) ** 2), omega, weights, candidate)
        for name, candidate in candidates.items()
    }
    std = by_layer(spread)
    return costs, {layer: (value, std[layer]) for layer, value in by_layer(mean).items()}


def _by_fisher(losses, weights, batches, candidates):
    def one(weights, example):
        return losses(weights, jax.tree.map(lambda leaf: leaf[None], example))[0]

    run = jax.jit(lambda weights, batch: fisher(one, weights, batch))
    information = _mean([run(weights, batch) for batch in batches])
    return {
        name: jax.tree.map(lambda f, w, q: matrix_sum(f * (w - q) ** 2), information, weights, candidate)
        for name, candidate in candidates.items()
    }


def _by_path(losses, weights, batches, candidates, points):
    @jax.jit
    def run(weights, candidate, batch):
        found = path_attributions(lambda w: jnp.mean(losses(w, batch)), weights, candidate, points)
        return jax.tree.map(matrix_sum, found)

    return {
        name: _mean([run(weights, candidate, batch) for batch in batches]) for name, candidate in candidates.items()
    }


def _mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def _spread(values, like):
    """A value a leaf, to each layer of the leaf."""
    return jax.tree.map(lambda value, leaf: jnp.full(leaf.shape, value), values, like)
