"""Four-bit floats in NVFP4 blocks: 16 values share an e4m3 scale, a tensor a float32 one."""

from dataclasses import replace

from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, AbsMax, Eden, FourOverSix, Hadamard, Quantizer
from lowprec.recipes.recipe import everywhere

NVFP4 = Quantizer("nvfp4", pad=True)
WEIGHT_TILE = Quantizer("e2m1fn@16x16/e4m3fn.tensor", pad=True)
RHT16 = Hadamard(16, signs="fixed")

nvfp4 = everywhere(
    "nvfp4",
    GemmRule(
        fwd=(NVFP4, WEIGHT_TILE),
        dgrad=(Quantizer("nvfp4", rounding="stochastic", pad=True), REUSE),
        wgrad=(
            Quantizer("nvfp4", RHT16, rounding="stochastic", pad=True),
            Quantizer("nvfp4", RHT16, source="original", pad=True),
        ),
    ),
    "NVIDIA, arXiv 2509.25149; TransformerEngine NVFP4BlockScaling (without its high-precision layers and late switch)",
)

FOUR_OVER_SIX = Quantizer("nvfp4", scale=FourOverSix(), pad=True)
RHT128 = Hadamard(128, signs="random")
# 17/16 for the rounding of the scale, 0.93 clips a little because EDEN corrects the shrinkage; 255.99 lets a corrected
# scale grow within e4m3.
EDEN_SCALE = AbsMax(headroom=17 / 16 * 0.93, limit=255.99)
EDEN = Quantizer("nvfp4", RHT128, scale=EDEN_SCALE, correction=Eden(128), pad=True)
EDEN_AGAIN = Quantizer("nvfp4", RHT128, scale=EDEN_SCALE, correction=Eden(128), source="requantize", pad=True)

quartet2 = everywhere(
    "quartet2",
    GemmRule(fwd=(FOUR_OVER_SIX, FOUR_OVER_SIX), dgrad=(EDEN, EDEN_AGAIN), wgrad=(EDEN, EDEN_AGAIN)),
    "Quartet II, arXiv 2601.22813: NVFP4 with 4/6 forward, unbiased MS-EDEN backward",
)

# 17/16 keeps every value within the elements though its scale was rounded down: nothing clips, so rounding is unbiased.
STOCHASTIC = Quantizer("nvfp4", rounding="stochastic", scale=AbsMax(headroom=17 / 16), pad=True)

fp4_all_the_way = everywhere(
    "fp4_all_the_way",
    GemmRule(fwd=(NVFP4, NVFP4), dgrad=(STOCHASTIC, NVFP4), wgrad=(STOCHASTIC, STOCHASTIC)),
    "FP4 All the Way, arXiv 2505.19115: NVFP4 in all products, to nearest forward, stochastic backward (not its late "
    "switch)",
)

RHT32 = Hadamard(32, signs="random")
ROTATED = Quantizer("nvfp4", RHT32, rounding="stochastic", scale=AbsMax(headroom=17 / 16), pad=True)
ROTATED_AGAIN = replace(ROTATED, source="requantize")

tetrajet = everywhere(
    "tetrajet",
    GemmRule(fwd=(NVFP4, NVFP4), dgrad=(ROTATED, ROTATED_AGAIN), wgrad=(ROTATED, ROTATED_AGAIN)),
    "TetraJet-v2 without its oscillation and outlier control: NVFP4, unbiased rotated backward of the forward values",
)

# A uniform grid of 15 values: rounding rotated values on it to nearest does not shrink them, as e2m1fn does.
UNIFORM = Quantizer("e1m2fn@1x16/e4m3fn.tensor", Hadamard(16, signs="random"), pad=True)
UNIFORM_GRADIENT = replace(UNIFORM, rounding="stochastic", scale=AbsMax(headroom=17 / 16))

ufp4 = everywhere(
    "ufp4",
    GemmRule(fwd=(UNIFORM, UNIFORM), dgrad=(UNIFORM_GRADIENT, UNIFORM), wgrad=(UNIFORM_GRADIENT, UNIFORM)),
    "UFP4, arXiv 2606.20381: a uniform grid (E1M2), random Hadamard rotations in all products, stochastic rounding of "
    "dy alone (blocks and rotations of 16, as in NVFP4)",
)

RECIPES = (nvfp4, quartet2, fp4_all_the_way, tetrajet, ufp4)
