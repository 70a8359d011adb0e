"""Our products as cases: scales a block, scales a row with an epilogue, weights of 4 bits."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from lowprec.analysis.bench.case import Shape, product_work, shape_name
from lowprec.analysis.bench.checks import close
from lowprec.analysis.bench.kernel_case import KernelCase, Program
from lowprec.analysis.bench.xla_products import BIG, SHAPES, SMALL, in_float32, k_major, normal, peer
from lowprec.formats import parse, round_to
from lowprec.quantizers import quantize
from lowprec.typing import Array, Float

# (format of a, format of b) of block_matmul.
TILES, LINES = ("e4m3fn@1x128", "e4m3fn@128x128"), ("e4m3fn@1x128", "e4m3fn@1x128")
BLOCK_VARIANTS = {
    "tiles": TILES,
    "lines": LINES,
    "tiles_e5m2": ("e5m2@1x128", "e4m3fn@128x128"),
    "tiles_int8": ("int8_symmetric@1x128", "int8_symmetric@128x128"),
    "lines_mxfp8": ("mxfp8", "mxfp8"),
}
CHANNEL_VARIANTS = ("bias_gelu_fp8", "bf16")
PACKED_WEIGHTS = ("int4@1x128", "nf4@1x64", "e2m1fn@1x32")
# Roundings of outputs to bfloat16, 2^-9 / √3 each, and sums of float8 products on tensor cores, which keep some 14 bits
# (DeepSeek-V3, arXiv 2412.19437, §3.5.2).
_BFLOAT16_OUTPUTS = 5e-3


def correctness() -> Iterator[KernelCase]:
    """Every variant of our products, small."""
    for variant in BLOCK_VARIANTS:
        yield _tried_out(f"block_matmul/{variant}", partial(block_product, variant))
    for variant in CHANNEL_VARIANTS:
        yield _tried_out(f"channel_matmul/{variant}", partial(channel_product, variant))
    for fmt in PACKED_WEIGHTS:
        yield _tried_out(f"w4_matmul/{fmt.replace('@', '_')}", partial(packed_product, fmt))


def block_products() -> Iterator[KernelCase]:
    """block_matmul at every shape; and what XLA makes of the same scales at one."""
    for variant in ("tiles", "lines"):
        for shape in SHAPES:
            name, build = f"block_matmul/{variant}/{shape_name(shape)}", partial(block_product, variant)
            yield KernelCase(name, build, shape, SMALL, True, peers=(peer("bf16", shape), peer("fp8_fast", shape)))
    yield KernelCase(
        f"block_matmul/dequantized/{shape_name(BIG)}", _dequantized, BIG, SMALL, peers=(peer("bf16", BIG),)
    )


def other_products() -> Iterator[KernelCase]:
    """channel_matmul beside XLA's product with the same epilogue, and w4_matmul beside the product in bfloat16."""
    for variant in CHANNEL_VARIANTS:
        name, build = f"channel_matmul/{variant}/{shape_name(BIG)}", partial(channel_product, variant)
        yield KernelCase(f"{name}/xla", build, BIG, SMALL)
        yield KernelCase(f"{name}/kernel", build, BIG, SMALL, True, peers=(f"{name}/xla",))
    for shape in (SHAPES[-1], BIG):
        for fmt in PACKED_WEIGHTS if shape != BIG else PACKED_WEIGHTS[:1]:
            name = f"w4_matmul/{fmt.replace('@', '_')}/{shape_name(shape)}"
            yield KernelCase(name, partial(packed_product, fmt), shape, SMALL, True, peers=(peer("bf16", shape),))


def _tried_out(name, build):
    return KernelCase(f"correct/{name}", build, SMALL, SMALL, True, timed=False)


def block_product(variant: str, shape: Shape, impl: str, config=None) -> Program:
    """block_matmul of one variant; `config` as it takes it."""
    a_format, b_format = BLOCK_VARIANTS[variant]
    integer = "int8" in variant

    def product(a, a_scale, b, b_scale):
        from lowprec.pallas.block_matmul import block_matmul

        return block_matmul(a, a_scale, b, b_scale, out_dtype=jnp.bfloat16, impl=impl, config=config)

    bits = [parse(fmt).bits_per_value / 8 for fmt in (a_format, b_format)]
    return Program(
        product,
        lambda: (*_codes(0, shape[0::2], a_format), *_codes(1, shape[1:], b_format)),
        product_work(shape, "int8" if integer else "float8", *bits),
        lambda *operands: _exact(*operands).astype(jnp.bfloat16),
        close(_BFLOAT16_OUTPUTS),
    )


