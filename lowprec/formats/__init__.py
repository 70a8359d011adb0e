"""Number formats: which values exist, how they are coded, how blocks of them share scales, how reals round to them.

from lowprec import formats
formats.round_to(x, "e4m3fn", rounding="stochastic", key=key)
formats.parse("e2m1fn@1x16/e4m3fn.tensor") == formats.parse("nvfp4")
"""

from lowprec.formats.elements import decode, element_of, encode, round_to, value_table
from lowprec.formats.grammar import names, parse
from lowprec.formats.native import format_of, from_native, to_native
from lowprec.formats.packing import pack, unpack
from lowprec.formats.random import random_bits
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.traced import TracedFormat, stack_traced, traced, traced_fixed, traced_float
from lowprec.formats.types import BlockFormat, FloatFormat, Format, IntFormat, ScaleSpec, TableFormat

__all__ = [
    "BlockFormat",
    "FloatFormat",
    "Format",
    "IntFormat",
    "Rounding",
    "ScaleSpec",
    "TableFormat",
    "TracedFormat",
    "decode",
    "element_of",
    "encode",
    "format_of",
    "from_native",
    "names",
    "pack",
    "parse",
    "parse_rounding",
    "random_bits",
    "round_to",
    "stack_traced",
    "to_native",
    "traced",
    "traced_fixed",
    "traced_float",
    "unpack",
    "value_table",
]
