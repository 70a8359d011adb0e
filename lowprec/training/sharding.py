"""Where arrays lie: a mesh ("data", "fsdp") and rules on paths and shapes, with nothing written inside the layers.

The batch is split over both axes; parameters and optimizer state over "fsdp" only. XLA inserts the gathers and sums.
Values, rounding noise included, depend on global indices alone, so that any mesh computes the same up to the order of
float32 sums.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowprec.errors import UsageError
from lowprec.optim.paths import path_name
from lowprec.training.config import MeshConfig, RunConfig

BATCH_AXES = ("data", "fsdp")
# Below this many elements a gather costs more than the memory it saves.
MIN_ELEMENTS = 2**14

# (pattern on the path of a leaf, how it is split); the first that matches wins.
RULES = ((r".*(norm|scale|bias).*", "replicate"), (r".*", "fsdp"))


def make_mesh(config: RunConfig) -> Mesh:
    """The devices as ("data", "fsdp").

    Raises:
      UsageError: more devices than there are, or a microbatch that they cannot share evenly.
    """
    data, fsdp = _sizes(config.mesh, len(jax.devices()))
    microbatch = config.train.batch_size // config.train.accumulate
    if microbatch % (data * fsdp):
        raise UsageError(
            f"a microbatch of {microbatch} windows (train.batch_size / train.accumulate) cannot be shared by "
            f"mesh.data={data} × mesh.fsdp={fsdp} devices; choose a multiple of {data * fsdp}"
        )
    devices = np.asarray(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    # jax.make_mesh would make the axes Explicit.
    return Mesh(devices, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _sizes(mesh: MeshConfig, devices: int) -> tuple[int, int]:
    data = max(devices // mesh.fsdp, 1) if mesh.data == -1 else mesh.data
    if data * mesh.fsdp > devices:
        raise UsageError(
            f"mesh.data={data} × mesh.fsdp={mesh.fsdp} needs {data * mesh.fsdp} devices; there are {devices} "
            f"({jax.devices()[0].platform})"
        )
    return data, mesh.fsdp


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of a batch whose axis number `leading` counts the windows."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, shapes, rules=RULES, min_elements: int = MIN_ELEMENTS):
    """A sharding for each leaf of a tree of arrays or shapes.

    Optimizer state has the shapes and the names of the parameters in its paths, hence falls under the same rules.
    """

    def sharding(path, leaf):
        name = path_name(path)
        tactic = next(tactic for pattern, tactic in rules if re.fullmatch(pattern, name))
        spec = PartitionSpec()
        if tactic == "fsdp" and np.prod(leaf.shape, dtype=np.int64) >= min_elements:
            spec = _split_largest(leaf.shape, mesh.shape["fsdp"])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def _split_largest(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """Splits the longest axis that the parts divide, the last of equals; none if there is none."""
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes:
        return PartitionSpec()
    chosen = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))
