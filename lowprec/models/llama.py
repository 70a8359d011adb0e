"""A Llama-type decoder (arXiv 2302.13971): RMSNorm, rotary positions, grouped queries, SwiGLU, untied embeddings.

Plain Linen, without a word about quantization; `nn.linen.quantize` brings a recipe to it.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from lowprec.models.config import ModelConfig
from lowprec.nn import attention_weights
from lowprec.nn.attention import CausalSelfAttention
from lowprec.nn.attention_mask import mask_of_tokens
from lowprec.nn.gates import SiluGate
from lowprec.nn.outliers import observe_activations
from lowprec.nn.stack import LayerStack
from lowprec.typing import Array, Bool, Float, Int


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        dense = lambda features, name: nn.Dense(
            features, use_bias=False, dtype=c.dtype, kernel_init=nn.initializers.normal(c.init_std), name=name
        )
        gate_BTF, up_BTF = dense(c.gate_width, "gate")(x_BTD), dense(c.gate_width, "up")(x_BTD)
        hidden_BTF = SiluGate(name="gating")(gate_BTF, up_BTF)
        return dense(c.width, "down")(hidden_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    path_prefix: str = ""

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BTS: Bool[Array, "B T S"] | None = None
    ) -> Float[Array, "B T D"]:
        c = self.config
        norm = partial(nn.RMSNorm, epsilon=c.norm_epsilon, dtype=c.dtype)
        attention = CausalSelfAttention(
            c.heads,
            c.key_heads,
            c.init_std,
            c.rotary_base,
            c.dtype,
            weights=attention_weights.get(c.attention, c.attention_clip),
            gate=c.gate,
            rotary_dtype=c.rotary_dtype,
            name="attention",
        )
        x_BTD = x_BTD + attention(norm(name="attention_norm")(x_BTD), mask_BTS)
        x_BTD = x_BTD + GatedMLP(c, name="mlp")(norm(name="mlp_norm")(x_BTD))
        observe_activations(self, "residual", x_BTD)
        return x_BTD


class Llama(nn.Module):
    """Logits of the next token."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        c = self.config
        mask_BTS = mask_of_tokens(tokens_BT, c.documents, c.separator, self.vocab_size)
        init = nn.initializers.normal(c.init_std)
        x_BTD = nn.Embed(self.vocab_size, c.width, dtype=c.dtype, embedding_init=init, name="embed")(tokens_BT)
        x_BTD = LayerStack(partial(Block, c), c.layers, c.remat, name="layers")(x_BTD, mask_BTS)
        x_BTD = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)
        logits_BTV = nn.Dense(self.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=init, name="head")(x_BTD)
        return logits_BTV.astype(jnp.float32)
