"""Quantization-aware training: a quantized forward pass, gradients of the quantized operands in high precision."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, AbsMax, AbsMean, Clip, Hadamard, Quantizer, RootMeanSquare
from lowprec.recipes.recipe import everywhere

# The clip of the 2^b-level mid-rise grid with the least squared error for N(0, 1), in standard deviations. QuEST's own
# table stops short of the optimum at 6, 7 and 8 bits (3.2766, 3.6010, 3.8849; at most 0.15 % in error).
GAUSSIAN_CLIP = {
    1: 0.797885, 2: 1.493530, 3: 2.051068, 4: 2.514005, 5: 2.916151, 6: 3.277985, 7: 3.611097, 8: 3.922205,
}  # fmt: skip


def quest(bits: int):
    """QuEST: rotated, scaled by the root mean square of a row, b-bit mid-rise, trust estimator."""
    operand = Quantizer(
        f"int{bits}_midrise@row",
        Hadamard(128),
        scale=RootMeanSquare(GAUSSIAN_CLIP[bits]),
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

RECIPES = (*(quest(bits) for bits in GAUSSIAN_CLIP), bitnet158)
