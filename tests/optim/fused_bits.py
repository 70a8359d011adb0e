"""A program that compares fused with unfused steps, bit by bit: names of cases -> a line of JSON, what differs in each.

It is run with XLA_FLAGS=--xla_cpu_max_isa=AVX, which has no fused multiply-add: the compiler makes such of a·b + c in
one program and not in another, by what else stands beside it.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax

from lowprec import optim
from lowprec.optim import (
    Elementwise,
    Leafwise,
    apply_updates,
    chain,
    dense,
    dense_weights,
    elementwise,
    fused_step,
    kahan,
    quantize_weights,
    split_weights,
    with_stochastic_rounding,
)
from lowprec.optim.adam import adamw, scale_by_adam
from lowprec.optim.labels import Chain

FOUR = {"mu_format": "de4@32", "nu_format": "log4@32(stochastic)", "min_size": 64}
EIGHT = {"mu_format": "cmp8", "nu_format": "log8(stochastic)", "min_size": 64}
KEY = jax.random.key(0)


def parameters(dtype=jnp.float32):
    """Chunked by rows, by rows of a stack of matrices with a rest, not chunked, a scalar."""
    shapes = {"a": {"kernel": (24, 96)}, "b": (7,), "c": (3, 5, 64), "s": ()}
    is_leaf = lambda shape: isinstance(shape, tuple)
    return jax.tree.map(lambda shape: jax.random.normal(KEY, shape).astype(dtype), shapes, is_leaf=is_leaf)


def gradients(params, step):
    """Of magnitudes that differ by 2^12 within a block."""

    def of(w):
        exponents = jax.random.randint(jax.random.key(step), w.shape, -9, 4).astype(jnp.float32)
        return jnp.sin(3 * w.astype(jnp.float32) + step) * jnp.exp2(exponents)

    return jax.tree.map(of, dense(params))


def differences(tx, params, *, chunk=512, keys=False, steps=2, **extra):
    """The paths at which parameters and states are not the same."""
    fused = fused_step(tx, chunk=chunk)

    @jax.jit
    def unfused(params, grads, state, key):
        updates, state = tx.update(grads, state, params, **extra)
        return (apply_updates(params, updates, key) if keys else optax.apply_updates(params, updates)), state

    found, expected = (params, fused.init(params)), (params, tx.init(params))
    step = jax.jit(lambda *args: fused.step(*args, **extra))
    for count in range(steps):
        grads, key = gradients(params, count), jax.random.fold_in(KEY, count)
        expected = unfused(expected[0], grads, expected[1], key)
        found = step(found[0], grads, found[1], key)
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return ["structure"]
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    return [jax.tree_util.keystr(path) for (path, x), y in pairs if x.dtype != y.dtype or not jnp.array_equal(x, y)]


def labelled(tx):
    return all(map(labelled, tx.parts)) if isinstance(tx, Chain) else isinstance(tx, Elementwise | Leafwise)


def registered(name):
    small = {"min_size": 64} if "min_size" in optim.get(name).settings else {}
    return optim.get(name)(optax.linear_schedule(1e-2, 1e-3, 4), **small)


def of_registered(name):
    params = parameters()
    return differences(registered(name), {"a": params["a"], "b": params["b"]})


def clipped():
    return chain(optax.clip_by_global_norm(0.1), scale_by_adam(**FOUR), elementwise(optax.scale(-1e-2)))


def quantized():
    return quantize_weights(parameters(), "int8@row", "a/kernel")


NARROW = {"stochastic": with_stochastic_rounding, "kahan": kahan, "split": split_weights}
CASES = {
    **{f"chunk {chunk}": lambda chunk=chunk: differences(adamw(1e-2, **FOUR), parameters(), chunk=chunk)
       for chunk in (None, 1, 300, 512)},
    **{name: lambda wrap=wrap: differences(wrap(adamw(1e-2, **EIGHT)), parameters(jnp.bfloat16))
       for name, wrap in NARROW.items()},
    "split 24": lambda: differences(split_weights(adamw(1e-2, **EIGHT), 24), parameters(jnp.bfloat16)),
    "apply_updates": lambda: differences(adamw(1e-2, **FOUR), parameters(jnp.bfloat16), keys=True),
    "QTensor": lambda: differences(dense_weights(adamw(1e-2, **FOUR)), quantized(), keys=True),
    "rank 1": lambda: differences(adamw(1e-2, nu_format="lin4@rank1", min_size=64), parameters()),
    "clipped": lambda: differences(clipped(), parameters()),
    "unlabelled last": lambda: differences(chain(scale_by_adam(**FOUR), optax.scale(-1e-2)), parameters()),
    "unlabelled": lambda: differences(kahan(optax.rmsprop(1e-2)), parameters(jnp.bfloat16)),
}  # fmt: skip

if __name__ == "__main__":
    cases = {name: CASES[name]() if name in CASES else of_registered(name) for name in sys.argv[1:]}
    print(json.dumps(cases))
