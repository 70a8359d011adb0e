"""Enough of a language model for a step."""

import flax.linen as nn


class TwoLayers(nn.Module):
    """Each token predicts the next by itself."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16, name="embed")(tokens)
        return nn.Dense(32, name="head")(nn.relu(nn.Dense(24, name="inner")(x)))
