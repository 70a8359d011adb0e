"""The grammar of format names, in both directions: parse(str(fmt)) == fmt.

element := [float] e<E>m<M>[b<bias>]<family>[_<flag>…]   family: fn, fnuz, fnu, _ieee, _p3109[u](e|f)
         | p3109_k<bits>p<precision>[u](e|f)
         | [u]int<bits>[_symmetric|_midrise] | [u]fx<word>.<fraction>[_symmetric|_midrise]
         | posit<bits>[_es<E>] | lns<bits>.<fraction> | pow2_<bits> | [u]de<bits> | log<bits> | lin<bits> | [u]cmp<bits>
         | a name in the catalog
block   := element@(tensor|row|1x<g>|<g>x<g>)[/scale]
scale   := f32 | bf16 | e8m0.<rule> | <float element>[.tensor]
"""

import re

from lowprec.errors import UsageError, unknown
from lowprec.formats import catalog, codebooks
from lowprec.formats.types import (
    BFLOAT16,
    E8M0,
    E8M0_RULES,
    FLOAT32,
    BlockFormat,
    ElementFormat,
    FloatFormat,
    Format,
    IntFormat,
    ScaleSpec,
)

_FLOAT = re.compile(
    r"(?:float(?P<bits>\d+)_)?e(?P<E>\d+)m(?P<M>\d+)(?:b(?P<b>\d+|_\d+))?"
    r"(?P<family>fnuz|fnu|fn|_ieee|_p3109u?[ef])?(?P<flags>(?:_[a-z]+)*)"
)
_P3109 = re.compile(r"p3109_k(?P<k>\d+)p(?P<p>\d+)(?P<u>u?|s)(?P<domain>[ef])")
_INT = re.compile(r"(?P<u>u?)int(?P<bits>\d+)(?P<flag>_symmetric|_midrise)?")
_FIXED = re.compile(r"(?P<u>u?)fx(?P<bits>\d+)\.(?P<fraction>-?\d+)(?P<flag>_symmetric|_midrise)?")

# The flags of float names: (what they say, the field, its value).
_FLAGS = {
    "inf": ("has_inf", True),
    "noinf": ("has_inf", False),
    "nan": ("nan", "fn"),
    "nonan": ("nan", "none"),
    "unsigned": ("signed", False),
    "nonegzero": ("negative_zero", False),
    "nosubnormals": ("subnormals", False),
}


