"""Learned quantizers against the formulas of their papers; delayed scales and running ranges step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.quantizers import optimal_clip
from lowprec.quantizers.affine import RunningRange, affine_quant
from lowprec.quantizers.delayed import Delayed
from lowprec.quantizers.diffq import DiffQ
from lowprec.quantizers.learned_rules import HAIR, Elastic, LearnedClip, LearnedExponentBias, LearnedStep
from lowprec.quantizers.noisy_bits import LearnedBits

W = np.asarray(jax.random.normal(jax.random.key(0), (64, 8)), np.float64)
G = np.asarray(jax.random.normal(jax.random.key(1), (64, 8)), np.float64)


def run(rule, fmt, w=W, g=G, axis=0, params=None, key=None):
    """(values, gradient of w, gradients of the parameters) for the loss Σ g·y."""
    fmt, w = formats.parse(fmt), jnp.float32(w)
    params = rule.initial_params(w, fmt, axis) if params is None else params

    def loss(w, params):
        values, _ = rule.quantize(w, fmt, axis, params, {}, key)
        return jnp.sum(jnp.float32(g) * values), values

    (_, values), (dw, dparams) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(w, params)
    return np.asarray(values, np.float64), np.asarray(dw, np.float64), dparams


@pytest.mark.parametrize(("bits", "init"), [(2, 1.596), (3, 0.921), (4, 0.603), (8, 0.142)])
def test_the_first_step_of_lsq_on_gaussian_data(bits, init):
    """2·E|x| / √Q with E|x| = √(2/π)."""
    x = jax.random.normal(jax.random.key(2), (1 << 16, 1))
    step = LearnedStep().initial_params(x, formats.parse(f"int{bits}@tensor"), 0)["step"]
    assert float(step.reshape(())) == pytest.approx(init, rel=0.01)  # 65536 values: the mean has a deviation of .3 %


@pytest.mark.parametrize(("bits", "start"), [(2, 2 * 1.493535 / 3), (4, 2 * 2.514005 / 15)])
def test_the_first_step_of_lsq_plus_weights_spaces_levels_equally_about_zero(bits, start):
    """2·A·rms / (2^b - 1), with the published optimal clips A of Gaussian data (QuEST, arXiv 2502.05003)."""
    x = 3 * jax.random.normal(jax.random.key(2), (64, 1))
    step = LearnedStep("gaussian").initial_params(x, formats.parse(f"int{bits}@tensor"), 0)["step"]
    assert float(step.reshape(())) == pytest.approx(start * float(jnp.sqrt(jnp.mean(x * x))), rel=1e-5)


def test_the_gradient_of_an_lsq_step_is_the_papers():
    """∂v̂/∂s for s = .5 and codes -4 … 3, value by value."""
    v = np.array([[-3.0, -0.6, 0.2, 0.3, 1.0, 2.0]]).T
    expected = np.array([-4, 0.2, -0.4, 0.4, 0, 3.0])
    for index, value in enumerate(expected):
        g = np.zeros_like(v)
        g[index] = 1
        params = {"step": jnp.full((1, 1), 0.5)}
        _, _, gradient = run(LearnedStep(count="matrix"), "int3@tensor", v, g, params=params)
        assert float(gradient["step"].reshape(())) * np.sqrt(6 * 3) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("count", "number"), [("block", 64), ("features", 64), ("matrix", 512)])
def test_what_the_gradient_of_a_step_is_divided_by(count, number):
    rule = LearnedStep(count=count)
    params = {"step": jnp.full((1, 8), 0.3)}
    _, _, gradient = run(rule, "int4@row", params=params)
    v = W / np.float32(0.3)
    q = np.clip(np.round(v), -8, 7)
    slope = np.where((v > -8) & (v < 7), q - v, q)
    expected = (G * slope).sum(0, keepdims=True) / np.sqrt(number * 7)
    np.testing.assert_allclose(gradient["step"], expected, rtol=1e-4, atol=1e-4)


def test_lsq_plus_starts_on_the_range_and_learns_the_offset():
    x = W + 3.0
    fmt = formats.parse("uint4@tensor")
    rule = LearnedStep("range", offset=True)
    params = rule.initial_params(jnp.float32(x), fmt, 0)
    step, offset = (float(params[name].reshape(())) for name in ("step", "offset"))
    spread = x.max() - x.min()
    assert step == pytest.approx((1 + 2 * HAIR) * spread / 15, rel=1e-6)
    assert offset == pytest.approx(x.min() - HAIR * spread, rel=1e-6)
    assert np.all(run(rule, "uint4@tensor", x, params=params)[1])  # the extremes have a gradient
    params = {"step": params["step"] / 2, "offset": params["offset"]}  # half the range: the upper half clips
    values, dx, gradient = run(rule, "uint4@tensor", x, params=params)
    v = (x - offset) / (step / 2)
    inside = (v > 0) & (v < 15)
    np.testing.assert_allclose(values, np.clip(np.round(v), 0, 15) * step / 2 + offset, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dx != 0, inside)
    expected = (G * ~inside).sum() / np.sqrt(512 * 15)
    assert float(gradient["offset"].reshape(())) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fmt", ["uint2@tensor", "int4_symmetric@tensor"])
def test_the_clip_of_pact_gets_the_gradients_of_what_it_clips(fmt):
    alpha = 0.8
    values, dx, gradient = run(LearnedClip(), fmt, params={"clip": jnp.full((1, 1), alpha)})
    signed = fmt.startswith("int")
    low, steps = (-alpha, 7) if signed else (0.0, 3)
    expected = np.round(np.clip(W, low, np.float32(alpha)) * steps / np.float32(alpha)) / steps * np.float32(alpha)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_array_equal(dx, np.where((low < W) & (alpha > W), np.float32(G), 0))
    clipped = G[alpha <= W].sum() - (G[-alpha >= W].sum() if signed else 0)
    assert float(gradient["clip"].reshape(())) == pytest.approx(clipped, rel=1e-5)


def test_the_clip_of_pact_starts_at_ten_as_in_the_paper_or_where_gaussian_data_want_it():
    fmt = formats.parse("int4_symmetric@tensor")
    assert float(LearnedClip(10.0).initial_params(jnp.float32(W), fmt, 0)["clip"].reshape(())) == 10
    found = float(LearnedClip().initial_params(jnp.float32(W), fmt, 0)["clip"].reshape(()))
    assert found == pytest.approx(optimal_clip("int4_symmetric") * np.sqrt((W**2).mean()), rel=1e-5)


def test_the_levels_of_stretched_elastic_quantization():
    one = {"scale": jnp.ones((1, 1))}
    w = np.array([[-1, -0.6, -0.3, -0.01, 0.01, 0.49, 0.51, 1.2]]).T
    two, _, _ = run(Elastic(), "int2_midrise@row", w, np.ones_like(w), params=one)
    np.testing.assert_array_equal(two[:, 0], [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75])
    ternary, _, _ = run(Elastic(), "ternary@row", np.linspace(-2, 2, 81)[:, None], np.ones((81, 1)), params=one)
    np.testing.assert_allclose(np.unique(ternary), [-2 / 3, 0, 2 / 3], rtol=1e-6)
    grid = np.linspace(-1, 1, 2001)[:, None]
    values, _, _ = run(Elastic(), "ternary@row", grid, np.ones_like(grid), params=one)
    assert np.abs(grid[values == 0]).max() == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("repo", [False, True])
@pytest.mark.parametrize(("fmt", "n", "shift"), [("ternary@row", 1.5, 0.0), ("int2_midrise@row", 2.0, 0.5)])
def test_gradients_of_stretched_elastic_quantization(fmt, n, shift, repo):
    alpha = np.float32(0.9)
    _, dw, gradient = run(Elastic(repo), fmt, params={"scale": jnp.full((1, 8), alpha)})
    v = np.float32(W) / alpha
    bound = (n - shift) / n
    q = (np.round(np.clip(v, -0.99, 0.99) * n - shift) + shift) / n
    inside = np.abs(v) <= bound
    np.testing.assert_array_equal(dw != 0, inside)
    beyond = np.sign(v) * bound if repo else q
    expected = (G * np.where(inside, q - v, beyond)).sum(0, keepdims=True) / np.sqrt(512)
    np.testing.assert_allclose(gradient["scale"], expected, rtol=1e-4, atol=1e-5)


def test_one_bit_is_the_sign_times_the_mean_magnitude_of_the_row():
    values, dw, gradient = run(Elastic(), "binary@row")
    mean = np.abs(W).mean(0, keepdims=True)
    np.testing.assert_allclose(values, np.sign(W) * mean, rtol=1e-6)
    np.testing.assert_array_equal(dw != 0, np.abs(np.float32(W)) <= np.float32(mean))
    np.testing.assert_allclose(
        gradient["scale"], (G * np.sign(W)).sum(0, keepdims=True) / np.sqrt(512), rtol=1e-4, atol=1e-5
    )


def test_a_learned_exponent_bias_starts_at_the_largest_magnitude_and_moves_the_grid():
    rule, fmt = LearnedExponentBias(), formats.parse("e2m1fn@row")
    params = rule.initial_params(jnp.float32(np.full((4, 1), 6.0)), fmt, 0)
    assert float(params["bias"].reshape(())) == pytest.approx(1 - np.log2(1 + HAIR), rel=1e-6)  # that of e2m1 itself
    params = rule.initial_params(jnp.ones((4, 1)), fmt, 0)
    assert float(params["bias"].reshape(())) == pytest.approx(3.584962500721156 - np.log2(1 + HAIR), rel=1e-6)
    values, _, _ = run(rule, "e2m1fn@row", np.linspace(0, 3.7, 3001)[:, None], np.ones((3001, 1)))
    levels = (1 + HAIR) * 3.7 * np.array([0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
    np.testing.assert_allclose(np.unique(values), levels, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_an_exponent_bias_is_that_of_the_step():
    """∂y/∂b = -ln 2 · step · ∂y/∂step."""
    bias = jnp.full((1, 8), 1.7)
    _, _, of_bias = run(LearnedExponentBias(), "e2m1fn@row", params={"bias": bias})
    _, _, of_step = run(LearnedStep(), "e2m1fn@row", params={"step": jnp.exp2(1 - bias)})
    np.testing.assert_allclose(of_bias["bias"], -np.log(2) * np.exp2(1 - 1.7) * of_step["step"], rtol=1e-4)


BITS = {"bits": jnp.ones((2, 1))}
TALL = np.asarray(jax.random.normal(jax.random.key(5), (64, 32)), np.float64)


def test_gaussian_weight_sampling_is_unbiased_with_the_variance_of_rounded_normals():
    """Var round(N/2) = .3253; 400 draws of 2048 values: the relative error of the variance is below 1 % at 4 sigma."""
    rule, fmt = LearnedBits(start=6, target=4), formats.parse("float32@32x32")
    draw = jax.jit(lambda key: rule.quantize(jnp.float32(TALL), fmt, 0, BITS, {}, key)[0])
    draws = np.stack([np.asarray(draw(jax.random.key(i)), np.float64) for i in range(400)]) - TALL
    top = np.abs(TALL.reshape(2, 32, 32)).max((1, 2)) * 2.0 ** (1 - 6)
    unit = draws / np.repeat(top, 32)[None, :, None]
    assert np.mean(unit**2) == pytest.approx(0.3253, rel=0.01)
    assert abs(np.mean(unit)) < 5 * np.sqrt(0.3253 / unit.size)
    np.testing.assert_allclose(np.unique(np.round(unit)), [-2, -1, 0, 1, 2])
    assert np.mean(np.round(unit) == 0) == pytest.approx(0.6827, abs=5 * np.sqrt(0.6827 * 0.3173 / unit.size))


def test_gradients_of_learned_bits():
    """That of w is the gradient itself; that of b the derivative of the noise at fixed draws."""
    rule, key, g = LearnedBits(6, 4), jax.random.key(7), np.float32(np.sin(np.arange(2048.0)).reshape(64, 32))
    noise_at = lambda t: run(rule, "float32@32x32", TALL, g, params={"bits": jnp.full((2, 1), t)}, key=key)
    _, dw, gradient = noise_at(1.0)
    np.testing.assert_array_equal(dw, g)
    step = 0.05  # curvature: (2 ln 2 · .05)² / 6 = 8e-4
    difference = (g * (noise_at(1.0 + step)[0] - noise_at(1.0 - step)[0])).reshape(2, 32, 32).sum((1, 2)) / (2 * step)
    np.testing.assert_allclose(np.asarray(gradient["bits"])[:, 0], difference, rtol=2e-3)


def test_many_bits_are_no_noise():
    values, _, _ = run(
        LearnedBits(start=60, target=60), "float32@32x32", TALL, TALL, params=BITS, key=jax.random.key(1)
    )
    np.testing.assert_array_equal(values, np.float32(TALL))


def test_delayed_scaling_step_by_step():
    """The scale used at each step: TransformerEngine's example, as the factor 448 / amax of the values."""
    rule, fmt = Delayed(history=4), formats.parse("e4m3fn@tensor")
    state, used = rule.initial_state(fmt), []
    for amax in (1, 10, 0.1, 0.1, 0.1, 0.1, 0.1):
        used.append(1 / float(state["scale"]))
        state = rule.next_state(state, rule.observe(jnp.array([amax, -amax / 2])), fmt)
    np.testing.assert_allclose(used, [1, 448, 44.8, 44.8, 44.8, 44.8, 4480], rtol=1e-6)