def channel_product(variant: str, shape: Shape, impl: str) -> Program:
    """channel_matmul, plain or with all that its epilogue does."""
    fused = variant != "bf16"
    out_dtype = jnp.float8_e4m3fn if fused else jnp.bfloat16

    def product(a, a_scale, b, b_scale, bias):
        from lowprec.pallas.channel_matmul import channel_matmul

        scales, epilogue = {"a_scale": a_scale, "b_scale": b_scale}, {"bias": bias, "activation": "gelu"}
        extra = {**epilogue, "out_scale": jnp.float32(0.25)} if fused else {}
        return channel_matmul(a, b, **scales, **extra, out_dtype=out_dtype, impl=impl)

    def inputs():
        a, a_scale = _codes(0, shape[0::2], "e4m3fn@row")
        b, b_scale = _codes(1, shape[1:], "e4m3fn@row")
        # To outputs of variance one, as a network would have them.
        return a, a_scale[:, 0], b, b_scale[:, 0] / jnp.sqrt(shape[2]), normal(2, shape[1:2], jnp.float32)

    def reference(a, a_scale, b, b_scale, bias):
        y = in_float32(a, b) * a_scale[:, None] * b_scale
        return round_to(jax.nn.gelu(y + bias) / 0.25, "e4m3fn") if fused else y

    check = close(1e-2 if fused else _BFLOAT16_OUTPUTS)  # a value at a tie goes to its other neighbour, 6 % away
    return Program(
        product,
        inputs,
        product_work(shape, "float8", out_bytes=1 if fused else 2),
        reference,
        lambda found, wanted: check(found.astype(jnp.float32), wanted.astype(jnp.float32)),
    )


def packed_product(fmt: str, shape: Shape, impl: str) -> Program:
    """w4_matmul of activations in bfloat16."""
    m, _, k = shape

    def product(x, codes, scales):
        from lowprec.pallas.w4_matmul import w4_matmul

        return w4_matmul(x, codes, scales, fmt.partition("@")[0], impl=impl)

    def inputs():
        q = quantize(normal(1, shape[1:]), fmt)
        return normal(0, (m, k)), q.codes, q.scales

    def reference(x, codes, scales):
        from lowprec.quantizers import QTensor

        w = QTensor(codes, scales, None, parse(fmt), shape[1:], -1).dequantize()
        return in_float32(x, w).astype(jnp.bfloat16)

    work = product_work(shape, "bfloat16", 2, parse(fmt).bits_per_value / 8)
    return Program(product, inputs, work, reference, close(_BFLOAT16_OUTPUTS))


def _dequantized(shape, _):
    """What XLA makes of scales a block: values in bfloat16, and their product."""
    tiles = block_product("tiles", shape, "xla")

    def product(a, a_scale, b, b_scale):
        values = (_values(codes, scale).astype(jnp.bfloat16) for codes, scale in ((a, a_scale), (b, b_scale)))
        return k_major(*values, preferred_element_type=jnp.bfloat16)

    return Program(product, tiles.inputs, tiles.work, tiles.reference, close(_BFLOAT16_OUTPUTS))


def _codes(seed, shape, fmt):
    codes, scales = quantize(normal(seed, shape), fmt).to_native()
    return codes, scales.astype(jnp.float32)


def _exact(a, a_scale, b, b_scale):
    return in_float32(_values(a, a_scale), _values(b, b_scale))


def _values(codes: Array, scales: Float[Array, "blocks blocks"]) -> Float[Array, "rows columns"]:
    """codes · scales, each scale that of as many rows and columns as there are to one."""
    rows, columns = (size // count for size, count in zip(codes.shape, scales.shape, strict=True))
    wide = jnp.repeat(jnp.repeat(scales, rows, axis=0), columns, axis=1)
    return codes.astype(jnp.float32) * wide
