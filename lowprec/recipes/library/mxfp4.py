"""Four-bit floats in MXFP4 blocks: 32 values share a power of two."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, Clip, Hadamard, OctaveMax, Quantizer, RootMeanSquare
from lowprec.recipes.recipe import everywhere


def quartet(name: str, backward: str, source: str, scale_round: str = "floor"):
    """Quartet: rotated, clipped at the best multiple of the deviation, forward; unbiased or nearly so backward.

    Args:
      backward: the rounding of the backward operands.
      scale_round: of the forward scale's logarithm: floor, as published, nearest or ceil. Floor clips: it shrinks
        Gaussian values by 5 % on average, nearest by 1.5 %.
    """
    forward = Quantizer(
        f"e2m1fn@1x32/e8m0.{scale_round}",
        Hadamard(32),
        # The authors add 1e-8 to the scale; here it is added to where the largest element, 6, stands.
        scale=RootMeanSquare(2.92247856, offset=6e-8, centered=True),
        estimator=Clip(),
        pad=True,
    )
    rotation = Hadamard(32, signs="random")
    gradient = Quantizer("mxfp4", rotation, rounding=backward, scale=OctaveMax(), pad=True)
    again = Quantizer("mxfp4", rotation, rounding=backward, scale=OctaveMax(), source="requantize", pad=True)
    return everywhere(name, GemmRule(fwd=(forward, forward), dgrad=(gradient, again), wgrad=(gradient, again)), source)


RHT64 = Hadamard(64, signs="random")
STOCHASTIC = Quantizer("mxfp4", RHT64, rounding="stochastic", scale=OctaveMax(), pad=True)

tseng_mxfp4 = everywhere(
    "tseng_mxfp4",
    GemmRule(fwd=(EXACT, EXACT), dgrad=(STOCHASTIC, STOCHASTIC), wgrad=(STOCHASTIC, STOCHASTIC)),
    "Tseng et al., arXiv 2502.20586: MXFP4 in the backward products alone, rotated and stochastic, without bias",
)

RECIPES = (
    quartet(
        "quartet", "stochastic", "Quartet, arXiv 2505.14669: MXFP4, rotated and clipped forward, unbiased backward"
    ),
    quartet(
        "quartet_rtn",
        "nearest_even",
        "Quartet, arXiv 2505.14669, backward rounded to nearest; random signs before the rotation (arXiv 2601.22813)",
    ),
    tseng_mxfp4,
)
