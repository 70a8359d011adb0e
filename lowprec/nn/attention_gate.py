"""A gate on the context of each attention head, which lets a head say nothing (Bondarenko et al., arXiv 2306.12929)."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowprec.typing import Array, Float

KINDS = ("", "linear", "mlp")
PATH = "head_gate"


def hidden_width(kind: str, head_width: int) -> int:
    """Of the inner layer of an "mlp" gate, a quarter of the head; 0 of a "linear" one."""
    return max(1, head_width // 4) if kind == "mlp" else 0


class HeadGate(nn.Module):
    """σ(G_h(x_h)) for each token and head h, x_h being the head's part of the input of attention (§4.2).

    Its products are those of one matrix a head: "head_gate/out" and, of an MLP, "head_gate/hidden" before it.

    Args:
      hidden: of G_h = linear(relu(linear(x))); 0: G_h is linear.
      init_std: of the kernels.
      opening: what the gate lets through at first, π.
    """

    hidden: int = 0
    init_std: float = 0.02
    opening: float = 0.25
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H"]:
        if self.hidden:
            x_BTHK = nn.relu(self._linear(x_BTHK, self.hidden, nn.initializers.zeros, "hidden"))
        logit = math.log(self.opening / (1 - self.opening))
        logit_BTH1 = self._linear(x_BTHK, 1, nn.initializers.constant(logit), "out")
        return nn.sigmoid(logit_BTH1[..., 0].astype(jnp.float32)).astype(self.dtype)

    def _linear(self, x_BTHK, features, bias_init, name):
        H, K = x_BTHK.shape[-2:]
        layer = nn.Einsum(
            (H, K, features),
            "BTHK,HKN->BTHN",
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.init_std),
            bias_init=bias_init,
            name=name,
        )
        return layer(x_BTHK)
