"""The gate of a gated layer, a module of its own, so that a recipe can say how its inputs are saved."""

import flax.linen as nn

from lowprec.typing import Array, Float


def silu_gate(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) · up (Shazeer, arXiv 2002.05202)."""
    return nn.silu(gate) * up


class SiluGate(nn.Module):
    """`silu_gate`, without parameters."""

    @nn.compact
    def __call__(self, gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
        return silu_gate(gate, up)
