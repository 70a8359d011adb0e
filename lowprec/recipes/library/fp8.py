"""Eight-bit floats."""

from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, AbsMax, Quantizer
from lowprec.recipes.recipe import everywhere

E4M3 = Quantizer("e4m3fn@tensor")
E5M2 = Quantizer("e5m2@tensor")

fp8 = everywhere(
    "fp8",
    GemmRule(fwd=(E4M3, E4M3), dgrad=(E5M2, REUSE), wgrad=(REUSE, REUSE)),
    "current scaling, hybrid: e4m3 forward, e5m2 gradients, a scale a tensor (TransformerEngine Float8CurrentScaling)",
)

# DeepGEMM floors amax at 1e-4. dx takes the forward tiles as they are; for dw the activations, of which only the
# quantized ones are kept, are quantized again along the rows.
FLOORED = AbsMax(floor=1e-4)
LINE128 = Quantizer("e4m3fn@1x128", scale=FLOORED, pad=True)
TILE128 = Quantizer("e4m3fn@128x128", scale=FLOORED, pad=True)

fp8_block = everywhere(
    "fp8_block",
    GemmRule(
        fwd=(LINE128, TILE128),
        dgrad=(LINE128, REUSE),
        wgrad=(LINE128, Quantizer("e4m3fn@1x128", scale=FLOORED, source="requantize", pad=True)),
    ),
    "DeepSeek-V3, arXiv 2412.19437 §3.3: 1x128 activations and gradients, 128x128 weights, all e4m3",
)

MXFP8 = Quantizer("mxfp8", pad=True)

mxfp8 = everywhere(
    "mxfp8",
    GemmRule(fwd=(MXFP8, MXFP8), dgrad=(MXFP8, MXFP8), wgrad=(MXFP8, MXFP8)),
    "OCP Microscaling; e4m3 in all products, each orientation quantized from the original (TransformerEngine MXFP8)",
)

RECIPES = (fp8, fp8_block, mxfp8)
