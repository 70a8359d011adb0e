"""Whose variables go on where a ramp begins and ends, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.training.ramps import off_ramp, onto_ramp
from lowprec.training.state import Quantizers


def layers(start, stop, **leaves):
    """A run of a stack: each layer has its number, times the given factor."""
    numbers = jnp.arange(start, stop, dtype=jnp.float32)
    return {f"{start}:{stop}": {"up": {"fwd.w": {name: size * numbers for name, size in leaves.items()}}}}


def fresh(tree):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, -1), tree)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_ramp_takes_what_was_learned_whatever_the_runs():
    """Layers 1 to 3 learned, and the ramp treats the last one otherwise than those before."""
    old = {"layers": layers(1, 4, step=10.0)}
    ramp = {"layers": {**layers(1, 3, before_step=10.0, step=0.0), **layers(3, 4, before_step=10.0)}}
    new = {"layers": {**fresh(layers(0, 1, step=0.0)), **fresh(ramp["layers"])}}
    expected = {"layers": {**fresh(layers(0, 1, step=0.0)), **ramp["layers"]}}
    expected["layers"]["1:3"]["up"]["fwd.w"]["step"] = jnp.full(2, -1.0)
    assert_equal(onto_ramp(Quantizers(params=new), Quantizers(params=old)).params, expected)
    # Where it ends, layers 0 and 1 are one run, and what the recipe before had learned is gone.
    ramp = {"layers": {**layers(0, 1, step=2.0), **layers(1, 3, before_step=10.0, step=2.0)}}
    after = {"layers": layers(0, 2, step=2.0)}
    assert_equal(off_ramp(Quantizers(params=fresh(after)), Quantizers(params=ramp)).params, after)


def test_gradients_are_those_of_the_recipe_before_until_the_end():
    dy, x = {"dgrad.dy": {"scale": jnp.float32(4)}}, {"fwd.x": {"scale": jnp.float32(5)}}
    old = {"up": {**dy, **x}}
    ramp = {"up": {**fresh(dy), "fwd.x": {"blend_steps": jnp.float32(0), "before_scale": -jnp.ones(()), "low": 7.0}}}
    begun = onto_ramp(Quantizers(state=ramp), Quantizers(state=old)).state
    assert begun["up"]["dgrad.dy"] == dy["dgrad.dy"]
    assert begun["up"]["fwd.x"] == {"blend_steps": 0, "before_scale": 5, "low": 7}
    ended = off_ramp(Quantizers(state={"up": {**fresh(dy), "fwd.x": {"low": -1.0}}}), Quantizers(state=begun)).state
    assert ended == {"up": {**fresh(dy), "fwd.x": {"low": 7}}}


def test_moments_and_counts_of_what_is_learned_go_on():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
    learned, both = (
        {"up": {"fwd.w": {"step": jnp.ones(2)}}},
        {"up": {"fwd.w": {"before_step": jnp.ones(2), "step": jnp.ones(2)}}},
    )
    _, trained = optimizer.update(learned, optimizer.init(learned))
    old, new = Quantizers(learned, trained), Quantizers(both, optimizer.init(both))
    adam, schedule = onto_ramp(new, old).opt_state
    assert int(adam.count) == int(schedule.count) == 1
    of_up = adam.mu["up"]["fwd.w"]
    assert np.all(of_up["before_step"] == trained[0].mu["up"]["fwd.w"]["step"]) and not np.any(of_up["step"])
    assert_equal(onto_ramp(new, old, reset=True).opt_state, new.opt_state)
    # A recipe that learned nothing has left nothing.
    assert_equal(onto_ramp(new, Quantizers()), new)
    onward = off_ramp(Quantizers(learned, optimizer.init(learned)), Quantizers(both, (adam, schedule)))
    assert int(onward.opt_state[0].count) == 1 and not np.any(onward.opt_state[0].mu["up"]["fwd.w"]["step"])