def test_delayed_scaling_keeps_its_scale_where_nothing_finite_was_seen():
    rule, fmt = Delayed(history=2, algorithm="most_recent", margin=1), formats.parse("e5m2@tensor")
    state = rule.next_state(rule.initial_state(fmt), rule.observe(jnp.array([3.0])), fmt)
    assert float(state["scale"]) == np.float32(3.0) / np.float32(57344) * 2
    for strange in (jnp.zeros(3), jnp.array([1.0, jnp.nan]), jnp.array([jnp.inf])):
        after = rule.next_state(state, rule.observe(strange), fmt)
        assert float(after["scale"]) == float(state["scale"]) and bool(jnp.all(jnp.isfinite(after["history"])))
    unseen = rule.next_state(state, jnp.zeros(2), fmt)
    jax.tree.map(np.testing.assert_array_equal, unseen, state)


def test_state_of_stacked_layers_is_updated_layer_by_layer():
    rule, fmt = Delayed(history=3), formats.parse("e4m3fn@tensor")
    single = [rule.next_state(rule.initial_state(fmt), jnp.array([2.0, v]), fmt) for v in (4.0, 6.0)]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), rule.initial_state(fmt))
    together = rule.next_state(stacked, jnp.array([[2.0, 4.0], [2.0, 6.0]]), fmt)
    jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.stack(b)), together, *single)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_quantization_holds_zero_exactly_and_errs_by_half_a_step_inside(bits):
    x = np.float32(W * 2 + 1)
    low, high = np.float32(-1.3), np.float32(4.1)
    values, inside = affine_quant(jnp.asarray(np.append(x, 0)), low, high, bits)
    assert float(values[-1]) == 0
    step = (np.float64(high) - low) / (2**bits - 1)
    error = np.abs(np.asarray(values[:-1], np.float64) - x.ravel())[np.asarray(inside[:-1])]
    assert error.max() <= step / 2 * (1 + 1e-5)
    codes = np.unique(np.round(np.asarray(values, np.float64) / step))
    assert len(codes) <= 2**bits and np.allclose(
        np.asarray(values) / step, np.round(np.asarray(values) / step), atol=1e-4
    )


