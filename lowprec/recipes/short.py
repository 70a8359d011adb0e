"""The short form of a recipe, for configs and sweeps: "fwd=int4@row dgrad=int8@row(stochastic) wgrad=bf16".

    recipe  := rule | pattern ": " rule {"; " pattern ": " rule}
    rule    := product "=" operand ["," operand] {" " product "=" …}
    product := fwd (of x, w) | dgrad (of dy, w) | wgrad (of dy, x)
    operand := format ["(" option {" " option} ")"]
    option  := a rounding mode | hadamard<size|full>[.fixed|.random][.outer] | clamp[<quantile>]
               | rms | absmean | least_squares | four_over_six      (the scale; else absmax)
               | clip | trust | dge                                 (the estimator; else straight-through)
               | requantize

One operand stands for both. A product left out stays as it is; so do embeddings, the head, and the products inside
attention. A pattern is a regular expression for whole layer paths, without blanks and semicolons; the first that
matches wins: "layers/(0|3)/.*: fwd=int8@row; .*: fwd=int4@row".
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from lowprec.errors import UsageError, unknown
from lowprec.formats.rounding import KINDS
from lowprec.ops.rule import PRODUCTS, GemmRule
from lowprec.quantizers import (
    EXACT,
    REUSE,
    AbsMean,
    ClampQuantiles,
    Clip,
    DifferentiableGradient,
    FourOverSix,
    Hadamard,
    LeastSquares,
    Quantizer,
    RootMeanSquare,
)
from lowprec.recipes.recipe import ATTENTION_PRODUCTS, EMBEDDINGS_AND_HEAD, LayerRule, Recipe

_CLAUSE = re.compile(r"(?P<pattern>[^\s;]+):\s+(?P<rule>[^\s;][^;]*)")
_OPERAND = re.compile(r"(?P<format>[^(),=]+)(?:\((?P<options>[^()]*)\))?")
_HADAMARD = re.compile(r"hadamard(?P<size>\d+|full)(?:\.(?P<signs>fixed|random))?(?P<outer>\.outer)?")
_CLAMP = re.compile(r"clamp\[(?P<quantile>0?\.\d+)\]")
# QuEST's trust on an equally spaced grid reaches half a step beyond the clip.
_ESTIMATORS = {"clip": Clip(), "trust": Clip(margin=0.5), "dge": DifferentiableGradient()}
_SCALES = {
    "rms": RootMeanSquare(),
    "absmean": AbsMean(),
    "least_squares": LeastSquares(),
    "four_over_six": FourOverSix(),
}
_WORDS = {"exact": EXACT, "reuse": REUSE}


def parse_short(text: str) -> Recipe:
    """The recipe of a short form; `str` gives its canonical text.

    Raises:
      UsageError: (a ValueError) naming the part that is wrong.
    """
    if ";" not in text and not _CLAUSE.match(text.strip()):
        return layer_rules({".*": _gemm(text)})
    gemms: dict[str, GemmRule] = {}
    for clause in text.strip().removesuffix(";").split(";"):
        match = _CLAUSE.fullmatch(clause.strip())
        if not match:
            raise UsageError(f"recipe {text!r}: {clause.strip()!r} is not 'pattern: fwd=… dgrad=… wgrad=…'")
        if match["pattern"] in gemms:
            raise UsageError(f"recipe {text!r} gives the pattern {match['pattern']!r} twice")
        gemms[match["pattern"]] = _gemm(match["rule"])
    return layer_rules(gemms)


def layer_rules(gemms: Mapping[str, GemmRule]) -> Recipe:
    """The recipe of patterns and their rules, named by its short form; embeddings, head and attention as always.

    Raises:
      UsageError: (a ValueError) a pattern that the short form cannot hold.
    """
    for pattern in gemms:
        if not re.fullmatch(r"[^\s;]+", pattern):
            raise UsageError(f"a pattern of the short form has neither blanks nor semicolons, unlike {pattern!r}")
    only = _canonical(gemms[".*"]) if list(gemms) == [".*"] else None
    name = only or "; ".join(f"{pattern}: {_canonical(gemm)}" for pattern, gemm in gemms.items())
    own = (LayerRule(pattern, gemm) for pattern, gemm in gemms.items())
    return Recipe(name, (EMBEDDINGS_AND_HEAD, ATTENTION_PRODUCTS, *own))


def _gemm(text: str) -> GemmRule:
    products = {}
    for part in re.split(r"\s+(?=\w+=)", text.strip()):
        name, equals, operands = part.partition("=")
        if not equals or name not in PRODUCTS:
            raise unknown("product in a recipe", name, PRODUCTS, "a recipe reads fwd=… dgrad=… wgrad=…")
        if name in products:
            raise UsageError(f"recipe {text!r} gives {name} twice")
        products[name] = _operands(operands, text, PRODUCTS[name][:2])
    return GemmRule(**products)


def _operands(text, recipe, names):
    parts = re.split(r",(?![^(]*\))", text)
    if len(parts) > 2:
        raise UsageError(
            f"recipe {recipe!r}: {text!r} names {len(parts)} operands; a product has two, {' and '.join(names)}"
        )
    quantizers = [_operand(part.strip(), recipe) for part in parts]
    return (quantizers[0], quantizers[-1])


def _operand(text, recipe):
    match = _OPERAND.fullmatch(text)
    if not match:
        raise UsageError(f"recipe {recipe!r}: {text!r} is not an operand, format(option option …)")
    if match["format"] in _WORDS:
        return _WORDS[match["format"]]
    quantizer = Quantizer(match["format"], pad=True)
    for option in (match["options"] or "").split():
        quantizer = replace(quantizer, **_option(option))
    return quantizer


def _option(option):
    rotation = _HADAMARD.fullmatch(option)
    if rotation:
        size = "full" if rotation["size"] == "full" else int(rotation["size"])
        return {"rotation": Hadamard(size, rotation["signs"], "outer" if rotation["outer"] else "inner")}
    clamp = _CLAMP.fullmatch(option)
    if clamp:
        return {"clamp": ClampQuantiles(float(clamp["quantile"]))}
    if option in _ESTIMATORS:
        return {"estimator": _ESTIMATORS[option]}
    if option in _SCALES:
        return {"scale": _SCALES[option]}
    if option == "requantize":
        return {"source": "requantize"}
    if option.partition("[")[0] in KINDS:
        return {"rounding": option}
    rotations = ("hadamard16", "hadamard32", "hadamard128")
    words = ("clamp[0.99]", *_SCALES, *_ESTIMATORS, "requantize")
    raise unknown("option of an operand", option, (*KINDS, *rotations, *words))


def _canonical(gemm: GemmRule) -> str:
    parts = []
    for product in PRODUCTS:
        operands = [_operand_text(q) for q in getattr(gemm, product)]
        if operands != ["exact", "exact"]:
            parts.append(f"{product}={operands[0] if operands[0] == operands[1] else ','.join(operands)}")
    return " ".join(parts) or "fwd=exact"


def _operand_text(q):
    if q in (EXACT, REUSE):
        return "exact" if q == EXACT else "reuse"
    options = []
    if q.rotation:
        signs, side = (f".{q.rotation.signs}" if q.rotation.signs else ""), ("", ".outer")[q.rotation.side == "outer"]
        options.append(f"hadamard{q.rotation.size}{signs}{side}")
    if q.clamp:
        options.append(f"clamp[{q.clamp.quantile:g}]")
    if q.rounding.kind != "nearest_even":
        options.append(str(q.rounding))
    options += [word for word, scale in _SCALES.items() if q.scale == scale]
    options += [word for word, estimator in _ESTIMATORS.items() if q.estimator == estimator]
    if q.source == "requantize":
        options.append("requantize")
    return f"{q.format}({' '.join(options)})" if options else str(q.format)