def parse(name: str | Format) -> Format:
    """The format of a name; a format passes through.

    Raises:
      UsageError: (a ValueError) if the name is unknown or ambiguous; it names the nearest ones.
      TypeError: for what is neither.
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a format or its name is wanted, not {name!r}")
    if name in catalog.BLOCKS:
        return catalog.BLOCKS[name]
    element, at, rest = name.partition("@")
    if not at:
        return parse_element(name)
    if element in catalog.BLOCKS:
        raise UsageError(f"format {name!r}: {element} has blocks and scales already ({parse(element)})")
    block, slash, scale = rest.partition("/")
    try:
        return BlockFormat(parse_element(element), _parse_block(block), parse_scale(scale if slash else "f32"))
    except ValueError as error:
        raise UsageError(f"format {name!r}: {error}") from None


def _parse_block(block):
    if block in ("tensor", "row"):
        return block
    match = re.fullmatch(r"(\d+)x(\d+)", block)
    outer, inner = map(int, match.groups()) if match else (0, 0)
    if inner < 1 or outer not in (1, inner):
        raise UsageError(f"a block is tensor, row, 1x<g> or <g>x<g>, not {block!r}")
    return outer, inner


def parse_element(name: str) -> ElementFormat:
    if name in catalog.ELEMENTS:
        return catalog.ELEMENTS[name]
    try:
        for pattern, build in _PATTERNS:
            match = pattern.fullmatch(name)
            if match:
                return build(match)
        table = codebooks.build(name)
        if table:
            return table
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"format {name!r}: {error}") from None
    hint = "lowprec formats lists all; any e<E>m<M>fn, e<E>m<M>_ieee, int<bits> and fx<bits>.<fraction> can be written"
    raise unknown("format", name, (*catalog.ELEMENTS, *catalog.BLOCKS), hint)


def _build_float(match):
    e, m, family = int(match["E"]), int(match["M"]), match["family"]
    if family is None:
        base = f"e{e}m{m}"
        raise UsageError(
            f"format {match[0]!r} is ambiguous: say {base}fn (all exponents hold numbers) or {base}_ieee "
            "(the top exponent holds infinity and NaN)"
        )
    if family in ("fn", "fnuz", "_ieee"):
        fmt = _build_by_fields(e, m, match)
    elif match["b"] or match["flags"]:
        raise UsageError(f"format {match[0]!r}: the family {family.strip('_')} has its own bias and takes no flags")
    elif family == "fnu":
        if (e, m) != (8, 0):
            raise UsageError(f"format {match[0]!r}: only e8m0 has the family fnu")
        fmt = E8M0
    else:
        fmt = _p3109(e, m, "u" in family, family.endswith("e"))
    if match["bits"] and int(match["bits"]) != fmt.bits:
        raise UsageError(f"format {match[0]!r} has {fmt.bits} bits, not {match['bits']}")
    return fmt


def _build_p3109(match):
    bits, precision, unsigned = int(match["k"]), int(match["p"]), match["u"] == "u"
    return _p3109(bits - precision + unsigned, precision - 1, unsigned, match["domain"] == "e")


def _p3109(e, m, unsigned, extended):
    """IEEE P3109: NaN takes the code of negative zero, or, unsigned, the last one; extended formats have infinities."""
    bias = 1 << (e - 1) if e > 0 else 0
    return FloatFormat(e, m, bias, extended, "fn" if unsigned else "fnuz", signed=not unsigned)


def _build_by_fields(e, m, match):
    family = match["family"]
    said: dict[str, object] = {}
    for flag in filter(None, match["flags"].split("_")):
        if flag not in _FLAGS:
            raise unknown("flag of a float format", flag, _FLAGS)
        field, value = _FLAGS[flag]
        if said.setdefault(field, value) != value:
            raise UsageError(f"format {match[0]!r}: its flags contradict each other")
    bias = int(match["b"].replace("_", "-")) if match["b"] else (1 << (e - 1)) - (family != "fnuz") if e else 0
    return FloatFormat(e, m, bias, **_family_fields(family, e, m) | said)


def _family_fields(family, exponent_bits, mantissa_bits):
    if family == "_ieee":
        return {"has_inf": True, "nan": "ieee"}
    if family == "fnuz":
        return {"has_inf": False, "nan": "fnuz"}
    # By custom the fn formats of 8 bits and more spend one code on NaN, the smaller ones none.
    return {"has_inf": False, "nan": "fn" if exponent_bits + mantissa_bits >= 7 else "none"}


def name_of(fmt: Format | ScaleSpec) -> str:
    """The canonical name: parse(name_of(fmt)) == fmt."""
    match fmt:
        case FloatFormat():
            return _float_name(fmt)
        case IntFormat():
            return _int_name(fmt)
        case ScaleSpec():
            return _scale_name(fmt)
        case BlockFormat():
            block = fmt.block if isinstance(fmt.block, str) else "x".join(map(str, fmt.block))
            scale = "" if fmt.scale == ScaleSpec() else f"/{fmt.scale}"
            return f"{fmt.element}@{block}{scale}"
    return fmt.name


def _float_name(fmt):
    """The canonical name: the one in the catalog, else by the grammar, with flags for what the family does not say."""
    known = catalog.name_of(fmt)
    if known:
        return known
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    family = {"ieee": "_ieee", "fnuz": "fnuz"}.get(fmt.nan, "fn")
    usual = _family_fields(family, e, m)
    flags = []
    if fmt.has_inf != usual["has_inf"]:
        flags.append("inf" if fmt.has_inf else "noinf")
    if fmt.nan != usual["nan"]:
        flags.append("nan" if fmt.nan == "fn" else "nonan")
    if not fmt.signed:
        flags.append("unsigned")
    elif not fmt.negative_zero and fmt.nan != "fnuz" and fmt.has_zero:
        flags.append("nonegzero")
    if not fmt.subnormals:
        flags.append("nosubnormals")
    usual_bias = ((1 << (e - 1)) - (family != "fnuz")) if e else 0
    bias = "" if fmt.bias == usual_bias else f"b{fmt.bias}".replace("-", "_")
    return f"e{e}m{m}{bias}{family}" + "".join(f"_{flag}" for flag in flags)


def _build_int(match):
    flag = match["flag"]
    fraction = int(match["fraction"]) if "fraction" in match.groupdict() else 0
    return IntFormat(int(match["bits"]), not match["u"], flag == "_symmetric", fraction, flag == "_midrise")


def _int_name(fmt):
    word = f"int{fmt.bits}" if fmt.fraction_bits == 0 else f"fx{fmt.bits}.{fmt.fraction_bits}"
    flag = "_symmetric" if fmt.symmetric else "_midrise" if fmt.midrise else ""
    return f"{'' if fmt.signed else 'u'}{word}{flag}"


_PATTERNS = ((_FLOAT, _build_float), (_P3109, _build_p3109), (_INT, _build_int), (_FIXED, _build_int))


def parse_scale(name: str) -> ScaleSpec:
    if name in ("f32", "float32"):
        return ScaleSpec()
    if name in ("bf16", "bfloat16"):
        return ScaleSpec(BFLOAT16)
    base, _, rule = name.partition(".")
    if base in ("e8m0", "e8m0fnu"):
        if rule not in E8M0_RULES:
            raise unknown("rule of an e8m0 scale", rule, E8M0_RULES)
        return ScaleSpec(E8M0, rule)
    if rule not in ("", "tensor"):
        raise UsageError(f"scale {name!r}: after the dot stands 'tensor' (a second level) or, for e8m0, a rule")
    element = parse_element(base)
    if not isinstance(element, FloatFormat):
        raise UsageError(f"scale {name!r} is not a floating-point format")
    return ScaleSpec(element, None, rule == "tensor")


def _scale_name(scale):
    if scale.format in (FLOAT32, BFLOAT16):
        return {FLOAT32: "f32", BFLOAT16: "bf16"}[scale.format]
    if scale.power_of_two:
        return f"e8m0.{scale.rule}"
    return f"{scale.format}{'.tensor' if scale.per_tensor else ''}"


def names() -> tuple[str, ...]:
    """The named formats: elements, then blocks. The grammar has many more."""
    return catalog.canonical_names()