def test_a_constant_or_one_sided_tensor_has_an_affine_range_with_zero():
    for x in (jnp.zeros(4), jnp.full(4, 3.0), jnp.full(4, -2.0)):
        values, _ = affine_quant(x, x.min(), x.max(), 8)
        np.testing.assert_allclose(values, x, rtol=1e-6)


def test_running_ranges_are_moving_averages_and_start_late():
    rule, fmt = RunningRange(decay=0.9, start=2), formats.parse("uint8@tensor")
    state = rule.initial_state(fmt)
    x = jnp.array([-1.0, 0.3, 2.0])
    as_is, _ = rule.quantize(x, fmt, 0, {}, state, None)
    np.testing.assert_array_equal(as_is, x)
    for low, high in ((-1.0, 2.0), (-3.0, 1.0)):
        state = rule.next_state(state, rule.observe(jnp.array([low, high])), fmt)
    assert float(state["low"]) == pytest.approx(-1.2) and float(state["high"]) == pytest.approx(1.9)
    rounded, inside = rule.quantize(x, fmt, 0, {}, state, None)
    np.testing.assert_allclose(rounded, affine_quant(x, -1.2, 1.9, 8)[0], rtol=1e-5)
    assert inside.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Delayed(algorithm="mean"), "max or most_recent"),
        (lambda: Delayed().initial_state(formats.parse("e4m3fn@row")), "a float scale a tensor"),
        (lambda: RunningRange().initial_state(formats.parse("int8@tensor")), "uint8@tensor"),
        (lambda: LearnedStep("mse"), "unknown start of a learned step"),
        (lambda: DiffQ("normal"), "unknown noise of DiffQ"),
        (lambda: DiffQ(lowest=8), "start between the lowest"),
        (lambda: Elastic().initial_params(jnp.ones((4, 4)), formats.parse("int4@row"), 0), "int<b>_midrise"),
        (lambda: LearnedExponentBias().initial_params(jnp.ones((4, 4)), formats.parse("int4@row"), 0), "float format"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
