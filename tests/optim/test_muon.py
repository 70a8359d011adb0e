"""Muon: Optax's on matrices, one by one in a stack, and with its momentum in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.optim.matrices import matrix_mask
from lowprec.optim.memory import state_bytes
from lowprec.optim.muon import muon

RATE = 1e-2


def tree(step, shapes):
    draw = np.random.default_rng(step)
    return {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def run(optimizer, shapes, steps=3):
    params, found = tree(0, shapes), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(tree(step + 1, shapes), state, params)
        found.append(updates)
    return found


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), a, b)


def test_it_is_optax_muon_on_matrices():
    shapes = {"w": (12, 16), "v": (16, 8)}
    theirs = optax.contrib.muon(RATE, weight_decay=0.1)
    close(run(muon(RATE, weight_decay=0.1), shapes), run(theirs, shapes))


def test_a_stack_is_its_matrices():
    stacked = run(muon(RATE), {"w": (2, 8, 12)}, 1)[0]["w"]
    gradients = {str(i): g for i, g in enumerate(tree(1, {"w": (2, 8, 12)})["w"])}
    by_itself = muon(RATE)
    updates, _ = jax.jit(by_itself.update)(gradients, by_itself.init(gradients), gradients)
    close(stacked, jnp.stack([updates["0"], updates["1"]]))


def test_eight_bit_momentum_keeps_the_direction_and_four_bits_roughly():
    """Cosine of updates with those of float32 momentum after ten steps of noise; errors of m are 0.6 % and 16 %."""
    shapes = {"w": (32, 64)}
    exact = run(muon(RATE), shapes, 10)[-1]["w"].ravel()
    for fmt, least in (("cmp8@128", 0.999), ("de4", 0.95)):
        found = run(muon(RATE, mu_format=fmt, min_size=1), shapes, 10)[-1]["w"].ravel()
        cosine = float(found @ exact / jnp.linalg.norm(found) / jnp.linalg.norm(exact))
        assert least < cosine < 1 - 1e-7, (fmt, cosine)


def test_bytes_are_those_of_one_moment():
    params = {"w": jnp.zeros((64, 256))}
    size = lambda **formats: state_bytes(jax.eval_shape(muon(RATE, **formats).init, params)) / params["w"].size
    assert 4 <= size() < 4.01
    assert 1 + 2 / 128 <= size(mu_format="cmp8@128") < 1.02


def test_matrices_are_neither_embeddings_nor_stacked_norms():
    params = {
        "embed": {"embedding": jnp.zeros((9, 4))}, "layers": {"norm": {"scale": jnp.zeros((2, 4))}},
        "mlp": {"kernel": jnp.zeros((2, 4, 4)), "bias": jnp.zeros((2, 4))}, "row": jnp.zeros((1, 4)),
        "head": {"kernel": jnp.zeros((4, 9))},
    }  # fmt: skip
    chosen = [path for path, is_one in jax.tree_util.tree_leaves_with_path(matrix_mask(params)) if is_one]
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path in chosen] == ["mlp/kernel"]


def test_updates_have_one_size_whatever_the_shape():
    found = run(muon(RATE, consistent_rms=0.2), {"w": (16, 32), "v": (32, 16), "u": (24, 24)}, 1)[0]
    for update in found.values():
        # Five iterations leave singular values between 0.7 and 1.2.
        assert 0.7 < float(jnp.sqrt(jnp.mean(update**2))) / (0.2 * RATE) < 1.2
