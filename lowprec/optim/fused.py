"""An optimizer step that never holds more of the moments in float32 than those of a chunk of one parameter.

To dequantize, update and quantize the state of a whole tree makes XLA hold all moments in float32 at once, which is
more than low-bit states save. Here one parameter after another is updated and stored, and large ones in chunks of rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowprec.formats.random import Key
from lowprec.optim.fused_kernel import AdamKernel
from lowprec.optim.labels import Chain, Elementwise, Leafwise
from lowprec.optim.narrow_weights import Narrow, NarrowState, Storage, moved, weight_key
from lowprec.optim.partial_state import ParameterTree, Part
from lowprec.optim.quantized_weights import DenseWeights
from lowprec.optim.row_chunks import rows_of_chunk, update_by_rows
from lowprec.optim.state_tensor import Rows, leaf_key
from lowprec.optim.stochastic_weights import apply_update
from lowprec.quantizers.qtensor import is_qtensor
from lowprec.typing import Array

# Of 2^14 to 2^18 elements none is faster than another beyond the noise; temporaries grow in proportion.
CHUNK = 1 << 16


class Step(NamedTuple):
    """An optimizer that gives parameters rather than updates.

    Attributes:
      init: params -> state.
      step: (params, grads, state, key=None, **extra) -> (params, state).
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any]]


def fused_step(tx: optax.GradientTransformation, *, chunk: int | None = CHUNK, impl: str = "xla") -> Step:
    """`tx.update` and `apply_updates` in one, with the same states and the same results.

    (Bit for bit where each operation is rounded; compilers make one operation of a·b + c here and there.)

        optimizer = fused_step(adamw(1e-3, mu_format="de4", nu_format="log4(stochastic)"))
        step = jax.jit(optimizer.step, donate_argnums=(0, 2))
        params, state = step(params, grads, state)

    Of a chain (`optim.chain`, and wrapped around it `with_stochastic_rounding`, `split_weights`, `kahan` or
    `dense_weights`) the parts after the last one without a label are fused: they see one parameter at a time, and those
    after the last `Leafwise` one, if it is large, a chunk of its rows. The parts before see the whole tree.

    Args:
      tx: the whole optimizer, its learning rate and decay among it.
      chunk: elements. Parameters of more, with two axes or more, are updated in a loop; None: there are no loops, which
        is what parameters want that are sharded along their rows.
      impl: who computes Adam with moments of 8 and 4 bits, its decay and its learning rate, in float32 weights or those
        of `with_stochastic_rounding`: "xla"; "mosaic_gpu", "mosaic_tpu": a kernel, in one pass over memory and without
        chunks, for each parameter it serves (why not for others is logged, once); "auto": that of the device, if it has
        one; "interpret": that kernel, interpreted. The kernels have not been measured on hardware yet: until then they
        have to be asked for.
    Returns:
      An object with `init` and `step`. `step` needs a key where `apply_updates` needs one; what else it is given by
      name goes to `tx`.
    """

    def step(params, grads, state, key=None, **extra):
        return _step(tx, chunk, impl, params, grads, state, key, extra)

    return Step(tx.init, step)


class _Leaf(NamedTuple):
    """One parameter, or rows of it, with its update, what is stored beside it, and the moments of each part."""

    w: Any
    update: Any
    rest: Any
    moments: list[Any]


class _Weights:
    """How the parameters are read and written: `Storage` where there is one."""

    def __init__(self, tree: ParameterTree, storage: Storage | None, state: Any, key: jax.Array | None):
        self.tree, self.storage, self.key = tree, storage, key
        self.rest = tree.split(state.rest) if storage else [None] * len(tree.leaves)
        self.steps = optax.safe_increment(state.steps) if storage else None

    def wide(self, w: Any, rest: Any) -> Any:
        """As transformations see them."""
        if self._stores(w):
            return self.storage.load(w, rest)
        return w.dequantize() if is_qtensor(w) else w

    def seen(self, gradient: Array) -> Array:
        """As transformations see it."""
        return gradient.astype(jnp.float32) if self.storage else gradient

    def noise(self, index: int) -> Key | None:
        """The key of a parameter."""
        path = self.tree.paths[index]
        if self._stores(self.tree.leaves[index]):
            return weight_key(self.storage, self.steps, path)
        return None if self.key is None else leaf_key(self.key, 0, path, "weights")

    def move(self, index: int, leaf: _Leaf, noise: Key | None, rows: Rows | None) -> tuple[Any, Any]:
        """(w, rest) after an update."""
        if self._stores(leaf.w):
            w, _, rest = moved(self.storage, leaf.w, leaf.rest, leaf.update, noise, rows)
            return w, rest
        return apply_update(leaf.w, leaf.update, noise, self.tree.paths[index], rows), None

    def _stores(self, w):
        return self.storage is not None and self.storage.stores(w)


