"""Saved activations: what is kept of an input, what it restores to, and the bytes and gradients that follow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.ops import GemmRule, initial_variables, next_state, qconv, qdot, qragged_dot
from lowprec.ops.saved import Codes, Exact, Recompute, RunningUint8, Stored, saved
from lowprec.quantizers import EXACT, REUSE, AbsMax, ClampQuantiles, Quantizer

FP8 = Stored("e4m3fn@1x16/bf16", scale=AbsMax(offset=1e-10))
MESA = RunningUint8()
KEY = jax.random.key(7)


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def rms_norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


# --- fp8 in groups of 16 (COAT)


def test_e4m3_in_groups_of_16_loses_at_most_the_published_error():
    x = normal(512, 1024)
    restored = FP8.restore(FP8.save(x))
    assert float(jnp.mean((restored - x) ** 2) / jnp.mean(x**2)) < 6e-4  # COAT on N(0, 1)


def test_coats_scale_is_that_of_its_formula():
    x = np.asarray(normal(4, 32, scale=1e-9))  # where 1e-10 is no small thing
    amax = np.abs(x).reshape(4, 2, 16).max(-1)
    expected = ((amax + np.float32(1e-10)) / np.float32(448)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(FP8.save(jnp.asarray(x)).tensor.scales, expected)


@pytest.mark.parametrize(
    ("policy", "bytes_a_value"),
    [(FP8, 1 + 2 / 16), (Stored("e2m1fn@1x32/e8m0.floor"), 0.5 + 1 / 32), (RunningUint8(groups=4), 1 + 32 / 2048)],
)
def test_what_is_kept_takes_the_bytes_of_its_format(policy, bytes_a_value):
    kept = policy.save(normal(16, 128), KEY)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == 2048 * bytes_a_value


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("policy", [FP8, MESA, RunningUint8(groups="heads"), Exact()], ids=str)
def test_an_input_is_restored_in_its_shape_and_dtype(policy, dtype):
    x = normal(2, 3, 4, 32).astype(dtype)
    restored = policy.restore(policy.save(x, KEY))
    assert (restored.shape, restored.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(restored.astype(jnp.float32), x.astype(jnp.float32), atol=0.25)


def test_the_gradient_of_a_norm_from_restored_inputs_is_within_3_percent():
    x, gain, dy = normal(256, 128), 1 + normal(128, seed=1, scale=0.1), normal(256, 128, seed=2)
    plain = jax.vjp(rms_norm, x, gain)[1](dy)
    found = jax.jit(lambda x, gain, dy: jax.vjp(saved(rms_norm, FP8, Exact()), x, gain)[1](dy))(x, gain, dy)
    for ours, theirs in zip(found, plain, strict=True):
        assert float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) < 0.03


# --- uint8 in running ranges (Mesa)


def state_of(low, high):
    return {"range": jnp.float32([high - low]), "shift": jnp.float32([low]), "steps": jnp.float32(1)}


def test_stochastic_codes_are_unbiased_inside_the_range_and_of_small_variance():
    draws, step = 4096, 6 / 255
    x = jnp.linspace(-1.9, 3.9, 101)
    save = lambda key: MESA.restore(MESA.save(x, key, state_of(-2.0, 4.0)))
    restored = np.asarray(jax.vmap(save)(jax.random.split(KEY, draws)), np.float64)
    # The variance of rounding to one of two neighbours is at most step² / 4: four standard errors of the mean.
    assert np.all(np.abs(restored.mean(0) - np.asarray(x)) <= 4 * step / (2 * draws**0.5))
    # Rounding of the values themselves to float32 comes on top.
    assert np.all(restored.var(0) <= step**2 / 4 * (1 + 1e-4))


def test_values_beyond_the_range_clamp_on_both_sides():
    x = jnp.float32([-100.0, -2.1, 4.1, 4.5, 100.0, 1e30])
    kept = MESA.save(x, KEY, state_of(-2.0, 4.0))
    np.testing.assert_array_equal(kept.codes, [0, 0, 255, 255, 255, 255])
    np.testing.assert_allclose(MESA.restore(kept), [-2, -2, 4, 4, 4, 4], atol=1e-6)


def test_running_ranges_are_nine_parts_old_and_one_part_new():
    state, slot = MESA.initial_memory()
    assert slot.shape == (3,)
    low = spread = None
    for step in range(4):
        x = normal(64, seed=step, scale=step + 1)
        state = MESA.next_state(state, MESA.observe(x))
        new_low, new_spread = float(x.min()), float(jnp.ptp(x))
        low = new_low if low is None else 0.9 * low + 0.1 * new_low
        spread = new_spread if spread is None else 0.9 * spread + 0.1 * new_spread
        np.testing.assert_allclose(state["shift"], [low], rtol=1e-5)
        np.testing.assert_allclose(state["range"], [spread], rtol=1e-5)
    for nothing in (jnp.zeros(3), MESA.observe(jnp.float32([1.0, jnp.nan])), MESA.observe(jnp.float32([1, jnp.inf]))):
        jax.tree.map(np.testing.assert_array_equal, MESA.next_state(state, nothing), state)


def test_several_calls_in_a_step_count_with_their_mean():
    x, y = normal(64), normal(64, seed=1, scale=3)
    state, _ = MESA.initial_memory()
    after = MESA.next_state(state, MESA.observe(x) + MESA.observe(y))
    np.testing.assert_allclose(after["shift"][0], (x.min() + y.min()) / 2, rtol=1e-6)


def test_each_group_has_its_range():
    x = jnp.concatenate([normal(5, 8, scale=100), normal(5, 8, seed=1, scale=0.01)], axis=-1)
    for policy, given in ((RunningUint8(groups=2), x), (RunningUint8(groups="heads"), x.reshape(5, 2, 8))):
        restored = policy.restore(policy.save(given, KEY)).reshape(5, 16)
        for part in (slice(0, 8), slice(8, 16)):
            step = float(jnp.ptp(x[:, part])) / 255
            assert float(jnp.max(jnp.abs(restored - x)[:, part])) <= step * 1.001
    state, slot = RunningUint8(groups="heads").initial_memory((5, 2, 8))
    assert (state["range"].shape, slot.shape) == ((2,), (5,))


# --- functions


@pytest.mark.parametrize("policy", [Exact(), Recompute(), FP8, MESA], ids=str)
def test_values_are_those_of_the_function_bit_for_bit(policy):
    x, gain = normal(32, 64), normal(64, seed=1)
    found = jax.jit(lambda x, gain: saved(rms_norm, policy, Exact())(x, gain, key=KEY))(x, gain)
    np.testing.assert_array_equal(found, jax.jit(rms_norm)(x, gain))


@pytest.mark.parametrize("policy", [Exact(), Recompute()], ids=str)
def test_exactly_kept_inputs_give_the_plain_gradient(policy):
    x, gain, dy = normal(32, 64), normal(64, seed=1), normal(32, 64, seed=2)
    gradient = lambda f: jax.jit(lambda x, gain, dy: jax.vjp(f, x, gain)[1](dy))(x, gain, dy)
    for ours, theirs in zip(gradient(saved(rms_norm, policy, Exact())), gradient(rms_norm), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("policy", [FP8, MESA], ids=str)
def test_the_gradient_is_that_at_the_restored_input(policy):
    x, gain, dy = normal(32, 64), normal(64, seed=1), normal(32, 64, seed=2)
    restored = policy.restore(policy.save(x, jax.random.fold_in(KEY, 0)))
    expected = jax.vjp(rms_norm, restored, gain)[1](dy)
    run = lambda x: jax.vjp(lambda x, gain: saved(rms_norm, policy, Exact())(x, gain, key=KEY), x, gain)[1](dy)
    for ours, jitted, theirs in zip(run(x), jax.jit(run)(x), expected, strict=True):
        # Float32 sums over 32 rows of values up to 10, in another order: 32 · 10 · 2^-24 is 2e-5.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
        np.testing.assert_allclose(jitted, theirs, rtol=0, atol=2e-5)


def test_arguments_that_have_no_gradient_pass_through():
    def masked(x, others):
        noise = jax.random.normal(others["key"], x.shape)
        return jnp.where(others["mask"], x * x + noise, 0) * others["factor"]

    others = {"key": KEY, "mask": jnp.arange(32) % 2 == 0, "factor": jnp.float32(3), "none": None}
    loss = lambda x, factor: jnp.sum(saved(masked, FP8, Exact())(x, {**others, "factor": factor}))
    gradient, _ = jax.jit(jax.grad(loss, argnums=(0, 1)))(normal(4, 32), jnp.float32(3))
    np.testing.assert_array_equal(gradient[:, 1::2], 0)
    np.testing.assert_allclose(
        gradient, 6 * jnp.where(others["mask"], FP8.restore(FP8.save(normal(4, 32))), 0), rtol=1e-5
    )


@pytest.mark.parametrize("policy", [FP8, MESA], ids=str)
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_recomputed_layers_have_the_gradients_of_a_loop(policy, remat):
    gains, x = 1 + normal(3, 64, scale=0.1), normal(8, 64)
    layer = lambda x, gain, key: x + saved(rms_norm, policy, Exact())(x, gain, key=key)
    keys = jax.random.split(KEY, 3)

    def looped(gains):
        y = x
        for gain, key in zip(gains, keys, strict=True):
            y = layer(y, gain, key)
        return jnp.sum(y**2)

    def scanned(gains):
        body = lambda y, given: (layer(y, *given), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(body) if remat else body, x, (gains, keys))[0] ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(gains), jax.grad(looped)(gains), rtol=2e-5, atol=1e-4)


def temporary_bytes(function, *arguments):
    return jax.jit(jax.grad(function)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("policy", "ratio"), [(FP8, 0.5), (MESA, 0.5), (Recompute(), 0.7)], ids=str)
def test_the_compiled_gradient_of_scanned_norms_takes_fewer_bytes(policy, ratio):
    """The bytes of 16 layers between the passes outweigh what one of them works with."""
    gains, x = jnp.ones((16, 256)), normal(256, 256)

    def loss(gains, function):
        body = lambda y, gain: (y + function(y, gain), None)
        return jnp.sum(jax.lax.scan(body, x, gains)[0])

    keeping = lambda y, gain: saved(rms_norm, policy, Exact())(y, gain, key=KEY)
    plain, found = (temporary_bytes(lambda g, f=f: loss(g, f), gains) for f in (rms_norm, keeping))
    assert found < ratio * plain


# --- products

TENSOR = Quantizer("e4m3fn@tensor")
REUSING = GemmRule(fwd=(TENSOR, TENSOR), dgrad=(Quantizer("e5m2@tensor"), REUSE), wgrad=(REUSE, REUSE))
X, W = normal(32, 64), normal(64, 48, seed=1, scale=0.1)


def backward(rule, backend="auto"):
    """y, dx, dw, what was observed, and the bytes kept beside the weights."""
    variables = initial_variables(X, W, rule)

    def run(x, w, slots):
        return qdot(x, w, rule, key=KEY, variables=variables._replace(slots=slots), backend=backend)

    y, pullback = jax.jit(lambda x, w: jax.vjp(run, x, w, variables.slots))(X, W)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended))
    return y, *pullback(jnp.cos(y)), kept - W.nbytes


@pytest.mark.parametrize("rule", [GemmRule(), GemmRule(fwd=(TENSOR, TENSOR))], ids=["exact", "fp8"])
@pytest.mark.parametrize("policy", [FP8, MESA, RunningUint8(groups=4), Recompute(), Exact()], ids=str)
def test_only_the_gradient_of_the_weights_sees_how_x_was_kept(rule, policy):
    y, dx, dw, _, plain_bytes = backward(rule)
    y_saved, dx_saved, dw_saved, seen, kept_bytes = backward(replace(rule, saved=policy))
    np.testing.assert_array_equal(y_saved, y)
    np.testing.assert_array_equal(dx_saved, dx)
    error = float(jnp.linalg.norm(dw_saved - dw) / jnp.linalg.norm(dw))
    if isinstance(policy, (Exact, Recompute)):
        assert error == 0
        assert kept_bytes == plain_bytes
    else:
        assert 1e-3 < error < 0.04
        assert kept_bytes < 0.3 * plain_bytes
    assert set(seen) == ({"saved.x"} if isinstance(policy, RunningUint8) else set())


def test_the_running_range_of_a_product_is_that_of_its_x():
    rule = GemmRule(saved=RunningUint8(groups=2))
    variables = initial_variables(X, W, rule)
    *_, seen, _ = backward(rule)
    state = next_state(rule, variables.state, seen)["saved.x"]
    np.testing.assert_allclose(state["shift"], X.reshape(32, 2, 32).min((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(state["range"], jnp.ptp(X.reshape(32, 2, 32), axis=(0, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "bytes_a_value"),
    [
        ("e4m3fn@tensor", 1),
        ("int8@row", 1),
        ("e3m4_ieee@tensor", 1),
        ("e2m1fn@1x16/e4m3fn.tensor", 0.5),
        ("int4@row", 0.5),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "emulate"])
def test_codes_change_no_gradient_and_take_the_bytes_of_their_elements(x, bytes_a_value, backend):
    rule = replace(REUSING, fwd=(Quantizer(x), EXACT))
    (*plain, _, plain_bytes), (*found, _, kept_bytes) = (
        backward(rule, backend),
        backward(replace(rule, saved=Codes()), backend),
    )
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    scales = 4 * {"row": 32, "tensor": 1}.get(str(rule.fwd[0].format.block), 32 * 4 + 1)
    assert kept_bytes <= X.size * bytes_a_value + scales <= plain_bytes or x == "int8@row"


@pytest.mark.parametrize(
    "rule", [GemmRule(), GemmRule(fwd=(Quantizer("mxfp8", pad=True),) * 2)], ids=["exact", "mxfp8"]
)
@pytest.mark.parametrize("policy", [FP8, MESA, Recompute()], ids=str)
def test_convolutions_keep_their_images(rule, policy):
    x, w = normal(2, 6, 6, 16), normal(3, 3, 16, 4, seed=1)

    def run(rule):
        variables = initial_variables(x, w, rule, (((3,), (2,)), ((), ())))

        def product(x, w, slots):
            given = variables._replace(slots=slots)
            options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            return qconv(x, w, rule, key=KEY, variables=given, **options)

        y, pullback = jax.vjp(product, x, w, variables.slots)
        return y, *pullback(jnp.cos(y))

    (y, dx, dw, _), (y_saved, dx_saved, dw_saved, seen) = run(rule), run(replace(rule, saved=policy))
    np.testing.assert_array_equal(y_saved, y)
    np.testing.assert_allclose(dx_saved, dx, rtol=1e-5, atol=1e-5)
    assert float(jnp.linalg.norm(dw_saved - dw) / jnp.linalg.norm(dw)) < 0.04
    assert set(seen) == ({"saved.x"} if policy is MESA else set())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunningUint8(groups="head"), "'heads' or a number of parts, not 'head'"),
        (lambda: RunningUint8(groups=0), "not 0"),
        (lambda: RunningUint8(decay=1.0), r"lies in \[0, 1\), not 1.0"),
        (lambda: Stored("e4m3@1x16"), "ambiguous"),
        (lambda: FP8.save(normal(4, 20)), "blocks of 16 do not divide axis 1"),
        (lambda: RunningUint8(groups=3).save(normal(4, 20), KEY), "3 groups do not divide"),
        (lambda: MESA.save(X), r"rngs=\{'quant': key\}"),
        (lambda: saved(rms_norm, FP8)(X, W), "2 arguments has 1 policies"),
        (lambda: GemmRule(saved="fp8"), "policy of ops.saved"),
        (lambda: GemmRule(saved=Codes()), "only where wgrad reuses or requantizes"),
        (lambda: GemmRule(fwd=(TENSOR, TENSOR), saved=Codes()), "only where wgrad reuses or requantizes"),
        (lambda: replace(REUSING, saved=FP8), "not the original"),
        (lambda: GemmRule(saved=RunningUint8(groups="heads")), "no heads"),
        (
            lambda: replace(
                REUSING, fwd=(Quantizer("e4m3fn@tensor", clamp=ClampQuantiles(0.99)), TENSOR), saved=Codes()
            ),
            "keeps a part in high precision",
        ),
        (lambda: qdot(X, W, GemmRule(saved=MESA), key=KEY), "saved.x .* pass `variables`"),
        (lambda: qragged_dot(X, W[None], jnp.array([32]), GemmRule(saved=FP8)), "keeps x as its products take it"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
