"""Models, in plain Linen: nothing in them knows of quantization.

model = models.build(models.ModelConfig(layers=2, width=64, heads=2), vocab_size=256)
"""

import flax.linen as nn

from lowprec.errors import unknown
from lowprec.models import ladder
from lowprec.models.config import ModelConfig
from lowprec.models.counts import Counts, count_parameters, flops_per_token
from lowprec.models.llama import Llama
from lowprec.models.unit_llama import UnitLlama

_ARCHITECTURES = {"llama": Llama, "unit_llama": UnitLlama}


def names() -> tuple[str, ...]:
    return tuple(_ARCHITECTURES)


def build(config: ModelConfig, vocab_size: int) -> nn.Module:
    """The model of a config: tokens (B, T) int32 -> logits (B, T, vocab_size) float32."""
    if config.name not in _ARCHITECTURES:
        raise unknown("model", config.name, _ARCHITECTURES)
    return _ARCHITECTURES[config.name](config, vocab_size)


__all__ = [
    "Counts",
    "Llama",
    "ModelConfig",
    "UnitLlama",
    "build",
    "count_parameters",
    "flops_per_token",
    "ladder",
    "names",
]
