"""Hypothesis strategies: any format that the types can express, and inputs that lie where it has values."""

import numpy as np
from hypothesis import strategies as st

from lowprec.formats import BlockFormat, FloatFormat, IntFormat, ScaleSpec, parse
from lowprec.formats.types import BFLOAT16, E8M0, E8M0_RULES, FLOAT32


@st.composite
def float_formats(draw, max_bits=32):
    """FloatFormats with every combination of fields that float32 can hold."""
    exponent_bits = draw(st.integers(0, min(8, max_bits - 1)))
    mantissa_bits = draw(st.integers(0, min(23, max_bits - 1 - exponent_bits)))
    nan = draw(st.sampled_from(["ieee", "fn", "fnuz", "none"]))
    fields = {
        "nan": nan,
        "has_inf": draw(st.booleans()),
        "signed": nan == "fnuz" or draw(st.booleans()),
        "negative_zero": draw(st.booleans()),
        "subnormals": draw(st.booleans()),
    }
    top = max((1 << exponent_bits) - 1, 1)  # of the exponent field
    bias = draw(st.one_of(st.none(), st.integers(top - 128, 150 - mantissa_bits)))
    try:
        return FloatFormat(exponent_bits, mantissa_bits, bias, **fields)
    except ValueError:  # contradicting fields, or one binade too far
        return FloatFormat(min(exponent_bits, 6), max(mantissa_bits, 2), bias and bias % 16, nan="none")


@st.composite
def int_formats(draw):
    kind = draw(st.sampled_from(["", "symmetric", "midrise", "unsigned"]))
    bits = draw(st.integers(2, 16))
    fraction = draw(st.one_of(st.just(0), st.integers(-64, 64)))
    return IntFormat(bits, kind != "unsigned", kind == "symmetric", fraction, kind == "midrise")


TABLES = [parse(name) for name in ("nf4", "ternary", "binary", "posit8", "posit6_es1", "lns6.2", "de4", "ude8", "cmp8")]


def element_formats():
    return st.one_of(float_formats(), float_formats(8), int_formats(), st.sampled_from(TABLES))


@st.composite
def block_formats(draw):
    size = draw(st.integers(1, 256))
    block = draw(st.sampled_from(["tensor", "row", (1, size), (size, size)]))
    kind = draw(st.sampled_from(["f32", "bf16", "e8m0", "float"]))
    if kind == "e8m0":
        scale = ScaleSpec(E8M0, draw(st.sampled_from(E8M0_RULES)))
    elif kind == "float":
        narrow = draw(float_formats(8).filter(lambda f: f not in (E8M0, FLOAT32, BFLOAT16)))
        scale = ScaleSpec(narrow, None, draw(st.booleans()))
    else:
        scale = ScaleSpec(FLOAT32 if kind == "f32" else BFLOAT16)
    return BlockFormat(draw(element_formats()), block, scale)


def inputs(fmt, seed: int, size: int = 512) -> np.ndarray:
    """Finite float32 numbers from far below the smallest value of a format to beyond the largest, many near values."""
    random = np.random.default_rng(seed)
    low = np.log2(fmt.min_subnormal)
    high = np.log2(fmt.max) + 1
    with np.errstate(over="ignore"):
        x = np.exp2(random.uniform(max(low - 6, -149), min(high, 127.99), size)).astype(np.float32)
        x = np.where(np.isfinite(x), x, np.finfo(np.float32).max)
    bits = x.view(np.uint32)
    # Short significands, hence ties and values, and what lies next to them.
    short = bits & ~((np.uint32(1) << random.integers(0, 24, size).astype(np.uint32)) - np.uint32(1))
    bits = np.where(random.random(size) < 0.7, short, bits) + random.integers(-1, 2, size).astype(np.uint32)
    bits = np.where(bits > 0x7F7FFFFF, np.uint32(0x7F7FFFFF), bits)  # also what wrapped below zero
    bits[:4] = 0, 1, 0x7F7FFFFF, 0x00800000
    return (bits | (random.integers(0, 2, size).astype(np.uint32) << 31)).astype(np.uint32).view(np.float32)
