"""Quantization-aware training: a quantized forward pass, gradients of the quantized operands in high precision."""

from lowprec.ops import GemmRule
from lowprec.quantizers import (
    EXACT,
    REUSE,
    AbsMax,
    AbsMean,
    Clip,
    CrossQuant,
    Hadamard,
    Quantizer,
    RootMeanSquare,
    SignAboutMean,
)
from lowprec.recipes.recipe import everywhere, forward_only

# Those of the authors' repository, in root mean squares; from six bits on their search had stopped too early.
QUEST_REPO_CLIPS = (0.79788456, 1.49353462, 2.05106835, 2.51393058, 2.91609388, 3.27659728, 3.60104972, 3.88493868)


def quest(bits: int, repo: bool = False):
    """QuEST: rotated, scaled by the root mean square of a row, b-bit mid-rise, trust estimator.

    Args:
      repo: take the clips of the authors' repository rather than the best ones.
    """
    operand = Quantizer(
        f"int{bits}_midrise@row",
        Hadamard(128),
        scale=RootMeanSquare(QUEST_REPO_CLIPS[bits - 1] if repo else None),
        # |q - h| <= half a step. At one bit half a step reaches as far as the clip itself.
        estimator=Clip(margin=0.5),
        pad=True,
    )
    return forward_only(
        f"quest_{bits}", operand, operand, f"QuEST, arXiv 2502.05003, {bits}-bit weights and activations"
    )


TOKENS = Quantizer("int8@row", scale=AbsMax(floor=1e-5))

bitnet158 = forward_only(
    "bitnet158",
    TOKENS,
    Quantizer("ternary@tensor", scale=AbsMean(floor=1e-5)),
    "BitNet b1.58, arXiv 2402.17764 and its training tips: ternary weights, 8-bit activations, normalized inputs",
    normalize_input=True,
)

bitnet1 = forward_only(
    "bitnet1",
    TOKENS,
    Quantizer("binary@tensor", scale=AbsMean(floor=1e-5), correction=SignAboutMean()),
    "BitNet, arXiv 2310.11453: one-bit weights, sign(w - mean w) · mean |w|, 8-bit activations, normalized inputs",
    normalize_input=True,
)

trilm = everywhere(
    "trilm",
    GemmRule(fwd=(EXACT, Quantizer("ternary@tensor", scale=AbsMean())), dgrad=(EXACT, REUSE)),
    "TriLM, arXiv 2407.12327: ternary weights, activations as they are",
)


def crossquant(bits: int):
    return forward_only(
        f"crossquant_int{bits}",
        Quantizer(f"int{bits}@row", scale=CrossQuant(0.15)),
        Quantizer(f"int{bits}@row"),
        f"CrossQuant, arXiv 2410.07505: {bits}-bit activations scaled by row and column, weights by output channel",
    )


RECIPES = (*(quest(bits) for bits in range(1, 9)), bitnet158, bitnet1, trilm, crossquant(8), crossquant(4))
