"""Calibration, and XLA's own products: what kernels are measured against."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.analysis.bench.case import Shape, Work, elements, product_work, shape_name
from lowprec.analysis.bench.checks import close
from lowprec.analysis.bench.kernel_case import KernelCase, Program
from lowprec.pallas.target import target
from lowprec.typing import Array

SMALL = (256, 256, 512)
BIG = (8192, 8192, 8192)
# The last one is that of decoding 64 sequences.
SHAPES = ((4096, 4096, 4096), BIG, (8192, 28672, 8192), (64, 7168, 7168))
COPY, BFLOAT16 = "calibration/copy", f"calibration/bf16/{shape_name(BIG)}"

# As XLA's compiled program calls cuBLASLt for products of float8.
_CUBLAS_FLOAT8 = "__cublas$lt$matmul$f8"
_PRESETS = {
    "fast": lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM,
    "precise": lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32,
}


def calibration() -> Iterator[KernelCase]:
    """What the device does today: a pass over memory, and XLA's product of bfloat16."""
    yield KernelCase(COPY, _copy, (8192, 8192), (256, 256))
    yield KernelCase(BFLOAT16, _bfloat16, BIG, SMALL)


def xla_products() -> Iterator[KernelCase]:
    """XLA's products of float8 with both ways of summing, of int8, and of bfloat16 at the other shapes."""
    for shape in SHAPES:
        for summing in _PRESETS if shape == BIG else ("fast",):
            yield KernelCase(f"xla/fp8_{summing}/{shape_name(shape)}", partial(_float8, summing), shape, SMALL)
        if shape != BIG:
            yield KernelCase(f"xla/bf16/{shape_name(shape)}", _bfloat16, shape, SMALL)
    yield KernelCase(f"xla/int8/{shape_name(BIG)}", _int8, BIG, SMALL)


def peer(kind: str, shape: Shape) -> str:
    """The name of XLA's product of this kind at a shape."""
    return BFLOAT16 if (kind, shape) == ("bf16", BIG) else f"xla/{kind}/{shape_name(shape)}"


def normal(seed: int, shape: Shape, dtype=jnp.bfloat16) -> Array:
    """Standard normal numbers. Zeros or small integers would draw less power, and clocks would stay higher."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def k_major(a: Array, b: Array, **options) -> Array:
    """a · bᵀ, both with the contraction axis last."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), **options)


def in_float32(a: Array, b: Array) -> Array:
    """The product of the float32 values, without TF32."""
    return k_major(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _operands(shape, dtype, scale=1.0):
    m, n, k = shape
    return tuple((scale * normal(seed, size)).astype(dtype) for seed, size in ((0, (m, k)), (1, (n, k))))


def _copy(shape, _):
    size = elements(shape)
    return Program(lambda x: x + jnp.bfloat16(1), lambda: (normal(0, shape),), Work(bytes=4.0 * size))


def _bfloat16(shape, _):
    return Program(
        partial(k_major, preferred_element_type=jnp.bfloat16),
        lambda: _operands(shape, jnp.bfloat16),
        product_work(shape, "bfloat16", 2, 2),
        lambda a, b: in_float32(a, b).astype(jnp.bfloat16),
        close(5e-3),
    )


def _float8(summing, shape, _):
    # The CPU refuses these presets; its one way of summing stands in for both.
    preset = _PRESETS[summing] if target().platform == "gpu" else None
    return Program(
        partial(k_major, preferred_element_type=jnp.bfloat16, precision=preset),
        lambda: _operands(shape, jnp.float8_e4m3fn),
        product_work(shape, "float8"),
        lambda a, b: in_float32(a, b).astype(jnp.bfloat16),
        close(1e-2),
        calls=_CUBLAS_FLOAT8,
    )


def _int8(shape, _):
    return Program(
        partial(k_major, preferred_element_type=jnp.int32),
        lambda: _operands(shape, jnp.int8, scale=20.0),
        product_work(shape, "int8", out_bytes=4),
        in_float32,
        lambda found, wanted: close(1e-6)(found.astype(jnp.float32), wanted),
    )
