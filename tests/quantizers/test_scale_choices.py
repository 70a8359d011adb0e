"""Rules that choose scales: what they promise about range and error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats import Rounding, parse
from lowprec.quantizers import AbsMax, AbsMean, FourOverSix, LeastSquares, Percentile, RootMeanSquare, round_blocks
from lowprec.quantizers.scales import ScaleRule

RULES = (
    AbsMax(),
    AbsMax(17 / 16),
    AbsMax(limit=256.0),
    AbsMax(floor=1e-4),
    FourOverSix(),
    RootMeanSquare(2.5),
    RootMeanSquare(),
    AbsMean(),
    Percentile(99.0),
    LeastSquares(5),
)


def data(shape=(64, 256)):
    random = np.random.default_rng(0)
    return (random.normal(size=shape) * np.exp(2 * random.normal(size=(shape[0], 1)))).astype(np.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "dfp16", "fp8_tile128", "int4@row", "e2m1fn@1x16/bf16"])
def test_every_rule_gives_every_format_a_scale_it_can_store(rule, name):
    fmt = parse(name)
    assert isinstance(rule, ScaleRule)
    x = jnp.asarray(data((128, 256)))
    if isinstance(rule, FourOverSix) and fmt.scale.power_of_two:
        with pytest.raises(UsageError, match="powers of two cannot choose between"):
            round_blocks(x, fmt, -1, rule=rule)
        return
    if rule == RootMeanSquare() and fmt.bits > 12:
        with pytest.raises(ValueError, match="12 bits"):
            round_blocks(x, fmt, -1, rule=rule)
        return
    scale = jax.jit(lambda x: round_blocks(x, fmt, -1, rule=rule).scale)(x)
    block = np.asarray(scale.block)
    assert np.all(block > 0) and np.all(np.isfinite(block))
    np.testing.assert_array_equal(formats.round_to(block, fmt.scale.format), block)
    assert (scale.tensor is None) == (not fmt.scale.per_tensor)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxint8", "int4@row", "e4m3fn@tensor"])
@pytest.mark.parametrize("culprit", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_spoils_its_block_and_no_other(rule, name, culprit):
    fmt = parse(name)
    if isinstance(rule, FourOverSix) and fmt.scale.power_of_two:
        pytest.skip("there is no such rule for powers of two")
    x = data((4, 128))
    x[1, 70] = culprit
    values = jax.jit(lambda x: (lambda r: (r.values, r.layout.merge(jnp.isnan(r.scale.block))))(
        round_blocks(x, fmt, -1, rule=rule)
    ))  # fmt: skip
    values, spoilt = values(x)
    size = {"row": 128, "tensor": 512}.get(fmt.block) or fmt.block[1]
    assert np.isnan(values).sum() == size and np.isnan(values[1, 70])
    np.testing.assert_array_equal(np.isnan(values), spoilt)


def test_headroom_of_17_16_keeps_nvfp4_from_clipping():
    # A scale rounded to e4m3 may be 1/16 too small; stochastic rounding must not see more than 6.
    x = jnp.asarray(data((512, 1024)))
    scaled = lambda rule: np.abs(scaled_values(x, "nvfp4", rule))
    assert scaled(AbsMax()).max() > 6.2
    assert scaled(AbsMax(17 / 16)).max() <= 6


def scaled_values(x, name, rule):
    rounded = jax.jit(
        lambda x: (lambda r: r.scale.divide(r.layout.split(x)))(round_blocks(x, parse(name), -1, rule=rule))
    )
    return np.asarray(rounded(x))


def test_the_limit_of_two_level_scales():
    x = jnp.asarray(data())
    for limit in (448.0, 256.0, 255.99):
        scale = round_blocks(x, parse("nvfp4"), -1, rule=AbsMax(limit=limit)).scale
        nearest = float(formats.round_to(np.float32(limit), "e4m3fn"))
        assert float(scale.block.max()) == nearest
        assert float(scale.tensor) == pytest.approx(np.abs(np.asarray(x)).max() / limit / 6, rel=1e-6)


def test_the_floor_of_amax():
    x = jnp.full((1, 128), 1e-6)
    scale = round_blocks(x, parse("fp8_block128"), -1, rule=AbsMax(floor=1e-4)).scale
    assert float(scale.block[0, 0, 0]) == np.float32(1e-4) / np.float32(448)


@pytest.mark.parametrize("name", ["nvfp4", "e2m1fn@16x16/e4m3fn.tensor", "e2m1fn@1x16/e4m3fn", "e2m1fn@1x16"])
def test_four_over_six_takes_the_better_scale_in_every_block(name):
    x = jnp.asarray(data())
    fmt = parse(name)
    layout = round_blocks(x, fmt, -1).layout
    block_errors = lambda y: np.asarray(((layout.split(y - x)) ** 2).sum(layout.members), np.float64)
    chosen = round_blocks(x, fmt, -1, rule=FourOverSix())
    error = block_errors(chosen.values)
    # With the same tensor scale: amax on 6, and amax on 4.
    tensor = 1 if chosen.scale.tensor is None else float(chosen.scale.tensor)
    for target in (6.0, 4.0):
        wanted = jnp.max(jnp.abs(layout.split(x)), layout.members, keepdims=True) / target / tensor
        if fmt.scale.format.bits == 8:
            wanted = formats.round_to(jnp.clip(wanted, 2.0**-6, 448), "e4m3fn")
        y = formats.round_to(layout.split(x) / (wanted * tensor), "e2m1fn") * (wanted * tensor)
        assert np.all(error <= block_errors(layout.merge(y)) * (1 + 1e-5) + 1e-12)
    assert error.sum() < 0.95 * block_errors(round_blocks(x, fmt, -1).values).sum() or "16x16" in name


def test_rms_and_mean_rules_by_their_definition():
    x = data().astype(np.float64)
    blocks = x.reshape(64, -1, 16)
    scale = lambda rule, name: np.asarray(
        round_blocks(jnp.asarray(x, jnp.float32), parse(name), -1, rule=rule).scale.block
    )
    rms = np.sqrt((blocks**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(scale(RootMeanSquare(2.5, 0.0), "int4@1x16"), 2.5 * rms / 7, rtol=1e-6)
    deviation = blocks.std(-1, keepdims=True)
    np.testing.assert_allclose(scale(RootMeanSquare(2.5, 0.0, True), "int4@1x16"), 2.5 * deviation / 7, rtol=1e-6)
    mean = np.abs(blocks).mean(-1, keepdims=True)
    np.testing.assert_allclose(scale(AbsMean(), "ternary@1x16"), mean, rtol=1e-6)
    assert scale(AbsMean(), "ternary@1x16").dtype == np.float32


@pytest.mark.parametrize("rule", [RootMeanSquare(2.5), RootMeanSquare(2.5, centered=True), AbsMean()], ids=str)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_zeros_that_fill_up_a_block_do_not_count(rule, block):
    x = jnp.asarray(data((16, 24)) + 1)
    padded = round_blocks(x, parse(f"int4@{block}"), -1, rule=rule, pad=True).scale.block
    alone = round_blocks(x[:, 16:], parse(f"int4@{'row' if block == '1x16' else 'tensor'}"), -1, rule=rule).scale.block
    np.testing.assert_allclose(padded.reshape(-1, 2)[:, 1], alone.ravel(), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_half_precision_blocks_have_float32_scales(rule):
    scale = round_blocks(jnp.asarray(data(), jnp.bfloat16), parse("nvfp4"), -1, rule=rule, rounding=Rounding()).scale
    assert scale.block.dtype == scale.tensor.dtype == jnp.float32


def test_percentiles_are_those_of_numpy_without_the_padding():
    x = data((8, 100))
    fmt = parse("int8_symmetric@1x64")
    scale = jax.jit(lambda x: round_blocks(x, fmt, -1, rule=Percentile(95.0), pad=True).scale.block)(x)
    expected = [[np.percentile(np.abs(part), 95.0) / 127 for part in (row[:64], row[64:])] for row in x]
    np.testing.assert_allclose(np.asarray(scale).reshape(8, 2), expected, rtol=1e-6)
    whole = jax.jit(lambda x, rule: round_blocks(x, fmt, -1, rule=rule, pad=True).values, static_argnums=1)
    np.testing.assert_array_equal(whole(x, Percentile(100.0)), whole(x, AbsMax()))
    x[0, 0] = np.nan
    assert np.isnan(np.asarray(whole(x, Percentile(95.0)))[0, :64]).all()


@pytest.mark.parametrize("name", ["int4_symmetric@1x64", "mxfp4", "nvfp4", "int3_symmetric@row/bf16"])
def test_the_search_finds_the_candidate_of_least_error(name):
    x, fmt = jnp.asarray(data((16, 128))), parse(name)
    values = jax.jit(lambda x, rule: round_blocks(x, fmt, -1, rule=rule).values, static_argnums=1)
    found = np.asarray(values(x, LeastSquares(7, 0.4)))
    # By brute force: each candidate alone, by a headroom below 1, then the best of each block.
    fractions = (1.0, 2.0, 0.5, 0.25) if fmt.scale.power_of_two else np.linspace(1, 0.4, 7)
    size = fmt.block[1] if fmt.block != "row" else 128
    error = lambda y: np.sum((np.asarray(y, np.float64) - x).reshape(-1, size) ** 2, axis=1)
    alone = [error(by_fraction(x, fmt, float(fraction))) for fraction in fractions]
    np.testing.assert_allclose(error(found), np.min(alone, axis=0), rtol=1e-4)
    assert np.any(error(found) < 0.9 * alone[0])


def by_fraction(x, fmt, fraction):
    """Rounded with the absmax scale times a fraction, in numpy."""
    from lowprec.formats.scaling import store_scale

    absmax = jax.jit(lambda x: round_blocks(x, fmt, -1).scale)(x)
    layout = round_blocks(x, fmt, -1).layout
    scale = store_scale(absmax.total() * np.float32(fraction), fmt.scale, tensor=absmax.tensor)
    elements = formats.round_to(scale.divide(layout.split(x)), fmt.element)
    return layout.merge(scale.multiply(elements))


def test_what_is_no_percentile_or_no_search_is_refused():
    with pytest.raises(ValueError, match="percentile"):
        Percentile(0)
    with pytest.raises(ValueError, match="candidate"):
        LeastSquares(0)
