"""Codes are those of jax's own dtypes, both ways, for every format that has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import QTensor, formats, quantize

NATIVE = [
    name for name in formats.names() if formats.parse(name).dtype is not None and "@" not in str(formats.parse(name))
]


@pytest.mark.parametrize("name", NATIVE)
def test_every_code_is_that_of_the_dtype(name):
    fmt = formats.parse(name)
    codes = jnp.arange(1 << min(fmt.bits, 16), dtype=formats.elements.code_dtype(fmt.bits))
    if fmt.bits > 16:
        codes = codes << 16 | codes
    array = formats.to_native(codes, fmt)
    assert array.dtype == fmt.dtype
    np.testing.assert_array_equal(formats.from_native(array), codes)
    # numpy, not XLA: its float32 has subnormals.
    np.testing.assert_array_equal(np.asarray(array).astype(np.float32), formats.decode(codes, fmt))
    assert formats.format_of(array.dtype) == fmt


def test_formats_without_a_dtype_and_dtypes_without_a_format_say_so():
    with pytest.raises(ValueError, match="no dtype for e3m2fn"):
        formats.to_native(jnp.zeros(3, jnp.uint8), "e3m2fn")
    with pytest.raises(ValueError, match="complex64"):
        formats.from_native(jnp.zeros(3, jnp.complex64))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "int4@1x32", "int8@row/bf16", "e5m2", "int2@tensor"])
def test_qtensors_go_to_native_arrays_and_back(name):
    x = jax.random.normal(jax.random.key(0), (6, 64))
    q = quantize(x, name)
    elements, scales = q.to_native()
    assert elements.shape == x.shape and elements.dtype == formats.element_of(name).dtype
    back = QTensor.from_native(elements, scales, name, tensor_scale=q.tensor_scale)
    jax.tree.map(np.testing.assert_array_equal, back, q)
    if name == "mxfp4":  # what the arrays mean without lowprec
        values = np.asarray(elements).astype(np.float32) * np.repeat(np.asarray(scales).astype(np.float32), 32, axis=1)
        np.testing.assert_array_equal(values, q.dequantize())


def test_arrays_that_do_not_fit_the_format_are_refused():
    elements, scales = quantize(jnp.ones((4, 64)), "mxfp4").to_native()
    with pytest.raises(ValueError, match=r"float8_e8m0fnu\[4, 2\], not none"):
        QTensor.from_native(elements, None, "mxfp4")
    with pytest.raises(ValueError, match="not float4_e2m1fn"):
        QTensor.from_native(elements, scales, "mxfp8")
    with pytest.raises(ValueError, match="tensor_scale"):
        QTensor.from_native(elements, jnp.ones((4, 4), jnp.float8_e4m3fn), "nvfp4")
