"""Unit scaling: operations whose outputs and gradients both have unit variance (arXiv 2303.11257; u-μP, 2407.17465).

Every operation multiplies its output and each of its gradients by a constant of its own, from shapes alone, assuming
inputs and output gradients of unit variance. Weights are drawn from N(0, 1); values then suit fp8 without any scale.

The gradient of such an operation is the true one times a constant. Where paths meet again (residuals, the gates of a
layer) the constants of all paths must be equal: `constraint="to_output_scale"` takes the forward constant for the
gradients of activations too. On cut edges, parameters above all, each keeps its own.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import unknown
from lowprec.nn.attention import grouped_attention
from lowprec.typing import Array, Float, Int

Constraint = Literal["to_output_scale"] | None


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_forward(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """x · scale; the gradient passes as it is."""
    return _times(x, scale)


scale_forward.defvjp(lambda x, scale: (_times(x, scale), None), lambda scale, _, dy: (dy,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_backward(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """x; its gradient is multiplied by scale."""
    return x


scale_backward.defvjp(lambda x, scale: (x, None), lambda scale, _, dy: (_times(dy, scale),))


def linear(
    x: Float[Array, "... K"], w: Float[Array, "K N"], *, constraint: Constraint = "to_output_scale"
) -> Float[Array, "... N"]:
    """x · w: the output by K^-½, dx by N^-½ (by K^-½ under the constraint), dw by (rows of x)^-½."""
    K, N = w.shape
    forward, backward = _constrained(constraint, K**-0.5, N**-0.5)
    w = scale_backward(w, rows_scale(x))
    return scale_forward(scale_backward(x, backward) @ w, forward)


def readout(x: Float[Array, "... K"], w: Float[Array, "K N"]) -> Float[Array, "... N"]:
    """The last linear layer: the output by 1/K (μP), dx by N^-½ and dw by (rows of x)^-½."""
    K, N = w.shape
    return scale_forward(scale_backward(x, N**-0.5) @ scale_backward(w, rows_scale(x)), 1 / K)


def rows_scale(x: Float[Array, "... K"]) -> float:
    """Of the gradient of a weight that multiplies all rows of x."""
    return math.prod(x.shape[:-1]) ** -0.5


def matmul(
    a: Float[Array, "... M K"], b: Float[Array, "... K N"], *, constraint: Constraint = "to_output_scale"
) -> Float[Array, "... M N"]:
    """a · b of two activations: the output by K^-½, da by N^-½ and db by M^-½, or all by K^-½."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    forward, backward_a, backward_b = _constrained(constraint, K**-0.5, N**-0.5, M**-0.5)
    return scale_forward(scale_backward(a, backward_a) @ scale_backward(b, backward_b), forward)


def gelu(
    x: Float[Array, "..."], *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> Float[Array, "..."]:
    """gelu(m·x) / m."""
    alpha = 1 / (1 + 0.25 / mult**2)
    backward = interpolate(alpha, 2.0, math.sqrt(2))
    forward, backward = _constrained(constraint, _rectifier_scale(mult), backward)
    x = scale_backward(x, backward)
    return scale_forward(jax.nn.gelu(mult * x, approximate=False) / mult, forward)


def silu(
    x: Float[Array, "..."], *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> Float[Array, "..."]:
    """x · sigmoid(m·x)."""
    backward = interpolate(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2))
    forward, backward = _constrained(constraint, _rectifier_scale(mult), backward)
    x = scale_backward(x, backward)
    return scale_forward(x * jax.nn.sigmoid(mult * x), forward)


def silu_glu(x: Float[Array, "..."], gate: Float[Array, "..."], *, mult: float = 1.0) -> Float[Array, "..."]:
    """x · gate · sigmoid(m·gate): one scale for the output and both gradients."""
    scale = interpolate(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2))
    x, gate = scale_backward(x, scale), scale_backward(gate, scale)
    return scale_forward(x * gate * jax.nn.sigmoid(mult * gate), scale)


