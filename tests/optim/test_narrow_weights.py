"""Weights in few bits without a float32 copy: against float32, float64 and what rounding in expectation must give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import quantize
from lowprec.errors import UsageError
from lowprec.formats import format_of, value_table
from lowprec.optim.kahan import kahan
from lowprec.optim.narrow_weights import export_fp32
from lowprec.optim.quantized_weights import dense, dense_weights, quantize_weights
from lowprec.optim.split_floats import join, split
from lowprec.optim.split_weights import split_weights
from lowprec.optim.stochastic_weights import apply_updates, with_stochastic_rounding

KEY = jax.random.key(0)


def after(tx, params, gradient, steps):
    """Parameters and state after so many updates by `optax.apply_updates`."""

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda params, state: jax.lax.fori_loop(0, steps, step, (params, state)))(params, tx.init(params))


def thousand_small_steps(wrap, size=4096):
    params = {"w": jnp.ones(size, jnp.bfloat16)}
    params, state = after(wrap(optax.sgd(1e-4)), params, lambda params: {"w": jnp.ones(size)}, 1000)
    assert params["w"].dtype == jnp.bfloat16
    return np.asarray(params["w"], np.float64), params, state


def test_nearest_bfloat16_does_not_move_by_a_thousand_small_steps():
    assert np.all(thousand_small_steps(lambda tx: tx)[0] == 1)


def test_stochastic_rounding_moves_on_average_as_far_as_real_numbers():
    w, _, _ = thousand_small_steps(with_stochastic_rounding)
    assert abs(w.mean() - 0.9) < 4 * 0.02 / np.sqrt(w.size)  # 4 sigma; the spread of a walk of 1000 roundings is 0.02
    assert 0.015 < w.std() < 0.025


def test_kahan_and_splits_keep_what_rounding_takes_away():
    w, params, state = thousand_small_steps(kahan)
    np.testing.assert_allclose(w, 0.9023, atol=1e-4)
    np.testing.assert_allclose(export_fp32(params, state)["w"], 0.9006, atol=1e-4)
    w, params, state = thousand_small_steps(lambda tx: split_weights(tx, 32))
    expected = np.float32(1)
    for _ in range(1000):
        expected = expected - np.float32(1e-4)
    np.testing.assert_array_equal(export_fp32(params, state)["w"], expected)
    np.testing.assert_array_equal(w, np.asarray(jnp.bfloat16(expected), np.float64))
    # An int8 is rounded in each of a thousand steps, by half of 1.6e-5 at most.
    _, params, state = thousand_small_steps(lambda tx: split_weights(tx, 24))
    np.testing.assert_allclose(export_fp32(params, state)["w"], 0.9, atol=1000 * 0.8e-5)


@pytest.mark.parametrize("leading", [0x00, 0x01, 0x7F])
@pytest.mark.parametrize("sign", [0, 1])
def test_splitting_in_32_bits_is_exact_for_all_remainders_and_exponents(sign, leading):
    """All 2^16 low halves of all finite exponents; below the largest leading bits they carry into the exponent."""
    round_trip = jax.jit(lambda bits: join(*split(jax.lax.bitcast_convert_type(bits, jnp.float32))))
    low = np.arange(1 << 16, dtype=np.uint32)
    for fields in np.array_split(np.arange(255, dtype=np.uint32), 5):
        bits = (np.uint32(sign << 31) + (fields << 23) + np.uint32(leading << 16))[:, None] + low
        np.testing.assert_array_equal(np.asarray(round_trip(bits)).view(np.uint32), bits)


def test_split_weights_are_bfloat16_next_to_the_whole_and_stay_nan():
    w = jnp.exp2(jax.random.uniform(KEY, (1 << 16,), minval=-100, maxval=100))
    for bits, error in ((32, 0), (24, 1.6e-5)):
        narrow, rest = split(w, bits)
        assert rest.dtype == {24: jnp.int8, 32: jnp.int16}[bits]
        np.testing.assert_allclose(np.asarray(narrow, np.float64), w, rtol=2.0**-8)
        np.testing.assert_allclose(join(narrow, rest), w, rtol=error)
        assert jnp.isnan(join(*split(jnp.float32(jnp.nan), bits)))


def problem():
    """Least squares with 4096 weights, of unit size, from inputs of unit size: its loss and its gradient."""
    truth = jax.random.normal(jax.random.key(1), (64, 64)) / 8
    x = jax.random.normal(jax.random.key(2), (256, 64))
    loss = lambda params: jnp.mean((x @ (params["layer"]["kernel"].astype(jnp.float32) - truth)) ** 2)
    return truth, loss, jax.grad(loss)


def test_split_weights_train_as_float32_weights_seen_through_bfloat16_bit_for_bit():
    _, _, gradient = problem()
    tx = optax.adamw(1e-2)
    start = {"layer": {"kernel": jnp.full((64, 64), 0.5)}}
    narrow = lambda params: jax.tree.map(lambda w: split(w)[0], params)
    seen_narrow = lambda params: jax.tree.map(lambda g: g.astype(jnp.float32), gradient(narrow(params)))
    params, _ = after(tx, start, seen_narrow, 30)
    found, state = after(split_weights(tx), narrow(start), gradient, 30)
    np.testing.assert_array_equal(export_fp32(found, state)["layer"]["kernel"], params["layer"]["kernel"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.inner[0].mu))


@pytest.mark.parametrize(
    ("wrap", "factor"),
    # The mean square of stochastic rounding errors is twice that of nearest ones, and each step makes them anew.
    [(with_stochastic_rounding, 4), (kahan, 2), (split_weights, 2), (lambda tx: split_weights(tx, 24), 2)],
    ids=["stochastic", "kahan", "split", "split24"],
)
def test_bfloat16_weights_converge_to_the_error_of_their_rounding(wrap, factor):
    truth, loss, gradient = problem()
    start = {"layer": {"kernel": jnp.zeros((64, 64), jnp.bfloat16)}}
    tx = optax.adam(optax.linear_schedule(3e-2, 0, 400))
    assert loss(after(wrap(tx), start, gradient, 400)[0]) < factor * loss(
        {"layer": {"kernel": truth.astype(jnp.bfloat16)}}
    )


@pytest.mark.parametrize("fmt", ["int8@row", "e4m3fn@1x32", "int4@1x32"])
def test_quantized_weights_are_trained_in_place_to_the_error_of_their_rounding(fmt):
    truth, loss, gradient = problem()
    params = quantize_weights({"layer": {"kernel": jnp.zeros((64, 64)) + 0.1}}, fmt, ".*")
    tx = dense_weights(optax.adam(optax.linear_schedule(3e-2, 0, 400)))

    def step(i, carry):
        params, state = carry
        updates, state = tx.update(gradient(dense(params)), state, params)
        return apply_updates(params, updates, jax.random.fold_in(KEY, i)), state

    found, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 400, step, c))((params, tx.init(params)))
    assert found["layer"]["kernel"].fmt == params["layer"]["kernel"].fmt
    assert found["layer"]["kernel"].codes.dtype == jnp.uint8
    rounded = quantize_weights({"layer": {"kernel": truth}}, fmt, ".*")
    assert loss(dense(found)) < 5 * loss(dense(rounded))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_a_sum_is_rounded_to_one_of_its_neighbours_by_its_distance(dtype):
    x, fmt = np.float32(1.00123), format_of(jnp.dtype(dtype))
    params = {"w": jnp.zeros(200_000, dtype)}
    w = apply_updates(params, {"w": jnp.full(200_000, x)}, KEY)["w"]
    assert w.dtype == jnp.dtype(dtype)
    values = value_table(fmt)
    low, high = values[values <= x].max(), values[values > x].min()
    assert set(np.unique(np.asarray(w, np.float64))) == {low, high}
    probability = (x - low) / (high - low)
    sigma = (high - low) * np.sqrt(probability * (1 - probability) / w.size)
    assert abs(np.asarray(w, np.float64).mean() - x) < 4 * sigma


def test_sums_that_are_exact_stay_and_those_beyond_the_range_are_as_in_casts():
    updates = {"w": jnp.array([0.5, -3.0, jnp.inf, jnp.nan, 3.3e38, 0.0])}
    params = {"w": jnp.array([1, 1, 1, 1, 3.3e38, -0.25], jnp.bfloat16)}
    w = apply_updates(params, updates, KEY)["w"]
    np.testing.assert_array_equal(w.astype(jnp.float32), [1.5, -2, jnp.inf, jnp.nan, jnp.inf, -0.25])
    w = apply_updates({"w": jnp.ones(3, jnp.float8_e4m3fn)}, {"w": jnp.array([1e4, jnp.inf, -1e4])}, KEY)["w"]
    np.testing.assert_array_equal(w.astype(jnp.float32), [448, jnp.nan, -448])


def test_float32_parameters_become_what_optax_makes_of_them_and_need_no_key():
    params = {"a": jax.random.normal(KEY, (64,)), "b": None, "c": jnp.arange(3)}
    updates = {"a": jax.random.normal(jax.random.key(1), (64,)), "b": None, "c": jnp.ones(3, jnp.int32)}
    found, expected = apply_updates(params, updates), optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(
        UsageError, match="parameter 'a/w' is bfloat16: it is rounded stochastically, which needs a key"
    ):
        apply_updates({"a": {"w": jnp.ones(2, jnp.bfloat16)}}, {"a": {"w": jnp.ones(2)}})
    with pytest.raises(UsageError, match="parameter 'w' is a QTensor of int8@row"):
        apply_updates({"w": quantize(jnp.ones((2, 2)), "int8@row")}, {"w": jnp.ones((2, 2))})


def test_noise_depends_on_the_key_the_parameter_and_the_element():
    params = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16)}
    updates = jax.tree.map(lambda w: jnp.full(w.shape, 0.003), params)
    first, again = apply_updates(params, updates, KEY), apply_updates(params, updates, KEY)
    other = apply_updates(params, updates, jax.random.key(1))
    np.testing.assert_array_equal(first["a"], again["a"])
    for same in (first["b"], other["a"], jnp.roll(first["a"], 1)):
        assert 0.3 < float(jnp.mean(first["a"] == same)) < 0.75  # of two values, taken with 0.38 and 0.62: 0.53


def test_stochastic_rounding_to_a_dtype_is_the_same_in_float32_arrays():
    _, _, gradient = problem()
    narrow = {"layer": {"kernel": jnp.full((64, 64), 0.5, jnp.bfloat16)}}
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    as_f32 = lambda params: jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), gradient(params))
    first, _ = after(with_stochastic_rounding(optax.adam(1e-2)), narrow, gradient, 20)
    second, _ = after(with_stochastic_rounding(optax.adam(1e-2), "bfloat16"), wide, as_f32, 20)
    assert second["layer"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(first["layer"]["kernel"].astype(jnp.float32), second["layer"]["kernel"])


def test_wrapped_optimizers_leave_float32_parameters_alone_and_refuse_what_they_cannot_split():
    params = {"w": jnp.ones(4, jnp.bfloat16), "norm": jnp.ones(3)}
    grads = {"w": jnp.ones(4), "norm": jnp.full(3, 0.1)}
    for wrap in (with_stochastic_rounding, split_weights, kahan):
        tx = wrap(optax.sgd(0.1))
        updates, state = tx.update(grads, tx.init(params), params)
        assert state.rest["norm"] is None
        np.testing.assert_array_equal(updates["norm"], -jnp.float32(0.1) * grads["norm"])
        np.testing.assert_array_equal(export_fp32(params, tx.init(params))["norm"], params["norm"])
    with pytest.raises(UsageError, match="float16"):
        split_weights(optax.sgd(0.1)).init({"w": jnp.ones(2, jnp.float16)})
    with pytest.raises(UsageError, match="bits is 24 or 32, not 16"):
        split_weights(optax.sgd(0.1), 16)


def test_a_weight_that_vanishes_in_one_step_is_still_split_into_its_parts():
    """The difference of the two bfloat16 is no float32 then; what is stored is what `apply_updates` makes of it."""
    tx = split_weights(optax.sgd(1.0))
    params = {"w": jnp.array([1.0, -3.0, 256.0], jnp.bfloat16)}
    target = jnp.array([1.2345e-7, 2.5e-6, -1e-3])
    updates, state = tx.update({"w": params["w"].astype(jnp.float32) - target}, tx.init(params), params)
    after = export_fp32(optax.apply_updates(params, updates), state)["w"]
    total = params["w"].astype(jnp.float32) - (params["w"].astype(jnp.float32) - target)
    np.testing.assert_allclose(after, total, atol=3e-5 * 2.0**-16 * 256)
