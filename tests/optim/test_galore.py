"""GaLore and Q-GaLore against their equations in float64, and their integers against the authors' formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.optim.adam import scale_by_adam
from lowprec.optim.affine import affine_format
from lowprec.optim.galore import galore, project_gradients, q_galore
from lowprec.optim.memory import state_bytes
from lowprec.optim.state_tensor import load, store
from lowprec.optim.stochastic_weights import apply_updates
from lowprec.quantizers import quantize

RATE, RANK, GAP, SCALE, B1, B2, EPS = 1e-2, 3, 3, 0.25, 0.9, 0.999, 1e-6


def gradients(step, shape, seed=0):
    """Low rank and noise: singular values that are well apart."""
    draw = np.random.default_rng([seed, step])
    left, right = draw.normal(size=(*shape[:-1], 4)), draw.normal(size=(*shape[:-2], 4, shape[-1]))
    return (left * [8, 4, 2, 1]) @ right + 0.01 * draw.normal(size=shape)


class Reference:
    """One matrix in float64, as the paper has it; the sign of a singular vector is that nearer to the last one's."""

    def __init__(self, shape):
        self.tall, self.p = shape[0] >= shape[1], np.zeros((RANK, min(shape)))
        self.m = self.v = 0.0
        self.steps = 0

    def update(self, g):
        if self.steps % GAP == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            new = vt[:RANK] if self.tall else u[:, :RANK].T
            self.p = new * np.where(np.sum(new * self.p, axis=1, keepdims=True) < 0, -1, 1)
        self.steps += 1
        low = g @ self.p.T if self.tall else self.p @ g
        self.m, self.v = B1 * self.m + (1 - B1) * low, B2 * self.v + (1 - B2) * low**2
        u = self.m / (1 - B1**self.steps) / (np.sqrt(self.v / (1 - B2**self.steps)) + EPS)
        return -RATE * SCALE * (u @ self.p if self.tall else self.p.T @ u)


def test_updates_are_those_of_the_equations():
    """Tall, wide and stacked matrices over two changes of subspace; up to signs of the first vectors, which cancel."""
    optimizer = galore(RATE, rank=RANK, gap=GAP, scale=SCALE, b1=B1, b2=B2, eps=EPS)
    shapes = {"tall": (12, 8), "wide": (6, 10), "stack": (2, 5, 9)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    references = {
        name: [Reference(shape[-2:]) for _ in range(2 if name == "stack" else 1)] for name, shape in shapes.items()
    }
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(7):
        g = {name: gradients(step, shape) for name, shape in shapes.items()}
        found, state = update({name: jnp.asarray(x, jnp.float32) for name, x in g.items()}, state, params)
        for name, matrices in references.items():
            expected = [r.update(x) for r, x in zip(matrices, g[name].reshape(-1, *shapes[name][-2:]), strict=True)]
            expected = np.reshape(expected, shapes[name])
            assert np.max(np.abs(found[name] - expected)) < 1e-3 * np.max(np.abs(expected)), (name, step)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9), (2, 8, 12)])
def test_a_gradient_of_that_rank_passes_unchanged(shape):
    optimizer = project_gradients(optax.identity(), 4, 1, 1.0)
    u, s, vt = np.linalg.svd(gradients(0, shape), full_matrices=False)
    g = {"w": jnp.asarray((u[..., :4] * s[..., None, :4]) @ vt[..., :4, :], jnp.float32)}
    found, _ = optimizer.update(g, optimizer.init(g), g)
    np.testing.assert_allclose(found["w"], g["w"], atol=2e-5 * float(jnp.max(jnp.abs(g["w"]))))


