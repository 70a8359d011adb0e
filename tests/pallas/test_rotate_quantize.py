"""Rotating and quantizing in one pass: the specification against numpy, the kernel against the specification."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.pallas.block_rounding import block_rounding
from lowprec.pallas.quantize_config import PLAIN, QuantizeConfig
from lowprec.pallas.rotate_quantize import rotate_quantize, why_not_rotate_quantize
from lowprec.pallas.target import on
from lowprec.quantizers import AbsMax, FourOverSix, Quantizer, hadamard, quantize

ONE = QuantizeConfig(warpgroups=1, stages=2, resident=1)
KEY = jax.random.key(11)
EDEN_RULE = AbsMax(headroom=17 / 16 * 0.93, limit=255.99)
NARROW = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1fn": ml_dtypes.float4_e2m1fn}


def exact_sums(rows, columns, seed=0):
    """bfloat16 multiples of 2^-6 below 2: float32 holds every sum of 128 of them exactly, in any order."""
    integers = np.random.default_rng(seed).integers(-127, 128, (rows, columns))
    return jnp.asarray(integers / 64, jnp.bfloat16)


def special(rows=192, columns=256):
    """Ordinary blocks beside zeros, -0, subnormals, infinities, NaN, the largest and the smallest numbers."""
    x = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    x[:, :128] *= np.float32(2.0) ** np.random.default_rng(2).integers(-130, 120, (rows, 1))
    x[1], x[2], x[3] = 0, -0.0, 1e-39
    x[4, 5], x[5, 130], x[6, 7] = np.inf, -np.inf, np.nan
    x[7] = float(jnp.finfo(jnp.bfloat16).max)
    x[8] = 2.0**-126
    x[9, 1:] = 0
    x[10, ::2] = 1e-39
    return jnp.asarray(x, jnp.bfloat16)


def signs_of(length):
    return jnp.asarray(np.random.default_rng(4).choice([-1.0, 1.0], length), jnp.float32)


def assert_same(got, want):
    """Bit for bit; but sums, which are float32 in another order: 2^-24 of what is summed, 128 times at most."""
    for name in ("codes", "scales", "tensor"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            bits = lambda v: np.atleast_1d(np.asarray(v)).view(np.uint8)
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)
    for a, b in zip(got.sums or (), want.sums or (), strict=True):
        np.testing.assert_allclose(a, b, rtol=128 * 2.0**-24)


def unpacked(codes, count):
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)[:, :count]


# What numpy makes of the definitions.


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_fp8_codes_are_what_ml_dtypes_rounds_the_scaled_values_to(name):
    x = np.asarray(exact_sums(6, 300)).astype(np.float32)
    got = rotate_quantize(jnp.asarray(x), f"{name}@1x128", impl="xla")
    top = np.float32(float(ml_dtypes.finfo(NARROW[name]).max))
    for start in range(0, 300, 128):
        block = x[:, start : start + 128]
        scale = np.abs(block).max(1) / top
        np.testing.assert_array_equal(got.scales[:, start // 128], scale)
        want = (block * (np.float32(1) / scale)[:, None]).astype(NARROW[name])
        np.testing.assert_array_equal(np.asarray(got.codes)[:, start : start + 128], want)


def test_mxfp4_has_ocp_scales_and_the_even_element_in_the_low_nibble():
    x = np.asarray(exact_sums(5, 96)).astype(np.float32)
    got = rotate_quantize(jnp.asarray(x), "mxfp4", impl="xla")
    blocks = x.reshape(5, 3, 32).astype(np.float64)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    np.testing.assert_array_equal(got.scales, exponent + 127)
    z = np.clip(blocks / 2.0 ** exponent[..., None], -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(unpacked(np.asarray(got.codes), 96), z.view(np.uint8).reshape(5, 96))


def test_nvfp4_has_two_levels():
    x = np.asarray(exact_sums(5, 64)).astype(np.float32)
    got = rotate_quantize(jnp.asarray(x), "nvfp4", impl="xla")
    tensor = np.abs(x).max() / np.float32(6 * 448)
    blocks = x.reshape(5, 4, 16)
    scale = (np.abs(blocks).max(-1) / np.float32(6) / tensor).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(got.tensor, tensor)
    np.testing.assert_array_equal(got.scales, scale.view(np.uint8))
    z = blocks * ((np.float32(1) / tensor) / scale.astype(np.float32))[..., None]
    np.testing.assert_array_equal(
        unpacked(np.asarray(got.codes), 64), z.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(5, 64)
    )


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_rotation_multiplies_by_signs_and_then_by_hadamards_matrix(size):
    x, signs = exact_sums(4, 256), signs_of(256)
    got = rotate_quantize(x, "int8@1x128", rotation=size, signs=signs, impl="xla")
    bits = np.arange(size)[:, None] & np.arange(size)[None]
    matrix = (-1.0) ** np.array([[int(v).bit_count() for v in row] for row in bits])
    blocks = (np.asarray(x).astype(np.float64) * np.asarray(signs)).reshape(4, -1, size) @ matrix
    y = (blocks.reshape(4, 2, 128).astype(np.float32)) * np.float32(size**-0.5)
    scale = np.abs(y).max(-1) / np.float32(127)
    np.testing.assert_array_equal(got.scales, scale)
    want = np.rint(y * (np.float32(1) / scale)[..., None]).reshape(4, 256)
    np.testing.assert_array_equal(got.codes, want)


# What the framework's emulation makes of them.

FORMATS = ("fp8_block128", "e5m2@1x16", "mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4", "int8@1x128", "int4@1x32", "mxint8")


def some(cases, fast):
    """Parameters of which only the cases of these numbers are fast."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[pytest.mark.slow] * (i not in fast)) for i, row in enumerate(rows)]


