"""Adam on moments of 8 and 4 bits in one pass: what is stored is read once, and written once, in its place.

A block of threads, one warpgroup, takes `rows` rows of 256 consecutive elements. Each row is (2, 32, 2, 2): two blocks
of 128 members, 32 lanes of a warp, two pairs of neighbours. So the codes of neighbours, which share a byte where they
have 4 bits, lie in one thread, and what a warp reads or writes at once are whole sectors of memory. Nothing is used
twice but by the thread that has it: the way through shared memory would gain nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.formats.amax import amax_at, place_by_magnitude
from lowprec.formats.random import bits_at
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode, moments_after, weights_after
from lowprec.typing import Array, Float, UInt32

ROWS = 8  # of a tile: 16 elements a thread
COLUMNS = 256
_ROW = (2, 32, 2, 2)
# A warp a row, a lane four neighbours: two registers of two.
_VALUES = plgpu.Layout.TILED(Tiling(((4, 1, 32, 2, 2),)), warp_dims=(-5,), lane_dims=(-3,), vector_dim=-1)
_PAIRS = _VALUES.reduce(4)
_SCALES = {128: _PAIRS.reduce(3).reduce(2), 256: _PAIRS.reduce(3).reduce(2).reduce(1)}


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
    rows: int = ROWS,
    interpret=None,
) -> tuple[Array, Moment, Moment]:
    """The operation on arrays of whole rows of 256; those beyond the last whole tile of `rows` stay what they were."""
    total = w.size // COLUMNS
    names = [name for name in AdamScalars._fields if getattr(scalars, name) is not None]
    operands = jnp.stack([jnp.asarray(getattr(scalars, name), jnp.float32) for name in names])
    parts = lambda code: ((total, *_ROW[: 4 if code.packed == 1 else 3]), (total, *_ROW[: 2 - code.block // 128]))
    shapes = [(total, *_ROW), *parts(mu_code), *parts(nu_code)]
    stored = (w, *mu, *nu)
    changed = [jax.new_ref(x.reshape(shape)) for x, shape in zip(stored, shapes, strict=True)]

    def body(*refs):
        tile = lax.axis_index("tile")
        *tiles, scalar_ref, word_ref = refs
        w_tile, *moments, g_tile = [ref.at[pl.ds(tile * rows, rows)] for ref in tiles]
        now = AdamScalars(**{"weight_decay": None} | {name: scalar_ref[i] for i, name in enumerate(names)})
        index = _indices((rows, *_ROW), tile.astype(jnp.uint32) * np.uint32(rows * COLUMNS))
        words: Any = [(word_ref[i, 0], word_ref[i, 1]) for i in range(3)]
        noise = lambda i: bits_at(words[i], index)
        mu_tiles, nu_tiles = moments[:2], moments[2:]
        m, v = _load(mu_tiles, mu_code, rows), _load(nu_tiles, nu_code, rows)
        w = _read(w_tile, _VALUES)
        m, v = moments_after(_read(g_tile, _VALUES).astype(jnp.float32), m, v, now)
        _write(w_tile, weights_after(w, m, v, now, noise(2) if w.dtype == jnp.bfloat16 else None))
        _store(m, mu_tiles, mu_code, lambda: noise(0))
        _store(v, nu_tiles, nu_code, lambda: noise(1))

    plgpu.kernel(
        body,
        out_type=(),
        grid=(total // rows,),
        grid_names=("tile",),
        **({} if interpret is None else {"interpret": interpret}),
    )(*changed, g.reshape(total, *_ROW), operands, words)
    w, *moments = (jax.freeze(ref).reshape(x.shape) for ref, x in zip(changed, stored, strict=True))
    return w, Moment(*moments[:2]), Moment(*moments[2:])


def _indices(shape, first):
    """The flat index of each element."""
    index, stride = first, 1
    for axis in reversed(range(len(shape))):
        index = index + plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=_VALUES) * np.uint32(stride)
        stride *= shape[axis]
    return index


def _load(tiles, code: MomentCode, rows):
    """A moment in float32."""
    shape = (rows, *_ROW)
    if code.packed == 1:
        codes = _read(tiles[0], _VALUES).astype(jnp.uint32)
    else:
        pairs = _read(tiles[0], _PAIRS).astype(jnp.uint32)
        codes = (lax.broadcast_in_dim(pairs, shape, (0, 1, 2, 3)) >> _offsets(shape)) & np.uint32(15)
    return code.decode(codes, _to_members(_read(tiles[1], _SCALES[code.block]).astype(jnp.float32), shape))


def _store(x, tiles, code: MomentCode, noise):
    place = place_by_magnitude(x)
    for axis in (4, 3, 2) if code.block == 128 else (4, 3, 2, 1):
        place = jnp.max(place, axis=axis)
    scale = amax_at(place, code.signed_scale).astype(code.scale_dtype)
    _write(tiles[1], scale)
    codes = code.encode(x, _to_members(scale.astype(jnp.float32), x.shape), noise() if code.stochastic else None)
    if code.packed == 2:
        codes = jnp.sum((codes << _offsets(x.shape)).astype(jnp.int32), axis=4)
    _write(tiles[0], codes.astype(jnp.uint8))


def _to_members(scale, shape):
    return lax.broadcast_in_dim(scale, shape, tuple(range(scale.ndim)))


def _offsets(shape):
    """Of codes in their byte, in bits."""
    return plgpu.broadcasted_iota(jnp.uint32, shape, 4, layout=_VALUES) * np.uint32(4)


def _read(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _write(ref, value):
    if hasattr(plgpu, "store"):  # since jax 0.12
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
