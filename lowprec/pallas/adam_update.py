"""One step of Adam on one parameter whose moments are stored in 8 or 4 bits, in one pass over memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.pallas import reference
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode
from lowprec.pallas.dispatch import choose
from lowprec.pallas.interpreters import gpu_interpreter, tpu_interpreter
from lowprec.typing import Array, Float, UInt32

BLOCKS = (128, 256)
ELEMENTS = ("cmp8", "log8", "de4", "log4")  # with which the kernels were tested
_ROW = 256
_TPU_UNIT = 128 * _ROW


def adam_update(
    w: Float[Array, "..."],
    g: Float[Array, "..."],
    mu: Moment,
    nu: Moment,
    scalars: AdamScalars,
    words: UInt32[Array, "3 2"],
    *,
    mu_code: MomentCode,
    nu_code: MomentCode,
    impl: str = "auto",
) -> tuple[Array, Moment, Moment]:
    """Adam with decoupled decay (arXiv 1412.6980, 1711.05101), its moments as codes and scales:

        m ← b1·m + rest1·g,  v ← b2·v + rest2·g²
        w ← w + step · (m · correct1 / (√(v · correct2) + eps) + weight_decay · w)

    The update uses the moments as they are before they are coded. All in float32; bfloat16 weights are rounded
    stochastically in the end, and so are the moments whose code says so. An element's random bits are those of its flat
    index. A block with a NaN or an infinity in it becomes NaN. A kernel changes the weights and moments in their place
    where the program gives them up; it has the same results but where a compiler makes one operation of a·b + c.

    Bytes an element: 2 to 4 of the gradient; read and written, 2 or 4 of the weight, 1 or ½ of each moment, and scales.

    Not differentiable.

    Args:
      w: (…, n) float32 or bfloat16.
      g: of the same shape, float32 or bfloat16.
      mu, nu: the stored moments.
      words: the two words of the random bits of the codes of mu, of those of nu, and of the weights.
      mu_code, nu_code: how the moments are stored; blocks divide n.
      impl: see `dispatch.choose`.
    Returns:
      (w, mu, nu), as they came.
    Raises:
      UsageError: (a ValueError) for a kernel asked for by name that cannot serve the call.
    """
    codes: Any = {"mu_code": mu_code, "nu_code": nu_code}
    interpret: Any
    chosen = choose("adam_update", impl, why_not_adam_update(w, g, mu_code, nu_code))
    if chosen == "xla":
        return reference.adam_update(w, g, mu, nu, scalars, words, **codes)
    if chosen.endswith("tpu"):
        from lowprec.pallas.tpu import adam_update as tpu

        interpret = tpu_interpreter() if chosen.startswith("interpret") else False
        return tpu.adam_update(w, g, mu, nu, scalars, words, interpret=interpret, **codes)
    from lowprec.pallas.gpu_sm90 import adam_update as gpu

    interpret = gpu_interpreter() if chosen.startswith("interpret") else None
    kernel = partial(gpu.adam_update, interpret=interpret, **codes)
    return _by_tiles(kernel, gpu.ROWS, w, g, mu, nu, scalars, words, codes)


def why_not_adam_update(
    w: Array | jax.ShapeDtypeStruct,
    g: Array | jax.ShapeDtypeStruct,
    mu_code: MomentCode,
    nu_code: MomentCode,
) -> dict[str, str | None]:
    """Of each kernel, why it cannot serve such arrays; None if it can."""
    reason = _why_not(w, g, (mu_code, nu_code))
    ragged = f"shape {w.shape} does not have a multiple of {_TPU_UNIT} elements" if w.size % _TPU_UNIT else None
    return {"mosaic_gpu": reason, "mosaic_tpu": reason or ragged}


def _why_not(w, g, codes):
    for what, x in (("weights", w), ("gradients", g)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{what} are {x.dtype}, neither float32 nor bfloat16"
    for code in codes:
        if code.element.name not in ELEMENTS:
            return f"moments are {code.element.name}; there are kernels for {', '.join(ELEMENTS)}"
        if code.block not in BLOCKS:
            return f"blocks have {code.block} members, neither 128 nor 256"
        if w.shape[-1] % code.block:
            return f"blocks of {code.block} do not divide the last axis of shape {w.shape}"
    if w.size % _ROW or w.size == 0:
        return f"shape {w.shape} does not have a multiple of {_ROW} elements"
    return "there are more than 2^32 elements" if w.size > 1 << 32 else None


def _by_tiles(kernel, rows, w, g, mu, nu, scalars, words, codes):
    """The kernel on whole tiles, and the reference on what is left."""
    stored = (w, *mu, *nu)
    total = w.size // _ROW
    rest = total % rows
    lines = lambda x: x.reshape(total, -1)
    if rest == 0:
        return kernel(w, g, mu, nu, scalars, words)
    last = [lines(x)[-rest:] for x in (w, g, *mu, *nu)]
    # What is read of the old arrays is read before they are changed, or XLA would copy them.
    stored, last = lax.optimization_barrier((stored, last))
    last_w, last_g, *moments = last
    after = reference.adam_update(
        last_w, last_g, Moment(*moments[:2]), Moment(*moments[2:]), scalars, words,
        first=(total - rest) * _ROW, **codes,
    )  # fmt: skip
    done = w, mu, nu = stored[0], Moment(*stored[1:3]), Moment(*stored[3:])
    if total > rest:
        done = kernel(w, g, mu, nu, scalars, words)
    put = lambda x, part: lines(x).at[-rest:].set(part).reshape(x.shape)
    return jax.tree.map(put, done, after)
