"""Who carries out an operation: a kernel of ours, or XLA from the reference; and why not the kernel.

Every operation says statically, from shapes, dtypes and the target alone, whether a kernel serves a call. What no
kernel serves is computed by XLA from the reference, with the same results, and is said once.
"""

import logging
from collections.abc import Mapping
from functools import cache

import jax

from lowprec.errors import UsageError, unknown
from lowprec.pallas.target import Target, target

IMPLS = ("auto", "xla", "mosaic_gpu", "mosaic_tpu", "interpret")

_log = logging.getLogger("lowprec.pallas")


def choose(operation: str, impl: str, why_not: Mapping[str, str | None]) -> str:
    """The implementation that serves a call: "xla", "mosaic_gpu", "mosaic_tpu", or one of the last two "interpreted".

    Args:
      operation: its name, for messages.
      impl: one of `IMPLS`. "auto": the kernel of the target device where there is one that serves the call, else XLA.
        "interpret": that kernel (on a CPU, the GPU's if there is one) interpreted, with its races detected.
      why_not: of each kind of kernel that the operation has, the reason why it cannot serve the call; None if it can.
    Returns:
      "xla", "mosaic_gpu", "mosaic_tpu", "interpret_gpu" or "interpret_tpu".
    Raises:
      UsageError: (a ValueError) for an unknown impl, or a kernel asked for by name that cannot serve the call.
    """
    if impl not in IMPLS:
        raise unknown("implementation", impl, IMPLS)
    if impl == "xla":
        return impl
    if impl == "auto":
        reason = why_not_auto(target(), why_not)
        if reason is None:
            return kernel_of(target())
        if target().platform != "cpu":
            say_once(operation, reason)
        return "xla"
    kernel = impl if impl != "interpret" else _interpreted(why_not)
    if kernel not in why_not:
        raise UsageError(f"{operation} has no kernel {kernel!r}; it has {', '.join(why_not)} and xla")
    if why_not[kernel]:
        raise UsageError(
            f"{operation}: {kernel} cannot serve this call: {why_not[kernel]}; impl='auto' falls back to XLA"
        )
    return kernel.replace("mosaic", "interpret") if impl == "interpret" else kernel


def why_not_auto(device: Target, why_not: Mapping[str, str | None]) -> str | None:
    """The reason why a device has no kernel for a call, or None."""
    kernel = kernel_of(device)
    if kernel is None or kernel not in why_not:
        return f"there is no kernel for {device.kind}"
    if why_not[kernel] is None and arrays_may_be_split():
        return "arrays may be split over devices, and a kernel sees those of one (in shard_map they are)"
    return why_not[kernel]


def why_not_here(why_not: Mapping[str, str | None]) -> str | None:
    """The reason why the target device does not compute a call by this operation, or None.

    A CPU does so by the reference, for whatever some kernel serves.
    """
    if target().platform != "cpu":
        return why_not_auto(target(), why_not)
    return None if None in why_not.values() else next(iter(why_not.values()), "it has no kernel")


def kernel_of(device: Target) -> str | None:
    """The kind of kernels that run on a device."""
    if device.platform == "tpu":
        return "mosaic_tpu"
    # wgmma is Hopper's alone: neither its predecessors nor its successors have it.
    return "mosaic_gpu" if device.platform == "gpu" and device.capability == "9.0" else None


def arrays_may_be_split() -> bool:
    """Whether an array of the program traced now may lie on several devices: there are several, and no `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is not None and mesh.empty:  # of `target.on`
        return False
    if mesh.empty:
        return jax.device_count() > 1
    return mesh.size > 1 and not mesh.are_all_axes_manual


@cache
def say_once(operation: str, reason: str) -> None:
    """Logs why an operation is left to XLA, once in a process."""
    _log.info("%s is left to XLA: %s", operation, reason)


def _interpreted(why_not):
    kernel = kernel_of(target())
    return kernel if kernel in why_not else next(iter(why_not), "mosaic_gpu")
