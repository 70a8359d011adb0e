"""Causal self-attention with grouped queries; its scores and weights are computed in float32."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowprec.nn.rotary import rotary
from lowprec.typing import Array, Float

# The two products of attention with activations on both sides, as recipes name them: q · kᵀ and weights · v.
SCORES, CONTEXT = "scores", "context"


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which groups of query heads share a key and value head (GQA, arXiv 2305.13245).

    Args:
      heads: H, query heads.
      kv_heads: G, key and value heads, a divisor of H.
      init_std: of the kernels.
      rotary_base: of the position frequencies.
      scores_einsum, context_einsum: the products q · kᵀ and weights · v; a recipe may take their place.
      core: the context from queries, keys and values, and the two products; a recipe may save its inputs.
    """

    heads: int
    kv_heads: int
    init_std: float = 0.02
    rotary_base: float = 10_000.0
    dtype: DTypeLike = jnp.float32
    scores_einsum: Callable = jnp.einsum
    context_einsum: Callable = jnp.einsum
    core: Callable | None = None

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
        y_BTHK = (self.core or grouped_attention)(q_BTHK, k_BTGK, v_BTGK, self.scores_einsum, self.context_einsum)
        return dense(D, "out")(y_BTHK.reshape(B, T, D))


def grouped_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    scores_einsum: Callable = jnp.einsum,
    context_einsum: Callable = jnp.einsum,
) -> Float[Array, "B T H K"]:
    """softmax(q·k / √K + causal mask) · v, each key head serving H / G consecutive query heads."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    score_BGRTS = scores_einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BTGK, preferred_element_type=jnp.float32) * K**-0.5
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    weight_BGRTS = nn.softmax(jnp.where(causal_TS, score_BGRTS, -jnp.inf))
    y_BTGRK = context_einsum("BGRTS,BSGK->BTGRK", weight_BGRTS.astype(v_BTGK.dtype), v_BTGK)
    return y_BTGRK.reshape(B, T, H, K)
