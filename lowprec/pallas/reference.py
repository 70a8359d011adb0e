"""What the operations of this package are: each in jnp, in the words of the framework's own formats and quantizers.

Kernels are tested against these, and XLA computes them where no kernel serves a call. Arguments as in the operations,
which check them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.formats.amax import amax_at, narrow_scale, place_by_magnitude
from lowprec.formats.blocks import block_layout
from lowprec.formats.elements import as_float32, decode, encode_rounded, round_elements
from lowprec.formats.native import format_of, to_native
from lowprec.formats.packing import pack, unpack
from lowprec.formats.random import DrawnKey, bits_at, random_bits
from lowprec.formats.rounding import Rounding
from lowprec.formats.scaling import Scale, block_amax
from lowprec.formats.types import FLOAT32, ElementFormat, IntFormat
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode, moments_after, weights_after
from lowprec.pallas.block_rounding import BlockRounding, Blocks
from lowprec.pallas.padding import pad_to
from lowprec.pallas.target import target
from lowprec.pallas.tile_math import SHARED, absmax_scale
from lowprec.quantizers.hadamard import hadamard
from lowprec.quantizers.scales import AbsMax
from lowprec.typing import Array, Float, UInt32

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@partial(jax.jit, static_argnames=("group", "out_dtype"))
def block_matmul(
    a: Array, a_scale: Float[Array, "m groups"], b: Array, b_scale: Array, *, group: int, out_dtype=jnp.float32
) -> Array:
    """Σ over groups g of k: a_scale[:, g] · b_scale[:, g] · (a[:, g] · b[:, g]ᵀ)."""
    (m, groups), n = a_scale.shape, b.shape[0]
    if b_scale.shape[0] != n:  # of tiles
        b_scale = jnp.repeat(b_scale, group, axis=0)[:n]
    split = lambda x: jnp.moveaxis(pad_to(x, (x.shape[0], groups * group)).reshape(x.shape[0], groups, group), 1, 0)

    def add(total, operands):
        a, b, a_scale, b_scale = operands
        return total + exact_product(a, b).astype(jnp.float32) * (a_scale[:, None] * b_scale[None, :]), None

    total, _ = lax.scan(add, jnp.zeros((m, n), jnp.float32), (split(a), split(b), a_scale.T, b_scale.T))
    return total.astype(out_dtype)


@partial(jax.jit, static_argnames=("activation", "out_dtype"))
def channel_matmul(
    a: Array,
    b: Array,
    a_scale: Float[Array, " m"],
    b_scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None = None,
    *,
    activation: str | None = None,
    out_dtype=jnp.float32,
    out_scale: Float[Array, ""] | None = None,
) -> Array:
    """activation(a · bᵀ · (a_scale · b_scaleᵀ) + bias), as the elements of out_dtype nearest to it on out_scale."""
    y = exact_product(a, b).astype(jnp.float32) * (a_scale[:, None] * b_scale[None, :])
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if out_scale is not None:
        y = Scale(out_scale).divide(y)
    return to_dtype(y, out_dtype)


def exact_product(a: Array, b: Array) -> Array:
    """a · bᵀ of two matrices of 8 bits: int32 of integers, else float32."""
    dims = (((1,), (1,)), ((), ()))
    if a.dtype == jnp.int8:
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
    # bfloat16 holds every float8: devices multiply it, sum in float32, let the two differ. XLA's CPU backend
    # refuses some shapes of it.
    wide = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
    return lax.dot_general(
        a.astype(wide), b.astype(wide), dims, lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def w4_matmul(
    x: Float[Array, "m k"], codes: Array, scales: Float[Array, "n groups"], *, element: ElementFormat, out_dtype
) -> Array:
    """x · wᵀ, w the values of packed 4-bit codes times the scales of their groups, rounded to bfloat16."""
    elements = decode(unpack(codes, 4, x.shape[1]), element)
    w = elements * jnp.repeat(scales.astype(jnp.float32), x.shape[1] // scales.shape[1], axis=1)
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32).astype(out_dtype)


def to_dtype(y: Float[Array, "..."], dtype) -> Array:
    """float32 as float32 or bfloat16, or rounded to nearest even and saturated to 8 bits; NaN is the integer zero."""
    if jnp.dtype(dtype).itemsize > 1:
        return y.astype(dtype)
    element = format_of(dtype)
    y = round_elements(y, element, Rounding())
    if isinstance(element, IntFormat):
        y = jnp.where(jnp.isnan(y), 0, y)
    return y.astype(dtype)


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
    first: int = 0,
) -> tuple[Array, Moment, Moment]:
    """(w, mu, nu) after a step.

    Args:
      first: the flat index of the first element, where the arrays are a part of others: it has the noise it has there.
    """
    # As numbers that are not known, as in a kernel: XLA would join known ones with scales, and round other products.
    scalars = lax.optimization_barrier(jax.tree.map(jnp.float32, scalars))
    index = np.uint32(first) + jnp.arange(w.size, dtype=jnp.uint32).reshape(w.shape)
    noise = [bits_at(pair, index) for pair in words]
    m, v = _loaded(mu, mu_code, w.shape), _loaded(nu, nu_code, w.shape)
    m, v = moments_after(g.astype(jnp.float32), m, v, scalars)
    w = weights_after(w, m, v, scalars, noise[2])
    return w, stored(m, mu_code, noise[0]), stored(v, nu_code, noise[1])


def stored(x: Float[Array, "..."], code: MomentCode, noise: UInt32[Array, "..."] | None = None) -> Moment:
    """A moment as codes and scales; noise: 32 random bits an element."""
    place = place_by_magnitude(x).reshape(*x.shape[:-1], -1, code.block)
    scales = narrow_scale(amax_at(jnp.max(place, axis=-1), code.signed_scale), code.scale_dtype)
    codes = code.encode(x, jnp.repeat(scales.astype(jnp.float32), code.block, axis=-1), noise)
    return Moment(pack(codes, code.element.bits), scales)


@partial(jax.jit, static_argnames=("how", "axis"))
def round_blocks(
    x: Float[Array, "m k"],
    signs: Float[Array, " n"] | None,
    words: UInt32[Array, " 2"] | None,
    tensor: Float[Array, ""] | None,
    *,
    how: BlockRounding,
    axis: int = -1,
) -> Blocks:
    """x · D · H along an axis, and its blocks there; with axis 0, of the transposed matrix."""
    x = _rotated(x, signs, how, axis)
    layout = block_layout(x.shape, how.fmt.block, axis, pad=True)
    blocks = layout.split(x)
    scale = how.rule(blocks, layout, how.fmt)
    if tensor is not None and isinstance(how.rule, AbsMax):
        amax = block_amax(blocks, layout, how.fmt.scale, how.fmt.element if how.rule.headroom == 1 else None)
        scale = absmax_scale(amax, how.fmt, how.rule, tensor)
    z = scale.scaler(how.fmt.element).settled().divide(blocks)
    random = None if words is None else _noise(words, layout.padded, how.noise, axis).reshape(layout.split_shape)
    q = round_elements(z, how.fmt.element, how.rounding, random)
    last = lambda y: y if axis else y.T
    codes = last(encode_rounded(layout.merge(q), how.fmt.element)).astype(jnp.uint8)
    scales = last(scale.block.reshape(layout.scale_shape))
    if how.fmt.scale.format != FLOAT32:
        scales = encode_rounded(scales, how.fmt.scale.format).astype(jnp.uint8)
    sums = None
    if how.sums:
        sums = tuple(_chunk_sums(last((z * other).reshape(layout.padded))) for other in (z, q))
    return Blocks(stored_codes(codes, how.fmt.element), scales, scale.tensor, sums)


def stored_codes(codes: Array, element: ElementFormat) -> Array:
    """uint8 codes as `Blocks` has them."""
    if element.bits < 8:
        return pack(codes, element.bits)
    return codes if element.dtype is None else to_native(codes, element)


@partial(jax.jit, static_argnames=("how", "axis"))
def tensor_scale(
    x: Float[Array, "m k"], signs: Float[Array, " n"] | None, *, how: BlockRounding, axis: int = -1
) -> Float[Array, ""]:
    """The second level that the rule gives the scales of x · D · H."""
    x = _rotated(x, signs, how, axis)
    layout = block_layout(x.shape, how.fmt.block, axis, pad=True)
    return how.rule(layout.split(x), layout, how.fmt).tensor


def _rotated(x, signs, how, axis):
    x = as_float32(x)
    if how.rotation is None:
        return x
    shape = tuple(how.padded(size) if i == axis % 2 else size for i, size in enumerate(x.shape))
    return hadamard(pad_to(x, shape), how.rotation, signs, axis=axis)


def _noise(words, shape, noise, axis):
    index = jnp.arange(shape[0], dtype=jnp.uint32)[:, None], jnp.arange(shape[1], dtype=jnp.uint32)[None, :]
    if noise == "each":
        return random_bits(DrawnKey(words, words), shape)
    # The four elements that share a hash lie 32 apart in 128; its bytes go to them from the highest on.
    along = index[axis]
    first = along - along % 128 + along % SHARED
    flat = first + index[0] * np.uint32(shape[1]) if axis else first * np.uint32(shape[1]) + index[1]
    word = bits_at(words, flat) << (along % 128 // SHARED * 8)
    return (word & np.uint32(0xFF000000)) | np.uint32(0x00800000)


def _chunk_sums(v):
    chunks = -(-v.shape[1] // 128)
    return jnp.sum(pad_to(v, (v.shape[0], chunks * 128)).reshape(v.shape[0], chunks, 128), axis=-1)


def _loaded(moment, code, shape):
    codes = unpack(moment.codes, code.element.bits, shape[-1]).astype(jnp.uint32)
    return code.decode(codes, jnp.repeat(moment.scales.astype(jnp.float32), code.block, axis=-1))
