"""Batch norms folded into the kernels before them: what is quantized is then what inference multiplies by.

`fold` does it once, after training. A `ConvNorm` of the kind "folding" does it in every step, so that training sees the
rounding of the folded kernel (Krishnamoorthi, arXiv 1806.08342, §3.2.2; Jacob et al., arXiv 1712.05877, §3.2).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.typing import Array, Float

STATISTICS = "batch_stats"
# plain: a norm of its own; folding: inside the kernel; none: a bias instead, whose values `fold` gives.
KINDS = ("plain", "folding", "none")
MOMENTUM = 0.9
EPSILON = 1e-5


class ConvNorm(nn.Module):
    """A convolution "conv" and its batch norm "norm".

    The norm takes the statistics of the batch, and updates the running ones, where the collection "batch_stats" is
    mutable: in training. Elsewhere it takes the running ones.

    Args:
      features: of the output.
      window: height and width of the kernel; zeros are added around, so that only strides make the image smaller.
      strides: along both axes.
      kind: one of `KINDS`. The first two have the same variables, and the same output where nothing is quantized.
      dtype: of products; statistics are in float32.
    """

    features: int
    window: int = 3
    strides: int = 1
    kind: str = "plain"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        if self.kind not in KINDS:
            raise unknown("kind of batch norm", self.kind, KINDS)
        if self.kind == "none":
            return self._conv(use_bias=True)(x)
        # The first call makes the variables; at their first values the factor of the kernel is 1.
        if self.kind == "folding" and not self.is_initializing():
            return self._folding(x)
        running = not self.is_mutable_collection(STATISTICS)
        norm = nn.BatchNorm(running, momentum=MOMENTUM, epsilon=EPSILON, dtype=self.dtype, name="norm")
        return norm(self._conv(use_bias=False)(x))

    def _conv(self, **changes: Any) -> nn.Conv:
        window = (self.window, self.window)
        init = nn.initializers.he_normal()
        return nn.Conv(self.features, window, self.strides, dtype=self.dtype, kernel_init=init, name="conv", **changes)

    def _folding(self, x):
        """conv(x, W γ/σ) · σ/σ_B + β - γ μ_B/σ_B with running σ and the batch's μ_B, σ_B: those of 1806.08342, fig. 8.

        The kernel that is rounded changes as slowly as the running deviation; what the batch adds is a factor after.
        """
        params, running = self.variables["params"], self.variables[STATISTICS]["norm"]
        gamma, beta = params["norm"]["scale"], params["norm"]["bias"]
        sigma, mean, var = jnp.sqrt(running["var"] + EPSILON), running["mean"], running["var"]
        if self.is_mutable_collection(STATISTICS):
            y = self._exact(x, params["conv"]["kernel"])
            mean, var = jnp.mean(y, (0, 1, 2)), jnp.var(y, (0, 1, 2))
            mixed = {
                name: MOMENTUM * running[name] + (1 - MOMENTUM) * seen for name, seen in (("mean", mean), ("var", var))
            }
            self.put_variable(STATISTICS, "norm", mixed)
        deviation = jnp.sqrt(var + EPSILON)

        def promote(*operands: Array | None, dtype: Any = None, inexact: bool = True) -> list[Array | None]:
            inputs, kernel, bias = operands
            return promote_dtype(inputs, kernel * (gamma / sigma), bias, dtype=dtype, inexact=inexact)

        y = self._conv(use_bias=False, promote_dtype=promote)(x)
        return (y * (sigma / deviation) + (beta - gamma * mean / deviation)).astype(y.dtype)

    def _exact(self, x, kernel) -> Float[Array, "B h w F"]:
        """What the norm has its statistics of: the convolution that no recipe touches, in float32."""
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        strides, axes = (self.strides, self.strides), ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=axes).astype(jnp.float32)


def fold(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the same model with every `ConvNorm` of the kind "none": W γ/σ, and the bias β - γ μ/σ.

    Args:
      params: trained, of the kind "plain" or "folding".
      statistics: the collection "batch_stats" that belongs to them.
    Raises:
      UsageError: (a ValueError) if there is no batch norm after a convolution.
    """
    folded = _fold(params, statistics)
    if folded == params:
        raise UsageError("there is nothing to fold: no part of the parameters has a convolution 'conv' and its 'norm'")
    return folded


def _fold(params, statistics):
    if set(params) == {"conv", "norm"}:
        factor = params["norm"]["scale"] / jnp.sqrt(statistics["norm"]["var"] + EPSILON)
        bias = params["norm"]["bias"] - factor * statistics["norm"]["mean"]
        return {"conv": {"kernel": params["conv"]["kernel"] * factor, "bias": bias}}
    return {
        name: _fold(tree, statistics.get(name, {})) if isinstance(tree, Mapping) else tree
        for name, tree in params.items()
    }
