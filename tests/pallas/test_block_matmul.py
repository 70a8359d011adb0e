"""Block-scaled products: the reference against float64, the kernel against the reference, its lowering for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.pallas import block_matmul
from lowprec.pallas.config import BlockMatmulConfig, ChannelMatmulConfig, shipped
from lowprec.pallas.gpu_sm90 import block_matmul as kernel
from lowprec.pallas.interpreters import gpu_interpreter

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
E4, E5, I8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
KINDS = [("tiles", 128), ("lines", 128), ("lines", 32)]  # how the scales of b lie, and the elements of k they span


def codes(rng, shape, dtype):
    if dtype == I8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def operands(m, n, k, kind, group, a_dtype=E4, b_dtype=E4, seed=0):
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    scale = lambda rows: rng.uniform(0.25, 4, (rows, groups)).astype(np.float32)
    a, b = codes(rng, (m, k), a_dtype), codes(rng, (n, k), b_dtype)
    return tuple(map(jnp.asarray, (a, scale(m), b, scale(n if kind == "lines" else -(-n // 128)))))


def float64(a, a_scale, b, b_scale, group):
    """Independent of the package: ml_dtypes decodes, numpy multiplies."""
    a, a_scale, b, b_scale = (np.asarray(x).astype(np.float64) for x in (a, a_scale, b, b_scale))
    if b_scale.shape[0] != b.shape[0]:
        b_scale = np.repeat(b_scale, 128, axis=0)[: b.shape[0]]
    y = np.zeros((a.shape[0], b.shape[0]))
    with np.errstate(invalid="ignore", over="ignore"):
        for g in range(a_scale.shape[1]):
            ks = slice(g * group, (g + 1) * group)
            y += a_scale[:, g : g + 1] * b_scale[:, g] * (a[:, ks] @ b[:, ks].T)
    return y


def error(y, wanted):
    """The largest error, relative to the largest value: sums cancel, so that single values may be small."""
    y, wanted = np.asarray(y, np.float64), np.asarray(wanted, np.float64)
    return np.abs(y - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E4, E4), (E5, E4), (I8, I8)])
def test_the_reference_is_the_sum_of_scaled_groups(kind, group, a_dtype, b_dtype):
    arguments = operands(37, 150, 300, kind, group, a_dtype, b_dtype)
    # Of 300 products each within half a float32 ulp of the sum: 300 · 2^-24 = 2e-5 at worst, its root on average.
    assert error(block_matmul(*arguments, impl="xla"), float64(*arguments, group)) < 1e-6


CONFIGS = [
    BlockMatmulConfig(256, 128, 2),
    slow(BlockMatmulConfig(128, 128, 3)),
    BlockMatmulConfig(128, 64, 4, epilogue=64),  # an odd number of parts leave at the end
    slow(BlockMatmulConfig(64, 128, 4, snake=1)),
    BlockMatmulConfig(64, 256, 2),
    BlockMatmulConfig(128, 128, 3, "rows"),
    BlockMatmulConfig(128, 128, 3, "columns"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rows}x{c.columns}-{c.cluster}")
def test_the_kernel_interpreted_agrees_whatever_its_tiles(config):
    """K takes more steps than there are stages, the output more tiles than one; races are detected, memory is NaN."""
    arguments = operands(260, 200, 640, "tiles", 128)
    y = block_matmul(*arguments, impl="interpret", config=config)
    assert error(y, block_matmul(*arguments, impl="xla")) < 1e-6


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [slow(E4, E4), (E5, E4), slow(I8, I8)])
def test_the_kernel_interpreted_agrees_for_all_scales_and_elements(kind, group, a_dtype, b_dtype):
    arguments = operands(64, 130, 900, kind, group, a_dtype, b_dtype)
    y = block_matmul(*arguments, impl="interpret")
    assert error(y, block_matmul(*arguments, impl="xla")) < 1e-6


@pytest.mark.parametrize("cluster", [None, "rows"])
def test_blocks_divide_the_tiles_among_them(cluster):
    """Three blocks (two clusters of two) for six tiles."""
    a, a_scale, b, b_scale = operands(256, 384, 384, "tiles", 128)
    config = BlockMatmulConfig(128, 128, 2, cluster)
    y = kernel.block_matmul(
        a,
        a_scale.T,
        b,
        b_scale.T,
        lines=False,
        out_dtype=jnp.dtype(jnp.float32),
        config=config,
        cores=3 if cluster is None else 4,
        interpret=gpu_interpreter(),
    )
    assert error(y, block_matmul(a, a_scale, b, b_scale, impl="xla")) < 1e-6


def test_bfloat16_results_are_the_rounded_ones():
    arguments = operands(100, 100, 512, "tiles", 128)
    y = block_matmul(*arguments, impl="interpret", out_dtype=jnp.bfloat16)
    exact = block_matmul(*arguments, impl="xla")
    assert y.dtype == jnp.bfloat16
    # Half an ulp of a significand of eight bits is 2^-8 of its binade; the float32 sums differ by far less.
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8 * 1.001, atol=1e-5)
    # To nearest: but where the two sums fall on both sides of a tie, 1e-6 · 2^9 of the values at most.
    assert (y == exact.astype(jnp.bfloat16)).mean() > 0.999


@pytest.mark.parametrize("shape", [slow((1, 1, 1)), slow((3, 129, 33)), (66, 129, 127), slow((1, 300, 257))])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_sizes_that_are_no_whole_tiles(shape, kind, group):
    arguments = operands(*shape, kind, group)
    wanted = float64(*arguments, group)
    assert error(block_matmul(*arguments, impl="xla"), wanted) < 1e-6
    assert error(block_matmul(*arguments, impl="interpret"), wanted) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 64), (5, 0, 64), (5, 6, 0)])
@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_empty_products(shape, impl):
    y = block_matmul(*operands(*shape, "lines", 32), impl=impl)
    assert y.shape == shape[:2]
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_what_is_not_finite_reaches_its_rows_and_columns_and_no_others(kind, group):
    a, a_scale, b, b_scale = operands(9, 140, 300, kind, group, E4, E5)
    a_scale = a_scale.at[2, 1].set(jnp.nan).at[3, 0].set(jnp.inf)
    b_scale = b_scale.at[1, 2].set(jnp.nan)
    a = a.at[5, 299].set(jnp.nan)
    b = b.at[7, 298].set(jnp.inf)
    arguments = a, a_scale, b, b_scale
    wanted = float64(*arguments, group)
    assert np.isnan(wanted[2]).all() and np.isnan(wanted[5]).all() and np.isinf(wanted[3]).any()
    assert np.isfinite(wanted).sum() > 100
    for impl in ("xla", "interpret"):
        y = np.asarray(block_matmul(*arguments, impl=impl))
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4, err_msg=impl)


def test_float16_results_are_left_to_xla():
    arguments = operands(8, 8, 128, "lines", 128)
    assert block_matmul(*arguments, out_dtype=jnp.float16).dtype == jnp.float16
    with pytest.raises(UsageError, match="cannot serve this call: it writes float32 and bfloat16, not float16"):
        block_matmul(*arguments, out_dtype=jnp.float16, impl="mosaic_gpu")


LOWERED = [(kind, config) for kind, group in KINDS for config in shipped("block_matmul", group)]


@pytest.mark.parametrize(
    ("kind", "config"), LOWERED, ids=[f"{k}-{c.group}-{c.rows}x{c.columns}-{c.cluster}" for k, c in LOWERED]
)
def test_every_config_lowers(kind, config, lowers):
    arguments = operands(512, 256, 1024, kind, config.group, b_dtype=E5)
    dtype = jnp.bfloat16 if config.cluster else jnp.float32
    text = lowers(lambda *xs: block_matmul(*xs, impl="mosaic_gpu", config=config, out_dtype=dtype), *arguments)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_int8_lowers(kind, group, lowers):
    assert "mosaic_gpu" in lowers(block_matmul, *operands(130, 256, 300, kind, group, I8, I8))


def test_only_hopper_gets_the_kernel(lowers):
    arguments = operands(128, 128, 256, "tiles", 128)
    assert "mosaic_gpu" in lowers(block_matmul, *arguments, kind="NVIDIA H100 80GB HBM3")
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "TPU v5p"):
        assert "mosaic_gpu" not in lowers(block_matmul, *arguments, kind=kind)


def test_a_batch_lowers(lowers):
    arguments = [jnp.stack([x, x]) for x in operands(128, 128, 256, "tiles", 128)]
    assert "mosaic_gpu" in lowers(jax.vmap(block_matmul), *arguments)


def changed(**changes):
    names = ("a", "a_scale", "b", "b_scale")
    arguments = dict(zip(names, operands(4, 300, 256, "tiles", 128), strict=True))
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": jnp.zeros((4, 256))}, "multiplies float8_e4m3fn, float8_e5m2, int8; a is float32"),
        ({"b": jnp.zeros((300, 256), I8)}, "not float8_e4m3fn by int8"),
        ({"b": jnp.zeros((256, 300), E4)}, r"a \(4, 256\) and b \(256, 300\), which differ.*transpose b"),
        ({"a": jnp.zeros(256, E4)}, r"a has shape \(256,\)"),
        ({"a_scale": jnp.ones((4, 3))}, r"a_scale of shape \(4, 2\) or \(4, 8\), not \(4, 3\)"),
        ({"b_scale": jnp.ones((2, 2))}, r"b_scale of shape \(300, 2\) or \(3, 2\), not \(2, 2\)"),
        ({"a_scale": jnp.ones((4, 8))}, r"b_scale of shape \(300, 8\), not \(3, 2\)"),
        ({"a_scale": jnp.ones((4, 2), jnp.bfloat16)}, "a_scale in float32, not bfloat16"),
        ({"out_dtype": jnp.int8}, "writes float32, bfloat16, float16, not int8"),
        ({"config": BlockMatmulConfig(group=32, stages=2)}, "config for groups of 32, and scales of groups of 128"),
        ({"impl": "cuda"}, "unknown implementation 'cuda'"),
        ({"impl": "interpret", "config": ChannelMatmulConfig()}, "takes a BlockMatmulConfig on GPUs, not ChannelM"),
    ],
)
def test_what_does_not_suit_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        block_matmul(**changed(**changes))