def softmax(
    x: Float[Array, "..."], *, axis: int = -1, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> Float[Array, "..."]:
    """softmax(m·x) over T values."""
    T, alpha = x.shape[axis], 1 / (1 + 4 / mult**2)
    forward = interpolate(alpha, float(T), math.sqrt(T))
    backward = interpolate(alpha, T / mult, math.sqrt(T / mult))
    forward, backward = _constrained(constraint, forward, backward)
    return scale_forward(jax.nn.softmax(mult * scale_backward(x, backward), axis=axis), forward)


def causal_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    *,
    mult: float = 1.0,
) -> Float[Array, "B T H K"]:
    """softmax(m/K · q·k + causal mask) · v: one scale for the output and the gradients of q, k and v."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    # A single position attends to itself.
    spread = math.sqrt(math.log(T) / T) if T > 1 else 1.0
    scale = 1 / interpolate(1 / (1 + 4 * K / mult**2), spread, 1.0)
    q, k, v = (scale_backward(a, scale) for a in (q_BTHK, k_BTGK, v_BTGK))
    # grouped_attention divides by √K.
    return scale_forward(grouped_attention(q * np.float32(mult * K**-0.5).astype(q.dtype), k, v), scale)


def cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, ""]:
    """The mean over the tokens; the gradient is that of the sum, by V / √(V - 1)."""
    V = logits.shape[-1]
    log_p = jax.nn.log_softmax(scale_backward(logits, V / math.sqrt(V - 1)).astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)
    return scale_forward(-jnp.sum(picked), 1 / targets.size)


def embedding(tokens: Int[Array, "..."], table: Float[Array, "V D"]) -> Float[Array, "... D"]:
    """The rows of the tokens; the gradient of the table by √(V / number of tokens)."""
    return jnp.take(scale_backward(table, table_scale(tokens, len(table))), tokens, axis=0)


def table_scale(tokens: Int[Array, "..."], vocabulary: int) -> float:
    """Of the gradient of an embedding table."""
    return math.sqrt(vocabulary / tokens.size)


def rms_norm(
    x: Float[Array, "... D"], gain: Float[Array, " D"] | None = None, *, epsilon: float = 1e-5
) -> Float[Array, "... D"]:
    """x / rms(x) · gain, in float32; the gradient of the gain by (rows of x)^-½."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + np.float32(epsilon))
    return (y if gain is None else y * scale_backward(gain, rows_scale(x))).astype(x.dtype)


def residual_split(x: Float[Array, "..."], tau: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(branch, skip) of a residual layer: their gradients by τ / √(1+τ²) and 1 / √(1+τ²).

    The forward constants are those of `residual_add`: thus values in the branch have unit variance both ways.
    """
    return scale_backward(x, tau / math.sqrt(1 + tau**2)), scale_backward(x, 1 / math.sqrt(1 + tau**2))


def residual_add(branch: Float[Array, "..."], skip: Float[Array, "..."], tau: float) -> Float[Array, "..."]:
    """(τ · branch + skip) / √(1+τ²); the gradients pass as they are, until `residual_split`."""
    norm = math.sqrt(1 + tau**2)
    return scale_forward(branch, tau / norm) + scale_forward(skip, 1 / norm)


def interpolate(alpha: float, lower: float, upper: float) -> float:
    """upper^α · lower^(1-α)."""
    return upper**alpha * lower ** (1 - alpha)


def _rectifier_scale(mult):
    return interpolate(1 / (1 + 0.25 / mult**2), 2.0, math.sqrt(2 / (1 - 1 / math.pi)))


def _constrained(constraint, forward, *backward):
    if constraint not in ("to_output_scale", None):
        raise unknown("constraint", str(constraint), ("to_output_scale", "None"))
    return (forward, *(forward if constraint else scale for scale in backward))


def _times(x, scale):
    return (x.astype(jnp.float32) * np.float32(scale)).astype(x.dtype)
