"""Causal self-attention with grouped queries; its scores and weights are computed in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowprec.nn import attention_gate
from lowprec.nn.attention_mask import causal_mask
from lowprec.nn.attention_weights import Weights, softmax
from lowprec.nn.outliers import observe_activations, observe_weights, observing
from lowprec.nn.rotary import rotary
from lowprec.typing import Array, Bool, Float

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
      weights: from scores, one of `nn.attention_weights`.
      gate: of each head's context, one of `attention_gate.KINDS`.
      rotary_dtype: see `rotary`.
    """

    heads: int
    kv_heads: int
    init_std: float = 0.02
    rotary_base: float = 10_000.0
    dtype: DTypeLike = jnp.float32
    scores_einsum: Callable = jnp.einsum
    context_einsum: Callable = jnp.einsum
    core: Callable | None = None
    weights: Weights = softmax
    gate: str = ""
    rotary_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BTS: Bool[Array, "B T S"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attention to what the mask allows; None: to every token up to one's own."""
        B, T, D = x_BTD.shape
        H, G, K = self.heads, self.kv_heads, D // self.heads
        dense = lambda features, name: nn.Dense(
            features, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std), name=name
        )
        project = lambda heads, name: dense(heads * K, name)(x_BTD).reshape(B, T, heads, K)
        turned = partial(rotary, positions_T=jnp.arange(T), base=self.rotary_base, dtype=self.rotary_dtype)
        q_BTHK, k_BTGK, v_BTGK = turned(project(H, "query")), turned(project(G, "key")), project(G, "value")
        y_BTHK = self._context(q_BTHK, k_BTGK, v_BTGK, mask_BTS)
        if self.gate:
            hidden = attention_gate.hidden_width(self.gate, K)
            gate = attention_gate.HeadGate(hidden, self.init_std, dtype=self.dtype, name=attention_gate.PATH)
            y_BTHK = y_BTHK * gate(x_BTD.reshape(B, T, H, K))[..., None]
        y_BTD = dense(D, "out")(y_BTHK.reshape(B, T, D))
        observe_activations(self, "attention", y_BTD)
        return y_BTD

    def _context(self, q_BTHK, k_BTGK, v_BTGK, mask_BTS):
        options: dict[str, Any] = {"weights": self.weights} | ({} if mask_BTS is None else {"mask": mask_BTS})
        core = self.core or grouped_attention
        if observing(self):
            # How inputs are saved changes no value, and there is no backward pass here.
            core, options["observe"] = grouped_attention, partial(observe_weights, self)
        return core(q_BTHK, k_BTGK, v_BTGK, self.scores_einsum, self.context_einsum, **options)


def grouped_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    scores_einsum: Callable = jnp.einsum,
    context_einsum: Callable = jnp.einsum,
    *,
    mask: Bool[Array, "B T T"] | None = None,
    weights: Weights = softmax,
    observe: Callable | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q·k / √K + causal mask) · v, each key head serving H / G consecutive query heads.

    Args:
      mask: the tokens that each may attend to; None: those up to its own.
      weights: what takes the place of softmax.
      observe: is told the weights and the mask.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    score_BGRTS = scores_einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BTGK, preferred_element_type=jnp.float32) * K**-0.5
    allowed = causal_mask(T) if mask is None else mask[:, None, None]
    weight_BGRTS = weights(score_BGRTS, allowed)
    if observe is not None:
        observe(weight_BGRTS, allowed)
    y_BTGRK = context_einsum("BGRTS,BSGK->BTGRK", weight_BGRTS.astype(v_BTGK.dtype), v_BTGK)
    return y_BTGRK.reshape(B, T, H, K)
