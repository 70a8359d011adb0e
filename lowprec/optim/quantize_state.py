"""Any Optax transformation with its moments in few bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lowprec.errors import UsageError
from lowprec.optim.labels import Elementwise, Leafwise
from lowprec.optim.paths import path_name
from lowprec.optim.state_leaves import Choice, MomentLeaf, Rules, described, moment_leaves
from lowprec.optim.state_tensor import Rows, is_stored, leaf_key, load, store, zeros
from lowprec.optim.stored_moments import MIN_SIZE, SKIPPED
from lowprec.typing import Array


class QuantizedState(NamedTuple):
    """
    Attributes:
      steps: updates so far.
      inner: the state of the wrapped transformation, its moments as `StateTensor`s.
    """

    steps: jax.Array
    inner: Any


def quantize_state(
    inner: optax.GradientTransformation,
    mu: Choice = "de8",
    nu: Choice = "log8(stochastic)",
    default: Choice = None,
    *,
    min_size: int = MIN_SIZE,
    skip: str | None = SKIPPED,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose state is stored in state formats: loaded before each update, and stored after it.

        updates, state = inner.update(gradients, load(state), params);   state ← store(state)

    Of its state, leaves in the shape and at the path of a parameter are stored, by the field that they are in: averages
    of gradients (`state_leaves.SIGNED`: mu, trace, …) as `mu` says, averages of squares (`UNSIGNED`: nu, v, …) as `nu`
    does, all others as `default` does. Leaves of other shapes, such as the rows and columns of Adafactor, stay as they
    are. The inner transformation sees gradients and parameters in float32, so that no moment follows the dtype of
    bfloat16 parameters; its updates are float32.

    It can be inside of `optax.chain`, `masked`, `partition`, `inject_hyperparams`, `apply_if_finite` and `MultiSteps`,
    or around them. Around `MultiSteps` it stores the moments once more in every small step, which noise may change.

    `optim.adam` with the same formats has the same bits, and `fused_step` can update it leaf by leaf. Here XLA may hold
    the float32 moments of all leaves at once, unless `inner` is labelled (`optim.labels`).

    Args:
      mu: e.g. "de4", "cmp8@128", or formats by regular expressions of the whole paths of parameters, of which the first
        that matches holds: {"embed/.*": "de8", ".*": "de4"}; None: stored as they are.
      min_size: moments of smaller parameters are stored as they are, in float32.
      skip: regular expression; so are those of parameters whose whole path matches; None: only small ones are.
      seed: of stochastic rounding; the noise depends on it, the step, the field, the path and the index of the element.
    Raises:
      UsageError: (a ValueError) for a format that is unknown, or has no values of the sign; from `init`, if the inner
        transformation itself stores a moment that has a format here; from `update`, for a state in other formats.
    """
    rules, extended = Rules(mu, nu, default, min_size, skip), optax.with_extra_args_support(inner)

    def stored(value, moment, fmt, step, rows=None):
        key = leaf_key(seed, step, moment.path, moment.role) if fmt.stochastic else None
        return store(value, fmt, key, rows)

    def init(params):
        params = _float32(params)
        shapes, are_zeros = _initial(extended.init, params)
        leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_stored)
        moments = moment_leaves(leaves, params)
        formats = [leaf and rules.format_of(leaf, leaf.size) for leaf in moments]
        _refuse_stored(leaves, formats)
        literal = [fmt is not None and zero for fmt, zero in zip(formats, are_zeros, strict=True)]

        # Compiled, so that the zeros that are not used are not made.
        @jax.jit
        def others(params):
            state = jax.tree.leaves(extended.init(params), is_leaf=is_stored)
            return [leaf for leaf, known in zip(state, literal, strict=True) if not known]

        rest = iter(others(params))

        def start(leaf, moment, fmt, known):
            if known:
                return zeros(leaf.shape, fmt)
            value = next(rest)
            # Behind a barrier: XLA takes minutes to fold the blocks of a large constant.
            return value if fmt is None else stored(lax.optimization_barrier(value), moment, fmt, 0)

        state = map(start, (leaf for _, leaf in leaves), moments, formats, literal)
        return QuantizedState(jnp.int32(0), jax.tree.unflatten(jax.tree.structure(shapes, is_leaf=is_stored), state))

    def update(updates, state, params=None, *, rows: Rows | None = None, **extra):
        steps = optax.safe_increment(state.steps)
        structure: Any
        leaves, structure = jax.tree_util.tree_flatten_with_path(state.inner, is_leaf=is_stored)
        moments = moment_leaves(leaves, updates)
        formats = [leaf and rules.format_of(leaf, _whole_size(leaf, rows)) for leaf in moments]
        _require_formats(leaves, formats)
        before = [leaf if fmt is None else load(leaf) for (_, leaf), fmt in zip(leaves, formats, strict=True)]
        by_rows = {} if rows is None else {"rows": rows}
        updates, after = extended.update(
            _float32(updates), structure.unflatten(before), _float32(params), **by_rows, **extra
        )
        after = (
            leaf if fmt is None else stored(leaf, moment, fmt, steps, rows)
            for leaf, moment, fmt in zip(structure.flatten_up_to(after), moments, formats, strict=True)
        )
        return updates, QuantizedState(steps, structure.unflatten(after))

    kind = next((label for label in (Elementwise, Leafwise) if isinstance(inner, label)), None)
    if kind is Elementwise and not rules.by_rows:
        kind = Leafwise
    return (kind or optax.GradientTransformationExtraArgs)(init, update)


def _float32(tree: Any) -> Any:
    """Floats narrower than float32 in float32, all else as it is."""
    narrow = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if narrow(leaf) else leaf, tree)


def _refuse_stored(leaves, formats) -> None:
    for (path, leaf), fmt in zip(leaves, formats, strict=True):
        if fmt is not None and is_stored(leaf):
            raise UsageError(
                f"{path_name(path)} is stored by the inner transformation, as {leaf.fmt}: not again as {fmt}"
            )


def _require_formats(leaves, formats) -> None:
    for (path, leaf), fmt in zip(leaves, formats, strict=True):
        found = leaf.fmt if is_stored(leaf) else None
        if fmt is not None and found != (fmt if fmt.element else None):
            raise UsageError(
                f"{path_name(path)} is stored {described(found)}, and this optimizer stores it as {fmt}: "
                "optim.convert_state makes the one from the other"
            )


def _whole_size(leaf: MomentLeaf, rows: Rows | None) -> int:
    return leaf.size if rows is None else leaf.size // leaf.rows * rows[1]


def _initial(init, params) -> tuple[Any, list[bool]]:
    """The state's shapes, and of each leaf whether `init` makes it of zeros, whatever the parameters are."""
    traced, shapes = jax.make_jaxpr(init, return_shape=True)(params)
    found = [_is_zeros(atom, traced.jaxpr) for atom in traced.jaxpr.outvars]
    of_leaves = jax.tree.unflatten(jax.tree.structure(shapes), found)
    return shapes, [all(jax.tree.leaves(leaf)) for leaf in jax.tree.leaves(of_leaves, is_leaf=is_stored)]


def _is_zeros(atom, jaxpr) -> bool:
    if hasattr(atom, "val"):
        return not np.any(atom.val)
    made = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    if made is None:
        return False
    if made.primitive.name in ("broadcast_in_dim", "convert_element_type"):
        return _is_zeros(made.invars[0], jaxpr)
    if made.primitive.name not in ("jit", "pjit"):
        return False
    inside = made.params["jaxpr"].jaxpr
    return _is_zeros(inside.outvars[made.outvars.index(atom)], inside)
