"""Adam on moments of 8 and 4 bits in one pass, on a TPU; the reference defines it.

A step takes 128 or 256 rows of 256 elements, each two blocks of 128 lanes. Scales come and go across, along lanes, so
that memory holds them densely. Codes of 4 bits are spread over the lanes of their elements, and joined, by products
with matrices of zeros and ones: integers up to 255, which are exact.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowprec.formats.amax import amax_at, place_by_magnitude
from lowprec.formats.random import bits_at
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode, moments_after, weights_after
from lowprec.pallas.tpu.tiles import LANES
from lowprec.typing import Array, Float, UInt32

COLUMNS = 2 * LANES
_SIGN = np.uint32(1 << 31)


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
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, Moment, Moment]:
    """The operation on arrays whose size is a multiple of 128 · 256: scales of 128 rows fill the lanes."""
    total = w.size // COLUMNS
    rows = LANES * (1 + (total % (2 * LANES) == 0))  # at most 0.5 MiB of weights and gradients, twice in flight
    names = [name for name in AdamScalars._fields if getattr(scalars, name) is not None]
    operands = jnp.stack([jnp.asarray(getattr(scalars, name), jnp.float32) for name in names])
    lines = lambda x: x.reshape(total, -1)
    across = lambda x: lines(x.astype(jnp.float32)).T
    changed = [lines(w), lines(mu.codes), across(mu.scales), lines(nu.codes), across(nu.scales)]
    down = lambda x: pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))
    along = lambda x: pl.BlockSpec((x.shape[0], rows), lambda i: (0, i))
    specs = [down(changed[0]), down(changed[1]), along(changed[2]), down(changed[3]), along(changed[4])]
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    w_new, *new = pl.pallas_call(
        partial(_step, names=names, codes=(mu_code, nu_code)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed],
        grid=(total // rows,),
        in_specs=[*specs, down(lines(g)), scalar, scalar],
        out_specs=specs,
        input_output_aliases={i: i for i in range(len(changed))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(*changed, lines(g), operands, words)
    back = lambda moment, codes, scales: Moment(
        codes.reshape(moment.codes.shape), scales.T.reshape(moment.scales.shape).astype(moment.scales.dtype)
    )
    return w_new.reshape(w.shape), back(mu, *new[:2]), back(nu, *new[2:])


def _step(*refs, names, codes):
    w_ref, *moment_refs, g_ref, scalar_ref, word_ref = refs[:8]
    w_out, *moment_outs = refs[8:]
    now = AdamScalars(**{"weight_decay": None} | {name: scalar_ref[i] for i, name in enumerate(names)})
    rows = w_ref.shape[0]
    m, v = (_load(moment_refs[i : i + 2], code, rows) for i, code in zip((0, 2), codes, strict=True))
    g, w = g_ref[...].astype(jnp.float32), w_ref[...]
    row = lax.broadcasted_iota(jnp.int32, w.shape, 0) + pl.program_id(0) * rows
    index = (row * COLUMNS + lax.broadcasted_iota(jnp.int32, w.shape, 1)).astype(jnp.uint32)
    words: Any = [(word_ref[i, 0], word_ref[i, 1]) for i in range(3)]
    noise = lambda i: bits_at(words[i], index)
    m, v = moments_after(g, m, v, now)
    w_out[...] = weights_after(w, m, v, now, noise(2) if w.dtype == jnp.bfloat16 else None)
    for i, (x, code) in enumerate(zip((m, v), codes, strict=True)):
        _store(x, moment_outs[2 * i : 2 * i + 2], code, noise(i) if code.stochastic else None)


def _load(refs, code: MomentCode, rows):
    """A moment in float32."""
    codes, scales = refs[0][...].astype(jnp.int32), refs[1][...]
    if code.packed == 2:
        pairs = codes.astype(jnp.float32)
        spread = [_times(pairs[:, half * 64 : (half + 1) * 64], _pairing(0)) for half in range(2)]
        pairs = jnp.concatenate(spread, axis=1).astype(jnp.int32)
        codes = (pairs >> _offsets(pairs.shape)) & 15
    columns = [jnp.broadcast_to(scales[i : i + 1, :], (LANES, rows)).T for i in range(scales.shape[0])]
    scale = jnp.concatenate(columns * (2 // len(columns)), axis=1)
    return code.decode(codes.astype(jnp.uint32), scale)


def _store(x, refs, code: MomentCode, noise):
    # Integers have an order with a sign here.
    place = (place_by_magnitude(x) ^ _SIGN).astype(jnp.int32)
    halves = [jnp.max(place[:, start : start + LANES], axis=1, keepdims=True) for start in (0, LANES)]
    if code.block == COLUMNS:
        halves = [jnp.maximum(*halves)]
    scales = [amax_at(half.astype(jnp.uint32) ^ _SIGN, code.signed_scale) for half in halves]
    scales = [scale.astype(code.scale_dtype).astype(jnp.float32) for scale in scales]
    columns = [jnp.broadcast_to(scale, (x.shape[0], LANES)) for scale in scales]
    for i, column in enumerate(columns):
        refs[1][i : i + 1, :] = column.T[:1, :]
    coded = code.encode(x, jnp.concatenate(columns * (2 // len(columns)), axis=1), noise).astype(jnp.int32)
    if code.packed == 2:
        shifted = (coded << _offsets(coded.shape)).astype(jnp.float32)
        joined = [_times(shifted[:, start : start + LANES], _pairing(1)) for start in (0, LANES)]
        coded = jnp.concatenate(joined, axis=1).astype(jnp.int32)
    refs[0][...] = coded.astype(jnp.uint8)


def _offsets(shape):
    """Of codes in their byte, in bits."""
    return (lax.broadcasted_iota(jnp.int32, shape, 1) & 1) * 4


def _pairing(axis):
    """One where a lane belongs to a pair of lanes; pairs along `axis`, lanes along the other."""
    shape = (LANES // 2, LANES) if axis == 0 else (LANES, LANES // 2)
    pair, lane = (lax.broadcasted_iota(jnp.int32, shape, i) for i in (axis, 1 - axis))
    return (pair == lane >> 1).astype(jnp.float32)


def _times(x, matrix):
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
