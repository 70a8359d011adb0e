"""Four-bit floats with one scale a row: of a token, or of an output channel."""

from lowprec.ops import GemmRule
from lowprec.quantizers import (
    ClampQuantiles,
    DifferentiableGradient,
    Hadamard,
    LeastSquares,
    PowerOfTwoRatios,
    Quantizer,
    RootMeanSquare,
    Trust,
)
from lowprec.recipes.recipe import everywhere, forward_only

E4M3 = Quantizer("e4m3fn@tensor")
E5M2 = Quantizer("e5m2@tensor")
# The four-bit values of the forward pass, cast to fp8.
E4M3_OF_FP4 = Quantizer("e4m3fn@tensor", source="requantize")

ms_fp4 = everywhere(
    "ms_fp4",
    GemmRule(
        fwd=(
            Quantizer("e2m1fn@row", clamp=ClampQuantiles(0.99, residual="keep")),
            Quantizer("e2m1fn@row", estimator=DifferentiableGradient(k=5.0, cap=3.0)),
        ),
        dgrad=(E5M2, E4M3_OF_FP4),
        wgrad=(E5M2, E4M3_OF_FP4),
    ),
    "Wang et al. (Microsoft), arXiv 2501.17116: FP4 forward, outliers of x clamped and compensated, differentiable "
    "gradient of w, FP8 backward",
)

QUEST = Quantizer(
    "e2m1fn@row",
    Hadamard(128),
    scale=RootMeanSquare(),
    # T = c / (2^4 - 1), c the clip; in units of the element, of which the largest is 6.
    estimator=Trust(6 / 15),
    pad=True,
)

quest_fp4 = forward_only(
    "quest_fp4",
    QUEST,
    QUEST,
    "QuEST, arXiv 2502.05003, four-bit floats (E2M1) for weights and activations",
)

TOKENS_FP8 = Quantizer("e4m3fn@row")


def zeroquant_fp(name: str, weights: Quantizer, how: str):
    return forward_only(
        name,
        TOKENS_FP8,
        weights,
        f"ZeroQuant-FP, arXiv 2307.09782: FP8 activations, FP4 weights in groups of 256 whose scales are {how}",
    )


# A hundred real exponent biases, of each output channel of w and of all of x.
SEARCH = LeastSquares(candidates=100, least=0.01, most=1.2)

llm_fp4 = forward_only(
    "llm_fp4",
    Quantizer("e2m1fn@tensor", scale=SEARCH),
    Quantizer("e2m1fn@row", scale=SEARCH),
    "LLM-FP4, arXiv 2310.16836: real exponent biases by search (on the error of the operand, at each step, without the "
    "pre-shifted biases of channels)",
)

RECIPES = (
    ms_fp4,
    quest_fp4,
    zeroquant_fp(
        "zeroquant_fp",
        Quantizer("e2m1fn@1x256", scale=PowerOfTwoRatios(), pad=True),
        "the largest of a row over powers of two (M2)",
    ),
    zeroquant_fp("zeroquant_fp_m1", Quantizer("e2m1fn@1x256/e8m0.rceil_exact", pad=True), "powers of two (M1)"),
    llm_fp4,
)
