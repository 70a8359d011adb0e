"""Sparse update: what is not trained is not in the compiled program; what is chosen, against all choices."""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.nn import linen
from lowprec.optim.sparse_update import (
    Candidate,
    Selection,
    choose,
    contributions,
    tensor_selections,
    update_bytes,
)


class Net(nn.Module):
    """Widths that are all different: a shape names a product."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(12, name="a")(x))
        return nn.Dense(5, name="c")(jnp.tanh(nn.Dense(10, name="b")(x)))


X = jax.random.normal(jax.random.key(0), (16, 8))
GRADIENTS = {"a": "[8,12]", "b": "[12,10]", "c": "[10,5]"}


def start(recipe="f32"):
    model = linen.quantize(Net(), recipe)
    variables = model.init({"params": jax.random.key(1), "quant": jax.random.key(2)}, X)
    loss = lambda params: jnp.mean(
        model.apply({**variables, "params": params}, X, rngs={"quant": jax.random.key(3)}) ** 2
    )
    return variables["params"], loss


def gradient_of(selection, loss):
    def gradient(params):
        trained, frozen = selection.split(params)
        return jax.grad(lambda trained: loss(selection.join(trained, frozen)))(trained)

    return gradient


def products(compiled):
    return re.findall(r"= \w+(\[[\d,]*\])\S* dot\(", compiled.as_text())


@pytest.mark.parametrize("recipe", ["f32", "qas_int8"])
@pytest.mark.parametrize(
    ("patterns", "layers"), [((".*",), "abc"), (("b/kernel",), "b"), ((".*bias",), ""), (("c/.*", "a/bias"), "c")]
)
def test_no_product_makes_the_gradient_of_a_frozen_tensor(recipe, patterns, layers):
    params, loss = start(recipe)
    compiled = jax.jit(gradient_of(Selection(patterns), loss)).lower(params).compile()
    made = products(compiled)
    assert {layer for layer, shape in GRADIENTS.items() if shape in made} == set(layers)
    everything = jax.jit(gradient_of(Selection((".*",)), loss)).lower(params).compile()
    less = compiled.cost_analysis()["flops"] / everything.cost_analysis()["flops"]
    assert less == 1 if layers == "abc" else less < 0.9


def test_layers_before_the_first_trained_one_have_no_backward_pass():
    """Of `b` alone: three forward products, one back to its outputs, its own gradient."""
    params, loss = start()
    compiled = jax.jit(gradient_of(Selection(("b/kernel",)), loss)).lower(params).compile()
    assert sorted(products(compiled)) == sorted(["[16,12]", "[16,10]", "[16,5]", "[16,10]", "[12,10]"])


def test_the_gradients_are_those_of_all_parameters():
    params, loss = start()
    selection = Selection(("b/.*",), (("c/kernel", 2), ("a/bias", 3)))
    found, full = jax.jit(gradient_of(selection, loss))(params), jax.jit(jax.grad(loss))(params)
    assert {path: leaf.shape for path, leaf in found.items()} == {
        "b/kernel": (12, 10),
        "b/bias": (10,),
        "c/kernel": (10, 2),
        "a/bias": (3,),
    }
    np.testing.assert_allclose(found["b/kernel"], full["b"]["kernel"], atol=1e-7)
    np.testing.assert_allclose(found["c/kernel"], full["c"]["kernel"][:, :2], atol=1e-7)
    np.testing.assert_allclose(found["a/bias"], full["a"]["bias"][:3], atol=1e-7)


def test_training_changes_what_is_chosen_and_keeps_state_for_nothing_else():
    params, loss = start()
    selection, optimizer = Selection((".*bias",), (("c/kernel", 2),)), optax.adam(0.05)
    trained, frozen = selection.split(params)
    state = optimizer.init(trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (12 + 10 + 5 + 20) + 1
    assert update_bytes(selection, params, state_copies=2) == 3 * 4 * (12 + 10 + 5 + 20)

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(lambda t: loss(selection.join(t, frozen)))(trained)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    losses = []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    after = selection.join(trained, frozen)
    assert losses[-1] < 0.5 * losses[0]
    for layer in "ab":
        np.testing.assert_array_equal(after[layer]["kernel"], params[layer]["kernel"])
    np.testing.assert_array_equal(after["c"]["kernel"][:, 2:], params["c"]["kernel"][:, 2:])
    assert np.all(after["c"]["kernel"][:, :2] != params["c"]["kernel"][:, :2])


def test_what_cannot_be_chosen_is_named():
    params, _ = start()
    with pytest.raises(UsageError, match="no parameter matches 'd/kernel'; there are a/bias"):
        Selection(("d/kernel",)).split(params)
    with pytest.raises(UsageError, match=r"c/kernel of shape \(10, 5\) has no 6 output channels"):
        Selection((), (("c/kernel", 6),)).split(params)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_gains_at_least_half_of_the_best_choice(seed):
    random = np.random.default_rng(seed)
    gains, sizes = random.exponential(1, 8) - 0.2, random.integers(1, 40, 8)
    candidates = [Candidate(Selection((str(i),)), g, int(b)) for i, (g, b) in enumerate(zip(gains, sizes, strict=True))]
    selection, chosen = choose(candidates, limit=50)
    assert sum(c.bytes for c in chosen) <= 50
    assert selection.patterns == tuple(c.selection.patterns[0] for c in chosen)
    every = itertools.chain.from_iterable(itertools.combinations(candidates, r) for r in range(9))
    best = max(sum(c.gain for c in some) for some in every if sum(c.bytes for c in some) <= 50)
    assert best / 2 <= sum(c.gain for c in chosen) <= best + 1e-9


def test_one_large_gain_beats_many_small_ones_per_byte():
    """Greedy alone would take the first and have no room for the second."""
    small, large = Candidate(Selection(("s",)), 2.0, 1), Candidate(Selection(("l",)), 10.0, 10)
    assert choose([small, large], limit=10)[1] == [large]
    assert choose([Candidate(Selection(("w",)), -1.0, 1)], limit=10) == (Selection(), [])


def test_contributions_are_gains_over_training_nothing():
    """The loss after one exact line search over each tensor of a quadratic: the tensor that is off gains all."""
    target = {"a": jnp.zeros(3), "b": jnp.ones(3)}
    params = jax.tree.map(jnp.zeros_like, target)

    def score(selection):
        trained, frozen = selection.split(params)
        loss = lambda t: sum(jnp.sum((selection.join(t, frozen)[k] - target[k]) ** 2) for k in target)
        stepped = jax.tree.map(lambda w, g: w - 0.5 * g, trained, jax.grad(loss)(trained))
        return -float(loss(stepped))

    selections = tensor_selections(params)
    found = contributions(selections, score, lambda s: update_bytes(s, params))
    assert [(c.gain, c.bytes) for c in found] == [(0.0, 12), (3.0, 12)]
    assert choose(found, limit=12)[0] == Selection(("b",))