ROUNDED = [(fmt, rounding) for fmt in FORMATS for rounding in ("nearest_even", "stochastic")]


@pytest.mark.parametrize(("fmt", "rounding"), some(ROUNDED, (1, 4, 8, 11, 12, 15)))
def test_without_rotation_the_specification_is_quantize(fmt, rounding):
    x = special(40, 200)
    got = rotate_quantize(x, fmt, rounding=rounding, key=KEY, impl="xla")
    want = quantize(x, fmt, rounding=rounding, key=KEY, pad=True)
    np.testing.assert_array_equal(np.asarray(got.codes).view(np.uint8), want.codes)
    np.testing.assert_array_equal(got.scales, want.scales)
    assert got.tensor == want.tensor_scale


def test_a_tensor_scale_that_is_given_is_used():
    x = exact_sums(8, 64)
    own = rotate_quantize(x, "nvfp4", impl="xla")
    assert_same(rotate_quantize(x, "nvfp4", tensor_scale=own.tensor, impl="xla"), own)
    twice = rotate_quantize(x, "nvfp4", tensor_scale=2 * own.tensor, impl="xla")
    np.testing.assert_array_equal(twice.scales, own.scales - 8)  # half of an e4m3 number that stays normal
    np.testing.assert_array_equal(twice.codes, own.codes)


def test_sums_are_those_of_eden():
    x, signs = exact_sums(6, 256), signs_of(256)
    got = rotate_quantize(x, "nvfp4", rotation=128, signs=signs, rule=EDEN_RULE, sums=True, impl="xla")
    y = hadamard(x.astype(jnp.float32), 128, signs)
    rounded = Quantizer("nvfp4", scale=EDEN_RULE).round(y, -1)
    z = np.asarray(rounded.scale.divide(rounded.layout.split(y)), np.float64).reshape(6, 2, 128)
    q = np.asarray(rounded.elements, np.float64).reshape(6, 2, 128)
    for sums, want in zip(got.sums, (np.sum(z * z, -1), np.sum(z * q, -1)), strict=True):
        np.testing.assert_allclose(sums, want, rtol=128 * 2.0**-24)


def test_shared_noise_is_unbiased_to_one_in_512_steps():
    x = jnp.full((4096, 128), 1.0, jnp.float32).at[:, 1:].set(0.3)
    got = rotate_quantize(x, "int8@1x128", rounding="stochastic", noise="shared", key=KEY, impl="xla")
    mean = np.asarray(got.codes)[:, 1:].astype(np.float64).mean()
    # 38.1 stands between 38 and 39: 520192 draws with deviation 0.3, groups of four share a hash; 6 of 0.0009, + 1/512.
    assert abs(mean - 38.1) < 1 / 512 + 6 * 0.0009


# The kernel, interpreted: more tiles than stages, memory that starts as NaN, races detected.

