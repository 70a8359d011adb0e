"""Causal self-attention with grouped queries; its scores and weights are computed in float32."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowprec.nn.rotary import rotary
from lowprec.typing import Array, Float


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which groups of query heads share a key and value head (GQA, arXiv 2305.13245).

    Args:
      heads: H, query heads.
      kv_heads: G, key and value heads, a divisor of H.
      init_std: of the kernels.
      rotary_base: of the position frequencies.
    """

    heads: int
    kv_heads: int
    init_std: float = 0.02
    rotary_base: float = 10_000.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        B, T, D = x_BTD.shape
        H, G, K = self.heads, self.kv_heads, D // self.heads
        dense = lambda features, name: nn.Dense(
            features, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std), name=name
        )
        project = lambda heads, name: dense(heads * K, name)(x_BTD).reshape(B, T, heads, K)
        positions_T = jnp.arange(T)
        q_BTHK = rotary(project(H, "query"), positions_T, self.rotary_base)
        k_BTGK = rotary(project(G, "key"), positions_T, self.rotary_base)
        v_BTGK = project(G, "value")
        y_BTHK = grouped_attention(q_BTHK, k_BTGK, v_BTGK)
        return dense(D, "out")(y_BTHK.reshape(B, T, D))


def grouped_attention(
    q_BTHK: Float[Array, "B T H K"], k_BTGK: Float[Array, "B T G K"], v_BTGK: Float[Array, "B T G K"]
) -> Float[Array, "B T H K"]:
    """softmax(q·k / √K + causal mask) · v, each key head serving H / G consecutive query heads."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    score_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BTGK, preferred_element_type=jnp.float32) * K**-0.5
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    weight_BGRTS = nn.softmax(jnp.where(causal_TS, score_BGRTS, -jnp.inf))
    y_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weight_BGRTS.astype(v_BTGK.dtype), v_BTGK)
    return y_BTGRK.reshape(B, T, H, K)
