"""Adam on 8- and 4-bit moments: the reference against float64, the kernels against the reference, and what they serve.

Equalities are of bits where no compiler has a choice: with hyperparameters that are powers of two and
gradients of 8 bits, every product that is added to something is exact, so that it does not matter which of them
become one operation. With others a weight may differ by an ulp of its terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats.elements import element_of, value_table
from lowprec.pallas import reference
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode
from lowprec.pallas.adam_update import adam_update, why_not_adam_update
from lowprec.pallas.interpreters import tpu_interpreter
from lowprec.pallas.tpu.adam_update import adam_update as tpu_kernel

CODES = {
    "adam8": (
        MomentCode(element_of("cmp8"), 128, "bfloat16"),
        MomentCode(element_of("log8"), 256, stochastic=True, keeps_positive=True),
    ),
    "adam4": (
        MomentCode(element_of("de4"), 128, signed_scale=True),
        MomentCode(element_of("log4"), 128, stochastic=True, keeps_positive=True),
    ),
    "adam8, all blocks of 128": (
        MomentCode(element_of("cmp8"), 128, "bfloat16"),
        MomentCode(element_of("log8"), 128, stochastic=True, keeps_positive=True),
    ),
}
EXACT = AdamScalars(*map(np.float32, (0.5, 0.5, 0.5, 0.25, 2**-20, 2.0, 1.25, -(2**-7), 2**-5)))
ORDINARY = AdamScalars(*map(np.float32, (0.9, 0.1, 0.999, 0.001, 1e-8, 1.7, 30.0, -1e-3, 0.1)))
LOWERED = [
    *((name, weights, "bfloat16", True) for name in CODES for weights in ("float32", "bfloat16")),
    ("adam8", "float32", "float32", False),
]

stored = jax.jit(reference.stored, static_argnums=1)


def operands(name, shape, weights="float32", gradients="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda size: jnp.asarray(rng.normal(size=shape) * size, jnp.float32)
    words = jnp.asarray(rng.integers(0, 2**32, (3, 2), dtype=np.uint32))
    mu_code, nu_code = CODES[name]
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    mu, nu = stored(normal(0.01), mu_code, index), stored(normal(0.01) ** 2, nu_code, index << 20)
    g = normal(0.01).astype(jnp.bfloat16).astype(gradients)
    return normal(1.0).astype(weights), g, mu, nu, words


def updated(name, given, scalars, impl="xla"):
    mu_code, nu_code = CODES[name]
    *arrays, words = given
    step = lambda arrays, scalars, words: adam_update(
        *arrays, scalars, words, mu_code=mu_code, nu_code=nu_code, impl=impl
    )
    return jax.jit(step)(arrays, scalars, words)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def values(moment, code, shape):
    """In float64, by the table."""
    codes = np.asarray(moment.codes)
    if code.packed == 2:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape)
    scales = np.repeat(np.asarray(moment.scales, np.float64), code.block, axis=-1)
    return value_table(code.element)[codes] * scales, scales


@pytest.mark.parametrize("name", ["adam8", "adam4"])
def test_the_reference_is_adam_in_float64_and_codes_are_neighbours_of_the_moments(name):
    shape, codes = (3, 512), CODES[name]
    given = operands(name, shape)
    w, g, mu, nu, _ = given
    new_w, *moments = updated(name, given, ORDINARY)
    g = np.asarray(g, np.float64)
    s = AdamScalars(*(float(x) for x in ORDINARY))
    m = s.b1 * values(mu, codes[0], shape)[0] + s.rest1 * g
    v = s.b2 * values(nu, codes[1], shape)[0] + s.rest2 * g**2
    update = m * s.correct1 / (np.sqrt(v * s.correct2) + s.eps) + s.weight_decay * np.asarray(w, np.float64)
    # A few roundings in float32 of an update that is below 0.1, and one of a weight below 8.
    np.testing.assert_allclose(new_w, np.asarray(w, np.float64) + s.step * update, atol=2**-21, rtol=0)
    for new, code, wanted in zip(moments, codes, (m, v), strict=True):
        got, scales = values(new, code, shape)
        amax = np.abs(wanted).reshape(*shape[:-1], -1, code.block).max(axis=-1).repeat(code.block, axis=-1)
        np.testing.assert_allclose(np.abs(scales), amax, rtol=2.0**-8 if code.scale_dtype == "bfloat16" else 1e-6)
        table = value_table(code.element)
        place = np.clip(np.searchsorted(table, wanted / scales), 1, len(table) - 1)
        gap = (table[place] - table[place - 1]) * np.abs(scales)
        assert np.all(np.abs(got - wanted) <= gap * (1 + 1e-5) + np.abs(scales) * table[table > 0].min())


@pytest.mark.parametrize(
    ("name", "weights"),
    [("adam8", "float32"), ("adam8", "bfloat16"), ("adam4", "float32"), ("adam8, all blocks of 128", "bfloat16")],
)
def test_the_kernel_has_every_bit_of_the_reference(name, weights):
    given = operands(name, (19, 256), weights, gradients="float32")  # two tiles of 8 rows, and three rows more
    same_bits(updated(name, given, EXACT, "interpret"), updated(name, given, EXACT))


@pytest.mark.parametrize("name", ["adam8", "adam4"])
def test_blocks_that_are_zero_nan_or_infinite_are_those_of_the_reference(name):
    w, g, *moments, words = operands(name, (8, 256))
    g = g.at[0].set(0).at[1, 3].set(jnp.nan).at[2, 200].set(jnp.inf).at[3, 5].set(-jnp.inf).at[4, :128].set(1e-30)
    g = g.at[5].set(0)
    zero = lambda moment: Moment(moment.codes, moment.scales.at[5:].set(0))
    given = (w, g, *map(zero, moments), words)
    ours, theirs = updated(name, given, EXACT, "interpret"), updated(name, given, EXACT)
    same_bits([x for x in jax.tree.leaves(ours[1:]) if x.dtype == jnp.uint8], [moment.codes for moment in theirs[1:]])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))  # NaNs differ in their bits
    assert np.isnan(np.float32(ours[1].scales)[1, 0]) and np.isnan(np.asarray(ours[0])[1, 3])
    assert np.all(np.isfinite(np.asarray(ours[0])[4:]))


def test_other_hyperparameters_leave_an_ulp_to_the_compiler():
    given = operands("adam4", (16, 256))
    scalars = ORDINARY._replace(weight_decay=None)
    (w, *ours), (w_reference, *theirs) = (updated("adam4", given, scalars, impl) for impl in ("interpret", "xla"))
    np.testing.assert_allclose(w, w_reference, rtol=2**-23, atol=2**-24)
    for moment, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(moment.scales, other.scales, rtol=2**-22)
        # A code differs where a moment lies within an ulp of a threshold, or of what its random bits are.
        assert np.mean(np.asarray(moment.codes) != np.asarray(other.codes)) < 1e-3


@pytest.mark.parametrize(("name", "weights", "gradients", "decays"), LOWERED)
def test_the_kernel_lowers_for_hopper_and_works_in_place(name, weights, gradients, decays, lowers):
    *arrays, words = operands(name, (11, 256), weights, gradients)
    mu_code, nu_code = CODES[name]
    scalars = EXACT if decays else EXACT._replace(weight_decay=None)
    step = lambda *arrays: adam_update(*arrays[:-1], scalars, arrays[-1], mu_code=mu_code, nu_code=nu_code)
    text = lowers(step, *arrays, words)
    (call,) = [line for line in text.splitlines() if "mosaic_gpu_v2" in line]
    assert call.count("output_operand_alias<") == 5


@pytest.mark.parametrize(
    ("name", "weights"), [("adam8", "float32"), ("adam4", "bfloat16"), ("adam8, all blocks of 128", "float32")]
)
def test_the_kernel_of_a_tpu_has_every_bit_of_the_reference(name, weights):
    *arrays, words = given = operands(name, (384, 256), weights)  # three tiles
    codes = dict(zip(("mu_code", "nu_code"), CODES[name], strict=True))
    kernel = jax.jit(lambda *arrays: tpu_kernel(*arrays, **codes, interpret=tpu_interpreter()))
    same_bits(kernel(*arrays, EXACT, words), updated(name, given, EXACT))


@pytest.mark.parametrize(("name", "weights", "gradients", "decays"), LOWERED)
def test_the_kernel_lowers_for_a_tpu_and_works_in_place(name, weights, gradients, decays, lowers):
    *arrays, words = operands(name, (256, 256), weights, gradients)
    mu_code, nu_code = CODES[name]
    scalars = EXACT if decays else EXACT._replace(weight_decay=None)
    step = lambda *arrays: adam_update(*arrays[:-1], scalars, arrays[-1], mu_code=mu_code, nu_code=nu_code)
    text = lowers(step, *arrays, words, kind="TPU v5 lite")
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert call.count("output_operand_alias<") == 5


def test_what_no_kernel_serves_is_said_and_left_to_the_reference():
    mu_code, nu_code = CODES["adam8"]
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    reason = lambda w, g=None, mu_code=mu_code: why_not_adam_update(w, g or w, mu_code, nu_code)["mosaic_gpu"]
    assert reason(array(4, 512)) is None
    assert "float16" in reason(array(4, 512, dtype="float16"))
    assert "gradients are float16" in reason(array(4, 512), array(4, 512, dtype="float16"))
    assert "last axis" in reason(array(512, 384))
    assert "64 members" in reason(array(4, 512), mu_code=MomentCode(element_of("cmp8"), 64))
    assert "lin4" in reason(array(4, 512), mu_code=MomentCode(element_of("lin4"), 128))
    assert "256 elements" in reason(array(0, 512))
    assert "2^32" in reason(array(1 << 21, 4096))
    given = operands("adam8", (4, 512))
    with pytest.raises(UsageError, match="cannot serve"):
        w, g, *rest, words = given
        adam_update(w.astype(jnp.float16), g, *rest, EXACT, words, mu_code=mu_code, nu_code=nu_code, impl="mosaic_gpu")
    same_bits(updated("adam8", given, EXACT, "auto"), updated("adam8", given, EXACT))


def test_a_part_of_an_array_has_the_noise_of_its_place():
    w, g, mu, nu, words = operands("adam8", (4, 256))
    codes = dict(zip(("mu_code", "nu_code"), CODES["adam8"], strict=True))
    step = jax.jit(lambda *arrays, first=0: reference.adam_update(*arrays, EXACT, words, first=first, **codes))
    rows = lambda x: Moment(*(part[2:] for part in x)) if isinstance(x, Moment) else x[2:]
    part = jax.jit(lambda *arrays: reference.adam_update(*arrays, EXACT, words, first=512, **codes))
    same_bits(part(*map(rows, (w, g, mu, nu))), [rows(x) for x in step(w, g, mu, nu)])