CASES = {
    "fp8": ("fp8_block128", {}),
    "fp8 stochastic": ("fp8_block128", {"rounding": "stochastic"}),
    "e5m2 1x32": ("e5m2@1x32", {"rounding": "stochastic", "noise": "shared"}),
    "int8 floor": ("int8@1x128", {"rule": AbsMax(floor=1e-4)}),
    "int8 offset": ("int8@1x128", {"rounding": "stochastic", "rule": AbsMax(offset=1e-10)}),
    "mxfp8": ("mxfp8", {}),
    "mxfp4 rceil": ("e2m1fn@1x32/e8m0.rceil", {"rounding": "stochastic"}),
    "nvfp4": ("nvfp4", {"rule": AbsMax(headroom=17 / 16, limit=256.0)}),
    "nvfp4 stochastic": ("nvfp4", {"rounding": "stochastic", "noise": "shared"}),
    "mxint8": ("mxint8", {}),
    "int4": ("int4@1x64", {}),
}


@pytest.mark.parametrize("case", some(CASES, (1, 4, 7)))
def test_the_kernel_gives_the_specified_bits(case):
    fmt, options = CASES[case]
    x = special()
    call = partial(rotate_quantize, x, fmt, key=KEY, **options)
    assert_same(call(impl="interpret", config=ONE), call(impl="xla"))


