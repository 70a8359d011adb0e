"""Products with weights of 4 bits, for inference and for adapters beside frozen weights (QLoRA)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError, lookup
from lowprec.pallas import reference
from lowprec.pallas.dispatch import choose
from lowprec.pallas.four_bits import ELEMENTS, separated
from lowprec.pallas.interpreters import gpu_interpreter
from lowprec.pallas.operands import check_out_dtype
from lowprec.pallas.padding import pad_to
from lowprec.pallas.target import target
from lowprec.pallas.w4_config import COLUMNS, DEPTH, W4Config, w4_config
from lowprec.typing import Array, Float, UInt8

GROUPS = (32, 64, 128)


def w4_matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "n bytes"],
    scales: Float[Array, "n groups"],
    fmt: str,
    *,
    out_dtype=jnp.bfloat16,
    impl: str = "auto",
    config: W4Config | None = None,
) -> Float[Array, "m n"]:
    """x · wᵀ, where w = bfloat16(element · scale): weights are read as 4 bits, and are bfloat16 in registers alone.

    Products are exact and summed in float32. Differentiable in x and in the scales; that product is XLA's.

    Source: QLoRA (arXiv 2305.14314) for nf4; AWQ (arXiv 2306.00978) for groups of int4.

    Args:
      x: bfloat16.
      codes: k/2 bytes a row of weights, the even element in the low nibble, as a `QTensor` has them.
      scales: bfloat16 or float32, one for each 32, 64 or 128 elements of a row of weights.
      fmt: the elements: "int4", "e2m1fn" or "nf4".
      out_dtype: bfloat16 or float32.
      impl: who computes it, see `dispatch.IMPLS`.
      config: of the kernel; None takes what a model of the machine says.
    Raises:
      UsageError: (a ValueError) that names the argument which does not suit.
    """
    element = lookup("format of 4-bit weights", ELEMENTS, str(fmt))
    check_out_dtype("w4_matmul", out_dtype, ("bfloat16", "float32"))
    _check(x, codes, scales)
    chosen = choose("w4_matmul", impl, why_not_w4_matmul(x, codes, scales))
    return _product(x, codes, scales, element, jnp.dtype(out_dtype), chosen, config)


def why_not_w4_matmul(x: Array, codes: Array, scales: Array) -> dict[str, str | None]:
    """Why a kind of kernel cannot serve a call, or None. Looks at shapes and dtypes alone."""
    return {"mosaic_gpu": "the matrices are empty" if 0 in (*x.shape, *codes.shape) else None}


def _check(x, codes, scales):
    if x.ndim != 2 or codes.ndim != 2 or scales.ndim != 2:
        found = f"x {x.shape}, codes {codes.shape} and scales {scales.shape}"
        raise UsageError(f"w4_matmul takes matrices (m, k), (n, k/2) and (n, k/g), not {found}")
    k, n = x.shape[1], codes.shape[0]
    if x.dtype != jnp.bfloat16 or codes.dtype != jnp.uint8 or str(scales.dtype) not in ("bfloat16", "float32"):
        raise UsageError(
            "w4_matmul takes bfloat16 x, uint8 codes and bfloat16 or float32 scales, not "
            f"{x.dtype}, {codes.dtype} and {scales.dtype}"
        )
    if k % 2 or codes.shape[1] != k // 2:
        raise UsageError(f"w4_matmul takes codes of shape {(n, k // 2)} beside x of shape {x.shape}, not {codes.shape}")
    shapes = [(n, k // group) for group in GROUPS if k % group == 0]
    if scales.shape not in shapes:
        choices = " or ".join(map(str, shapes)) or f"none, for groups of 32, 64 or 128 do not divide {k}"
        raise UsageError(f"w4_matmul takes scales of shape {choices}, not {scales.shape}")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _product(x, codes, scales, element, out_dtype, chosen, config):
    if chosen == "xla":
        return reference.w4_matmul(x, codes, scales, element=element, out_dtype=out_dtype)
    interpret = gpu_interpreter() if chosen == "interpret_gpu" else None
    return _on_sm90(x, codes, scales, element, out_dtype, config, interpret)


def _forward(x, codes, scales, element, out_dtype, chosen, config):
    return _product(x, codes, scales, element, out_dtype, chosen, config), (x, codes, scales)


def _backward(element, out_dtype, chosen, config, saved, dy):
    x, codes, scales = saved
    product = lambda x, scales: reference.w4_matmul(x, codes, scales, element=element, out_dtype=out_dtype)
    dx, d_scales = jax.vjp(product, x, scales)[1](dy)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), d_scales


_product.defvjp(_forward, _backward)


def _on_sm90(x, codes, scales, element, out_dtype, config, interpret):
    from lowprec.pallas.gpu_sm90 import w4_matmul as kernel  # it needs Mosaic GPU

    (m, k), n = x.shape, codes.shape[0]
    group = k // scales.shape[1]
    config = config or w4_config(m, n, k, target().cores, out_dtype.itemsize)
    whole = lambda size, step: -(-size // step) * step
    rows, columns, depth = whole(m, config.rows), whole(n, COLUMNS), whole(k, DEPTH * config.splits)
    parts = kernel.w4_matmul(
        pad_to(x, (rows, depth)),
        separated(pad_to(codes, (columns, depth // 2)), element),
        pad_to(scales, (columns, depth // group)).T,
        element=element,
        out_dtype=out_dtype if config.splits == 1 else jnp.float32,
        config=config,
        interpret=interpret,
    )
    y = parts[0] if config.splits == 1 else jnp.sum(parts, axis=0).astype(out_dtype)
    return y[:m, :n]
