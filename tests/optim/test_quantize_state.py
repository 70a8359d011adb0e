"""Any transformation of Optax with its state in few bits: what is stored, with what it composes, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.optim.adam import adamw, scale_by_adam
from lowprec.optim.fused import fused_step
from lowprec.optim.labels import chain, elementwise
from lowprec.optim.quantize_state import quantize_state
from lowprec.optim.state_tensor import is_stored, leaf_key, load, store

MU, NU = "cmp8@128", "log8(stochastic)"
NEAREST = {"mu": "cmp8@128", "nu": "log8", "min_size": 256}
STORED = {"mu": MU, "nu": NU, "min_size": 256}
RATE = 1e-2
# Bits are compared here, not speed.
QUICKLY = {"xla_backend_optimization_level": 0}


def tree(seed=0, dtype=jnp.float32):
    """A matrix, one whose name keeps it in float32, a small one and a scalar."""
    draw = np.random.default_rng(seed)
    shapes = {"w": (8, 160), "embed": {"table": (8, 160)}, "bias": (7,), "gain": ()}
    return jax.tree.map(
        lambda s: jnp.asarray(draw.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def run(optimizer, steps=4, params=None, gradient=tree):
    """Updates of all steps and the last state; gradients do not depend on the parameters."""
    params = tree() if params is None else params
    update, state, found = jax.jit(optimizer.update, compiler_options=QUICKLY), optimizer.init(params), []
    for step in range(steps):
        updates, state = update(gradient(step + 1), state, params)
        found.append(updates)
    return found, state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    """Up to the last places, which depend on what XLA fuses in a program."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), a, b)


