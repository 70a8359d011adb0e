"""What only a GPU tells: JAX_PLATFORMS=cuda python -m pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import fake_quant, formats, recipes
from lowprec.ops import qdot
from lowprec.pallas.block_matmul import block_matmul, why_not_block_matmul
from lowprec.pallas.channel_matmul import channel_matmul, why_not_channel_matmul
from lowprec.pallas.dispatch import kernel_of, why_not_auto
from lowprec.pallas.rotate_quantize import rotate_quantize
from lowprec.pallas.target import target

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def a_gpu():
    if target().platform != "gpu":
        pytest.skip(f"needs a GPU, and this is {target().kind}")


@pytest.fixture
def kernels():
    if kernel_of(target()) is None:
        pytest.skip(f"there are no kernels for {target().kind}")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_fp8_products_are_those_of_the_tensor_cores():
    if target().capability < "8.9":
        pytest.skip(f"{target().kind} has no fp8 products")
    x, w = normal(0, 512, 1024), normal(1, 1024, 256)
    for recipe in ("fp8", "fwd=e4m3fn@row", "fwd=e5m2@row,e4m3fn@tensor"):
        rule = recipes.parse(recipe).rule_for("layers/0/mlp/up")
        text = jax.jit(lambda x, w, rule=rule: qdot(x, w, rule)).lower(x, w).compile().as_text()
        assert "__cublas$lt$matmul$f8" in text, recipe


@pytest.mark.parametrize("name", formats.names())
def test_no_cast_is_left_out_of_a_compiled_rounding(name):
    x = normal(0, 64, 512) * jnp.exp2(normal(1, 64, 512) * 4)
    run = lambda x: fake_quant(x, name, pad=True)
    with jax.disable_jit():
        eager = np.asarray(run(x))
    np.testing.assert_array_equal(np.asarray(jax.jit(run)(x)), eager)


@pytest.mark.parametrize("recipe", ["fp8", "fp8_block", "int8_full", "mxfp8", "nvfp4", "quartet2", "jetfire"])
@pytest.mark.parametrize("backend", ["auto", "pallas"])
def test_products_on_the_device_are_what_emulation_makes_them(recipe, backend):
    rule, key = recipes.get(recipe).rule_for("layers/0/mlp/up"), jax.random.key(2)
    x, w, dy = (v.astype(jnp.bfloat16) for v in (normal(0, 256, 512), normal(1, 512, 384) / 16, normal(3, 256, 384)))

    @jax.jit
    def run(x, w, dy):
        results = []
        for who in (backend, "emulate"):
            y, vjp = jax.vjp(lambda x, w, who=who: qdot(x, w, rule, key=key, backend=who), x, w)
            results.append((y, *vjp(dy)))
        return results

    for ours, theirs in zip(*run(x, w, dy), strict=True):
        ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
        # Both are rounded to bfloat16; rotated operands may differ in a few of their codes.
        assert np.linalg.norm(ours - theirs) < 3e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("group", "tiles"), [(128, True), (128, False), (32, False)])
@pytest.mark.parametrize("dtypes", [("float8_e4m3fn",) * 2, ("float8_e5m2", "float8_e4m3fn"), ("int8",) * 2])
def test_the_kernel_by_blocks_is_its_reference(kernels, group, tiles, dtypes):
    m, k, n = 200, 1000, 300
    a, b = (_codes(i, (rows, k), dtype) for i, (rows, dtype) in enumerate(zip((m, n), dtypes, strict=True)))
    groups = -(-k // group)
    a_scale = jnp.exp(normal(2, m, groups))
    b_scale = jnp.exp(normal(3, -(-n // 128) if tiles else n, groups))
    assert why_not_auto(target(), why_not_block_matmul(a, b)) is None
    ours, theirs = (block_matmul(a, a_scale, b, b_scale, impl=impl) for impl in ("mosaic_gpu", "xla"))
    _near(ours, theirs)


@pytest.mark.parametrize("dtypes", [("float8_e4m3fn",) * 2, ("float8_e5m2", "float8_e4m3fn"), ("int8",) * 2])
def test_the_kernel_by_channels_is_its_reference(kernels, dtypes):
    a, b = (_codes(i, (rows, 1000), dtype) for i, (rows, dtype) in enumerate(zip((200, 300), dtypes, strict=True)))
    scales = {"a_scale": jnp.exp(normal(2, 200)), "b_scale": jnp.exp(normal(3, 300))}
    assert why_not_auto(target(), why_not_channel_matmul(a, b)) is None
    _near(*(channel_matmul(a, b, **scales, impl=impl) for impl in ("mosaic_gpu", "xla")))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("fmt", ["fp8_block128", "mxfp8", "mxfp4", "nvfp4", "int8@1x128"])
@pytest.mark.parametrize("rotation", [None, 128])
def test_the_rounding_kernel_is_its_reference(kernels, rotation, fmt, rounding):
    x, key = normal(0, 200, 1000).astype(jnp.bfloat16), jax.random.key(1)
    ours, theirs = (
        rotate_quantize(x, fmt, rotation=rotation, rounding=rounding, key=key, impl=impl)
        for impl in ("mosaic_gpu", "xla")
    )
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        differing = np.mean(np.asarray(a) != np.asarray(b))
        # Sums of rotated values may differ in their last bits, and then a code by a step.
        assert differing == 0 if rotation is None else differing < 1e-3


def _codes(seed, shape, dtype):
    x = normal(seed, *shape)
    return jnp.round(x * 40).astype(dtype) if dtype == "int8" else x.astype(dtype)


def _near(ours, theirs):
    ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
    # Within a group the tensor cores sum fp8 products with some 14 bits.
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