def test_what_is_no_matrix_is_given_to_adam_as_it_is():
    shapes = {"embed": (40, 16), "small": (5, RANK), "bias": (7,), "w": (8, 9)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    g = jax.tree.map(lambda w: jnp.sin(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape), params)
    optimizer, adam = project_gradients(scale_by_adam(B1, B2, EPS), RANK), scale_by_adam(B1, B2, EPS)
    found, state = optimizer.update(g, optimizer.init(params))
    expected, _ = adam.update(g, adam.init(params))
    for name in ("embed", "small", "bias"):
        np.testing.assert_array_equal(found[name], expected[name])
        assert not jax.tree.leaves(state.subspaces[name])
    assert np.linalg.matrix_rank(found["w"]) <= RANK


def test_bytes_are_those_of_the_paper():
    """4 (n r + 2 m r) for an m × n matrix, m ≥ n: optax.contrib.galore, which projects the other side, has more."""
    m, n, r = 96, 64, 8
    params = {"w": jnp.zeros((m, n))}
    counts = 4 * 5  # three of them, and the gap and the number of refreshes
    assert state_bytes(jax.eval_shape(galore(1.0, rank=r).init, params)) - counts == 4 * (n * r + 2 * m * r)
    assert state_bytes(jax.eval_shape(optax.contrib.galore(1.0, rank=r).init, params)) > 4 * (m * r + 2 * n * r)
    quantized = state_bytes(jax.eval_shape(q_galore(1.0, rank=r, min_size=1, steady=None).init, params)) - counts
    # Codes; scale and zero point a row of P; one scale a row of each moment, whose rows are shorter than a block.
    assert quantized == n * r // 2 + 5 * r + 2 * (m * r + 4 * m)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_with_a_zero_point_are_the_authors(bits):
    """scale = max(max - min, 1e-5) / (2^b - 1), zero = clip(-round(min / scale)), x ≈ scale · (code - zero)."""
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(6, 512)) + np.arange(-3, 3)[:, None]).astype(np.float32)
    x[0, :256] = 0
    groups, top = x.reshape(-1, 256), np.float32(2**bits - 1)
    scale = np.maximum(groups.max(1, keepdims=True) - groups.min(1, keepdims=True), np.float32(1e-5)) / top
    zero = np.clip(-np.round(groups.min(1, keepdims=True) / scale), 0, top)
    expected = ((np.clip(np.round(groups / scale) + zero, 0, top) - zero) * scale).reshape(x.shape)
    read_again = jax.jit(lambda x: load(store(x, affine_format(bits))))
    found = read_again(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert np.all(np.isnan(read_again(jnp.full((6, 512), jnp.nan))))


def test_stochastic_integers_are_unbiased():
    """Mean of 4000 draws: its standard deviation is at most 0.5 / √4000 = 0.008 steps of 0.1; 5 of them are allowed."""
    x = jnp.tile(jnp.linspace(-0.6, 0.9, 64), (4000, 1))
    fmt = affine_format(4, block=64, stochastic=True)
    found = jax.jit(lambda x: jnp.mean(load(store(x, fmt, jax.random.key(0))), axis=0))(x)
    assert float(jnp.max(jnp.abs(found - x[0]))) < 5 * 0.008 * 0.1


def steps_of(optimizer, gradient, steps):
    state = optimizer.init({"w": gradient(0)})

    def step(state, g):
        return optimizer.update({"w": g}, state)[1], state.subspaces["w"].refreshes

    state, refreshes = jax.lax.scan(step, state, jnp.stack([gradient(i) for i in range(steps)]))
    changed = np.diff(np.append(np.asarray(refreshes), state.subspaces["w"].refreshes))
    return np.flatnonzero(changed).tolist(), int(state.subspaces["w"].gap)


def test_a_steady_subspace_is_sought_less_and_less():
    """Six of them until five cosines are known; then every one doubles the gap, whose multiples are the next steps."""
    g = jnp.asarray(gradients(0, (8, 6)), jnp.float32)
    lazy = project_gradients(optax.identity(), RANK, 2, steady=0.4)
    assert steps_of(lazy, lambda _: g, 40) == ([0, 2, 4, 6, 8, 10, 12, 16, 32], 32)
    never = project_gradients(optax.identity(), RANK, 2, steady=0.9)
    changing = lambda step: jnp.asarray(gradients(step, (8, 6)), jnp.float32)
    assert steps_of(never, changing, 24) == (list(range(0, 24, 2)), 2)


AFFINE8 = affine_format(8, stochastic=True)
# How weights are made of float32 ones, read, and moved with a key.
WEIGHTS = {
    "float32": (lambda w: w, lambda w: w, lambda w, u, key: w + u),
    "zero_point": (
        lambda w: store(w, AFFINE8, jax.random.key(1)), load, lambda w, u, key: store(load(w) + u, AFFINE8, key)
    ),
    "qtensor": (lambda w: quantize(w, "int8@row", axis=-2), lambda w: w.dequantize(), apply_updates),
}  # fmt: skip


def test_int8_weights_are_trained_in_place():
    """Least squares: Q-GaLore on weights of 8 bits goes where it goes on float32 weights."""
    draw = np.random.default_rng(0)
    x, truth = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((64, 16), (16, 24)))
    optimizer = q_galore(0.1, rank=8, gap=10, scale=1.0, min_size=1)
    loss = lambda w: jnp.mean((x @ (w - truth)) ** 2)

    def train(kind):
        make, read, write = WEIGHTS[kind]

        def step(carry, key):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(read(weights)), state, read(weights))
            return (write(weights, updates, key), state), None

        w, keys = jnp.zeros_like(truth), jax.random.split(jax.random.key(0), 150)
        run = jax.jit(lambda w: jax.lax.scan(step, (make(w), optimizer.init(w)), keys)[0][0])
        return float(loss(read(run(w))))

    start, exact = float(loss(jnp.zeros_like(truth))), train("float32")
    assert exact < 0.02 * start
    for kind in ("zero_point", "qtensor"):
        assert train(kind) < 2 * exact + 0.001 * start, kind


def test_what_cannot_be_is_refused():
    for settings in ({"rank": 0}, {"rank": 2.0}, {"gap": 0}):
        with pytest.raises(UsageError, match="positive integer"):
            galore(1.0, **settings)
