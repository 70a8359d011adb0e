"""Products with 4-bit weights: the specification in float64, what kernels make of codes, the kernel, its lowering."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.errors import UsageError
from lowprec.formats.catalog import NF4
from lowprec.pallas.four_bits import ELEMENTS, code_dtype, separated, values
from lowprec.pallas.interpreters import gpu_interpreter
from lowprec.pallas.w4_config import W4Config, shipped, w4_config
from lowprec.pallas.w4_matmul import w4_matmul

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
# The values of the sixteen codes, by ml_dtypes and by the paper's table.
TABLES = {
    "int4": np.arange(16, dtype=np.uint8).astype(ml_dtypes.uint4).view(ml_dtypes.int4).astype(np.float64),
    "e2m1fn": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64),
    "nf4": np.asarray(NF4.values),
}


def operands(m, n, k, group, scale_dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16),
        jnp.asarray(rng.integers(0, 256, (n, k // 2)), jnp.uint8),
        jnp.asarray(rng.uniform(0.5, 2, (n, k // group)), scale_dtype),
    )


def weights(codes, scales, name):
    """numpy's, rounded to bfloat16 by ml_dtypes."""
    codes, scales = np.asarray(codes), np.asarray(scales).astype(np.float32)
    elements = TABLES[name][np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)].astype(np.float32)
    w = elements * np.repeat(scales, elements.shape[1] // scales.shape[1], axis=1)
    return w.astype(ml_dtypes.bfloat16).astype(np.float64)


def error(y, wanted):
    return np.abs(np.asarray(y, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("name", "group"), [("int4", 128), ("e2m1fn", 32), ("nf4", 64)])
def test_the_reference_multiplies_by_bfloat16_weights(name, group, scale_dtype):
    x, codes, scales = operands(5, 7, 256, group, scale_dtype)
    wanted = np.asarray(x).astype(np.float64) @ weights(codes, scales, name).T
    # A float32 sum of 256 exact products: √256 · 2^-24 = 1e-6 of a term, and less of the largest sum.
    assert error(w4_matmul(x, codes, scales, name, out_dtype=jnp.float32, impl="xla"), wanted) < 1e-6


def test_gradients_are_those_of_the_product_with_dequantized_weights():
    x, codes, scales = operands(4, 6, 128, 32, jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)), jnp.float32)
    loss = lambda x, scales: jnp.sum(w4_matmul(x, codes, scales, "nf4", out_dtype=jnp.float32, impl="xla") * dy)
    dx, d_scales = jax.grad(loss, (0, 1))(x, scales)
    assert error(dx, np.asarray(dy, np.float64) @ weights(codes, scales, "nf4")) < 2.0**-8  # dx is bfloat16
    elements = weights(codes, jnp.ones_like(scales), "nf4")
    dw = np.asarray(dy, np.float64).T @ np.asarray(x).astype(np.float64)
    assert error(d_scales, (dw * elements).reshape(6, 4, 32).sum(-1)) < 2.0**-6  # through bfloat16 weights


def dequantized(tile, element, interpret=None):
    """values() in the registers of a kernel, with the layouts of the product."""

    def kernel(codes_g, out_g, codes_s, out_s, barrier):
        plgpu.copy_gmem_to_smem(codes_g, codes_s, barrier)
        plgpu.barrier_wait(barrier)
        loaded = plgpu.load(codes_s, layout=plgpu.Layout.WGMMA_UPCAST_4X)
        out_s[...] = values(plgpu.layout_cast(loaded, plgpu.Layout.WGMMA), element)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_g)
        plgpu.wait_smem_to_gmem(0)

    in_tiles = lambda columns, swizzle: (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 128), jnp.float32),
        scratch_types=[
            plgpu.SMEM((64, 128), code_dtype(element), transforms=in_tiles(128, 64)),
            plgpu.SMEM((64, 128), jnp.float32, transforms=in_tiles(32, 128)),
            plgpu.Barrier(),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )(tile)


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_kernel_reads_all_sixteen_codes_as_the_format_has_them(name, lowers):
    """Whatever wgmma is then given, in registers or in shared memory, starts with this."""
    codes = np.random.default_rng(2).permutation(np.resize(np.arange(256, dtype=np.uint8), 64 * 64)).reshape(64, 64)
    tile = separated(jnp.asarray(codes), ELEMENTS[name])
    wanted = TABLES[name][np.stack([codes & 15, codes >> 4], axis=-1).reshape(64, 128)].astype(np.float32)
    got = np.asarray(dequantized(tile, ELEMENTS[name], gpu_interpreter()))
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
    assert "mosaic_gpu" in lowers(lambda tile: dequantized(tile, ELEMENTS[name]), tile)


