"""For which device a program is being made: the one that is there, or one that is only named.

    with on("NVIDIA H200"):
        jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",))

makes the very program an H200 would get, on a machine without one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from lowprec.errors import unknown


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: its name, as jax has it.
      capability: of NVIDIA's GPUs, e.g. "9.0"; else None.
      cores: streaming multiprocessors or tensor cores.
    """

    platform: str
    kind: str
    capability: str | None = None
    cores: int = 1


KNOWN = {
    target.kind: target
    for target in (
        Target("cpu", "cpu"),
        Target("gpu", "NVIDIA A100-SXM4-80GB", "8.0", 108),
        Target("gpu", "NVIDIA H100 80GB HBM3", "9.0", 132),
        Target("gpu", "NVIDIA H200", "9.0", 132),
        Target("gpu", "NVIDIA B200", "10.0", 148),
        Target("tpu", "TPU v5 lite"),
        Target("tpu", "TPU v5p"),
        Target("tpu", "TPU v6 lite"),
    )
}


def target() -> Target:
    """The device of `on`, or else the default device of this process."""
    named = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if named is not None and named.device_kind in KNOWN:
        return KNOWN[named.device_kind]
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):  # the name of a platform
        device = jax.local_devices(backend=device)[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    cores = getattr(device, "core_count", None) or 1
    return Target(platform, device.device_kind, getattr(device, "compute_capability", None), cores)


@contextmanager
def on(kind: str) -> Iterator[Target]:
    """Programs traced here are those for a device of this kind, whether or not there is one.

    Args:
      kind: of `KNOWN`, e.g. "NVIDIA H200", "TPU v5 lite".
    """
    if kind not in KNOWN:
        raise unknown("device", kind, KNOWN)
    named = KNOWN[kind]
    device = AbstractDevice(device_kind=named.kind, num_cores=named.cores, platform=named.platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield named
