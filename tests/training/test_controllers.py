"""Controllers by themselves: AdaPT's histograms and gradients, FLIQS' policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.formats import round_to
from lowprec.recipes import FormatSearch, PrecisionSwitching
from lowprec.recipes.library.dynamic import fliqs
from lowprec.training.controllers import Adapt, Fliqs, Signals, build_controller
from lowprec.training.controllers.adapt import diversity, fewest_bits, histogram_distance, integer_bits
from lowprec.training.controllers.protocol import by_layer

# Two layers of a stack and one beside it.
SHAPES = {"layers": {"up": {"kernel": (2, 16, 8)}}, "out": {"kernel": (8, 4)}}
IS_SHAPE = lambda node: isinstance(node, tuple)


def tree(make):
    return jax.tree.map(make, SHAPES, is_leaf=IS_SHAPE)


def quant(**state):
    of = lambda axes: {name: jnp.full(axes, value, jnp.float32) for name, value in state.items()}
    return {"layers": {"0:2": {"up": {"fwd.w": of((2,))}}}, "out": {"fwd.w": of(())}}


def normal(seed, size=1.0):
    keys = iter(jax.random.split(jax.random.key(seed), 2))
    return tree(lambda shape: size * jax.random.normal(next(keys), shape))


def test_the_distance_of_histograms_is_that_of_numpy():
    w = jax.random.normal(jax.random.key(0), (500,))
    q = round_to(w, "fx6.3")
    amax = float(jnp.max(jnp.abs(w)))
    p, r = (np.histogram(np.clip(v, -amax, amax), 32, (-amax, amax))[0] / 500 + 1e-6 for v in (w, q))
    p, r = p / p.sum(), r / r.sum()
    assert float(histogram_distance(w, q, 32)) == pytest.approx(float(np.sum(p * np.log(p / r))), rel=1e-3)
    assert float(histogram_distance(w, w, 32)) == 0


def test_integer_bits_hold_the_largest_weight():
    for amax, bits in ((0.24, -2), (0.25, -1), (0.9, 0), (1.0, 1), (5.0, 3), (0.0, -20)):
        assert int(integer_bits(jnp.array([amax, -amax / 2]))) == bits


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_weights_that_lie_on_a_grid_need_no_more_bits_than_it_has(bits):
    """The largest code is among them, so the histogram changes as soon as a bit is missing."""
    codes = jnp.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)).astype(jnp.float32)
    w = jnp.repeat(codes * 2.0**-6, 3)
    for highest in (16, bits - 1):
        rule = PrecisionSwitching(bins=512, tolerance=1e-4, highest=highest)
        assert float(fewest_bits(w, integer_bits(w), rule)) == min(bits, highest)


def test_coarser_histograms_ask_for_fewer_bits():
    w = jax.random.normal(jax.random.key(1), (4096,))
    found = [float(fewest_bits(w, integer_bits(w), PrecisionSwitching(bins=bins))) for bins in (4, 16, 64)]
    assert found[0] < found[1] < found[2] < 16


def test_the_diversity_of_equal_gradients_is_one_over_their_number_and_of_orthogonal_ones_one():
    g = jnp.array([3.0, 4.0])
    assert float(diversity(5 * jnp.sum(g * g), 5 * g)) == pytest.approx(1 / 5)
    assert float(diversity(jnp.float32(3.0), jnp.ones(3))) == 1
    assert float(diversity(jnp.float32(2.0), jnp.zeros(3))) > 1e6


ADAPT = Adapt(PrecisionSwitching(window=3))
UPDATE = jax.jit(ADAPT.update)


def adapt_run(losses, gradient_of):
    """The bits of each layer in each step, at constant weights."""
    params, seen = normal(0, 0.1), []
    memory, state = ADAPT.init(params, quant(bits=16, fraction_bits=14), jax.random.key(0))
    for step, loss in enumerate(losses):
        signals = Signals(jnp.float32(loss), params, gradient_of(step), jax.random.key(step), jnp.zeros(()))
        memory, state, metrics = UPDATE(memory, state, signals)
        seen.append(by_layer(metrics["bits"]))
    return seen, state


def test_adapt_pushes_down_after_a_window_and_up_when_gradients_cancel():
    cancelling = lambda step: jax.tree.map(lambda leaf: (-1.0) ** step * leaf, normal(3))
    falling = [10.0 * 0.5**step for step in range(12)]
    seen, state = adapt_run(falling, cancelling)
    assert set(seen[0]) == {"layers/0/up", "layers/1/up", "out"}
    assert all(value == 16 for bits in seen[:3] for value in bits.values())
    down = seen[3]
    assert all(2 <= value < 12 for value in down.values()) and all(bits == down for bits in seen[3:])
    # The largest weight is below 2^integer, and integer + fraction + sign is the word.
    words = state["out"]["fwd.w"]
    integer = integer_bits(normal(0, 0.1)["out"]["kernel"].ravel())
    assert float(words["bits"] - 1 - words["fraction_bits"]) == int(integer)

    seen, _ = adapt_run([1.0] * 12, cancelling)
    raised = [{path: bits[path] - down[path] for path in bits} for bits in seen[3:]]
    assert [set(r.values()) for r in raised] == [{0.0}] * 3 + [{1.0}] * 3 + [{2.0}] * 3
    equal = lambda step: normal(3)
    assert adapt_run([1.0] * 12, equal)[0][3:] == [down] * 9


def fliqs_run(search, steps, loss=lambda key: jax.random.normal(key, ())):
    """Metrics of each step, with a loss that depends on nothing, or on no format."""
    recipe = fliqs("searched", ("int4", "int6", "int8"), search.target)
    controller, params = Fliqs(search, recipe), normal(0)
    memory, state = controller.init(params, quant(choice=0), jax.random.key(1))

    def step(carry, given):
        key, progress = given
        signals = Signals(loss(key), params, params, key, progress)
        *carry, metrics = controller.update(*carry, signals)
        return tuple(carry), metrics

    given = jax.random.split(jax.random.key(2), steps), jnp.arange(steps) / steps
    (memory, _), metrics = jax.jit(lambda carry: jax.lax.scan(step, carry, given))((memory, state))
    return memory, metrics


@functools.cache
def search_of_cost_alone(entropy):
    """The cost is all that the reward sees."""
    return fliqs_run(FormatSearch(6, delay=0.05, entropy=entropy), 3000, lambda key: jnp.float32(2.0))


def test_the_search_ends_at_the_target_without_entropy():
    memory, metrics = search_of_cost_alone(0.5)
    assert abs(float(metrics["format_cost"][-1]) - 1) < 0.05
    assert float(metrics["format_entropy"][0]) == pytest.approx(np.log(3), rel=1e-5)
    assert float(metrics["format_entropy"][-1]) < 0.02
    assert int(memory.steps) == 0.95 * 3000


def test_without_a_weight_the_entropy_stays():
    _, metrics = search_of_cost_alone(0.0)
    assert float(metrics["format_entropy"][-1]) > 0.1


def test_formats_are_drawn_uniformly_before_the_search():
    """12000 draws of three formats: a share is off by less than 5 sqrt(2/9/12000) = .022."""
    _, metrics = fliqs_run(FormatSearch(6, delay=0.999), 4000)
    bits = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(metrics["bits"])])
    for value in (4, 6, 8):
        assert np.mean(bits == value) == pytest.approx(1 / 3, abs=0.022)
    untaught = lambda delay: all(
        bool(jnp.all(leaf == 0.5)) for leaf in jax.tree.leaves(fliqs_run(FormatSearch(6, delay=delay), 4)[0].logits)
    )
    # The first step of the search has no average of rewards to compare with.
    assert untaught(0.75) and not untaught(0.5)


def test_the_reward_and_the_cost_of_a_draw():
    """Sizes 128, 128 and 32; memory: mean bits by weights; compute: mean squares against the square of the target."""
    for cost, power in (("memory", 1), ("compute", 2)):
        _, metrics = fliqs_run(FormatSearch(6, cost, delay=0.0), 20, lambda key: jnp.float32(2.0))
        stacked, out = (np.asarray(metrics["bits"][name]["0:2"]["up"] if name == "layers" else metrics["bits"][name])
                        for name in ("layers", "out"))  # fmt: skip
        mean = (128 * stacked[:, 0] ** power + 128 * stacked[:, 1] ** power + 32 * out**power) / 288
        np.testing.assert_allclose(metrics["format_reward"], -2 - np.abs(mean / 6**power - 1), rtol=1e-5)


def test_controllers_by_recipe():
    assert build_controller(recipes.get("bf16")) is None
    assert isinstance(build_controller(recipes.get("adapt")), Adapt)
    assert isinstance(build_controller(recipes.get("fliqs_6")), Fliqs)
    with pytest.raises(UsageError, match="formats of 4 to 8 bits do not cost 3 bits a value"):
        Fliqs(FormatSearch(3), recipes.get("fliqs_6"))
