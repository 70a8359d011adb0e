"""Kernels without their devices: interpreters that start afresh, and lowering for a device that is only named."""

import jax
import pytest

from lowprec.pallas.interpreters import reset_interpreters
from lowprec.pallas.target import on


@pytest.fixture(autouse=True)
def fresh_interpreters():
    """What a kernel that raised left behind would make the next test fail."""
    yield
    reset_interpreters()


@pytest.fixture
def lowers():
    """lowers(fn, *args, kind="NVIDIA H200"): the text of the program of fn for that device, made without one.

    For a GPU that includes the layouts of registers, the rules of wgmma and TMA and the budget of shared memory; not
    what ptxas says.
    """

    def lower(fn, *args, kind: str = "NVIDIA H200") -> str:
        with on(kind) as device:
            platform = "cuda" if device.platform == "gpu" else device.platform
            return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    return lower