@pytest.mark.parametrize(
    ("m", "name", "group", "scale_dtype", "config"),
    [
        (5, "e2m1fn", 32, jnp.float32, W4Config(8, 2, 1)),  # six steps, in two stages
        slow(5, "int4", 128, jnp.bfloat16, W4Config(8, 2, 2)),
        (40, "nf4", 64, jnp.bfloat16, W4Config(16, 2, 3)),  # parts of K, rows in three tiles
        slow(200, "int4", 64, jnp.float32, W4Config(128, 2, 1)),
    ],
)
def test_the_kernel_interpreted_is_the_reference(m, name, group, scale_dtype, config):
    """Odd numbers of rows and columns, more steps than stages; races are detected, memory is NaN."""
    x, codes, scales = operands(m, 150, 768, group, scale_dtype)
    options = {"fmt": name, "out_dtype": jnp.float32}
    got = w4_matmul(x, codes, scales, impl="interpret", config=config, **options)
    assert error(got, np.asarray(w4_matmul(x, codes, scales, impl="xla", **options), np.float64)) < 1e-6


@pytest.mark.parametrize("operand", ["shared", slow("registers")])
@pytest.mark.parametrize("config", shipped(), ids=lambda c: f"{c.rows}x{c.splits}")
@pytest.mark.parametrize(("name", "group"), [("int4", 128), slow("e2m1fn", 32), ("nf4", 64)])
def test_the_kernel_lowers_for_an_h200(name, group, config, operand, lowers):
    """Parts of K leave as float32, the largest results there are."""
    config = W4Config(config.rows, config.stages, config.splits, operand)
    arguments = operands(config.rows, 256, 1024, group, jnp.float32 if name == "e2m1fn" else jnp.bfloat16)
    assert "mosaic_gpu" in lowers(partial(w4_matmul, fmt=name, impl="mosaic_gpu", config=config), *arguments)


@pytest.mark.parametrize("m", [1, 500])
def test_auto_takes_the_kernel_on_an_h200_and_xla_elsewhere(m, lowers):
    call = lambda *a: w4_matmul(*a, "int4")
    arguments = operands(m, 256, 1024, 128)
    assert "mosaic_gpu" in lowers(call, *arguments)
    assert "mosaic_gpu" not in lowers(call, *arguments, kind="NVIDIA B200")


def test_few_rows_are_shared_out_over_the_multiprocessors():
    assert w4_config(1, 4096, 4096, 132).splits == 4  # 32 blocks without
    assert w4_config(1, 32768, 4096, 132).splits == 1
    assert w4_config(4096, 4096, 4096, 132).rows == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "int5"}, "unknown format of 4-bit weights 'int5'; did you mean int4"),
        ({"scales": jnp.ones((4, 3))}, r"scales of shape \(4, 8\) or \(4, 4\) or \(4, 2\), not \(4, 3\)"),
        ({"x": jnp.ones((3, 256))}, "bfloat16 x"),
        ({"codes": jnp.zeros((4, 100), jnp.uint8)}, r"codes of shape \(4, 128\)"),
        ({"out_dtype": jnp.float16}, "writes bfloat16, float32, not float16"),
    ],
)
def test_what_does_not_suit_is_named(change, message):
    x, codes, scales = operands(3, 4, 256, 64)
    with pytest.raises(UsageError, match=message):
        w4_matmul(**{"x": x, "codes": codes, "scales": scales, "fmt": "int4"} | change)
