"""The memory report against bytes that can be counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.step_memory import step_memory as measure
from lowprec.analysis.memory import MemoryReport, memory_report, saved_bytes, tree_bytes
from lowprec.models import ModelConfig
from lowprec.optim.sparse_update import Selection

step_memory = partial(measure, ModelConfig(layers=2, width=16, heads=2, mlp_width=24), tokens=(2, 8))
PARAMS = {"a": jax.ShapeDtypeStruct((64, 128), jnp.float32), "b": jax.ShapeDtypeStruct((128, 32), jnp.float32)}
INPUTS = jax.ShapeDtypeStruct((256, 64), jnp.float32)
ADAM = optax.adam(0.1)


def loss(params, x):
    return jnp.sum(jnp.exp(x @ params["a"]) @ params["b"])


def step(state, x):
    params, moments = state
    updates, moments = ADAM.update(jax.grad(loss)(params, x), moments)
    return optax.apply_updates(params, updates), moments


def report(step):
    moments = jax.eval_shape(ADAM.init, PARAMS)
    return memory_report(
        jax.jit(step, donate_argnums=0).lower((PARAMS, moments), INPUTS).compile(),
        loss=loss,
        trained=PARAMS,
        others=(INPUTS,),
        parts={"parameters": PARAMS, "optimizer state": moments},
    )


def test_what_the_step_is_given_is_counted_to_the_byte():
    found = report(step)
    weights = 4 * (64 * 128 + 128 * 32)
    assert found.parts == {"parameters": weights, "optimizer state": 2 * weights + 4}
    assert found.gradients == weights
    assert found.arguments == 3 * weights + 4 + 4 * 256 * 64
    # State takes the place of state; a few bytes are those of the tuple that holds it.
    assert found.aliased == 3 * weights + 4
    assert 0 <= found.outputs - found.aliased <= 256
    assert found.peak == found.arguments + found.outputs - found.aliased + found.temporary


def test_what_is_saved_is_what_the_chain_rule_reads():
    """exp keeps its value, and so does the product after it: one array of 256 x 128, the input is there anyway."""
    assert saved_bytes(loss, PARAMS, INPUTS) == 4 * 256 * 128
    remat = jax.checkpoint(loss)
    assert saved_bytes(remat, PARAMS, INPUTS) == 0


@pytest.mark.parametrize(("pattern", "saved"), [("b", 4 * 256 * 128), (".*", 4 * 256 * 128)])
def test_a_sparse_update_saves_what_its_gradients_read(pattern, saved):
    selection = Selection((pattern,))
    shapes = jax.eval_shape(lambda params: selection.split(params)[0], PARAMS)
    sparse = lambda trained, params, x: loss(selection.join(trained, params), x)
    assert saved_bytes(sparse, shapes, PARAMS, INPUTS) == saved


def test_the_temporary_holds_the_activations_that_are_saved():
    found = report(step)
    assert found.temporary >= found.saved == 4 * 256 * 128


def test_the_table_adds_up():
    found = MemoryReport({"parameters": 600}, 600, 250, 700, 650, 600, 250)
    assert found.peak == 1000
    lines = found.table().splitlines()
    assert lines[0].split() == ["|", "memory", "|", "bytes", "|", "of", "the", "peak", "|"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *("parameters", "gradients", "saved activations", "arguments (compiled)"),
        *("outputs, not in place", "temporary (compiled)", "peak"),
    ]
    assert "| 1,000 |" in lines[-1] and "100.0%" in lines[-1]


def test_a_sparse_update_of_a_llama_needs_less_of_everything():
    full = step_memory(recipe="int8", patterns=(".*",))
    some = step_memory(recipe="int8", patterns=("final_norm/.*", "head/.*"))
    assert full.parts["parameters"] == some.parts["parameters"]
    assert full.parts["optimizer state"] == 2 * full.parts["parameters"] + 4
    assert some.gradients == 4 * (16 + 16 * 64)
    assert some.parts["optimizer state"] == 2 * some.gradients + 4
    # No layer has a backward pass: nothing of theirs is saved.
    assert some.saved < 0.2 * full.saved
    assert some.peak < 0.7 * full.peak


def test_keys_are_no_memory_of_a_step():
    assert tree_bytes({"key": jax.random.key(0), "w": jnp.zeros(3)}) == 12
