"""Accumulators: narrow ones as published for tensor cores, and sums of integers against int64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.ops import GemmRule, qdot
from lowprec.ops.accumulation import Accumulation, IntegerAccumulation, NarrowAccumulation
from lowprec.ops.operand import Operand
from lowprec.quantizers import EXACT, Quantizer

DFP16 = Quantizer("dfp16")


def product(accumulation, x, w):
    return jax.jit(lambda x, w: accumulation(Operand("fwd.x", x, None), Operand("fwd.w", w, None)))(x, w)


@pytest.mark.parametrize(
    ("length", "promote", "published"),
    [(512, None, 4.3e-4), (512, 128, 1.3e-4), (4096, None, 3.3e-3), (4096, 128, 1.3e-4)],
)
def test_the_error_of_fourteen_bits(length, promote, published):
    """Gaussian operands; root mean square of the error relative to that of the product.

    6400 outputs leave a sampling error of 1 %; the published numbers have two digits, hence 5 %.
    """
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(80, length), (length, 80)]))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    error = product(NarrowAccumulation(14, 32, promote), x, w) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) == pytest.approx(published, rel=0.05)


def truncated(x, bits):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2**bits) / 2**bits, exponent)


@pytest.mark.parametrize(
    ("bits", "step", "promote"), [(6, 32, None), (6, 8, 32), (9, 16, 16), (1, 4, None), (24, 32, 64)]
)
def test_the_register_drops_what_lies_below_its_last_bit(bits, step, promote):
    """Whole numbers, of which float32 sums are exact: equal bit for bit to a register simulated in float64."""
    random = np.random.default_rng(bits)
    x, w = random.integers(-9, 10, (5, 90)), random.integers(-9, 10, (90, 7))  # 90 products: the last step is short
    total, register = np.zeros((5, 7)), np.zeros((5, 7))
    for start in range(0, 90, step):
        register = truncated(register + x[:, start : start + step] @ w[start : start + step], bits)
        if promote and (start + step) % promote == 0:
            total, register = total + register, np.zeros((5, 7))
    np.testing.assert_array_equal(
        product(NarrowAccumulation(bits, step, promote), jnp.float32(x), jnp.float32(w)), total + register
    )


@pytest.mark.parametrize("accumulation", [NarrowAccumulation(10, 8, 16), IntegerAccumulation(16)])
def test_every_product_of_the_rule_and_of_a_batch(accumulation):
    """Forward, dgrad and wgrad: each equals the product of the same operands, in their own order of axes."""
    rule = GemmRule(*[(DFP16, DFP16)] * 3, accumulation=accumulation)
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (
        jax.random.normal(k, shape) for k, shape in zip(keys, [(2, 24, 40), (2, 40, 20), (2, 24, 20)], strict=True)
    )
    dims = (((2,), (1,)), ((0,), (0,)))
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, dimension_numbers=dims), x, w)
    fwd = lambda a, b: qdot(a, b, GemmRule(fwd=(DFP16, DFP16), accumulation=accumulation), dimension_numbers=dims)
    swap = lambda a: jnp.swapaxes(a, 1, 2)
    for ours, theirs in zip((y, *vjp(dy)), (fwd(x, w), fwd(dy, swap(w)), fwd(swap(x), dy)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert float(jnp.max(jnp.abs(y - x @ w))) < 40 * 2.0**-9 * 10


@pytest.mark.parametrize("data", ["normal", "largest codes", "alternating"])
@pytest.mark.parametrize("chunk", [1, 256, 512])
def test_sums_of_integers_are_those_of_int64(data, chunk):
    random = np.random.default_rng(0)
    shapes = (8, 1000), (1000, 6)
    if data == "normal":
        x, w = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    elif data == "largest codes":
        x, w = (np.full(shape, 32767.0, np.float32) for shape in shapes)
    else:
        x, w = (np.where(np.indices(shape).sum(0) % 2, 32767, -32767).astype(np.float32) for shape in shapes)

    def codes(a):
        exponent = np.floor(np.log2(np.abs(a).max())) - 14  # Das et al.: the largest exponent, less P - 2
        whole = np.clip(np.rint(a.astype(np.float64) * 2.0**-exponent), -32767, 32767)
        return whole.astype(np.int64), exponent

    (x_codes, x_exponent), (w_codes, w_exponent) = codes(x), codes(w)
    expected = (x_codes @ w_codes).astype(np.float64) * 2.0 ** (x_exponent + w_exponent)
    rule = GemmRule(fwd=(DFP16, DFP16), accumulation=IntegerAccumulation(chunk))
    y = np.asarray(jax.jit(lambda x, w: qdot(x, w, rule))(x, w), np.float64)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    # One rounding of 2^-24 a chunk, which add up as a random walk of sums that themselves grow.
    assert error < 2.0**-24 * max(np.sqrt(1000 / chunk), 1) * 2
    if chunk == 256:
        assert error < 1.5e-7


def test_the_codes_of_dynamic_fixed_point():
    x = jax.random.normal(jax.random.key(0), (2000, 1000))
    rounded = jax.jit(lambda x: DFP16.round(x, -1).values)(x)
    # The step is 2^-12 for amax in [4, 8): step² / 12 = 4.97e-9.
    assert float(jnp.mean((rounded - x) ** 2) / jnp.mean(x**2)) == pytest.approx(5e-9, rel=0.01)
    elements = DFP16.round(jnp.array([[32767.6, -40000.0, 65535.9, -65535.9]]), -1).elements
    assert float(jnp.max(jnp.abs(elements))) == 32767


def test_activations_are_kept_as_sixteen_bits():
    rule = recipes.get("dfp16").rule_for("layer")
    shapes = jax.eval_shape(
        lambda x, w: jax.vjp(lambda x, w: qdot(x, w, rule), x, w)[1], jnp.ones((32, 48)), jnp.ones((48, 8))
    )
    kept = [leaf for leaf in jax.tree.leaves(shapes) if leaf.size == 32 * 48]
    assert [leaf.dtype for leaf in kept] == [jnp.int16]


def test_what_cannot_be_is_named():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 4))
    for operand, reason in (
        (EXACT, "fwd.x is not quantized"),
        (Quantizer("e4m3fn@tensor"), r"elements of fwd.x \(e4m3fn@tensor\) are no integers of at most 16 bits"),
        (Quantizer("int8@1x4"), r"the scales of fwd.x \(int8@1x4\) vary along the contraction axis"),
    ):
        with pytest.raises(UsageError, match=reason):
            qdot(x, w, GemmRule(fwd=(operand, DFP16), accumulation=IntegerAccumulation()))
    rule = GemmRule(fwd=(Quantizer("e4m3fn@tensor"),) * 2, accumulation=NarrowAccumulation())
    with pytest.raises(UsageError, match="'native' accumulates in float32, not in 14 bits, 32 products at once"):
        qdot(x, w, rule, backend="native")
    with pytest.raises(UsageError, match="after whole steps of 32: after 96, not 100"):
        NarrowAccumulation(promote=100)
    with pytest.raises(UsageError, match="1 to 24 bits"):
        NarrowAccumulation(bits=25)
    with pytest.raises(UsageError, match="1 to 512 products, not 1024"):
        IntegerAccumulation(1024)


def test_a_rule_says_its_accumulation():
    assert GemmRule().accumulation == Accumulation()
    assert not GemmRule(accumulation=NarrowAccumulation()).exact
    for name, text in (
        ("fp8_block_promoted", "14 bits, 32 products at once, promoted to float32 every 128 products"),
        ("fp8_tensor_core", "14 bits, 32 products at once, never promoted"),
        ("dfp16", "integers, exact over 256 products, then float32"),
    ):
        assert f"sums of all products: {text}" in recipes.get(name).describe()
    assert "sums of all products" not in recipes.get("fp8_block").describe()


def test_the_recipes_with_narrow_sums_differ_from_fp8_block_as_their_accumulators_do():
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(32, 4096), (4096, 32)]))
    run = lambda name: np.asarray(jax.jit(lambda x, w: qdot(x, w, recipes.get(name).rule_for("a")))(x, w), np.float64)
    exact = run("fp8_block")
    error = {
        n: np.sqrt(np.mean((run(n) - exact) ** 2) / np.mean(exact**2))
        for n in ("fp8_block_promoted", "fp8_tensor_core")
    }
    assert 0.8e-4 < error["fp8_block_promoted"] < 1.5e-4
    assert 2.5e-3 < error["fp8_tensor_core"] < 3.6e-3
