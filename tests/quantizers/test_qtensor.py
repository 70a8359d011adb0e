"""QTensor: codes that give back exactly what fake quantization gives, in as many bytes as its bits need."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.formats import BlockFormat, parse
from lowprec.quantizers import QTensor, dequantize, fake_quant, quantize

BLOCKS = [name for name in formats.names() if isinstance(parse(name), BlockFormat)]
OTHERS = (
    "int4@row",
    "int2_symmetric@1x16/bf16",
    "nf4@1x64",
    "ternary@row/bf16",
    "binary@tensor",
    "int4_midrise@row",
    "e3m4_ieee@1x5/tf32",
    "e2m3fn@8x8/e8m0.even",
    "int5@1x4/e5m2.tensor",
    "e4m3fn@3x3/float16",
    "bfloat16@row/e8m0.rceil",
    "fx7.9@1x8/e8m0.nearest",
    "e2m1fn@1x16/e4m3fn",
)
ELEMENTS = ("e4m3fn", "e2m1fn", "e3m2fn", "int2", "int3", "int16", "nf4", "bfloat16", "tf32", "binary")
SHAPE = (5, 33, 70)  # no block divides it


def data(shape=SHAPE, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * np.exp2(random.integers(-20, 20, (*shape[:-1], 1)))
    x = np.where(random.random(shape) < 0.05, 0, x).astype(np.float32)
    x[..., :3] *= np.float32(2.0**-100)
    x[0, :] = 0.0  # blocks of zeros
    x[0, 1] = -0.0
    x[1] *= np.float32(2.0**-126)  # and of subnormals
    return x


def assert_same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("name", [*BLOCKS, *OTHERS, *ELEMENTS])
def test_dequantized_codes_are_the_fake_quantized_values_bit_for_bit(name):
    cases = [{"axis": 1, "rounding": "stochastic"}, {"axis": -1}, {"axis": 1}][: 3 if name in BLOCKS else 2]

    @jax.jit
    def both(x, key):
        pairs = [[f(x, name, key=key, pad=True, **case) for f in (quantize, fake_quant)] for case in cases]
        return [(q, q.dequantize(), values) for q, values in pairs]

    for q, dequantized, values in both(data(), jax.random.key(0)):
        assert q.shape == values.shape == SHAPE
        assert not np.isnan(values).any()
        assert_same_bits(dequantized, values)


def bytes_of(name, shape, axis):
    """Codes fill whole bytes on each line of the last axis; a scale a block, in the bytes of its format."""
    fmt = parse(name)
    element = formats.element_of(fmt)
    lines, last = math.prod(shape[:-1]), shape[-1]
    codes = lines * math.ceil(last * element.bits / 8) if element.bits < 8 else math.prod(shape) * width(element)
    if not isinstance(fmt, BlockFormat):
        return codes
    counts = list(shape)
    if fmt.block == "tensor":
        counts = [1] * len(shape)
    elif fmt.block == "row":
        counts[axis] = 1
    else:
        outer, inner = fmt.block
        counts[axis] = math.ceil(counts[axis] / inner)
        if outer > 1:
            other = axis + 1 if axis + 1 < len(shape) else axis - 1
            counts[other] = math.ceil(counts[other] / outer)
    return codes + math.prod(counts) * width(fmt.scale.format) + 4 * fmt.scale.per_tensor


def width(fmt):
    return 1 if fmt.bits <= 8 else 2 if fmt.bits <= 16 else 4


@pytest.mark.parametrize("name", [*BLOCKS, *OTHERS, *ELEMENTS])
@pytest.mark.parametrize("axis", [1, 2])
def test_nbytes_are_the_bits_that_codes_and_scales_need(name, axis):
    q = jax.eval_shape(lambda x: quantize(x, name, axis=axis, pad=True), jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    assert q.nbytes == bytes_of(name, SHAPE, axis)
    assert q.codes.dtype == formats.encode(jnp.ones(1), formats.element_of(name)).dtype


@pytest.mark.parametrize(
    "name,bits", [("mxfp8", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25), ("nvfp4", 4.5), ("nf4@1x64", 4.5)]
)
def test_bits_per_value_of_a_large_tensor(name, bits):
    q = jax.eval_shape(lambda x: quantize(x, name), jax.ShapeDtypeStruct((1024, 4096), jnp.float32))
    assert parse(name).bits_per_value == bits
    assert q.nbytes - 4 * parse(name).scale.per_tensor == 1024 * 4096 * bits / 8


@pytest.mark.parametrize("name", ["nvfp4", "int4@row", "mxfp8", "int8@tensor/bf16"])
def test_a_qtensor_passes_through_jit_scan_and_vmap(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 32)), jnp.float32)
    compiled = jax.jit(lambda x: quantize(x, name))
    rows = [compiled(row) for row in x]
    assert isinstance(rows[0], QTensor) and (rows[0].fmt, rows[0].shape, rows[0].axis) == (parse(name), (8, 32), -1)
    values = jnp.stack([jax.jit(dequantize)(q) for q in rows])
    batch = jax.jit(jax.vmap(compiled))(x)  # leaves have a leading axis; the shape is that of a member
    assert jax.tree.structure(batch) == jax.tree.structure(rows[0])
    assert_same_bits(jax.jit(jax.vmap(dequantize))(batch), values)
    _, scanned = jax.lax.scan(lambda total, q: (total, q.dequantize()), 0.0, batch)
    assert_same_bits(scanned, values)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8_tile128", "int4@row", "nf4@tensor", "int3", "e4m3fn"])
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0,)])
def test_empty_arrays_stay_empty(name, shape):
    if isinstance(parse(name), BlockFormat) and parse(name).block == (128, 128) and len(shape) == 1:
        return
    q = quantize(jnp.zeros(shape), name)
    assert q.dequantize().shape == shape and q.size == 0
    assert fake_quant(jnp.zeros(shape), name).shape == shape


@pytest.mark.parametrize("name", ["int4", "e4m3fn", "int8@tensor", "nvfp4"])
def test_a_single_number_has_no_axis(name):
    if name == "nvfp4":
        with pytest.raises(ValueError, match=r"shape \(\) has no axis -1"):
            quantize(jnp.float32(3), name)
    else:
        q = quantize(jnp.float32(3), name)
        assert q.shape == q.dequantize().shape == () and q.dequantize() == 3
        assert q.nbytes == 1 + 4 * ("@" in name)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "dfp16", "int8@row"])
def test_half_precision_input_quantizes_as_its_exact_float32(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.bfloat16)
    q, wide = quantize(x, name), quantize(x.astype(jnp.float32), name)
    jax.tree.map(np.testing.assert_array_equal, q, wide)
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    assert fake_quant(x, name).dtype == jnp.bfloat16


def test_codes_are_those_of_the_scaled_values():
    x = np.array([[6.0, -3.0, 0.4, 1.4], [0.0, 0.0, 0.0, 0.0]], np.float32)
    q = quantize(jnp.asarray(x), "e2m1fn@row")
    # 6 -> 0111, -3 -> 1101, 0.4 -> 0.5 = 0001, 1.4 -> 1.5 = 0011; the first code in the low nibble.
    np.testing.assert_array_equal(q.codes, [[0xD7, 0x31], [0, 0]])
    np.testing.assert_array_equal(q.scales, [[1.0], [1.0]])
    assert q.ndim == 2 and q.tensor_scale is None


def test_what_cannot_be_quantized_is_refused():
    x = jnp.ones((4, 30))
    with pytest.raises(ValueError, match=r"blocks of 16 do not divide axis 1 of shape \(4, 30\); pad=True"):
        quantize(x, "nvfp4")
    with pytest.raises(ValueError, match="stochastic rounding needs a key"):
        quantize(x, "int8@row", rounding="stochastic")
    with pytest.raises(TypeError, match="not int32"):
        quantize(jnp.ones((4, 32), jnp.int32), "nvfp4")
    with pytest.raises(ValueError, match="did you mean nvfp4"):
        quantize(x, "nvpf4")
    with pytest.raises(ValueError, match="has no axis 2"):
        quantize(x, "int8@row", axis=2)
