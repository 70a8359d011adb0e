"""Adam-mini (arXiv 2406.16793): Adam with one v for each block of a parameter."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowprec.errors import UsageError
from lowprec.optim.adam import bias_correction
from lowprec.optim.descent import Mask, as_float32, descent
from lowprec.optim.labels import Chain, Leafwise, chain, leafwise
from lowprec.optim.paths import path_name
from lowprec.optim.state_formats import StateFormat
from lowprec.optim.stored_moments import MomentStore
from lowprec.typing import Array

# The axes over which elements share v, by the path of a parameter; the first pattern that matches counts. HEADS: those
# of kernels (…, K, heads · head_width), by head. What matches none is a kernel (…, K, N): one v for each output, or, of
# one axis, one tensor.
HEADS = "heads"
Sharing = tuple[tuple[str, tuple[int, ...] | str], ...]
SHARING: Sharing = (
    (r"(.*/)?bias", ()),
    (r"(.*/)?([^/]*(embed|norm)[^/]*|wte|wpe|scale)(/.*)?", (-1,)),
    (r"(.*/)?(q|k|query|key|q_proj|k_proj)/kernel", HEADS),
)


class ScaleByAdamMiniState(NamedTuple):
    """mu in the structure and the shapes of the parameters; nu, float32, in blocks: shared axes have size 1."""

    count: jax.Array  # type: ignore[assignment]  # tuples have a method of this name
    mu: Any
    nu: Any


def scale_by_adam_mini(
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    *,
    head_width: int | None = None,
    sharing: Sharing = SHARING,
    mu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Leafwise:
    """Of each block of a parameter, t = 1, 2, …:

        m ← b1·m + (1 - b1)·g,  v ← b2·v + (1 - b2)·mean(g²)
        update = (m / (1 - b1^t)) / (√(v / (1 - b2^t)) + eps)

    Blocks are a head of queries and keys, an output of other kernels, a row of embeddings, a norm, an element of a
    bias; leading axes, of stacked layers, are never shared. v is so small that float32 costs nothing: with 4 bits of m
    the state is 0.53 bytes a parameter, and no v freezes.

    Args:
      head_width: of query and key kernels (…, K, heads · head_width); None: one v for each of their outputs.
      sharing: pairs (regular expression of whole paths, axes that share), e.g. (-3, -1) for query kernels (K, heads,
        head_width).
      mu_format, min_size, skip, seed: see `scale_by_adam`.
    Raises:
      UsageError: (a ValueError) if head_width does not divide the outputs of a query or key kernel.
    """
    first = MomentStore("mu", mu_format, True, min_size, skip, seed)
    blocks = lambda path, g: _blocks(path, g.shape, sharing, head_width)

    def init(params):
        def zeros(path, w):
            split, axes = blocks(path, w)
            return jnp.zeros([1 if axis - len(split) in axes else size for axis, size in enumerate(split)], jnp.float32)

        return ScaleByAdamMiniState(jnp.int32(0), first.zeros(params), jax.tree_util.tree_map_with_path(zeros, params))

    def update(updates, state, params=None, **extra):
        del params, extra
        grads, count = as_float32(updates), optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first.load(state.mu), grads)

        def second(path, v, g):
            split, axes = blocks(path, g)
            return b2 * v + (1 - b2) * jnp.mean(jnp.square(g.reshape(split)), axes, keepdims=True)

        nu = jax.tree_util.tree_map_with_path(second, state.nu, grads)
        correct1, correct2 = 1 / bias_correction(b1, count), 1 / bias_correction(b2, count)

        def scale(path, m, v):
            split, _ = blocks(path, m)
            return (m.reshape(split) * correct1 / (jnp.sqrt(v * correct2) + eps)).reshape(m.shape)

        scaled = jax.tree_util.tree_map_with_path(scale, mu, nu)
        return scaled, ScaleByAdamMiniState(count, first.store(mu, state.mu, count), nu)

    return leafwise(optax.GradientTransformationExtraArgs(init, update))


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    head_width: int | None = None,
    sharing: Sharing = SHARING,
    mu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """`scale_by_adam_mini` with decoupled decay.

    Args:
      mask: of the parameters that decay, as in `optax.adamw`. All else: see `scale_by_adam_mini`.
    """
    rule = scale_by_adam_mini(
        b1, b2, eps, head_width=head_width, sharing=sharing,
        mu_format=mu_format, min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip
    return chain(rule, *descent(learning_rate, weight_decay, mask))


def _blocks(path, shape, sharing, head_width):
    """The shape in which a parameter is split, and which of its axes, counted from the end, share v."""
    name = path_name(path)
    axes = next((axes for pattern, axes in sharing if re.fullmatch(pattern, name)), None)
    if axes is None or (axes == HEADS and head_width is None):
        return shape, (-2,) if len(shape) > 1 else (-1,) if shape else ()
    if axes != HEADS:
        return shape, tuple(axis for axis in axes if -axis <= len(shape))
    if shape[-1] % head_width:
        raise UsageError(f"{name} of shape {shape} has no heads of width {head_width}")
    return (*shape[:-1], shape[-1] // head_width, head_width), (-3, -1)
