"""A unit-scaled Llama: weights from N(0, 1), and values and gradients near one everywhere (`nn.unit_scaling`).

Its parameters have the names and shapes of `models.llama`. The linear layers are plain nn.Dense, between constants.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lowprec.models.config import ModelConfig
from lowprec.nn import unit_scaling
from lowprec.nn.outliers import observe_activations
from lowprec.nn.rotary import rotary
from lowprec.nn.stack import LayerStack
from lowprec.nn.unit_scaling import scale_backward, scale_forward
from lowprec.typing import Array, Float, Int

_UNIT = nn.initializers.normal(1.0)


def dense(
    x: Float[Array, "... K"], features: int, name: str, dtype: str, *, last: bool = False
) -> Float[Array, "... N"]:
    """A linear layer of the module that is running, scaled as `unit_scaling.linear` (the last: as its `readout`)."""
    K = x.shape[-1]
    forward = 1 / K if last else K**-0.5
    backward = features**-0.5 if last else forward
    rows_scale = unit_scaling.rows_scale(x)

    def promote(*operands: Array | None, dtype: Any = None, inexact: bool = True) -> list[Array | None]:
        inputs, kernel, bias = operands
        return promote_dtype(inputs, scale_backward(kernel, rows_scale), bias, dtype=dtype, inexact=inexact)

    layer = nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=_UNIT, promote_dtype=promote, name=name)
    return scale_forward(layer(scale_backward(x, backward)), forward)


class UnitRMSNorm(nn.Module):
    """x / rms(x) · gain."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gain = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return unit_scaling.rms_norm(x, gain, epsilon=self.epsilon)


class UnitAttention(nn.Module):
    """Causal attention with rotary positions and grouped queries."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, (B, T, D) = self.config, x_BTD.shape
        K = D // c.heads
        project = lambda heads, name: dense(x_BTD, heads * K, name, c.dtype).reshape(B, T, heads, K)
        positions_T = jnp.arange(T)
        q_BTHK = rotary(project(c.heads, "query"), positions_T, c.rotary_base)
        k_BTGK = rotary(project(c.key_heads, "key"), positions_T, c.rotary_base)
        y_BTHK = unit_scaling.causal_attention(q_BTHK, k_BTGK, project(c.key_heads, "value"))
        y_BTD = dense(y_BTHK.reshape(B, T, D), D, "out", c.dtype)
        observe_activations(self, "attention", y_BTD)
        return y_BTD


class UnitMLP(nn.Module):
    """down(up(x) · silu(gate(x)))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate_BTF, up_BTF = (dense(x_BTD, c.gate_width, name, c.dtype) for name in ("gate", "up"))
        return dense(unit_scaling.silu_glu(up_BTF, gate_BTF), c.width, "down", c.dtype)


class UnitBlock(nn.Module):
    """Attention and MLP, each beside a skip connection of weight 1 / √(1+τ²)."""

    config: ModelConfig
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        # u-μP takes 1 / √(L + i) for the i-th of 2L branches; all blocks being one program, this is its middle.
        tau = (2 * c.layers) ** -0.5
        for layer, name in ((UnitAttention, "attention"), (UnitMLP, "mlp")):
            branch_BTD, skip_BTD = unit_scaling.residual_split(x_BTD, tau)
            branch_BTD = UnitRMSNorm(c.norm_epsilon, name=f"{name}_norm")(branch_BTD)
            x_BTD = unit_scaling.residual_add(layer(c, name=name)(branch_BTD), skip_BTD, tau)
        observe_activations(self, "residual", x_BTD)
        return x_BTD


class UnitLlama(nn.Module):
    """Logits of the next token, whose gradient is brought to unit scale.

    The loss of a run is a mean over tokens; its gradient at the logits is multiplied by their number and V / √(V - 1),
    which makes the loss `unit_scaling.cross_entropy`. All gradients are the true ones times constants a parameter.
    `init_std` of the config has no meaning here: it is 1.
    """

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        c, V = self.config, self.vocab_size
        table_scale = unit_scaling.table_scale(tokens_BT, V)

        def promote(*tables: Array | None, dtype: Any = None, inexact: bool = True) -> list[Array | None]:
            return promote_dtype(*(scale_backward(t, table_scale) for t in tables), dtype=dtype, inexact=inexact)

        embed = nn.Embed(V, c.width, dtype=c.dtype, embedding_init=_UNIT, promote_dtype=promote, name="embed")
        x_BTD = LayerStack(partial(UnitBlock, c), c.layers, c.remat, name="layers")(embed(tokens_BT))
        x_BTD = UnitRMSNorm(c.norm_epsilon, name="final_norm")(x_BTD)
        logits_BTV = dense(x_BTD, V, "head", c.dtype, last=True).astype(jnp.float32)
        return scale_backward(logits_BTV, tokens_BT.size * V * (V - 1) ** -0.5)
