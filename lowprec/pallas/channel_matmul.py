"""Products of 8 bits with one scale a row and column, or a tensor: what follows a layer's product, in one kernel."""

from functools import partial

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError, lookup
from lowprec.pallas import config as configs
from lowprec.pallas import reference
from lowprec.pallas.config import ChannelMatmulConfig
from lowprec.pallas.dispatch import choose
from lowprec.pallas.interpreters import gpu_interpreter, tpu_interpreter
from lowprec.pallas.operands import ELEMENTS, check_float32, check_operands, check_out_dtype
from lowprec.pallas.padding import pad_to
from lowprec.pallas.target import target
from lowprec.pallas.tpu.tiles import Tiles
from lowprec.typing import Array, Float

OUTPUTS = ("float32", "bfloat16", "float16", *ELEMENTS)


def channel_matmul(
    a: Array,
    b: Array,
    *,
    a_scale: Float[Array, "..."] | float = 1.0,
    b_scale: Float[Array, "..."] | float = 1.0,
    bias: Float[Array, " n"] | None = None,
    activation: str | None = None,
    out_dtype=jnp.float32,
    out_scale: Float[Array, ""] | float | None = None,
    impl: str = "auto",
    config: ChannelMatmulConfig | Tiles | None = None,
) -> Array:
    """activation(a · bᵀ · (a_scale · b_scaleᵀ) + bias) / out_scale, as out_dtype.

    The sum over k is float32 (int8: int32, which holds it for k < 2^17); so is all that follows. Of 8 bits, the result
    is rounded to nearest even and saturates; NaN is the integer zero. The division is a product with the reciprocal.

    It pays where what follows the product is fused with it; for a bare product with scales XLA has its own.

    Not differentiable: `ops.qdot` has the gradients of a quantized product.

    Args:
      a: (m, k) float8_e4m3fn, float8_e5m2 or int8.
      b: (n, k); of the two float8 formats it may have the other one.
      a_scale: () or (m,) float32.
      b_scale: () or (n,) float32.
      bias: (n,) float32.
      activation: None, "relu", "gelu" (by tanh) or "silu".
      out_dtype: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      out_scale: () float32; of the elements that come out.
      impl: who computes it, see `dispatch.IMPLS`.
      config: of the kernel; None takes what is best for the shape on the device.
    Raises:
      UsageError: (a ValueError) that names the argument which does not suit.
    """
    check_operands("channel_matmul", a, b)
    check_out_dtype("channel_matmul", out_dtype, OUTPUTS)
    if activation is not None:
        lookup("activation", reference.ACTIVATIONS, activation)
    if config is not None and not isinstance(config, ChannelMatmulConfig | Tiles):
        raise UsageError(f"channel_matmul takes a ChannelMatmulConfig, not {config!r}")
    (m, k), n = a.shape, b.shape[0]
    a_scale = _vector("a_scale", a_scale, m)
    b_scale = _vector("b_scale", b_scale, n)
    if bias is not None:
        check_float32("channel_matmul", "bias", bias, ((n,),))
    if out_scale is not None:
        out_scale = jnp.float32(out_scale) if isinstance(out_scale, float | int) else out_scale
        check_float32("channel_matmul", "out_scale", out_scale, ((),))
    chosen = choose("channel_matmul", impl, why_not_channel_matmul(a, b, out_dtype=out_dtype))
    epilogue = {"activation": activation, "out_dtype": jnp.dtype(out_dtype)}
    if chosen == "xla" or 0 in (m, n, k):
        return reference.channel_matmul(a, b, a_scale, b_scale, bias, out_scale=out_scale, **epilogue)
    if chosen.endswith("tpu"):
        interpret = tpu_interpreter() if chosen == "interpret_tpu" else False
        return _on_tpu(a, b, a_scale, b_scale, bias, out_scale, config=config, interpret=interpret, **epilogue)
    races = gpu_interpreter() if chosen == "interpret_gpu" else None
    return _on_sm90(a, b, a_scale, b_scale, bias, out_scale, config, races, **epilogue)


def why_not_channel_matmul(a: Array, b: Array, *, out_dtype=jnp.float32) -> dict[str, str | None]:
    """Why a kind of kernel cannot serve a call, or None. Looks at shapes and dtypes alone."""
    reason = None
    if jnp.dtype(out_dtype) == jnp.float16:
        reason = "it writes float32, bfloat16 and 8 bits, not float16"
    return {"mosaic_gpu": reason, "mosaic_tpu": reason}


def _vector(name, scale, size):
    scale = jnp.float32(scale) if isinstance(scale, float | int) else scale
    check_float32("channel_matmul", name, scale, ((), (size,)))
    return jnp.broadcast_to(scale, (size,))


def _on_sm90(a, b, a_scale, b_scale, bias, out_scale, config, interpret, **epilogue):
    from lowprec.pallas.gpu_sm90 import channel_matmul as kernel  # it needs Mosaic GPU

    (m, k), n, device = a.shape, b.shape[0], target()
    config = config or configs.channel_matmul_config(m, n, k, device)
    if not isinstance(config, ChannelMatmulConfig):
        raise UsageError(f"channel_matmul takes a ChannelMatmulConfig on GPUs, not {config!r}")
    rows, columns, depth = config.padded(m, n, k)
    y = kernel.channel_matmul(
        pad_to(a, (rows, depth)),
        pad_to(b, (columns, depth)),
        pad_to(a_scale, (rows,), 1),
        pad_to(b_scale, (columns,), 1),
        None if bias is None else pad_to(bias, (columns,)),
        None if out_scale is None else (1 / out_scale)[None],
        config=config,
        cores=device.cores,
        interpret=interpret,
        **epilogue,
    )
    return y[:m, :n]


@partial(jax.jit, static_argnames=("activation", "out_dtype", "config", "interpret"))
def _on_tpu(a, b, a_scale, b_scale, bias, out_scale, **options):
    from lowprec.pallas.tpu import channel_matmul as kernel

    factor = None if out_scale is None else (1 / out_scale)[None]
    return kernel.channel_matmul(a, b, a_scale, b_scale, bias, factor, **options)
