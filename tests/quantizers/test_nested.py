"""Codes of lower widths from stored codes alone; the gradients of the steps; widths drawn by layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import fake_quant, quantize, recipes
from lowprec.nn import linen
from lowprec.quantizers.learned import learned_quant
from lowprec.quantizers.nested import (
    WIDTHS,
    DoubleRounding,
    SampledDoubleRounding,
    at_width,
    narrowed,
    rate_factors,
    width_probabilities,
    with_widths,
)

FORMAT = recipes.parse("fwd=int8@row").rule_for("x").fwd[1].format


@pytest.mark.parametrize(("bits", "width"), [(b, w) for b in (8, 6, 4) for w in (8, 6, 5, 4, 3, 2) if w <= b])
def test_every_code_is_divided_and_rounded_to_even(bits, width):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    expected = np.clip(np.round(codes / 2.0 ** (bits - width)), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    np.testing.assert_array_equal(narrowed(jnp.asarray(codes), bits, width), expected)
    traced = jax.jit(narrowed, static_argnums=1)(jnp.asarray(codes), bits, jnp.int32(width))
    np.testing.assert_array_equal(traced, expected)
    if width == bits:
        np.testing.assert_array_equal(expected, codes)


@pytest.mark.parametrize("width", [6, 4, 2])
def test_rounding_twice_differs_from_rounding_once_by_one_level_and_only_near_ties(width):
    """Near: within half a step of the stored codes, which is 2^-(8 - width) / 2 of the level."""
    v = np.random.default_rng(0).uniform(-128, 127, 200_000)
    ratio = 2.0 ** (8 - width)
    once = np.clip(np.round(v / ratio), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    twice = np.asarray(narrowed(jnp.asarray(np.round(v)), 8, width))
    differs = once != twice
    assert 0 < differs.mean() < 0.2
    assert np.abs(once - twice).max() == 1
    to_tie = np.abs(v / ratio - np.floor(v / ratio) - 0.5)
    assert to_tie[differs].max() <= 0.5 / ratio + 1e-12


W = np.random.default_rng(1).normal(size=(24, 10)).astype(np.float32)


@pytest.mark.parametrize("width", [8, 6, 4, 2])
@pytest.mark.parametrize("fmt", ["int8@row", "int8@1x8/bf16", "int8@tensor"])
def test_a_stored_tensor_is_read_at_a_lower_width(fmt, width):
    stored = quantize(W, fmt, axis=0)
    narrow = at_width(stored, width)
    assert str(narrow.fmt) == fmt.replace("int8", f"int{width}")
    scale = np.abs(stored.dequantize()).max() / 127 if "tensor" in fmt else None
    codes = np.asarray(jnp.round(stored.to_native()[0].astype(jnp.float32)))
    expected = np.clip(np.round(codes / 2.0 ** (8 - width)), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    layout = stored.layout
    steps = layout.broadcast_scale(jnp.asarray(stored.scales, jnp.float32)) * 2.0 ** (8 - width)
    values = layout.merge(layout.split(jnp.asarray(expected, jnp.float32)) * steps)
    np.testing.assert_allclose(narrow.dequantize(), values, rtol=1e-6)
    assert narrow.codes.nbytes == -(-10 * width // 8) * 24
    if width == 8:
        np.testing.assert_array_equal(narrow.codes, stored.codes)
    if scale is not None:
        np.testing.assert_allclose(narrow.scales, scale * 2.0 ** (8 - width), rtol=1e-6)


def test_reading_in_two_stages_is_another_rounding_but_the_same_grid():
    stored = quantize(W, "int8@row", axis=0)
    direct, staged = at_width(stored, 2), at_width(at_width(stored, 4), 2)
    np.testing.assert_array_equal(direct.scales, staged.scales)
    assert np.all(np.abs(direct.dequantize() - staged.dequantize()) <= np.asarray(direct.scales).reshape(1, -1) * 1.001)


@pytest.mark.parametrize("fmt", ["uint8@row", "int8@1x8/e8m0.floor", "nvfp4", "int8_symmetric@row", "int3_midrise@row"])
def test_other_formats_are_not_read_at_lower_widths(fmt):
    with pytest.raises(ValueError, match="widths are read from signed integers with float scales"):
        at_width(quantize(W[:16, :8], fmt, axis=0, pad=True), 2)


def test_a_higher_width_than_stored_is_not_there():
    with pytest.raises(ValueError, match="of int4@row widths from 2 to 4 can be read, not 6"):
        at_width(quantize(W, "int4@row", axis=0), 6)
    with pytest.raises(ValueError, match="the width read is one of 8, 4, not 6"):
        DoubleRounding(widths=(8, 4), width=6)
    with pytest.raises(ValueError, match="widths descend"):
        DoubleRounding(widths=(4, 8), width=8)
    with pytest.raises(ValueError, match="is the one stored, not 6 of int6@row"):
        DoubleRounding(widths=(4, 2), width=4).initial_params(W, "int6@row", 0)


def outcome(rule, w, params, state=None):
    run = lambda w, params: rule.quantize(w, FORMAT, 0, params, state or {}, None)[0]
    values, vjp = jax.vjp(run, w, params)
    return values, *vjp(jnp.cos(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape))


@pytest.mark.parametrize("shared", [False, True])
def test_at_first_the_stored_width_is_plain_rounding_and_learns_as_lsq(shared):
    rule = DoubleRounding(width=8, shared=shared)
    params = rule.initial_params(W, FORMAT, 0)
    values, dw, dparams = outcome(rule, W, params)
    np.testing.assert_allclose(values, fake_quant(W, FORMAT, axis=0), rtol=1e-6)
    # A third of the range: LSQ with clipped values on both sides.
    params = {**params, "step_8": params["step_8"] / 3}
    values, dw, dparams = outcome(rule, W, params)
    expected, vjp = jax.vjp(lambda w, s: learned_quant(w, s, FORMAT, axis=0), W, params["step_8"])
    expected_dw, expected_ds = vjp(jnp.cos(jnp.arange(W.size, dtype=jnp.float32)).reshape(W.shape))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-6)
    np.testing.assert_allclose(dparams["step_8"], expected_ds, rtol=1e-4, atol=1e-4)
    assert 0.1 < float(jnp.mean(dw == 0)) < 0.9


@pytest.mark.parametrize("width", [6, 4, 2])
def test_gradients_at_a_lower_width_are_those_of_the_chain_of_roundings(width):
    """In numpy: y = s_l · W_l, W_l following W_h / 2^(h-l), W_h following w / s_h, but where one of them clips."""
    rule, ratio = DoubleRounding(width=width), 2.0 ** (8 - width)
    params = {name: step * 0.7 for name, step in rule.initial_params(W, FORMAT, 0).items()}
    params[f"step_{width}"] = params[f"step_{width}"] * 1.1
    values, dw, dparams = outcome(rule, W, params)
    g = np.cos(np.arange(W.size, dtype=np.float32)).reshape(W.shape)
    s_h, s_l = np.asarray(params["step_8"]).reshape(1, -1), np.asarray(params[f"step_{width}"]).reshape(1, -1)
    v = W / s_h
    stored = np.round(np.clip(v, -128, 127))
    codes = np.clip(np.round(stored / ratio), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    follows = (v >= -128) & (v <= 127) & (np.abs(codes * ratio - stored) <= ratio / 2)
    assert 0 < follows.mean() < 1
    np.testing.assert_allclose(values, codes * s_l, rtol=1e-5)
    np.testing.assert_allclose(dw, g * follows * s_l / (s_h * ratio), rtol=1e-5)
    factor = lambda bits: 1 / np.sqrt(W.shape[0] * max(2.0 ** (bits - 1) - 1, 1))
    np.testing.assert_allclose(dparams[f"step_{width}"].ravel(), (g * codes).sum(0) * factor(width), rtol=1e-4)
    unread = {f"step_{other}" for other in WIDTHS} - {f"step_{width}"}
    assert all(not np.any(dparams[name]) for name in unread)
    shared = DoubleRounding(width=width, shared=True)
    values, dw, dparams = outcome(shared, W, {"step_8": params["step_8"]})
    np.testing.assert_allclose(values, codes * s_h * ratio, rtol=1e-5)
    np.testing.assert_allclose(dw, g * follows, rtol=1e-5)
    slope = codes * ratio - np.where(follows, v, 0)
    np.testing.assert_allclose(dparams["step_8"].ravel(), (g * slope).sum(0) * factor(8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_of_state_is_the_static_one(width):
    static, sampled = DoubleRounding(width=width), SampledDoubleRounding()
    params = static.initial_params(W, FORMAT, 0)
    expected = outcome(static, W, params)
    found = outcome(sampled, W, params, {"width": jnp.float32(width)})
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_one_set_of_variables_serves_every_width_of_a_model():
    model, x = nn.Dense(6), jax.random.normal(jax.random.key(0), (3, 8))
    variables = linen.quantize(model, "nested_8").init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    for width in WIDTHS:
        found = linen.quantize(model, f"nested_{width}").apply(variables, x)
        narrow = at_width(quantize(kernel, "int8@row", axis=0), width).dequantize()
        np.testing.assert_allclose(found, x @ narrow, rtol=1e-4, atol=1e-5)


def test_widths_are_drawn_layer_by_layer_and_nothing_else_changes():
    """3000 layers: four standard errors of a share are at most 4 · √(.25 / 1000) = .064."""
    quant = {"layers": {"0:3000": {"up": {"fwd.w": {"width": jnp.full(3000, 8.0), "other": jnp.ones(3)}}}}}
    chances = width_probabilities(jnp.where(jnp.arange(3000) % 3 == 0, 2.0, 0.5), WIDTHS)
    tree = {"layers": {"0:3000": {"up": {"fwd.w": {"width": chances}}}}}
    drawn = jax.jit(with_widths)(quant, jax.random.key(0), tree)["layers"]["0:3000"]["up"]["fwd.w"]
    np.testing.assert_array_equal(drawn["other"], 1)
    for own, expected in (
        (np.arange(3000) % 3 == 0, [0.4, 0.3, 0.2, 0.1]),
        (np.arange(3000) % 3 > 0, [0.1, 0.2, 0.3, 0.4]),
    ):
        shares = [np.mean(np.asarray(drawn["width"])[own] == width) for width in WIDTHS]
        np.testing.assert_allclose(shares, expected, atol=0.064)
    certain = with_widths(quant, jax.random.key(0), jnp.array([0.0, 0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(certain["layers"]["0:3000"]["up"]["fwd.w"]["width"], 4)


def test_rate_factors_fall_with_the_width_and_name_the_steps():
    assert rate_factors() == pytest.approx({"step_8": 1, "step_6": 0.1, "step_4": 0.01, "step_2": 0.001})
    assert set(rate_factors()) == set(DoubleRounding().initial_params(W, FORMAT, 0))


@pytest.mark.unoptimized
def test_one_model_learns_for_all_widths_by_the_sum_of_their_losses():
    """A linear problem, from small random weights: what each width leaves, as a share of the variance.

    Rounding the solution to two bits as initialised would leave about .21 (docs/recipes/nested.md).
    """
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, kernel = normal(256, 64), normal(64, 8) / 8
    y = x @ normal(64, 8)
    models = {width: linen.quantize(nn.Dense(8, use_bias=False), f"nested_{width}") for width in WIDTHS}
    variables = {"params": {"kernel": kernel}, **models[8].init_quantizers({"kernel": kernel}, x)}
    losses = lambda v: jnp.stack([jnp.mean((models[w].apply(v, x) - y) ** 2) for w in WIDTHS]) / jnp.mean(y**2)
    rate = optax.cosine_decay_schedule(3e-2, 500)
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_param_block_rms(), optax.scale_by_learning_rate(rate))

    def step(carry, _):
        variables, state = carry
        gradients = jax.grad(lambda v: jnp.sum(losses(v)))(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return (optax.apply_updates(variables, updates), state), None

    run = jax.jit(lambda v: jax.lax.scan(step, (v, optimizer.init(v)), length=500)[0][0])
    after = jax.jit(losses)(run(variables))
    assert jnp.all(jax.jit(losses)(variables) > 0.9)
    assert jnp.all(after < 0.17), after
