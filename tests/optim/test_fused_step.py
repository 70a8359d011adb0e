"""The fused step: the bits of the unfused one, and no moments in float32 but those of a chunk."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import fused_bits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import optim
from lowprec.errors import UsageError
from lowprec.optim import apply_updates, chain, elementwise, fused_step, with_stochastic_rounding
from lowprec.optim.adam import adamw

AT_ONCE = ("stochastic", "adam4")
LABELLED = tuple(name for name in optim.names() if fused_bits.labelled(fused_bits.registered(name)))
FUSES_PRODUCTS = "a processor on which the compiler cannot be kept from fusing products with sums"


def differing(names):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = Path(fused_bits.__file__)
    result = subprocess.run([sys.executable, program, *names], env=environment, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason=FUSES_PRODUCTS)
def test_the_fused_step_gives_the_bits_of_the_unfused_one():
    assert differing(AT_ONCE) == {name: [] for name in AT_ONCE}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason=FUSES_PRODUCTS)
def test_it_does_so_for_every_optimizer_of_labelled_parts_any_chunk_and_all_forms_of_weights():
    """Also with parts that are not labelled, before and after those that are."""
    names = [name for name in (*LABELLED, *fused_bits.CASES) if name not in AT_ONCE]
    assert differing(names) == {name: [] for name in names}


def test_which_optimizers_are_fused():
    assert {"adam", "adamw", "adam8", "adam4", "stable_adam4", "stable_spam", "spam", "adam_mini"} <= set(LABELLED)


def test_in_a_usual_program_it_differs_by_the_last_bits_of_float32_at_most():
    tx, params = fused_bits.registered("adam4"), {"a": fused_bits.parameters()["a"]}
    grads, state = fused_bits.gradients(params, 0), tx.init(params)
    updates, expected_state = jax.jit(tx.update)(grads, state, params)
    found, found_state = jax.jit(fused_step(tx, chunk=512).step)(params, grads, state)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), found, expected)
    for x, y in zip(jax.tree.leaves(found_state), jax.tree.leaves(expected_state), strict=True):
        assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01 or x.dtype == jnp.float32


def test_other_arguments_reach_the_parts_that_take_them():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = fused_step(chain(scaled, elementwise(scaled), elementwise(optax.sgd(0.25))), chunk=8)
    params = {"w": jnp.ones((4, 4))}
    found, _ = optimizer.step(params, {"w": jnp.full((4, 4), 0.5)}, optimizer.init(params), factor=2.0)
    np.testing.assert_array_equal(found["w"], 1 - 0.25 * 2 * 2 * 0.5)


def test_narrow_parameters_need_a_key_or_a_wrapped_optimizer():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    optimizer = fused_step(optax.sgd(1e-2))
    with pytest.raises(UsageError, match="parameter 'w' is bfloat16: it is rounded stochastically, which needs a key"):
        optimizer.step(params, params, optimizer.init(params))
    found, _ = optimizer.step(params, params, optimizer.init(params), jax.random.key(0))
    expected = apply_updates(params, optax.sgd(1e-2).update(params, optimizer.init(params))[0], jax.random.key(0))
    np.testing.assert_array_equal(found["w"], expected["w"])


def transformer(width=256, hidden=704, vocabulary=16_000):
    """A layer and embeddings: 9 million parameters."""
    shape = lambda *sizes: {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}
    layer = {"qkv": shape(width, 3 * width), "up": shape(width, hidden), "down": shape(hidden, width)}
    return {"embed": shape(vocabulary, width), "layer": layer, "norm": shape(width), "head": shape(width, vocabulary)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["adam8", "adam4"])
def test_temporaries_are_a_small_part_of_the_state_of_adam_in_float32(name, dtype):
    tx = optim.get(name)(1e-3, weight_decay=0.1)
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), transformer())
    optimizer = fused_step(tx if dtype == jnp.float32 else with_stochastic_rounding(tx))
    state = jax.eval_shape(optimizer.init, params)
    memory = jax.jit(optimizer.step, donate_argnums=(0, 2)).lower(params, params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.15 * 8 * sum(w.size for w in jax.tree.leaves(params))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == stored  # parameters and state are changed in place


def test_moments_are_as_large_in_float32_where_nothing_is_fused():
    """What the fused step is for."""
    tx = adamw(1e-3, mu_format="cmp8", nu_format="log8")
    params = {"a": jax.ShapeDtypeStruct((512, 512), jnp.float32), "b": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def unfused(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = [
        jax.jit(step, donate_argnums=(0, 2)).lower(params, params, state).compile().memory_analysis()
        for step in (unfused, fused_step(tx, chunk=1 << 13).step)
    ]
    whole, chunked = (memory.temp_size_in_bytes / (8 * 2 * 512 * 512) for memory in compiled)
    assert whole > 0.5
    assert chunked < 0.1
