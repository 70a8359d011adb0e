"""Eight virtual CPU devices; the flag must be set before jax starts, hence a process of its own for this folder."""

import os

if "jax" not in __import__("sys").modules:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(autouse=True)
def eight_devices():
    if len(jax.devices()) < 8:
        pytest.skip("run `pytest tests/multidevice` by itself: it needs 8 devices from the start of the process")
