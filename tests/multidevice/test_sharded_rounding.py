"""The same bits on one device and on eight, however the arrays are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowprec import formats, recipes
from lowprec.ops import qdot
from lowprec.quantizers import fake_quant, quantize

LAYOUTS = [
    PartitionSpec("data"),
    PartitionSpec(None, "data"),
    PartitionSpec("data", "fsdp"),
    PartitionSpec(("data", "fsdp")),
]


def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def placed(x, spec):
    return jax.device_put(x, NamedSharding(mesh(), spec))


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
def test_random_bits_depend_on_the_global_index_alone(spec):
    expected = formats.random_bits(jax.random.key(1), (64, 32))
    sharding = NamedSharding(mesh(), spec)
    sharded = jax.jit(lambda: formats.random_bits(jax.random.key(1), (64, 32)), out_shardings=sharding)()
    np.testing.assert_array_equal(sharded, expected)


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["e4m3fn", "nvfp4", "mxfp4", "int8@row", "e4m3fn@tensor"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_codes_and_scales_are_the_same_bits(name, rounding, spec):
    x = jax.random.normal(jax.random.key(0), (64, 128))
    run = jax.jit(lambda x: quantize(x, name, rounding=rounding, key=jax.random.key(2)))
    jax.tree.map(np.testing.assert_array_equal, run(placed(x, spec)), run(x))


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_block", "nvfp4", "quest_4", "int8_full"])
def test_products_and_gradients_agree_and_their_noise_is_identical(name):
    """Operands have the same bits; sums over a sharded axis are ordered otherwise: a few float32 roundings remain."""
    gemm = recipes.get(name).rule_for("layers/0/mlp/up")
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(64, 128), (128, 64), (64, 64)]))

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, gemm, key=jax.random.key(7)), x, w)
        return y, *vjp(dy)

    expected = run(x, w, dy)
    sharded = run(
        placed(x, PartitionSpec("data")), placed(w, PartitionSpec(None, "fsdp")), placed(dy, PartitionSpec("data"))
    )
    for ours, single in zip(sharded, expected, strict=True):
        assert float(jnp.max(jnp.abs(ours - single))) <= 1e-5 * float(jnp.max(jnp.abs(single)))


@pytest.mark.parametrize("name", ["e4m3fn", "int8", "posit8", "mxfp4", "e4m3fn@1x16", "int8@row"])
def test_inside_shard_map_the_bits_are_those_of_the_whole_array(name):
    """Of deterministic rounding: a shard cannot know where it lies, so noise wants a key of its own there."""
    x = jax.random.normal(jax.random.key(0), (64, 128))
    spec = PartitionSpec(("data", "fsdp"))
    inside = jax.shard_map(lambda x: fake_quant(x, name), mesh=mesh(), in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(inside)(x), fake_quant(x, name))
    fold = lambda x: fake_quant(x, name, rounding="stochastic", key=jax.random.fold_in(jax.random.key(1), shard()))
    shard = lambda: 2 * jax.lax.axis_index("data") + jax.lax.axis_index("fsdp")
    noisy = jax.jit(jax.shard_map(fold, mesh=mesh(), in_specs=spec, out_specs=spec))(jnp.tile(x[:8], (8, 1)))
    rows = np.asarray(noisy).reshape(8, -1)
    assert len({row.tobytes() for row in rows}) == 8  # each shard has noise of its own
