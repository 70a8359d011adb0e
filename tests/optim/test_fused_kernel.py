"""The fused step by the kernel for low-bit Adam: the states and results of its parts, where the kernel serves.

Hyperparameters are powers of two and gradients have 8 bits: products that are added to something are exact, and no
compiler can change a bit by making one operation of both. Runs are as old as makes the bias corrections one: powers of
numbers below one differ by an ulp from program to program.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.optim import chain, fused_step, kahan, with_stochastic_rounding
from lowprec.optim.adam import adam, adam4, adam8, scale_by_adam
from lowprec.pallas.dispatch import say_once
from lowprec.pallas.interpreters import reset_interpreters
from lowprec.pallas.target import on

SERVED = {"kernel": (9, 256), "stack": (2, 4, 256)}
OTHERS = {"narrow": (8, 96), "scalar": ()}
OLD = 200
EXACT = {"b1": 0.5, "b2": 0.5, "eps": 2.0**-20, "min_size": 512}


@pytest.fixture(autouse=True)
def fresh():
    say_once.cache_clear()
    yield
    reset_interpreters()


def tree(shapes, seed, dtype="float32", size=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape) * size, dtype) for name, shape in shapes.items()}


def after(tx, impl, params, count=OLD, steps=2):
    fused = fused_step(tx, impl=impl)
    step, state = jax.jit(fused.step), optax.tree_utils.tree_set(fused.init(params), count=jnp.int32(count))
    for seed in range(steps):
        grads = tree({name: w.shape for name, w in params.items()}, seed + 1, "bfloat16", 0.01)
        grads = {name: g.astype(params[name].dtype) for name, g in grads.items()}
        params, state = step(params, grads, state)
    return params, state


def lowered(tx, params, impl="auto"):
    fused = fused_step(tx, impl=impl)
    with on("NVIDIA H200"):
        traced = jax.jit(fused.step).trace(params, params, fused.init(params))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def scheduled(make):
    """A rate and a decay that change, and a decay of matrices alone."""
    halved = lambda first: lambda count: jnp.where(count == OLD, first, first / 2)
    matrices = lambda params: jax.tree.map(lambda w: w.ndim == 2, params)
    return make(halved(2.0**-7), weight_decay=halved(2.0**-5), mask=matrices, **EXACT)


@pytest.mark.parametrize(
    ("tx", "dtype"),
    [
        (scheduled(adam8), "float32"),
        (adam4(2.0**-7, **EXACT), "float32"),
        (with_stochastic_rounding(adam8(2.0**-7, weight_decay=2.0**-5, **EXACT), seed=3), "bfloat16"),
    ],
    ids=["adam8, schedules and a mask", "adam4", "adam8 of stochastically rounded weights"],
)
def test_the_kernel_gives_the_states_and_results_of_the_parts(tx, dtype):
    params = tree(SERVED | OTHERS, 0, dtype)
    (ours, state), (theirs, expected) = (after(tx, impl, params) for impl in ("interpret", "xla"))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path((ours, state))
    for (path, x), y in zip(paths, jax.tree.leaves((theirs, expected)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def test_bias_corrections_leave_it_an_ulp():
    params = tree(SERVED, 0)
    (ours, state), (theirs, expected) = (
        after(adam4(2.0**-7, **EXACT), impl, params, 0) for impl in ("interpret", "xla")
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-23, atol=2**-28), ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_on_a_gpu_each_parameter_that_is_served_is_one_call():
    params = tree(SERVED | OTHERS, 0)
    assert lowered(scheduled(adam8), params).count("@mosaic_gpu_v2") == len(SERVED)
    for impl in ("xla", fused_step.__kwdefaults__["impl"]):  # not measured on hardware: it has to be asked for
        assert lowered(scheduled(adam8), params, impl).count("@mosaic_gpu_v2") == 0


def test_parts_before_adam_see_the_whole_tree_as_ever():
    params = tree(SERVED, 0)
    tx = chain(optax.clip_by_global_norm(0.5), adam4(2.0**-7, **EXACT))
    assert lowered(tx, params).count("@mosaic_gpu_v2") == len(SERVED)


@pytest.mark.parametrize(
    ("tx", "dtype", "reason"),
    [
        (adam(1e-2, **EXACT), "float32", "moments are arrays"),
        (adam(1e-2, mu_format="de8", nu_format="log8(stochastic)", min_size=512), "float32", "moments are de8"),
        (chain(scale_by_adam(mu_format="de4"), optax.scale(-0.1)), "float32", "not a chain"),
        (chain(scale_by_adam(mu_format="de4", reset_every=5)), "float32", "not a chain"),
        (kahan(adam8(1e-2, **EXACT)), "bfloat16", "stored by Kahan"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said_once_and_left_to_the_parts(tx, dtype, reason, caplog):
    with caplog.at_level(logging.INFO, "lowprec.pallas"):
        assert "@mosaic_gpu_v2" not in lowered(tx, tree({"a": (8, 256), "b": (8, 256)}, 0, dtype))
    (message,) = caplog.messages
    assert reason in message and "the fused step" in message


def test_an_implementation_that_does_not_exist_is_refused():
    params = tree({"a": (8, 256)}, 0)
    fused = fused_step(adam8(1e-2), impl="triton")
    with pytest.raises(UsageError, match="mosaic_gpu"):
        fused.step(params, params, fused.init(params))
