"""How extreme activations and attention weights are: what quantization to few bits suffers from.

Modules of a model say what may be observed, with `observe_…`; it is measured where "intermediates" is among the
mutable collections of a call, and leaves a `LayerStack` layer by layer. Elsewhere nothing is computed.
"""

import flax.linen as nn
import jax.numpy as jnp

from lowprec.typing import Array, Bool, Float

COLLECTION, ENTRY = "intermediates", "outliers"
# Average attention on the first token from which a head counts as a sink (arXiv 2410.10781, 2504.20966).
SINK_THRESHOLD = 0.3


def kurtosis(x: Float[Array, "..."]) -> Float[Array, ""]:
    """E (x - μ)⁴ / σ⁴ over all values: 3 of a Gaussian, n of n values of which one alone is not 0."""
    centered = x.astype(jnp.float32) - jnp.mean(x, dtype=jnp.float32)
    # Powers of large values leave float32: the fourth moment is that of the values in units of σ.
    deviation = jnp.sqrt(jnp.mean(centered**2))
    return jnp.mean((centered / jnp.where(deviation > 0, deviation, 1)) ** 4)


def infinity_norm(x: Float[Array, "B ..."]) -> Float[Array, ""]:
    """The largest magnitude in a sequence, the mean over the sequences (Bondarenko et al., arXiv 2306.12929, §5)."""
    return jnp.mean(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))


def sink_rate(
    weight: Float[Array, "... T S"], allowed: Bool[Array, "... T S"], threshold: float = SINK_THRESHOLD
) -> Float[Array, ""]:
    """The fraction of heads, over all sequences, whose queries give the first token more than a threshold on average.

    Zuhri et al., arXiv 2504.20966, §4.4, after Gu et al., arXiv 2410.10781. In short windows even uniform attention
    gives the first token much: (1 + 1/2 + … + 1/T) / T on average, 0.34 at T = 8 and 0.07 at T = 64.

    Args:
      weight: of queries T for keys S.
      allowed: the first token of a query is the first that it may attend to.
    """
    first = jnp.argmax(allowed, axis=-1, keepdims=True)
    on_first = jnp.take_along_axis(weight, jnp.broadcast_to(first, (*weight.shape[:-1], 1)), axis=-1)
    return jnp.mean(jnp.mean(on_first, axis=(-2, -1)) > threshold, dtype=jnp.float32)


def sparsity(weight: Float[Array, "... T S"], allowed: Bool[Array, "... T S"]) -> Float[Array, ""]:
    """The fraction of the allowed weights that are exactly 0."""
    allowed = jnp.broadcast_to(allowed, weight.shape)
    return jnp.sum(allowed & (weight == 0), dtype=jnp.float32) / jnp.sum(allowed, dtype=jnp.float32)


def observing(module: nn.Module) -> bool:
    """Whether this call of a module measures outliers."""
    return module.is_mutable_collection(COLLECTION)


def observe_activations(module: nn.Module, name: str, x: Float[Array, "B ..."]) -> None:
    """Measures activations of a module: "<name>_kurtosis" and "<name>_infinity_norm"."""
    if observing(module):
        _note(module, {f"{name}_kurtosis": kurtosis(x), f"{name}_infinity_norm": infinity_norm(x)})


def observe_weights(module: nn.Module, weight: Float[Array, "... T S"], allowed: Bool[Array, "... T S"]) -> None:
    """Measures the weights of an attention: "sink_rate" and "sparsity"."""
    if observing(module):
        _note(module, {"sink_rate": sink_rate(weight, allowed), "sparsity": sparsity(weight, allowed)})


def _note(module, numbers):
    before = module.get_variable(COLLECTION, ENTRY, {})
    module.put_variable(COLLECTION, ENTRY, before | numbers)
