"""ResNets for small images (He et al., arXiv 1512.03385, §4.2): 6n + 2 layers in three stages of n residual blocks.

Plain Linen; the first convolution and the head are called "embed" and "head", as recipes that leave both alone expect.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from lowprec.models.config import ModelConfig
from lowprec.nn.folding import ConvNorm
from lowprec.nn.outliers import observe_activations
from lowprec.typing import Array, Float

STAGES = 3


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)) with two convolutions in f.

    The shortcut has no parameters: where f makes the image smaller it takes every second pixel, and adds channels of
    zeros (option A).
    """

    config: ModelConfig
    features: int
    strides: int

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        c = self.config
        layer = partial(ConvNorm, self.features, kind=c.batch_norm, dtype=c.dtype)
        y = nn.relu(layer(strides=self.strides, name="first")(x_BHWC))
        y = layer(name="second")(y)
        missing = self.features - x_BHWC.shape[-1]
        shortcut = x_BHWC[:, :: self.strides, :: self.strides]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        y = nn.relu(shortcut + y)
        observe_activations(self, "residual", y)
        return y


class ResNet(nn.Module):
    """Logits of the classes. `layers` of the config is n, `width` that of the first stage; it doubles twice."""

    config: ModelConfig
    classes: int

    @nn.compact
    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        c = self.config
        x = images_BHWC.astype(c.dtype)
        x = nn.relu(ConvNorm(c.width, kind=c.batch_norm, dtype=c.dtype, name="embed")(x))
        for stage in range(STAGES):
            for block in range(c.layers):
                strides = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(c, c.width * 2**stage, strides, name=f"stage{stage}_block{block}")(x)
        logits = nn.Dense(self.classes, dtype=c.dtype, name="head")(jnp.mean(x, axis=(1, 2)))
        return logits.astype(jnp.float32)