def moments(state):
    """The stored leaves alone, by order."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=is_stored) if is_stored(leaf)]


def stored_fields(state):
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_stored)
    field = lambda path: next(entry.name for entry in reversed(path) if hasattr(entry, "name"))
    return [(field(path), path[-1].key, str(leaf.fmt)) for path, leaf in leaves if is_stored(leaf)]


INNERS = {
    "adam": (optax.adam(RATE), [("mu", MU), ("nu", NU)]),
    "adafactor": (optax.adafactor(RATE, min_dim_size_to_factor=1024), [("v", NU)]),
    "adafactor_factored": (optax.adafactor(RATE, min_dim_size_to_factor=4), []),
    "lion": (optax.lion(RATE), [("mu", MU)]),
    "sgd_momentum": (optax.sgd(RATE, momentum=0.9), [("trace", MU)]),
    "adamax": (optax.adamax(RATE), [("mu", MU), ("nu", NU)]),
    "muon": (optax.contrib.muon(RATE), [("mu", MU)]),
    "adagrad": (optax.adagrad(RATE), [("sum_of_squares", NU)]),
}


@pytest.mark.parametrize("name", INNERS)
def test_any_transformation_is_loaded_updated_and_stored(name):
    """Against the second update by hand: of loaded moments, each stored with the noise of (step, path, field)."""
    inner, fields = INNERS[name]
    optimizer, params = quantize_state(inner, **STORED), tree()
    assert stored_fields(optimizer.init(params)) == [(field, "w", fmt) for field, fmt in fields]
    (_, found), state = run(optimizer, 2)
    _, first = run(optimizer, 1)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def by_hand(state, gradients):
        leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_stored)
        loaded = structure.unflatten([load(leaf) if is_stored(leaf) else leaf for _, leaf in leaves])
        updates, new = optax.with_extra_args_support(inner).update(gradients, loaded, params)
        stored = [
            store(x, old.fmt, leaf_key(0, 2, "w", path[-2].name)) if is_stored(old) else x
            for (path, old), x in zip(leaves, structure.flatten_up_to(new), strict=True)
        ]
        return updates, structure.unflatten(stored)

    updates, expected = by_hand(first.inner, tree(2))
    # XLA fuses the two programs otherwise: floats may differ in the last places, and then a code by one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), found, updates)
    for ours, hand in zip(moments(state), moments(expected), strict=True):
        assert np.mean(np.asarray(ours.codes) != np.asarray(hand.codes)) <= 0.002


def test_the_bits_are_those_of_our_adam_with_the_same_formats():
    ours = adamw(RATE, mu_format=MU, nu_format=NU, min_size=256, skip=r"embed.*", seed=3)
    wrapped = quantize_state(adamw(RATE), mu=MU, nu=NU, min_size=256, skip=r"embed.*", seed=3)
    (first, state), (second, other) = run(ours, 6), run(wrapped, 6)
    same(first, second)
    same(state, other.inner)
    assert len(moments(state)) == 2


def test_noise_depends_on_the_seed():
    codes = [moments(run(quantize_state(optax.adam(RATE), **STORED, seed=seed))[1])[1].codes for seed in (0, 0, 1)]
    assert np.array_equal(codes[0], codes[1]) and not np.array_equal(codes[0], codes[2])


def test_two_fields_of_one_name_have_noise_of_their_own():
    """Two moments of the same values, in which equal noise would give equal codes."""
    rms = optax.scale_by_rms()
    constant = jax.tree.map(lambda w: jnp.where(w > 0, 1.0, 0.7), tree())
    seen_again = optax.GradientTransformation(rms.init, lambda updates, state, params: rms.update(constant, state))
    _, state = run(quantize_state(optax.chain(rms, seen_again), **STORED), 1, gradient=lambda _: constant)
    first, second = moments(state)
    same(first.scales, second.scales)
    assert np.mean(np.asarray(first.codes) != np.asarray(second.codes)) > 0.2


def test_chain():
    clip = optax.clip_by_global_norm(1.0)
    same(
        run(optax.chain(clip, quantize_state(optax.adam(RATE), **STORED)))[0],
        run(quantize_state(optax.chain(clip, optax.adam(RATE)), **STORED))[0],
    )


def test_masked():
    mask = {"w": True, "embed": {"table": False}, "bias": True, "gain": False}
    outside, state = run(optax.masked(quantize_state(optax.adam(RATE), **STORED), mask))
    same(outside, run(quantize_state(optax.masked(optax.adam(RATE), mask), **STORED))[0])
    same([u["w"] for u in outside], [u["w"] for u in run(quantize_state(optax.adam(RATE), **STORED))[0]])
    same([u["embed"] for u in outside], [tree(step)["embed"] for step in range(1, 5)])
    assert len(moments(state)) == 2


def test_partition():
    labels = {"w": "adam", "embed": {"table": "sgd"}, "bias": "adam", "gain": "sgd"}
    adam, sgd = optax.adam(RATE), optax.sgd(RATE, momentum=0.9)
    inside = run(optax.partition({"adam": quantize_state(adam, **STORED), "sgd": sgd}, labels))
    outside = run(quantize_state(optax.partition({"adam": adam, "sgd": sgd}, labels), **STORED))
    same(inside[0], outside[0])
    assert len(moments(inside[1])) == len(moments(outside[1])) == 2


def test_multi_steps():
    """Each gradient twice: their mean is exact, so that two small steps are one of the optimizer by itself."""
    expected = run(quantize_state(optax.adam(RATE), **NEAREST), 2)[0]
    twice = lambda step: tree((step + 1) // 2)
    wrapped = optax.MultiSteps(quantize_state(optax.adam(RATE), **NEAREST), 2).gradient_transformation()
    around = quantize_state(optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(), **NEAREST)
    for optimizer in (wrapped, around):
        found, state = run(optimizer, 4, gradient=twice)
        close(found[1::2], expected)
        assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(found[0::2]))
        assert len(moments(state)) == 2


def test_inject_hyperparams():
    expected = run(quantize_state(optax.adam(RATE), **STORED))[0]
    inside = optax.inject_hyperparams(lambda learning_rate: quantize_state(optax.adam(learning_rate), **STORED))
    found, state = run(inside(learning_rate=RATE))
    same(found, expected)
    around = quantize_state(optax.inject_hyperparams(optax.adam)(learning_rate=RATE), **STORED)
    found, other = run(around)
    close(found, expected)
    # The rate is a number in the state, and can be changed there.
    state.hyperparams["learning_rate"] = jnp.float32(0)
    assert float(optax.global_norm(inside(learning_rate=RATE).update(tree(9), state, tree())[0])) == 0
    assert len(moments(state)) == len(moments(other)) == 2


def test_apply_if_finite():
    """A step with a NaN in it leaves every bit of the state as it was."""
    optimizer = optax.apply_if_finite(quantize_state(optax.adam(RATE), **STORED), max_consecutive_errors=3)
    _, before = run(optimizer, 2)
    bad = tree(3) | {"bias": jnp.full((7,), jnp.nan)}
    updates, after = jax.jit(optimizer.update)(bad, before, tree())
    assert float(optax.global_norm(updates)) == 0
    same(before.inner_state, after.inner_state)


def test_parts_of_a_chain_can_be_fused():
    rule = quantize_state(elementwise(optax.scale_by_adam()), **STORED)
    optimizer = chain(rule, elementwise(optax.scale_by_learning_rate(RATE)))
    fused, params, state = fused_step(optimizer, chunk=320), tree(), optimizer.init(tree())
    moved, new = jax.jit(fused.step)(params, tree(1), state)
    updates, expected = jax.jit(optimizer.update)(tree(1), state, params)
    same(new, expected)
    close(moved, optax.apply_updates(params, updates))


def test_moments_do_not_follow_bfloat16_parameters():
    """Nor does the arithmetic: state and updates are those of float32 copies of the same parameters and gradients."""
    narrow, wide = (lambda step, cast=cast: jax.tree.map(cast, tree(step, jnp.bfloat16)) for cast in (_same, _wide))
    optimizer = quantize_state(optax.adamw(RATE), **STORED)
    (found, state), (expected, other) = run(optimizer, 3, narrow(0), narrow), run(optimizer, 3, wide(0), wide)
    close(found, expected)
    assert all(
        np.mean(np.asarray(a.codes) != b.codes) < 0.002 for a, b in zip(moments(state), moments(other), strict=True)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {
        np.dtype(t) for t in ("float32", "uint8")
    } | {jnp.dtype("bfloat16")}  # codes, and the scales of cmp8


def _same(w):
    return w


def _wide(w):
    return w.astype(jnp.float32)


def test_formats_go_by_field_and_path():
    nu = {r"embed/.*": "log8", r"w": "log4@32"}
    optimizer = quantize_state(optax.adam(RATE), mu=None, nu=nu, default="bf16", min_size=1, skip=None)
    assert stored_fields(optimizer.init(tree())) == [("nu", "table", "log8"), ("nu", "w", "log4@32")]
    accumulating = optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation()
    state = quantize_state(accumulating, mu=None, nu=None, default={"w": "bf16"}, min_size=1).init(tree())
    assert {path: leaf.dtype for path, leaf in state.inner.acc_grads.items() if path != "embed"} == {
        "w": jnp.bfloat16, "bias": jnp.float32, "gain": jnp.float32
    }  # fmt: skip


def test_arrays_are_formats_too():
    state = run(quantize_state(optax.adam(RATE), mu="bf16", nu="f32", min_size=256))[1]
    adam = state.inner[0]
    assert (adam.mu["w"].dtype, adam.nu["w"].dtype, adam.mu["bias"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_initial_moments_that_are_zeros_are_not_encoded():
    text = lambda inner: str(jax.make_jaxpr(quantize_state(inner, **STORED).init)(tree()))
    assert "reduce" not in text(optax.adam(RATE))
    assert "reduce" in text(optax.adagrad(RATE))  # 0.1: each block has a largest value
    state = quantize_state(optax.adagrad(RATE), mu=None, nu="log8", min_size=256).init(tree())
    np.testing.assert_allclose(load(moments(state)[0]), 0.1, rtol=1e-6)


def test_optax_finds_its_way_in_the_state():
    optimizer, params = quantize_state(optax.adam(RATE), **STORED), tree()
    state = optimizer.init(params)
    assert is_stored(optax.tree_utils.tree_get(state, "nu")["w"])
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    named = optax.tree_map_params(
        optimizer, lambda _, name: name, state, names, transform_non_params=lambda _: None, is_leaf=is_stored
    )
    assert named.inner[0].mu == named.inner[0].nu == names


def test_the_second_step_is_not_compiled_again():
    optimizer, params = quantize_state(optax.adam(RATE), **STORED), tree()
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in (1, 2, 3):
        _, state = update(tree(step), state, params)
    assert update._cache_size() == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="unknown state format 'de9'"):
        quantize_state(optax.adam(RATE), mu="de9")
    with pytest.raises(UsageError, match=r"'\(embed' is not a regular expression"):
        quantize_state(optax.adam(RATE), mu={"(embed": "de8"})
    with pytest.raises(UsageError, match="log8"):
        quantize_state(optax.adam(RATE), mu="log8")
    twice = quantize_state(scale_by_adam(mu_format="de8", min_size=256), mu="de4", min_size=256)
    with pytest.raises(UsageError, match="mu/w is stored by the inner transformation, as de8"):
        twice.init(tree())


def test_a_state_in_another_format_is_refused():
    of = lambda nu: quantize_state(optax.adam(RATE), mu=None, nu=nu, min_size=256)
    with pytest.raises(UsageError, match=r"nu/w is stored as de8, and this optimizer stores it as log8: optim.convert"):
        of("log8").update(tree(), of("de8").init(tree()))
    with pytest.raises(UsageError, match=r"nu/w is stored as an array, and this optimizer stores it as log8"):
        of("log8").update(tree(), of("f32").init(tree()))
