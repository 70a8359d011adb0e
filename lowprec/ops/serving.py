"""Who computes the products of a rule on a device, said before anything is computed."""

from functools import cache

import jax
import jax.numpy as jnp

from lowprec.ops.accumulation import Accumulation
from lowprec.ops.backends import served_by
from lowprec.ops.dot import from_source
from lowprec.ops.kept import keep
from lowprec.ops.operand import Operand, Streams
from lowprec.ops.rule import GemmRule
from lowprec.ops.saved import Codes
from lowprec.ops.variables import canonical_variables, through_differentiable
from lowprec.pallas.target import target
from lowprec.quantizers.variables import Differentiable


def who_serves(rule: GemmRule, backend: str = "auto", *, size: int = 4096, dtype=jnp.float32) -> dict[str, str]:
    """Of each product of a rule by name, in words: who computes it on the target device (`pallas.target`), or why none.

    Args:
      backend: see `qdot`.
      size: of the product, M = K = N.
      dtype: of the model's products.
    """
    return dict(_who_serves(rule, backend, size, jnp.dtype(dtype), target()))


@cache
def _who_serves(rule, backend, size, dtype, device):
    found: dict[str, str] = {}

    def products(x, w, dy, key):
        variables, own = canonical_variables(x, w, rule), rule
        if any(isinstance(q.scale, Differentiable) for q in rule.fwd):
            x, w, own, variables = through_differentiable(x, w, rule, key, None, variables)
        streams = Streams(key, variables.state)

        def operand(q, name, original, forward=None):
            return from_source(q, name, original, forward, streams, backend)

        fx, fw, dy_n = (
            operand(q, name, v)
            for q, name, v in zip((*own.fwd, own.dgrad[0]), ("fwd.x", "fwd.w", "dgrad.dy"), (x, w, dy), strict=True)
        )
        again = fx  # as it comes out of what was kept of it
        if own.wgrad[1].source != "original":
            again = keep(fx, backend, own.accumulation, narrow=isinstance(own.saved, Codes)).restore("fwd.x")
        pairs = {
            "fwd": (fx, fw),
            "dgrad": (dy_n, operand(own.dgrad[1], "dgrad.w", w, fw)),
            "wgrad": (operand(own.wgrad[1], "wgrad.x", x, again), operand(own.wgrad[0], "wgrad.dy", dy, dy_n)),
        }
        for name, (a, b) in pairs.items():
            found[name] = _in_words(a, b, backend, own.accumulation)

    matrix = jax.ShapeDtypeStruct((size, size), dtype)
    jax.eval_shape(products, matrix, matrix, matrix, jax.eval_shape(lambda: jax.random.key(0)))
    return found


def _in_words(a: Operand, b: Operand, backend: str, accumulation: Accumulation) -> str:
    by, refused = served_by(a, b, backend, accumulation)
    if by is not None:
        return str(by)
    if accumulation != Accumulation():
        return f"emulated: sums in {accumulation}"
    if a.rounded is b.rounded is None:
        return f"XLA's product in {jnp.promote_types(a.source.dtype, jnp.float32)}"
    if backend == "emulate":
        return "emulated in float32"
    slower = served_by(a, b, "native").by
    if slower is not None:
        return f"emulated in float32, faster on {target().kind} than {slower}"
    return f"emulated in float32: {refused[-1][1] if refused else 'there is nothing narrower'}"
