"""Quantization-aware training: a quantized forward pass, gradients of the quantized operands in high precision."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, AbsMax, AbsMean, Clip, Hadamard, Quantizer, RootMeanSquare
from lowprec.recipes.recipe import everywhere


def quest(bits: int):
    """QuEST: rotated, scaled by the root mean square of a row, b-bit mid-rise, trust estimator."""
    operand = Quantizer(
        f"int{bits}_midrise@row",
        Hadamard(128),
        scale=RootMeanSquare(),
        # |q - h| <= half a step. At one bit half a step reaches as far as the clip itself.
        estimator=Clip(margin=0.5),
        pad=True,
    )
    return everywhere(
        f"quest_{bits}",
        GemmRule(fwd=(operand, operand), dgrad=(EXACT, REUSE), wgrad=(EXACT, REUSE)),
        f"QuEST, arXiv 2502.05003, {bits}-bit weights and activations",
    )


bitnet158 = everywhere(
    "bitnet158",
    GemmRule(
        fwd=(Quantizer("int8@row", scale=AbsMax(floor=1e-5)), Quantizer("ternary@tensor", scale=AbsMean(floor=1e-5))),
        dgrad=(EXACT, REUSE),
        wgrad=(EXACT, REUSE),
        normalize_input=True,
    ),
    "BitNet b1.58, arXiv 2402.17764 and its training tips: ternary weights, 8-bit activations, normalized inputs",
)

trilm = everywhere(
    "trilm",
    GemmRule(fwd=(EXACT, Quantizer("ternary@tensor", scale=AbsMean())), dgrad=(EXACT, REUSE)),
    "TriLM, arXiv 2407.12327: ternary weights, activations as they are",
)

RECIPES = (*(quest(bits) for bits in range(1, 9)), bitnet158, trilm)
