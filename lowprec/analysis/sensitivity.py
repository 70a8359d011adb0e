"""How much the loss feels the rounding of each layer's weights: from derivatives, as pure functions of (loss, params).

params are any tree of arrays; a leaf may hold many layers along its leading axes, and `layer_sum` says which axes
belong to one layer: `jnp.sum` takes a leaf as one, `matrix_sum` the last two axes. Each function is traced once,
whatever the number of layers; put it under `jax.jit` to compile it once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.typing import Array, Float

Tree = Any
Loss = Callable[[Tree], Float[Array, ""]]
LayerSum = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def matrix_sum(leaf: Float[Array, "... K N"]) -> Float[Array, "..."]:
    """The sum of each matrix of a stack."""
    return jnp.sum(leaf, axis=(-2, -1))


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error; trees with an entry a layer."""

    mean: Tree
    sem: Tree


def hessian_trace(
    loss: Loss, params: Tree, key: jax.Array, samples: int = 32, layer_sum: LayerSum = jnp.sum
) -> Estimate:
    """The trace of each layer's block of the Hessian, by Hutchinson's estimator: the mean of v · Hv for random v = ±1.

    One draw of v serves all layers. The variance of a draw is 2 Σ_{i≠j} H_ij² within the layer, plus Σ H_ij² over the
    columns of the other layers; a diagonal Hessian has none. (HAWQ-V2, arXiv 1911.03852, §3.2.)

    Args:
      loss: twice differentiable; roundings in it would hide the curvature.
      key: of the draws.
      samples: products with the Hessian, one after the other; at least 2.
    """
    leaves, tree = jax.tree.flatten(params)

    def draw(key):
        keys = jax.random.split(key, len(leaves))
        v = [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return curvature(loss, params, jax.tree.unflatten(tree, v), layer_sum)

    draws = lax.map(draw, jax.random.split(key, samples))
    sem = lambda each: jnp.std(each, axis=0, ddof=1) / samples**0.5
    return Estimate(jax.tree.map(lambda each: jnp.mean(each, axis=0), draws), jax.tree.map(sem, draws))


def curvature(loss: Loss, params: Tree, v: Tree, layer_sum: LayerSum = jnp.sum) -> Tree:
    """v · Hv summed over the entries of each layer; H v is the forward derivative of the gradient."""
    _, hv = jax.jvp(jax.grad(loss), (params,), (v,))
    return jax.tree.map(lambda a, b: layer_sum(a * b), v, hv)


def top_eigenvalues(
    loss: Loss, params: Tree, key: jax.Array, iterations: int = 20, layer_sum: LayerSum = jnp.sum
) -> Tree:
    """The eigenvalue of largest magnitude of each layer's block of the Hessian, by power iteration.

    Layers are taken one after the other, v being zero outside of its layer; the Rayleigh quotient vᵀHv is returned.
    (Q-BERT, arXiv 1909.05840, §3.1.)

    Returns:
      A tree with an entry a layer, in the shapes of layer_sum.
    """
    gradient = jax.grad(loss)
    leaves, tree = jax.tree.flatten(params)
    shapes = [jax.eval_shape(layer_sum, leaf).shape for leaf in leaves]
    counts = [math.prod(shape) for shape in shapes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    keys = jax.random.split(key, len(leaves))
    first = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]

    def of_layer(index):
        def project(tangent):
            """The part of a tree in the layer, at length 1; and its length before."""
            own = []
            for start, count, shape, leaf in zip(starts, counts, shapes, tangent, strict=True):
                chosen = (jnp.arange(count) + start == index).reshape(shape)
                own.append(leaf * chosen.reshape(shape + (1,) * (leaf.ndim - len(shape))))
            length = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in own))
            return [leaf / jnp.maximum(length, jnp.finfo(leaf.dtype).tiny) for leaf in own]

        def product(v):
            _, hv = jax.jvp(gradient, (params,), (jax.tree.unflatten(tree, v),))
            return jax.tree.leaves(hv)

        v = lax.fori_loop(0, iterations, lambda _, v: project(product(v)), project(first))
        return sum(jnp.vdot(a, b) for a, b in zip(v, product(v), strict=True))

    values = lax.map(of_layer, jnp.arange(sum(counts)))
    parts = zip(starts, counts, shapes, strict=True)
    return jax.tree.unflatten(tree, [values[start : start + count].reshape(shape) for start, count, shape in parts])


def fisher(loss: Callable[[Tree, Any], Float[Array, ""]], params: Tree, examples: Any) -> Tree:
    """The mean over examples of the squared gradient of each weight: the diagonal of the empirical Fisher information.

    Args:
      loss: of the parameters and one example.
      examples: a tree whose leaves have a leading axis of examples, taken one after the other.
    """
    gradient = jax.grad(loss)

    def add(sums, example):
        return jax.tree.map(lambda s, g: s + g * g, sums, gradient(params, example)), None

    sums, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), examples)
    count = jax.tree.leaves(examples)[0].shape[0]
    return jax.tree.map(lambda s: s / count, sums)


def path_attributions(loss: Loss, params: Tree, target: Tree, points: int = 16) -> Tree:
    """What each weight contributes to loss(target) - loss(params), by the integral of the gradient along the line.

    (target - params) · ∫₀¹ ∇loss(params + t (target - params)) dt, by the midpoint rule: the sum over all weights tends
    to the difference of the losses as points⁻². One point at t = 0, Taylor's first order, may be off by orders of
    magnitude for a well trained model. (PQI, ReQuant.)
    """
    gradient = jax.grad(loss)
    step = jax.tree.map(jnp.subtract, target, params)

    def add(sums, t):
        point = jax.tree.map(lambda w, d: w + t.astype(w.dtype) * d, params, step)
        return jax.tree.map(jnp.add, sums, gradient(point)), None

    midpoints = (jnp.arange(points) + 0.5) / points
    sums, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), midpoints)
    return jax.tree.map(lambda s, d: s * d / points, sums, step)
