"""The named formats: what `parse` knows by heart, and the table that people read."""

from lowprec.formats import codebooks
from lowprec.formats.types import (
    BFLOAT16,
    E4M3FN,
    E8M0,
    FLOAT32,
    BlockFormat,
    ElementFormat,
    FloatFormat,
    IntFormat,
    ScaleSpec,
    TableFormat,
)

# QLoRA, arXiv 2305.14314, appendix E: quantiles of the normal distribution, with an exact zero.
NF4 = TableFormat(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip

_CANONICAL: dict[str, ElementFormat] = {
    "float32": FLOAT32,
    "float16": FloatFormat(5, 10),
    "bfloat16": BFLOAT16,
    "tf32": FloatFormat(8, 10),
    "e5m2": FloatFormat(5, 2),
    "e4m3fn": E4M3FN,
    "e4m3_ieee": FloatFormat(4, 3),
    "e3m4_ieee": FloatFormat(3, 4),
    "e4m3fnuz": FloatFormat(4, 3, 8, False, "fnuz"),
    "e5m2fnuz": FloatFormat(5, 2, 16, False, "fnuz"),
    "e4m3b11fnuz": FloatFormat(4, 3, 11, False, "fnuz"),
    "e8m0fnu": E8M0,
    "e3m2fn": FloatFormat(3, 2, 3, False, "none"),
    "e2m3fn": FloatFormat(2, 3, 1, False, "none"),
    "e2m1fn": FloatFormat(2, 1, 1, False, "none"),
    **{
        f"{'' if signed else 'u'}int{bits}": IntFormat(bits, signed)
        for signed in (True, False)
        for bits in range(2, 17)
    },
    "nf4": NF4,
    "ternary": TableFormat("ternary", (-1.0, 0.0, 1.0)),
    "binary": TableFormat("binary", (-1.0, 1.0)),
    **{
        name: codebooks.build(name)
        for name in (
            *("posit8", "posit16", "lns8.3", "pow2_4"),
            *("de8", "ude8", "de4", "ude4", "log8", "log4", "lin4", "cmp8", "ucmp8"),
        )
    },
}

ELEMENTS: dict[str, ElementFormat] = {
    **_CANONICAL,
    "f32": FLOAT32,
    "fp32": FLOAT32,
    "f16": FloatFormat(5, 10),
    "fp16": FloatFormat(5, 10),
    "bf16": BFLOAT16,
    "e5m2_ieee": FloatFormat(5, 2),
    "e8m0": E8M0,
    # The types of ml_dtypes and jax whose names do not say the family.
    "float8_e5m2": FloatFormat(5, 2),
    "float8_e4m3": FloatFormat(4, 3),
    "float8_e3m4": FloatFormat(3, 4),
}

_E8M0_FLOOR = ScaleSpec(E8M0, "floor")

BLOCKS: dict[str, BlockFormat] = {
    # OCP Microscaling Formats (MX) 1.0: 32 elements share a power of two.
    "mxfp8": BlockFormat(E4M3FN, (1, 32), _E8M0_FLOOR),
    "mxfp8_e5m2": BlockFormat(_CANONICAL["e5m2"], (1, 32), _E8M0_FLOOR),
    "mxfp6_e3m2": BlockFormat(_CANONICAL["e3m2fn"], (1, 32), _E8M0_FLOOR),
    "mxfp6_e2m3": BlockFormat(_CANONICAL["e2m3fn"], (1, 32), _E8M0_FLOOR),
    "mxfp4": BlockFormat(_CANONICAL["e2m1fn"], (1, 32), _E8M0_FLOOR),
    "mxint8": BlockFormat(IntFormat(8, fraction_bits=6), (1, 32), _E8M0_FLOOR),
    # NVIDIA: 16 elements share an e4m3 scale, all blocks a float32 one.
    "nvfp4": BlockFormat(_CANONICAL["e2m1fn"], (1, 16), ScaleSpec(E4M3FN, None, True)),
    # Das et al., arXiv 1802.00930: the tensor shares an exponent.
    "dfp8": BlockFormat(IntFormat(8, symmetric=True), "tensor", _E8M0_FLOOR),
    "dfp16": BlockFormat(IntFormat(16, symmetric=True), "tensor", _E8M0_FLOOR),
    # Block floating point (Rouhani et al., NeurIPS 2020): 16 sign-magnitude numbers share the exponent of the largest.
    **{f"msfp{bits + 8}": BlockFormat(IntFormat(bits, symmetric=True), (1, 16), _E8M0_FLOOR) for bits in range(3, 9)},
    # DeepSeek-V3, arXiv 2412.19437.
    "fp8_block128": BlockFormat(E4M3FN, (1, 128)),
    "fp8_tile128": BlockFormat(E4M3FN, (128, 128)),
}

_NAMES = {fmt: name for name, fmt in _CANONICAL.items()}


def name_of(fmt: ElementFormat) -> str | None:
    return _NAMES.get(fmt)


def canonical_names() -> tuple[str, ...]:
    return (*_CANONICAL, *BLOCKS)
