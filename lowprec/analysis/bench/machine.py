"""The machine that benchmarks run on: what it is, what it can do at best, and what it usually does."""

import os
import platform
import subprocess
from importlib import metadata
from typing import Any, NamedTuple

import jax

from lowprec.errors import lookup


class Peaks(NamedTuple):
    """What a device cannot exceed, by its data sheet (products of dense matrices), and what it was seen to do.

    Attributes:
      bfloat16, float8, int8: operations a second.
      bytes_per_second: to and from its memory.
      usual_bfloat16, usual_copy: reached by XLA's product at 8192³ and by a pass over 128 MiB; None: not measured.
    """

    bfloat16: float
    float8: float
    int8: float
    bytes_per_second: float
    usual_bfloat16: float | None = None
    usual_copy: float | None = None

    def flops(self, kind: str) -> float:
        """Operations a second of products of this kind."""
        return lookup("kind of product", {name: getattr(self, name) for name in ("bfloat16", "float8", "int8")}, kind)


# NVIDIA's data sheets of the H200, H100 and A100 (SXM); the A100 has no products of float8 and does them in bfloat16.
DEVICES = {
    "NVIDIA H200": Peaks(989.5e12, 1979e12, 1979e12, 4.8e12, usual_bfloat16=790e12, usual_copy=4.3e12),
    "NVIDIA H100 80GB HBM3": Peaks(989.5e12, 1979e12, 1979e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, 312e12, 624e12, 2.039e12),
}

_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def peaks_of(kind: str) -> Peaks | None:
    """Of a device kind; None where its data sheet is not among ours."""
    return DEVICES.get(kind)


def describe() -> dict[str, Any]:
    """This machine: its device, drivers and libraries, clocks where they can be read, and the load on it."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "capability": getattr(device, "compute_capability", None),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "runtime": " ".join(device.client.platform_version.split()),
        "versions": {name: version for name in ("jax", "jaxlib", "flax", "optax") if (version := _version(name))},
        "clocks": clocks(),
    }


def clocks() -> dict[str, str]:
    """Driver, clocks in MHz, temperature and watts of the first NVIDIA GPU; empty where nothing can be read."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().split(",")]
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def _version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
