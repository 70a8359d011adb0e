"""Kernels see the part of an array that one device has: elsewhere than in shard_map XLA computes."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec.pallas.dispatch import arrays_may_be_split, choose
from lowprec.pallas.target import on


def test_arrays_may_be_split_where_there_are_devices_to_split_them_over():
    seen = {"at once": arrays_may_be_split()}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def body(x):
        seen["shard_map"] = arrays_may_be_split()
        return x

    jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.ones(8))
    with jax.set_mesh(mesh):
        seen["a mesh"] = arrays_may_be_split()
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        seen["a mesh of one"] = arrays_may_be_split()
    assert seen == {"at once": True, "shard_map": False, "a mesh": True, "a mesh of one": False}


def test_the_program_for_a_named_device_is_that_of_one():
    with on("NVIDIA H200"):
        assert choose("a product", "auto", {"mosaic_gpu": None}) == "mosaic_gpu"
