"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) as simplified by Beyer et al. (arXiv 2205.01580).

There the mean over patches is what is classified, without a class token, and positions are fixed sines and cosines.

Plain Linen; the layer of patches and the head are called "embed" and "head", as recipes that leave both alone expect.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.models.config import ModelConfig
from lowprec.nn.outliers import observe_activations
from lowprec.nn.stack import LayerStack
from lowprec.typing import Array, Float


def positions(height: int, width: int, features: int) -> np.ndarray:
    """float32 [height, width, features]: sines and cosines of column and row, a quarter of the features each.

    Raises:
      UsageError: (a ValueError) if there are no quarters, of two features or more.
    """
    quarter = features // 4
    if features % 4 or quarter < 2:
        raise UsageError(f"model.width of a vit is a multiple of 4 from 8, not {features}")
    frequencies = 10_000.0 ** -(np.arange(quarter) / (quarter - 1))
    rows, columns = np.mgrid[:height, :width][..., None] * frequencies
    return np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], -1).astype(np.float32)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every patch sees every patch."""

    config: ModelConfig
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        norm = partial(nn.LayerNorm, epsilon=c.norm_epsilon, dtype=c.dtype)
        attention = nn.MultiHeadDotProductAttention(c.heads, dtype=c.dtype, name="attention")
        attended_BTD = attention(norm(name="attention_norm")(x_BTD))
        observe_activations(self, "attention", attended_BTD)
        x_BTD = x_BTD + attended_BTD
        hidden_BTF = nn.Dense(c.mlp_width or 4 * c.width, dtype=c.dtype, name="up")(norm(name="mlp_norm")(x_BTD))
        x_BTD = x_BTD + nn.Dense(c.width, dtype=c.dtype, name="down")(nn.gelu(hidden_BTF))
        observe_activations(self, "residual", x_BTD)
        return x_BTD


class ViT(nn.Module):
    """Logits of the classes. Images are cut into squares of `patch` pixels; a rest at the edge is not seen."""

    config: ModelConfig
    classes: int

    @nn.compact
    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        c = self.config
        patch = (c.patch, c.patch)
        embed = nn.Conv(c.width, patch, patch, padding="VALID", dtype=c.dtype, name="embed")
        x_BHWD = embed(images_BHWC.astype(c.dtype))
        x_BHWD = x_BHWD + positions(*x_BHWD.shape[1:]).astype(c.dtype)
        x_BTD = x_BHWD.reshape(x_BHWD.shape[0], -1, c.width)
        x_BTD = LayerStack(partial(EncoderBlock, c), c.layers, c.remat, name="layers")(x_BTD)
        x_BTD = nn.LayerNorm(epsilon=c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)
        logits = nn.Dense(self.classes, dtype=c.dtype, name="head")(jnp.mean(x_BTD, axis=1))
        return logits.astype(jnp.float32)
