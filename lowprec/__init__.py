"""lowprec: low-precision training research in JAX.

import lowprec
q = lowprec.quantize(x, "nvfp4")                        # packed codes and scales
y = lowprec.fake_quant(x, "e4m3fn@row")                 # values on the grid, straight-through gradient
model = lowprec.nn.linen.quantize(model, "quartet2")    # any Flax Linen model under a recipe
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "analysis",
    "data",
    "formats",
    "models",
    "nn",
    "ops",
    "quantizers",
    "recipes",
    "training",
)
_NAMES = {
    "QTensor": "quantizers",
    "dequantize": "quantizers",
    "fake_quant": "quantizers",
    "qdot": "ops",
    "quantize": "quantizers",
}

__all__ = ["__version__", *_NAMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    """Rooms are imported when they are first used, so that `import lowprec` costs nothing."""
    if name in _ROOMS:
        return importlib.import_module(f"lowprec.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"lowprec.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'lowprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
