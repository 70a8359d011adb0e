"""Low-bit states lie where their parameters lie, and updating them exchanges nothing but scalars."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowprec import optim
from lowprec.optim.adam import adamw
from lowprec.optim.state_tensor import is_stored

COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-to-all|collective-\w+|all-reduce|reduce-scatter)(?:-start)?\(")


def mesh():
    return Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def placed(spec, shape=(16, 1024)):
    sharding = NamedSharding(mesh(), spec)
    draw = np.random.default_rng(0)
    make = lambda shape, sharding: jax.device_put(jnp.asarray(draw.normal(size=shape), jnp.float32), sharding)
    return {"w": make(shape, sharding), "bias": make((7,), NamedSharding(mesh(), PartitionSpec()))}


def collectives(optimizer, params):
    """What the compiled update exchanges: (kind, shapes)."""
    shardings = optim.state_shardings(optimizer, params)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    of_params = jax.tree.map(lambda w: w.sharding, params)
    update = jax.jit(optimizer.update, out_shardings=(of_params, shardings))
    text = update.lower(params, state, params).compile().as_text()
    return [(kind, re.findall(r"\w+\[([\d,]*)\]", shapes)) for shapes, kind in COLLECTIVE.findall(text)]


ROWS, COLUMNS, BOTH = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec("data", "fsdp")


@pytest.mark.parametrize("spec", [ROWS, COLUMNS, BOTH], ids=str)
@pytest.mark.parametrize("name", ["adam8", "adam4", "stable_adam4", "solo", "quantize_state"])
def test_the_update_exchanges_scalars_at_most(name, spec):
    formats = {"mu": "de8@128", "nu": "cmp8", "min_size": 256}
    optimizer = (
        optim.quantize_state(optax.adamw(1e-2), **formats)
        if name == "quantize_state"
        else optim.get(name)(1e-2, min_size=256)
    )
    found = collectives(optimizer, placed(spec))
    if name == "stable_adam4":  # norms and largest magnitudes of whole tensors
        assert found and all(kind == "all-reduce" and not any(shapes) for kind, shapes in found), found
    else:
        assert not found


def test_the_pattern_would_see_an_exchange():
    """Blocks of 256 in shards of 128 columns: the documented fallback gathers."""
    optimizer = optim.quantize_state(optax.adamw(1e-2), mu="de8", nu="log8", min_size=256)
    found = collectives(optimizer, placed(COLUMNS, (16, 512)))
    assert any(any(shapes) for _, shapes in found)


@pytest.mark.parametrize("spec", [ROWS, COLUMNS, BOTH, PartitionSpec(None, ("data", "fsdp"))], ids=str)
def test_codes_and_scales_have_the_spec_of_their_parameter(spec):
    params = placed(spec)
    state = optim.state_shardings(adamw(1e-2, mu_format="de4", nu_format="log4", min_size=256), params)
    for moment in (state[0].mu, state[0].nu):
        for part in jax.tree.leaves(moment["w"]):
            assert part.is_equivalent_to(params["w"].sharding, 2)
        assert moment["bias"].is_fully_replicated
    assert state[0].count.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "fmt", "spec", "expected"),
    [
        ((16, 512), "de8", COLUMNS, PartitionSpec("fsdp", None)),  # blocks of 256, shards of 128: to the rows
        ((16, 512), "de8@128", COLUMNS, COLUMNS),
        ((6, 512), "de8", COLUMNS, PartitionSpec(None, None)),  # 4 does not divide 6 either
        ((16, 512), "de8", BOTH, PartitionSpec("data", None)),  # the rows are split already
        ((3, 8, 512), "de8", PartitionSpec(None, None, "fsdp"), PartitionSpec(None, "fsdp", None)),
        ((16, 512), "de8", ROWS, ROWS),
        ((16, 300), "de8", COLUMNS, PartitionSpec("fsdp", None)),  # a ragged last block
        ((16, 512), "bf16", COLUMNS, COLUMNS),  # an array
    ],
)
def test_where_blocks_do_not_divide_the_shards_another_axis_is_split(shape, fmt, spec, expected):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), spec))}
    state = optim.state_shardings(adamw(1e-2, mu_format=fmt, min_size=256), params)
    for part in jax.tree.leaves(state[0].mu["w"]):
        assert part.is_equivalent_to(NamedSharding(mesh(), expected), len(shape)), part.spec


def test_lines_and_arrays_of_other_sizes_follow_along_the_axes_they_share():
    params = placed(BOTH)
    rank1 = optim.state_shardings(adamw(1e-2, mu_format="de4@rank1", min_size=256), params)[0].mu["w"]
    assert [part.spec for part in rank1.scales] == [PartitionSpec("data", None), PartitionSpec(None, "fsdp")]
    assert rank1.codes.spec == BOTH
    mini = optim.state_shardings(optim.get("adam_mini")(1e-2), params)
    shapes = jax.eval_shape(optim.get("adam_mini")(1e-2).init, params)
    by_shape = {leaf.shape: where for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(mini), strict=True)}
    assert by_shape[(16, 1024)].spec == BOTH
    other = next(shape for shape in by_shape if len(shape) == 2 and shape != (16, 1024))
    assert by_shape[other].spec == PartitionSpec(*("data" if n == 16 else "fsdp" if n == 1024 else None for n in other))


def test_eight_devices_store_the_bits_of_one():
    """Three steps; the noise is that of the global element. Elementwise arithmetic has no order to differ in."""
    optimizer = optim.get("adam4")(1e-2, min_size=256)

    def run(params):
        shardings = optim.state_shardings(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        update = jax.jit(optimizer.update, out_shardings=(None, shardings))
        for _ in range(3):
            _, state = update(params, state, params)
        return state

    params = placed(COLUMNS)
    single = jax.tree.map(lambda w: jax.device_put(np.asarray(w), jax.devices()[0]), params)
    sharded, expected = run(params), run(single)
    jax.tree.map(np.testing.assert_array_equal, sharded, expected)
    moment = sharded[0].mu["w"]
    assert is_stored(moment) and moment.codes.addressable_shards[0].data.shape == (16, 512 // 4)


@pytest.mark.parametrize("name", ["stable_adam4", "muon8", "q_galore", "adam_mini", "sgd_sai"])
def test_updates_do_not_depend_on_the_mesh(name):
    """Up to the order of float32 sums; what needs whole matrices gathers them."""
    settings = {"rank": 8} if name == "q_galore" else {}
    optimizer = optim.get(name)(1e-2, min_size=256, **settings)

    def updates(params):
        shardings = optim.state_shardings(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        found, state = jax.jit(optimizer.update, out_shardings=(None, shardings))(params, state, params)
        jax.tree.map(
            lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim) or pytest.fail(), state, shardings
        )
        return jax.device_get(found)

    params = placed(BOTH)
    single = jax.tree.map(lambda w: jax.device_put(np.asarray(w), jax.devices()[0]), params)
    found, expected = updates(params), updates(single)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.max(np.abs(b))), found, expected
    )
