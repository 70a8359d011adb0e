"""Models, in plain Linen: nothing in them knows of quantization.

model = models.build(models.ModelConfig(layers=2, width=64, heads=2), 256)
"""

import flax.linen as nn

from lowprec.errors import unknown
from lowprec.models import ladder
from lowprec.models.config import ModelConfig
from lowprec.models.counts import Counts, count_parameters, flops_per_token
from lowprec.models.image_counts import count_image_parameters, flops_per_image
from lowprec.models.llama import Llama
from lowprec.models.resnet import ResNet
from lowprec.models.unit_llama import UnitLlama
from lowprec.models.vit import ViT

TEXT_MODELS = {"llama": Llama, "unit_llama": UnitLlama}
IMAGE_MODELS = {"resnet": ResNet, "vit": ViT}


def names() -> tuple[str, ...]:
    return (*TEXT_MODELS, *IMAGE_MODELS)


def build(config: ModelConfig, outputs: int) -> nn.Module:
    """The model of a config.

    Of text: tokens (B, T) int32 -> logits (B, T, outputs) float32, where outputs is the size of the vocabulary. Of
    images: (B, height, width, channels) -> logits (B, outputs) float32, where outputs is the number of classes.
    """
    if config.name not in names():
        raise unknown("model", config.name, names())
    return (TEXT_MODELS | IMAGE_MODELS)[config.name](config, outputs)


__all__ = [
    "IMAGE_MODELS",
    "TEXT_MODELS",
    "Counts",
    "Llama",
    "ModelConfig",
    "ResNet",
    "UnitLlama",
    "ViT",
    "build",
    "count_image_parameters",
    "count_parameters",
    "flops_per_image",
    "flops_per_token",
    "ladder",
    "names",
]
