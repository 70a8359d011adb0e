"""Kernels on a CPU: interpreted, with memory that starts as NaN and races detected.

What makes kernels is imported where it is used: it takes longer to load than all of this package.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.experimental.pallas import tpu as pltpu


def gpu_interpreter(races: bool = True) -> "plgpu.InterpretGPUParams":
    """What `plgpu.kernel(…, interpret=…)` takes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=races)


def tpu_interpreter(races: bool = True) -> "pltpu.InterpretParams":
    """What `pl.pallas_call(…, interpret=…)` takes for a TPU's kernel."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=races)


def reset_interpreters() -> None:
    """After a kernel has raised: what it left behind would make the next ones fail."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # jax has no public name for it
    from jax.experimental.pallas import tpu as pltpu

    gpu_callbacks.reset_gpu_interpret_mode_state()
    pltpu.reset_tpu_interpret_mode_state()