def _step(tx, chunk, impl, params, grads, state, key, extra):
    tree = ParameterTree(params)
    storage = tx.storage if isinstance(tx, Narrow) else None
    weights = _Weights(tree, storage, state, key)
    inner = tx.inner if isinstance(tx, Narrow | DenseWeights) else tx
    steps = list(_parts(inner, state.inner if storage else state))
    start = 1 + max(
        (i for i, (part, _) in enumerate(steps) if not isinstance(part, Elementwise | Leafwise)), default=-1
    )
    states = []
    if start:
        wide = tree.join(list(map(weights.wide, tree.leaves, weights.rest)))
        grads = jax.tree.map(weights.seen, grads)
    for part, part_state in steps[:start]:
        grads, new = optax.with_extra_args_support(part).update(grads, part_state, wide, **extra)
        states.append(new)

    parts = [Part(tree, part, part_state, extra) for part, part_state in steps[start:]]
    kernel = AdamKernel(tree, parts[_late(parts) :], storage, impl)
    leaves: list[_Leaf] = []
    shared = [part.shared for part in parts]
    for index, update in enumerate(tree.split(grads)):
        leaf = _Leaf(tree.leaves[index], update, weights.rest[index], [part.moments[index] for part in parts])
        if leaves:
            # Without it XLA may load the moments of all parameters before it stores those of the first.
            leaf, _ = lax.optimization_barrier((leaf, leaves[-1]))
        leaf, shared = _updated(weights, parts, kernel, index, leaf, chunk)
        leaves.append(leaf)
    states += [part.state([leaf.moments[i] for leaf in leaves], shared[i]) for i, part in enumerate(parts)]

    state = _joined(inner, iter(states))
    if storage:
        state = NarrowState(weights.steps, state, tree.join([leaf.rest for leaf in leaves]))
    return tree.join([leaf.w for leaf in leaves]), state


def _late(parts: list[Part]) -> int:
    """From which part on all are elementwise."""
    return 1 + max((i for i, part in enumerate(parts) if not part.elementwise), default=-1)


def _updated(weights: _Weights, parts: list[Part], kernel: AdamKernel, index: int, leaf: _Leaf, chunk: int | None):
    """One parameter after the step, and what the states have that belongs to no parameter."""
    late = _late(parts)
    noise = weights.noise(index)

    def run(first, last, update, moments, wide, rows):
        new_moments, shared = [], []
        for part, old in zip(parts[first:last], moments, strict=True):
            update, new, of_none = part.update(index, weights.seen(update), old, wide, rows)
            new_moments.append(new)
            shared.append(of_none)
        return update, new_moments, shared

    def finish(update, changed, rows):
        w, rest, moments = changed
        update, moments, shared = run(late, None, update, moments, weights.wide(w, rest), rows)
        w, rest = weights.move(index, _Leaf(w, update, rest, moments), noise, rows)
        return (w, rest, moments), shared

    wide = weights.wide(leaf.w, leaf.rest)
    update, early, early_shared = run(0, late, leaf.update, leaf.moments[:late], wide, None)
    if kernel.serves(leaf.w, update, leaf.moments[late:]):
        w, moments = kernel.update(index, leaf.w, update, leaf.moments[late:], noise)
        return _Leaf(w, None, leaf.rest, early + moments), early_shared + kernel.shared
    changed = leaf.w, leaf.rest, leaf.moments[late:]
    rows = None if chunk is None else rows_of_chunk(leaf.w, (update, changed), chunk)
    if rows is None:
        (w, rest, moments), shared = finish(update, changed, None)
    else:
        shared = [part.shared for part in parts[late:]]
        (w, rest, moments), shared = update_by_rows(finish, update, changed, shared, rows)
    return _Leaf(w, None, rest, early + moments), early_shared + shared


def _parts(tx: optax.GradientTransformation, state: Any) -> Iterator[tuple[optax.GradientTransformation, Any]]:
    """The parts of a chain, and of chains in it, with their states."""
    if not isinstance(tx, Chain):
        yield tx, state
        return
    for part, part_state in zip(tx.parts, state, strict=True):
        yield from _parts(part, part_state)


def _joined(tx: optax.GradientTransformation, states: Iterator[Any]) -> Any:
    """The state of a chain from those of its parts."""
    return tuple(_joined(part, states) for part in tx.parts) if isinstance(tx, Chain) else next(states)