ROTATED = {
    "fp8 128": ("fp8_block128", {"rotation": 128}),
    "fp8 128 signs stochastic": ("fp8_block128", {"rotation": 128, "signs": 256, "rounding": "stochastic"}),
    "mxfp4 32": ("mxfp4", {"rotation": 32, "rounding": "stochastic", "noise": "shared"}),
    "nvfp4 16": ("nvfp4", {"rotation": 16, "signs": 256, "rounding": "stochastic"}),
    "int8 64": ("int8@1x128", {"rotation": 64}),
    "eden": ("nvfp4", {"rotation": 128, "signs": 256, "rule": EDEN_RULE, "sums": True}),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter multiplies in numpy
@pytest.mark.parametrize("case", some(ROTATED, (1, 2)))
def test_the_kernel_rotates_to_the_specified_bits_where_sums_are_exact(case):
    fmt, options = ROTATED[case]
    options = {name: signs_of(value) if name == "signs" else value for name, value in options.items()}
    x = exact_sums(192, 256).at[3].set(0).at[5, 7].set(jnp.inf).at[70, 200].set(jnp.nan)
    call = partial(rotate_quantize, x, fmt, key=KEY, **options)
    assert_same(call(impl="interpret", config=ONE), call(impl="xla"))


EDGES = [(fmt, *shape) for fmt in ("nvfp4", "e4m3fn@1x32") for shape in ((1, 16), (65, 100), (130, 131))]


@pytest.mark.parametrize(("fmt", "rows", "columns"), some(EDGES, (5,)))
def test_the_kernel_fills_up_what_tiles_do_not_divide(fmt, rows, columns):
    x = special(max(rows, 16), 256)[-rows:, :columns]
    call = partial(rotate_quantize, x, fmt, rounding="stochastic", key=KEY)
    assert_same(call(impl="interpret", config=ONE), call(impl="xla"))


@pytest.mark.slow
def test_the_kernel_fills_up_what_rotations_do_not_divide():
    x = exact_sums(70, 100)
    call = partial(rotate_quantize, x, "mxfp4", rotation=64, signs=signs_of(128), rounding="stochastic", key=KEY)
    got = call(impl="interpret", config=ONE)
    assert got.codes.shape == (70, 64)
    assert_same(got, call(impl="xla"))


def test_warpgroups_that_divide_the_rows_unevenly_agree():
    x = exact_sums(64 * 11, 128)
    config = QuantizeConfig(warpgroups=2, stages=2, resident=2)
    call = partial(rotate_quantize, x, "fp8_block128", rotation=128, rounding="stochastic", key=KEY)
    assert_same(call(impl="interpret", config=config), call(impl="xla"))


@pytest.mark.slow
def test_float32_is_read_as_it_is():
    x = special().astype(jnp.float32) * 1.1
    call = partial(rotate_quantize, x, "fp8_block128")
    assert_same(call(impl="interpret", config=ONE), call(impl="xla"))


# The kernel as the compiler for Hopper sees it.

LOWERED = [
    *[(fmt, {"rounding": rounding}) for fmt, rounding in ROUNDED],
    *[("fp8_block128", {"rotation": size, "rounding": "stochastic"}) for size in (16, 32, 64, 128)],
    ("fp8_block128", {"rotation": 128}),
    ("fp8_block128", {"rotation": 128, "signs": 256, "rounding": "stochastic", "noise": "shared"}),
    ("e5m2@1x128", {"rotation": 128, "signs": 256}),
    ("mxfp8", {"rotation": 32, "rounding": "stochastic"}),
    ("mxfp4", {"rotation": 32, "signs": 256, "rounding": "stochastic", "noise": "shared"}),
    ("nvfp4", {"rotation": 16, "signs": 256, "rounding": "stochastic"}),
    ("nvfp4", {"rotation": 128, "signs": 256, "rule": EDEN_RULE, "sums": True}),
    ("int8@1x128", {"rotation": 128, "rule": AbsMax(floor=1e-4)}),
    ("fp8_block128", {"dtype": jnp.float32}),
    ("nvfp4", {"dtype": jnp.float32, "rounding": "stochastic"}),
]


@pytest.mark.parametrize(("fmt", "options"), some(LOWERED, (0, 1, 11, 13, 23, 28)), ids=str)
def test_every_configuration_that_is_shipped_lowers(lowers, fmt, options):
    options = {name: signs_of(value) if name == "signs" else value for name, value in options.items()}
    x = jnp.zeros((512, 256), options.pop("dtype", jnp.bfloat16))
    text = lowers(partial(rotate_quantize, fmt=fmt, key=KEY, **options), x)
    assert "mosaic_gpu" in text


# What no kernel serves.


@pytest.mark.parametrize(
    ("fmt", "options", "reason"),
    [
        ("nvfp4", {"rule": FourOverSix()}, "4"),
        ("mxfp6_e3m2", {}, "4 and 8 bits"),
        ("nf4@1x64", {}, "4 and 8 bits"),
        ("e4m3fn@1x96", {}, "not 96"),
        ("e4m3fn@1x128/bf16", {}, "bf16"),
        ("fp8_block128", {"rounding": "stochastic[8]"}, "stochastic"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said_and_left_to_xla(fmt, options, reason):
    x = exact_sums(8, 192)
    asked = {"rounding": "nearest_even", "rule": AbsMax(), "noise": "each"} | options
    why = why_not_rotate_quantize(x, block_rounding("rotate_quantize", fmt, None, **asked))
    assert reason in why["mosaic_gpu"]
    with pytest.raises(UsageError, match="cannot serve"):
        rotate_quantize(x, fmt, key=KEY, impl="interpret", **options)
    with on("NVIDIA H200"):
        text = jax.jit(partial(rotate_quantize, fmt=fmt, key=KEY, **options)).trace(x).lower().as_text()
    assert "mosaic_gpu" not in text


def test_an_empty_matrix_is_no_error():
    got = rotate_quantize(jnp.zeros((0, 128), jnp.bfloat16), "fp8_block128")
    assert got.codes.shape == (0, 128) and got.scales.shape == (0, 1)


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("e4m3fn", {}, "1x<g>"),
        ("fp8_block128", {"rotation": 48}, "rotates blocks of 16"),
        ("fp8_block128", {"signs": 128}, "no rotation"),
        ("fp8_block128", {"rotation": 128, "signs": 64}, "a sign for each of 128"),
        ("fp8_block128", {"rounding": "stochastic"}, "needs a key"),
        ("fp8_block128", {"noise": "shared"}, "shared noise"),
        ("fp8_block128", {"noise": "chared"}, "shared"),
        ("fp8_block128", {"tensor_scale": jnp.float32(1)}, "second level"),
        ("nvfp4", {"rule": FourOverSix(), "tensor_scale": jnp.float32(1)}, "tensor scale"),
    ],
)
def test_what_does_not_fit_is_named(fmt, options, message):
    options = {name: signs_of(value) if name == "signs" else value for name, value in options.items()}
    with pytest.raises(UsageError, match=message):
        rotate_quantize(exact_sums(4, 128), fmt, **options)


def test_walkers_fill_the_last_wave():
    with on("NVIDIA H200") as device:
        assert PLAIN.walkers(64, 128, device) == 4  # 256 of 264 blocks of threads at once
        assert QuantizeConfig(4, 2, 1).walkers(224, 1024, device) == 4  # 896 of 7 · 132, not 224 of 2 · 132
        assert PLAIN.walkers(1, 1, device) == 1
