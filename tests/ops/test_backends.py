"""Backends compute what `emulate` defines, or say why they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import REUSE, OctaveMax, Quantizer

SHAPES = ((48, 64), (64, 32), (48, 32))


def gradients(rule, backend, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, SHAPES, strict=True))

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=jax.random.key(1), backend=backend), x, w)
        return y, *vjp(dy)

    return run(x, w, dy)


NATIVE = {
    "int8 rows": GemmRule(*[(Quantizer("int8_symmetric@row"),) * 2] * 3),
    "int8 tensor, reused": GemmRule((Quantizer("int8@tensor"),) * 2, (Quantizer("int8@tensor"), REUSE), (REUSE, REUSE)),
    "int4 rows": GemmRule(*[(Quantizer("int4@row/bf16"),) * 2] * 3),
    "int8 power-of-two scales": GemmRule(*[(Quantizer("int8@row/e8m0.ceil"),) * 2] * 3),
    "fp8 hybrid": GemmRule((Quantizer("e4m3fn@tensor"),) * 2, (Quantizer("e5m2@tensor"), REUSE), (REUSE, REUSE)),
    "bf16": GemmRule(*[(Quantizer("bfloat16"),) * 2] * 3),
    "float16": GemmRule(*[(Quantizer("float16"),) * 2] * 3),
    "nvfp4": GemmRule(*[(Quantizer("nvfp4"), Quantizer("e2m1fn@16x16/e4m3fn.tensor"))] * 3),
    "mxfp4": GemmRule(*[(Quantizer("mxfp4", scale=OctaveMax(), pad=True),) * 2] * 3),
    "mxfp8": GemmRule(*[(Quantizer("mxfp8", pad=True),) * 2] * 3),
    "integers and floats": GemmRule(*[(Quantizer("int8@row"), Quantizer("bfloat16"))] * 3),
    "midrise and ternary": GemmRule(*[(Quantizer("int4_midrise@row"), Quantizer("ternary@tensor"))] * 3),
}


@pytest.mark.parametrize("backend", ["native", "auto"])
@pytest.mark.parametrize("name", NATIVE)
def test_native_products_agree_with_emulation_within_the_accumulation(name, backend):
    rule = NATIVE[name]
    reference = gradients(rule, "emulate")
    for ours, theirs, depth in zip(gradients(rule, backend), reference, (64, 32, 48), strict=True):
        # Each of the two float32 sums of `depth` products errs by at most depth · 2^-24 of the sum of magnitudes.
        bound = 2 * depth * 2.0**-24 * depth * 4
        assert float(jnp.max(jnp.abs(ours - theirs))) < bound


def test_int8_products_are_integer_products():
    text = jax.jit(lambda: gradients(NATIVE["int8 rows"], "native")).lower().as_text()
    assert text.count("xi8>") > 0
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("i8>, tensor" in line and "-> tensor" in line and "xi32>" in line for line in products)


def test_fp8_products_are_fp8_products():
    text = jax.jit(lambda: gradients(NATIVE["fp8 hybrid"], "native")).lower().as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert "f8E4M3FN" in products[0]
    assert "f8E5M2" in products[1]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (recipes.get("fp8_block").rules[-1].gemm, "vary along the contraction axis, and no bfloat16 has"),
        (recipes.parse("fwd=int8@row,exact").rules[-1].gemm, "fwd.w is not quantized"),
        (recipes.parse("fwd=nf4@row").rules[-1].gemm, r"no bfloat16 has all elements of fwd.x \(nf4@row\)"),
        (recipes.parse("fwd=tf32@tensor").rules[-1].gemm, "no bfloat16 has all elements of fwd.x"),
    ],
)
def test_a_backend_that_cannot_serve_says_why_and_auto_goes_on(rule, reason):
    with pytest.raises(ValueError, match=reason):
        gradients(rule, "native")
    for ours, theirs in zip(gradients(rule, "auto"), gradients(rule, "emulate"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'palas'; did you mean pallas"):
        qdot(jnp.ones((2, 2)), jnp.ones((2, 2)), NATIVE["bf16"], backend="palas")
