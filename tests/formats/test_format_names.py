"""Names: what is written can be read back, what is wrong is told with the nearest right name."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_formats import block_formats, element_formats

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats import BlockFormat, FloatFormat, IntFormat, ScaleSpec, TableFormat, parse

PROMISED = """
    float16 bfloat16 tf32 e5m2 e4m3fn e4m3_ieee e3m4_ieee e4m3fnuz e5m2fnuz e4m3b11fnuz e8m0fnu e3m2fn e2m3fn e2m1fn
    nf4 ternary binary mxfp8 mxfp8_e5m2 mxfp6_e3m2 mxfp6_e2m3 mxfp4 mxint8 nvfp4 dfp16 fp8_block128 fp8_tile128
"""
INTEGERS = [f"{u}int{bits}" for u in ("", "u") for bits in range(2, 17)]


def test_the_promised_formats_are_named():
    assert {*PROMISED.split(), *INTEGERS} <= set(formats.names())


@pytest.mark.parametrize("name", formats.names())
def test_a_named_format_survives_writing_and_reading(name):
    fmt = parse(name)
    assert parse(str(fmt)) == fmt
    assert parse(fmt) is fmt
    assert hash(parse(str(fmt))) == hash(fmt)
    if not isinstance(fmt, BlockFormat):
        assert str(fmt) == name


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.one_of(element_formats(), block_formats()))
def test_any_format_survives_writing_and_reading(fmt):
    assert parse(str(fmt)) == fmt


@settings(max_examples=300, deadline=None, derandomize=True)
@given(element_formats(), element_formats())
def test_different_formats_have_different_names(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    "alias,canonical",
    [
        ("mxfp8", "e4m3fn@1x32/e8m0.floor"),
        ("mxfp4", "e2m1fn@1x32/e8m0.floor"),
        ("nvfp4", "e2m1fn@1x16/e4m3fn.tensor"),
        ("fp8_block128", "e4m3fn@1x128"),
        ("fp8_tile128", "e4m3fn@128x128"),
        ("int8@row", "int8@row/f32"),
        ("int8@tensor/bf16", "int8@tensor/bfloat16"),
        ("bf16", "bfloat16"),
        ("fx8.0", "int8"),
        ("e4m3b7fn", "e4m3fn"),
        ("e4m3_p3109f", "e4m3fnuz"),  # the same values and codes
        ("e5m2_p3109f", "e5m2fnuz"),
    ],
)
def test_names_of_the_same_format(alias, canonical):
    assert parse(alias) == parse(canonical)


@pytest.mark.parametrize("dtype", [name for name in dir(ml_dtypes) if re.match(r"float|bfloat|u?int", name)])
def test_dtype_names_are_understood_and_mean_that_dtype(dtype):
    if dtype in ("int1", "uint1"):
        return  # formats without a negative or a positive value to speak of
    fmt, theirs = parse(dtype), getattr(ml_dtypes, dtype)
    info = ml_dtypes.iinfo(theirs) if "int" in dtype else ml_dtypes.finfo(theirs)
    assert fmt.bits == info.bits
    assert fmt.max == float(info.max)
    if fmt.has_zero if isinstance(fmt, FloatFormat) else True:
        assert fmt.min == float(info.min)


WRONG = {
    "e4m3": "ambiguous: say e4m3fn .* or e4m3_ieee",
    "e2m1": "ambiguous: say e2m1fn .* or e2m1_ieee",
    "e3m4b2": "ambiguous: say e3m4fn .* or e3m4_ieee",
    "nvpf4": "did you mean nvfp4",
    "mxpf8": "did you mean mxfp8",
    "e4m3nf": "did you mean e4m3fn",
    "bfloat": "did you mean bfloat16",
    "fx8": r"fx<bits>\.<fraction> can be written",
    "": "unknown format ''",
    "int0": "int formats have 1 to 16 bits",
    "int17": "int formats have 1 to 16 bits",
    "e9m3fn": "exponent_bits is 0 to 8",
    "e4m24fn": "mantissa_bits 0 to 23",
    "e8m3b300fn": "float32 does not contain",
    "e0m3_ieee": "without exponent bits",
    "e2m1fn_inff": "unknown flag of a float format 'inff'; did you mean inf",
    "e4m3fn_inf_noinf": "contradict each other",
    "e4m3b3_p3109e": "has its own bias",
    "e5m2fnu": "only e8m0",
    "float16_e4m3fn": "has 8 bits, not 16",
    "e4m0fnuz_nosubnormals": "a format without a zero has none",
    "int8@": "a block is tensor, row, 1x<g> or <g>x<g>, not ''",
    "int8@col": "a block is tensor, row, 1x<g> or <g>x<g>, not 'col'",
    "int8@2x32": "a block is tensor, row, 1x<g> or <g>x<g>, not '2x32'",
    "int8@1x0": "a block is tensor, row, 1x<g> or <g>x<g>, not '1x0'",
    "int8@32": "a block is tensor, row, 1x<g> or <g>x<g>, not '32'",
    "mxfp8@row": "mxfp8 has blocks and scales already",
    "int8@1x32/e8m0": "choose from ceil, even, floor, nearest, rceil, rceil_exact",
    "int8@1x32/e8m0.flor": "did you mean floor",
    "int8@1x32/e4m3fn.row": "after the dot stands 'tensor'",
    "int8@1x32/int8": "'int8' is not a floating-point format",
    "int8@1x32/f32.tensor": "a second level makes sense for narrow scales only",
    "int1@row": "no positive value",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_refused_with_advice(name):
    with pytest.raises(UsageError, match=WRONG[name]):
        parse(name)


@pytest.mark.parametrize("thing", [3, None, np.float32, ("int8",)])
def test_what_is_no_format_is_a_type_error(thing):
    with pytest.raises(TypeError, match="a format or its name is wanted"):
        parse(thing)


@pytest.mark.parametrize(
    "rounding", ["nearest_even", "odd", "stochastic", "stochastic[8]", "stochastic[3A]", "stochastic_equal"]
)
def test_rounding_modes_survive_writing_and_reading(rounding):
    assert str(formats.parse_rounding(rounding)) == rounding
    assert formats.parse_rounding(formats.parse_rounding(rounding)) == formats.parse_rounding(rounding)


@pytest.mark.parametrize(
    "rounding,message",
    [
        ("nearest", "did you mean nearest_"),
        ("stochastc", "did you mean stochastic"),
        ("stochastic[0]", "1 to 24"),
        ("stochastic[25]", "1 to 24"),
        ("odd[3]", "only stochastic rounding takes"),
        ("stochastic[8D]", "unknown rounding"),
    ],
)
def test_a_wrong_rounding_mode_is_refused_with_advice(rounding, message):
    with pytest.raises(UsageError, match=message):
        formats.round_to(np.float32(1), "int8", rounding=rounding)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: FloatFormat(0, 0), "needs an exponent or a mantissa bit"),
        (lambda: FloatFormat(4, 3, nan="ocp"), "ieee, fn, fnuz or none"),
        (lambda: FloatFormat(4, 3, nan="fnuz", signed=False), "an unsigned format has none"),
        (lambda: FloatFormat(1, 0), "no code is left for a positive number"),
        (lambda: FloatFormat(1, 1, has_inf=False, subnormals=False), "no code is left for a positive number"),
        (lambda: FloatFormat(8, 7, 200), "float32 does not contain"),
        (lambda: IntFormat(4, signed=False, symmetric=True), "only signed mid-tread formats"),
        (lambda: IntFormat(4, signed=False, midrise=True), "a mid-rise format is signed"),
        (lambda: TableFormat("t", (1.0,)), "needs 2 to 65536 finite values"),
        (lambda: TableFormat("t", (1.0, np.inf)), "needs 2 to 65536 finite values"),
        (lambda: TableFormat("t", (1.0, 0.5)), "do not ascend"),
        (lambda: ScaleSpec(parse("e8m0fnu")), "has a rule"),
        (lambda: ScaleSpec(parse("e4m3fn"), "floor"), "and no other, has a rule"),
        (lambda: BlockFormat(parse("int8"), (2, 4)), r"\(1, g\) or \(g, g\)"),
        (lambda: BlockFormat(parse("int8"), "column"), "not 'column'"),
    ],
)
def test_contradicting_fields_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
